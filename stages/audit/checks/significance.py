"""B16: is a claimed gain larger than the noise between seeds?

The challenge asks for a gain of 0.005 nats over the best result so far at p < 0.01. Let g be the mean
gain of n seeds and s their sample deviation. If the true gain is d, then t = (g - d) / (s / sqrt(n))
has Student's t distribution with n - 1 degrees of freedom; if the baseline is a sample too, Welch's t
test applies. It is disputed whether the 0.005 are nats per token or per byte; the losses of a claim may
be either.

Three seeds are three runs. A seed is an integer, so that 1, 1.0 and "1" are not three of them, and two
runs have different losses: ledgers that are equal, or differ by less than rounding, are one run. Where
a run's ledger is given, its mean is computed from it. The ledgers of seeds are not certified themselves.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stages.audit.verdict import Check, Verdict, Words
from stages.common.challenge import MIN_RECORD_GAIN_NATS, MIN_RECORD_SEEDS, RECORD_P_VALUE
from stages.common.student_t import seed_statistics, welch

SIGNIFICANCE = Check(
    "B16",
    "significance",
    conditions=("statistics",),
    sees="gains within the noise, seeds of different configurations, too few seeds, one run under several "
    "seeds, losses that do not follow from their ledgers",
    blind="seeds that were run and not reported; a configuration that was tuned on validation text; "
    "ledgers of seeds that no run produced",
    words=Words(expected=f"< {RECORD_P_VALUE}"),
)


SAME_RUN_SHARE = 1.0e-3  # of a ledger's root mean square: two runs of one seed on two machines differ less
ROUNDING = 5.1e-5  # nats: a stated mean may be rounded to four decimals


def check_seeds(
    runs: Sequence[Mapping[str, Any]],
    baseline: Sequence[float],
    targets: int | None = None,
    counted_bytes: int | None = None,
) -> Verdict:
    """B16: at least three seeds of one configuration, and a gain that chance does not explain.

    runs: one mapping for each seed, with `seed`, `nats` and `config` (the hash of what was run), and
    perhaps `ledger`, the losses of all targets (N-1,), or `ledger_sha256`, the hash of its file;
    baseline: nats of the result to beat, one number or one for each of its seeds; targets,
    counted_bytes: of the stream, against which ledgers are held.
    """
    # Too few figures for a test say nothing against the claim.
    if len(runs) < MIN_RECORD_SEEDS or not baseline:
        evidence = (
            f"{len(runs)} seeds and {len(baseline)} baseline figures were given, "
            f"{MIN_RECORD_SEEDS} and 1 are needed"
        )
        return Verdict.cannot_tell(SIGNIFICANCE, "files", evidence, saw=1.0, bound=RECORD_P_VALUE)

    # Conditions of the test: the seeds are different runs, of one configuration, each with a loss.
    p_value = 1.0
    evidence = _fault_of_seeds(runs) or _fault_of_ledgers(runs, targets, counted_bytes)
    if not evidence:
        # The test itself, on the means of ledgers where there are any: they are not rounded.
        per_byte = _is_per_byte(runs, counted_bytes)
        ours = seed_statistics([_mean_loss(run, counted_bytes if per_byte else None) for run in runs])
        theirs = seed_statistics(baseline)
        p_value = welch(ours, theirs, MIN_RECORD_GAIN_NATS)

        # Evidence: a rejected gain is stated with its size, which may be right but too uncertain.
        if p_value < RECORD_P_VALUE:
            evidence = (
                f"{len(runs)} seeds of one configuration gain more than {MIN_RECORD_GAIN_NATS} nats, "
                f"p = {p_value:.3g}"
            )
        else:
            evidence = (
                f"mean gain {theirs.mean - ours.mean:+.5f} nats over {len(runs)} seeds: "
                f"p = {p_value:.3g} that it is {MIN_RECORD_GAIN_NATS} at most"
            )
        evidence += _ledgers_given(runs)

    return Verdict.of(
        SIGNIFICANCE, "files", p_value < RECORD_P_VALUE, evidence, saw=p_value, bound=RECORD_P_VALUE
    )


def _fault_of_seeds(runs: Sequence[Mapping[str, Any]]) -> str:
    """Find what is wrong with seeds, configurations and losses; "" if nothing is."""
    seeds = [run.get("seed") for run in runs]
    losses = [run.get("nats") for run in runs]
    configurations = {run.get("config") for run in runs}
    if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds):
        return f"a seed is not an integer: {seeds}"
    if len(set(seeds)) < len(seeds):
        return f"a seed was counted twice: {seeds}"
    if len(configurations) != 1 or None in configurations:
        return f"the seeds were run with {len(configurations)} configurations, or none is stated"
    for loss in losses:
        if isinstance(loss, bool) or not isinstance(loss, (int, float)) or not math.isfinite(loss):
            return f"a seed has no loss: {losses}"
    return ""


def _fault_of_ledgers(
    runs: Sequence[Mapping[str, Any]], targets: int | None, counted_bytes: int | None
) -> str:
    """Find two runs that are one, or a ledger that does not have its run's loss; "" if there is none."""
    # Hashes that are stated: equal files are one run.
    hashes = [str(run["ledger_sha256"]).lower() for run in runs if "ledger_sha256" in run]
    if len(set(hashes)) < len(hashes):
        return "two seeds state the same ledger: they are one run"

    # Each ledger by itself.
    ledgers = {run["seed"]: run["ledger"] for run in runs if "ledger" in run}
    for run in runs:
        nll = ledgers.get(run["seed"])
        if nll is None:
            continue
        if nll.ndim != 1 or not len(nll) or (targets is not None and len(nll) != targets):
            return f"the ledger of seed {run['seed']} has the shape {nll.shape}, expected ({targets},)"
        if nll.dtype.kind != "f" or not np.all(np.isfinite(nll) & (nll >= 0)):
            return f"the ledger of seed {run['seed']} has losses that are negative or no numbers"
        means = [_mean_loss(run, None), _mean_loss(run, counted_bytes)]
        if min(abs(mean - run["nats"]) for mean in means) > ROUNDING:
            return f"seed {run['seed']} states {run['nats']} nats, its ledger has {means[0]:.6f} a target"

    # Each pair: two runs do not make nearly the same losses everywhere.
    seeds = list(ledgers)
    for i, seed in enumerate(seeds):
        for other in seeds[:i]:
            first, second = ledgers[other], ledgers[seed]
            if first.shape != second.shape:
                return f"the ledgers of seeds {other} and {seed} have different lengths"
            if _root_mean_square(first - second) <= SAME_RUN_SHARE * _root_mean_square(first):
                return f"the ledgers of seeds {other} and {seed} have the same losses: they are one run"
    return ""


