"""B16: is a claimed gain larger than the noise between seeds?

The challenge asks for a gain of 0.005 nats over the best result so far at p < 0.01. Let g be the mean
gain of n seeds and s their sample deviation. If the true gain is d, then t = (g - d) / (s / sqrt(n))
has Student's t distribution with n - 1 degrees of freedom; if the baseline is a sample too, Welch's t
test applies. It is disputed whether the 0.005 are nats per token or per byte; the losses of a claim may
be either.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from stages.audit.verdict import Check, Verdict, Words
from stages.common.challenge import MIN_RECORD_GAIN_NATS, MIN_RECORD_SEEDS, RECORD_P_VALUE
from stages.common.student_t import seed_statistics, welch

SIGNIFICANCE = Check(
    "B16",
    "significance",
    conditions=("statistics",),
    sees="gains within the noise, seeds of different configurations, too few seeds",
    blind="seeds that were run and not reported; a configuration that was tuned on validation text",
    words=Words(expected=f"< {RECORD_P_VALUE}"),
)


def check_seeds(runs: Sequence[Mapping[str, Any]], baseline: Sequence[float]) -> Verdict:
    """B16: at least three seeds of one configuration, and a gain that chance does not explain.

    runs: one mapping for each seed, with `seed`, `nats` and `config` (the hash of what was run);
    baseline: nats of the result to beat, one number or one for each of its seeds.
    """
    seeds = [run.get("seed") for run in runs]
    losses = [run.get("nats") for run in runs]
    configurations = {run.get("config") for run in runs}

    # Too few figures for a test say nothing against the claim.
    if len(runs) < MIN_RECORD_SEEDS or not baseline:
        evidence = (
            f"{len(runs)} seeds and {len(baseline)} baseline figures were given, "
            f"{MIN_RECORD_SEEDS} and 1 are needed"
        )
        return Verdict.cannot_tell(SIGNIFICANCE, "files", evidence, saw=1.0, bound=RECORD_P_VALUE)

    # Conditions of the test: the seeds are different, of one configuration, each with a loss.
    p_value = 1.0
    if len(set(map(str, seeds))) < len(seeds):
        evidence = f"a seed was counted twice: {seeds}"
    elif len(configurations) != 1 or None in configurations:
        evidence = f"the seeds were run with {len(configurations)} configurations, or none is stated"
    elif not all(isinstance(loss, (int, float)) and math.isfinite(loss) for loss in losses):
        evidence = f"a seed has no loss: {losses}"
    else:
        # The test itself.
        ours = seed_statistics([float(loss) for loss in losses if loss is not None])
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

    return Verdict.of(
        SIGNIFICANCE, "files", p_value < RECORD_P_VALUE, evidence, saw=p_value, bound=RECORD_P_VALUE
    )
