"""B16: is a claimed gain more than the luck of the seeds?

The challenge asks for 0.005 nats over the best result so far at p < 0.01. Mean gain g of n seeds with sample deviation s: under "the true
gain is d", t = (g - d) / (s / sqrt(n)) has Student's law with n - 1 degrees of freedom; where the baseline is a sample too, Welch's t and
degrees. The unit of the 0.005 is disputed, so the claim says whether its losses are nats a token or nats a byte.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stages.audit.verdict import Verdict, outcome

SEEDS = 3
GAIN_NATS = 0.005
LEVEL = 0.01
STEPS = 4096


def upper_tail(t: float, freedom: float) -> float:
    """P(T > t) of Student's law: 1/2 less the integral of its density, which with t = sqrt(v) tan(a) is C cos(a)^(v-1), by Simpson."""
    angles = np.linspace(0.0, math.atan(abs(t) / math.sqrt(freedom)), STEPS + 1)
    weights = np.where(np.arange(STEPS + 1) % 2, 4.0, 2.0)
    weights[0] = weights[-1] = 1.0
    integral = float((weights * np.cos(angles) ** (freedom - 1)).sum()) * angles[-1] / STEPS / 3
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    below = scale * integral
    return 0.5 - below if t >= 0 else 0.5 + below


def one_sided(gains_over: Sequence[float], baseline: Sequence[float], least: float) -> tuple[float, float]:
    """Mean gain of losses over a baseline (one figure, or several seeds of it), and the p-value of "it is `least` at most"."""
    ours, theirs = np.array(gains_over, dtype=np.float64), np.array(baseline, dtype=np.float64)
    gain = float(theirs.mean() - ours.mean())
    shares = [values.var(ddof=1) / len(values) if len(values) > 1 else 0.0 for values in (ours, theirs)]
    spread = sum(shares)
    if spread == 0:
        return gain, 0.0 if gain > least else 1.0
    freedom = spread**2 / sum(
        share**2 / (len(values) - 1) for share, values in zip(shares, (ours, theirs), strict=True) if share
    )
    return gain, upper_tail((gain - least) / math.sqrt(spread), freedom)


def check_seeds(runs: Sequence[Mapping[str, Any]], baseline: Sequence[float]) -> Verdict:
    """At least three seeds, of one configuration, none left out, and a gain that chance does not explain.

    A run has `seed`, `nats` and `config` (the hash of what was run); `baseline` has the nats of the result to beat, one or several.
    """
    seeds = [run.get("seed") for run in runs]
    losses = [run.get("nats") for run in runs]
    fault, saw, missing = "", 1.0, ""
    if len(runs) < SEEDS or not baseline:
        missing = (
            f"{len(runs)} seeds and {len(baseline)} baseline figures were given, {SEEDS} and 1 are needed"
        )
    elif len(set(map(str, seeds))) < len(seeds):
        fault = f"a seed was counted twice: {seeds}"
    elif len({run.get("config") for run in runs}) != 1 or runs[0].get("config") is None:
        fault = f"the seeds were run with {len({run.get('config') for run in runs})} configurations, or none is stated"
    elif not all(isinstance(loss, (int, float)) and math.isfinite(loss) for loss in losses):
        fault = f"a seed has no loss: {losses}"
    else:
        gain, saw = one_sided([float(loss) for loss in losses if loss is not None], baseline, GAIN_NATS)
        fault = (
            ""
            if saw < LEVEL
            else f"mean gain {gain:+.5f} nats over {len(runs)} seeds: p = {saw:.3g} that it is {GAIN_NATS} at most"
        )
    evidence = (
        fault
        or missing
        or f"{len(runs)} seeds of one configuration gain more than {GAIN_NATS} nats, p = {saw:.3g}"
    )
    return Verdict(
        check="B16",
        name="significance",
        subject="files",
        conditions=("statistics",),
        outcome="cannot tell" if missing else outcome(not fault),
        evidence=evidence,
        saw=saw,
        expected=f"< {LEVEL}",
        bound=LEVEL,
        positions=(),
        sees="gains within the noise, seeds of different configurations, too few seeds",
        blind="seeds that were run and not told; a configuration that was tuned on validation text",
    )
