"""How hard an outside scorer is looked at: the parameters of each level, and what the scorer is asked for at most.

The pipeline's own scorers have theirs in params.yaml. Tolerances are those of float32 arithmetic in batches of other shapes.
"""

import dataclasses
from typing import NamedTuple

from stages.audit.checks.normalisation_blackbox import EXACT
from stages.audit.params import AuditParams

WINDOWS = 4  # a scorer that has only score_stream is shown this many windows at most


class Level(NamedTuple):
    """A level: parameters, the targets that may be asked for, and how many of them a decoder is to decode."""

    params: AuditParams
    targets: int | None
    decoded: int


QUICK = AuditParams(
    perturbations=21,
    segment_targets=128,
    recomputed_share=0.05,
    trained_share=1.0,
    graph_documents=5,
    handed_stretches=4,
    canary_targets=256,
    sampled_targets=128,
    canary_bits=64.0,
    distributions=12,
    substitutions=16,
    decoded_targets=0,
    shingle_rate=0,
    clean_room=False,
    loss_tolerance=1.0e-4,
    mean_tolerance=1.0e-6,
    bfloat16_loss_tolerance=0.5,
    bfloat16_mean_tolerance=5.0e-3,
    sum_tolerance=1.0e-5,
    evaluation_budget_seconds=600.0,
)
FULL = dataclasses.replace(
    QUICK,
    perturbations=105,
    recomputed_share=0.5,
    graph_documents=9,
    handed_stretches=16,
    canary_targets=2048,
    sampled_targets=1024,
    distributions=48,
    substitutions=64,
)
EXHAUSTIVE = dataclasses.replace(
    FULL, perturbations=525, recomputed_share=1.0, distributions=96, substitutions=1 << 16
)
LEVELS = {
    "quick": Level(QUICK, 200_000, 128),
    "full": Level(FULL, 5_000_000, 2048),
    "exhaustive": Level(EXHAUSTIVE, None, 16_384),
}


def probed(params: AuditParams, vocab_size: int) -> int:
    """Targets that the probes ask for, each from a fork, whatever the stream's length: an upper bound."""
    margin = 16  # about what one substitution scores, and what stands around a commitment
    perturbed = 2 * params.segment_targets * (params.perturbations + 2)
    substituted = params.distributions * margin * (2 + min(params.substitutions, vocab_size))
    documents = (1 + params.graph_documents) ** 2 * 40
    handed = params.handed_stretches * (params.segment_targets + 16)
    canaries = 6 * params.canary_targets + 2 * params.sampled_targets
    return perturbed + substituted + documents + handed + canaries + 2 * params.segment_targets


def affordable(level: Level, targets: int | None, length: int, vocab_size: int) -> tuple[AuditParams, int]:
    """Parameters and the number of the stream's tokens that keep to `targets`, for a scorer with steps and forks.

    Its ledger and the walk cost the stream's length each, the probes their own.
    """
    limit = level.targets if targets is None else targets
    if limit is None:
        return level.params, length
    params = level.params
    while probed(params, vocab_size) > limit // 2 and params.distributions > 2:
        params = thinned(params)
    left = (limit - probed(params, vocab_size)) // 2
    if left < 16:
        raise ValueError(
            f"--targets {limit} is too few: this level's checks alone ask for {probed(params, vocab_size)}; allow more"
        )
    return params, min(length, left)


def affordable_calls(
    level: Level, targets: int | None, length: int, vocab_size: int, window: int
) -> tuple[AuditParams, int]:
    """The same for a scorer that has only score_stream, where a fork costs its whole prefix: at most four windows of it."""
    limit = level.targets if targets is None else targets
    shown = min(length, WINDOWS * window)
    params = dataclasses.replace(
        level.params, segment_targets=max(8, min(level.params.segment_targets, shown // 4))
    )
    params = dataclasses.replace(
        params, canary_targets=min(params.canary_targets, 2 * shown), sampled_targets=1
    )
    if limit is None:
        return params, shown
    while _calls(params, vocab_size) * 2 * shown > limit and params.distributions > 1:
        params = thinned(params)
    if _calls(params, vocab_size) * 2 * shown > limit:
        needed = _calls(params, vocab_size) * 2 * shown
        raise ValueError(
            f"--targets {limit} is too few for {shown} tokens in one call: allow {needed}, or a shorter --window"
        )
    return params, shown


def thinned(params: AuditParams) -> AuditParams:
    """About three quarters of the places."""
    return dataclasses.replace(
        params,
        perturbations=max(3, params.perturbations * 3 // 4),
        distributions=max(1, params.distributions * 3 // 4),
        handed_stretches=max(1, params.handed_stretches * 3 // 4),
        substitutions=max(8, params.substitutions * 3 // 4),
    )


def _calls(params: AuditParams, vocab_size: int) -> int:
    substitutions = vocab_size if vocab_size <= EXACT else min(params.substitutions, vocab_size)
    return (
        params.distributions * substitutions
        + 2 * params.perturbations
        + 6 * params.handed_stretches
        + params.graph_documents
        + 32
    )