def _is_per_byte(runs: Sequence[Mapping[str, Any]], counted_bytes: int | None) -> bool:
    """Tell if losses are stated per byte: a ledger fits them only so."""
    given = [run for run in runs if "ledger" in run]
    return any(abs(_mean_loss(run, None) - run["nats"]) > ROUNDING for run in given) and bool(counted_bytes)


def _mean_loss(run: Mapping[str, Any], counted_bytes: int | None) -> float:
    """Compute a run's nats per target, or per byte, from its ledger; as stated without one."""
    if "ledger" not in run:
        return float(run["nats"])
    return math.fsum(run["ledger"].tolist()) / (counted_bytes or len(run["ledger"]))


def _ledgers_given(runs: Sequence[Mapping[str, Any]]) -> str:
    """Describe how far the seeds were shown to be different runs."""
    given = sum("ledger" in run for run in runs)
    stated = sum("ledger_sha256" in run for run in runs)
    if given == len(runs):
        return "; each has a ledger of its own, of which the loss was computed"
    if stated == len(runs):
        return "; each states the hash of a ledger of its own"
    return "; without a ledger of each seed, that they are different runs is not shown"


def _root_mean_square(values: np.ndarray) -> float:
    return math.sqrt(float(np.mean(np.square(values, dtype=np.float64))))
