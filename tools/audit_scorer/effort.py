"""Effort of an external audit: numbers of probes for each level, fitted to a limit of scored targets.

An effort level sets the numbers of positions and targets. Everything else (tolerances, bits of the
canaries) is that of the pipeline's own audit, in params.yaml: float32 sums in batches of other
shapes.

The limit is on targets that the scorer scores or observes. The cost model below gives an
upper bound of them for the probes of stages/audit/checks. Probes are reduced until they fit, and
the stream is cut to the rest.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stages.audit import sampling
from stages.audit.checks import canary, document_order
from stages.audit.checks.normalisation_blackbox import EXHAUSTIVE_VOCAB
from stages.audit.params import AuditParams
from stages.common import config

PARAMETER_FILE = Path(__file__).resolve().parents[2] / "params.yaml"

# Cost of the probes for a scorer with predict, observe and fork, in targets from one fork.
RUNS_PER_PERTURBATION = 2  # the segment with the replaced future and, once for a group, as it is
TARGETS_PER_SUBSTITUTION = 16  # tokens of the piece around the substituted id, at most 13
RUNS_BESIDES_SUBSTITUTIONS = 2  # the fork that reads the distribution, and the next targets charged from it
TARGETS_PER_TRACE = 16  # of the three forks that compare predict() after a span's first tokens
CANARIES = len(canary.SOURCES) + 2  # a stretch from each source, one of spellings, one in reserve
RUNS_PER_SAMPLED_TARGET = 2  # drawn from predict(), then scored
FIRST_SEGMENT_RUNS = 2  # two scorers from one factory, which must agree (B13)
STREAM_RUNS = 2  # the ledger, and the pass that the probes start from
PROBE_SHARE = 2  # the probes may take 1/2 of the limit, the stream gets the rest

# Cost of the probes for a scorer with score_stream alone, in calls.
CALLS_PER_CALL_SPLIT = 6  # one call for the whole span, and five pieces
OTHER_CALLS = 32  # canaries, first segments, recomputed spans, the unchanged documents
STREAMS_PER_CALL = 2  # the prefix again, and the probe; each at most as long as the stream shown

# Each fork of such a scorer scores its prefix again, so the stream and the segments are short.
MAX_REPLAYED_WINDOWS = 4  # windows of the stream that it is shown
SEGMENTS_PER_REPLAY = 4  # a segment is at most 1/4 of the stream shown
MIN_TOKENS = 16  # of a stream that can be audited


class Effort(NamedTuple):
    """An effort level."""

    counts: Mapping[str, Any]  # fields of AuditParams that it sets
    max_targets: int | None  # limit of what the scorer scores, unless the user gives another
    decoded_targets: int  # that another process decodes (B12)

    def params(self) -> AuditParams:
        """Return the parameters of an audit with this effort."""
        return dataclasses.replace(config.load(PARAMETER_FILE, _Params, []).audit, **self.counts)


@dataclass(frozen=True)
class _Params:
    """Sections of params.yaml that are read."""

    audit: AuditParams


class FittedEffort(NamedTuple):
    """Parameters, and tokens of the stream that the scorer is shown, which together keep to a limit."""

    params: AuditParams
    tokens: int


QUICK = {
    "perturbations": 21,
    "segment_targets": 128,
    "recomputed_share": 0.05,
    "chunked_scorer_share": 1.0,
    "order_documents": 5,
    "call_splits": 4,
    "canary_targets": 256,
    "sampled_targets": 128,
    "distributions": 12,
    "substitutions": 16,
}
FULL = QUICK | {
    "perturbations": 105,
    "recomputed_share": 0.5,
    "order_documents": 9,
    "call_splits": 16,
    "canary_targets": 2048,
    "sampled_targets": 1024,
    "distributions": 48,
    "substitutions": 64,
}
EXHAUSTIVE = FULL | {
    "perturbations": 525,
    "recomputed_share": 1.0,
    "distributions": 96,
    "substitutions": 1 << 16,  # every id of any vocabulary
}
EFFORTS = {
    "quick": Effort(QUICK, max_targets=200_000, decoded_targets=128),
    "full": Effort(FULL, max_targets=5_000_000, decoded_targets=2048),
    "exhaustive": Effort(EXHAUSTIVE, max_targets=None, decoded_targets=16_384),
}


def probe_cost(params: AuditParams, vocab_size: int) -> int:
    """Return an upper bound of the targets that the probes ask a scorer with forks for.

    It does not depend on the length of the stream, since every probe starts from a fork.
    """
    segment = params.segment_targets
    positions = params.perturbations + sampling.POSITIONS_PER_GROUP - 1  # groups are filled up
    perturbations = RUNS_PER_PERTURBATION * segment * positions

    runs = RUNS_BESIDES_SUBSTITUTIONS + min(params.substitutions, vocab_size)
    substitutions = params.distributions * TARGETS_PER_SUBSTITUTION * runs

    # All documents in one call, and again for each of them; one document more than there are.
    documents = (1 + params.order_documents) ** 2 * document_order.LONGEST_DOCUMENT

    call_splits = params.call_splits * (segment + TARGETS_PER_TRACE)
    canaries = CANARIES * params.canary_targets + RUNS_PER_SAMPLED_TARGET * params.sampled_targets
    first_segments = FIRST_SEGMENT_RUNS * segment
    return perturbations + substitutions + documents + call_splits + canaries + first_segments


def fit_stepwise_scorer(
    effort: Effort, max_targets: int | None, length: int, vocab_size: int
) -> FittedEffort:
    """Fit an effort to a limit, for a scorer with predict, observe and fork and a stream of `length` tokens.

    Without `max_targets` the limit is that of the effort. Raises ValueError if it is too small for
    any audit.
    """
    params = effort.params()
    limit = effort.max_targets if max_targets is None else max_targets
    if limit is None:
        return FittedEffort(params, length)

    while probe_cost(params, vocab_size) > limit // PROBE_SHARE and params.distributions > 2:
        params = reduced(params)
    cost = probe_cost(params, vocab_size)
    tokens = (limit - cost) // STREAM_RUNS
    if tokens < MIN_TOKENS:
        raise ValueError(
            f"--targets {limit} is too few: this level's checks alone ask for {cost}; allow more"
        )
    return FittedEffort(params, min(length, tokens))


def fit_replay_scorer(
    effort: Effort, max_targets: int | None, length: int, vocab_size: int, window: int
) -> FittedEffort:
    """Fit an effort to a limit, for a scorer with score_stream alone.

    A fork of such a scorer scores its whole prefix again, so it is shown at most four windows of
    the stream.
    """
    # What the scorer is shown, and probes that are not longer than that.
    tokens = min(length, MAX_REPLAYED_WINDOWS * window)
    params = effort.params()
    segment = min(params.segment_targets, tokens // SEGMENTS_PER_REPLAY)
    params = dataclasses.replace(
        params,
        segment_targets=max(sampling.SHORTEST_SEGMENT, segment),
        canary_targets=min(params.canary_targets, STREAMS_PER_CALL * tokens),
        sampled_targets=1,
    )
    limit = effort.max_targets if max_targets is None else max_targets
    if limit is None:
        return FittedEffort(params, tokens)

    # Fewer probes, until their calls fit.
    targets_per_call = STREAMS_PER_CALL * tokens
    while _replay_calls(params, vocab_size) * targets_per_call > limit and params.distributions > 1:
        params = reduced(params)
    needed = _replay_calls(params, vocab_size) * targets_per_call
    if needed > limit:
        raise ValueError(
            f"--targets {limit} is too few for {tokens} tokens in one call:"
            f" allow {needed}, or a shorter --window"
        )
    return FittedEffort(params, tokens)


def reduced(params: AuditParams) -> AuditParams:
    """Return parameters with about three quarters of the probes, but at least a few of each kind."""
    return dataclasses.replace(
        params,
        perturbations=max(3, params.perturbations * 3 // 4),
        distributions=max(1, params.distributions * 3 // 4),
        call_splits=max(1, params.call_splits * 3 // 4),
        substitutions=max(8, params.substitutions * 3 // 4),
    )


def _replay_calls(params: AuditParams, vocab_size: int) -> int:
    """Return an upper bound of the calls that the probes make of a scorer with score_stream alone."""
    ids = min(params.substitutions, vocab_size)
    if vocab_size <= EXHAUSTIVE_VOCAB:
        ids = vocab_size
    return (
        params.distributions * ids
        + RUNS_PER_PERTURBATION * params.perturbations
        + CALLS_PER_CALL_SPLIT * params.call_splits
        + params.order_documents
        + OTHER_CALLS
    )
