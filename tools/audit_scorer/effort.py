"""Effort of an external audit: numbers of probes for each level, fitted to a limit of scored targets.

An effort level sets the numbers of positions and targets. Everything else (tolerances, bits of the
canaries) is that of the pipeline's own audit, in params.yaml: float32 sums in batches of other
shapes.

The limit is on targets that the scorer scores or observes. Each probe of stages/audit/checks states its
cost; their sum for the largest probes that can be drawn is an upper bound. Probes are reduced until they
fit, and the stream is cut to the rest.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stages.audit import sampling
from stages.audit.checks import (
    call_invariance,
    canary,
    causality,
    document_order,
    metamorphic,
    normalisation,
    normalisation_blackbox,
    prefixes,
)
from stages.audit.params import AuditParams
from stages.audit.probe_runner import Cost
from stages.common import config

PARAMETER_FILE = Path(__file__).resolve().parents[2] / "params.yaml"

STREAM_RUNS = 3  # the ledger, the certified score, and the pass that the probes start from
FIRST_SEGMENT_RUNS = 2  # two scorers from one factory, which must agree (B13)
ROUND_TRIP_RUNS = 2  # encoding, and decoding in another process (B12)
PROBE_SHARE = 2  # the probes may take 1/2 of the limit, the stream gets the rest

# Each call of a scorer with score_stream alone scores its prefix again, so stream and segments are short.
MAX_REPLAYED_WINDOWS = 4  # windows of the stream that it is shown
SEGMENTS_PER_REPLAY = 4  # a segment is at most 1/4 of the stream shown
CANARY_STREAMS = 2  # a canary is at most as long as two such streams
MIN_TOKENS = 16  # of a stream that can be audited


class Effort(NamedTuple):
    """An effort level."""

    counts: Mapping[str, Any]  # fields of AuditParams that it sets
    max_targets: int | None  # limit of what the scorer scores, unless the user gives another
    decoded_targets: int  # that another process decodes (B12)
    prefixes: int  # of the stream that fresh processes score, for a scorer with score_stream alone (B1)

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
    probed_tokens: int  # of those, the first ones that the probes show


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
    "certified_targets": 4096,
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
    "certified_targets": 80_000,
}
EXHAUSTIVE = FULL | {
    "perturbations": 525,
    "recomputed_share": 1.0,
    "distributions": 96,
    "substitutions": 1 << 16,  # every id of any vocabulary
    "certified_targets": 0,  # all
}
EFFORTS = {
    "quick": Effort(QUICK, max_targets=200_000, decoded_targets=128, prefixes=6),
    "full": Effort(FULL, max_targets=5_000_000, decoded_targets=2048, prefixes=16),
    "exhaustive": Effort(EXHAUSTIVE, max_targets=None, decoded_targets=16_384, prefixes=64),
}


class PlannedProbes(NamedTuple):
    """Probes of one kind."""

    number: int
    cost: Cost  # of the largest that can be drawn


def plan_probes(params: AuditParams, vocab_size: int, predicts: bool) -> list[PlannedProbes]:
    """List the probes of an audit; `predicts`: of a scorer with predict, observe and fork.

    Their cost does not depend on the length of the stream, since every probe starts from a fork.
    """
    # Perturbations, orders of documents, ways to divide a stream into calls.
    groups = -(-params.perturbations // sampling.POSITIONS_PER_GROUP)
    perturbation = causality.Perturbation.cost_of(sampling.POSITIONS_PER_GROUP, params.segment_targets)

    documents = params.order_documents
    order = document_order.OrderProbe.cost_of(documents, document_order.max_tokens(documents))

    span = call_invariance.max_span(params.segment_targets)
    split = call_invariance.CallSplit.cost_of(span, 1 + call_invariance.CUTS, predicts)

    # Streams that nobody can predict, which every scorer gets.
    canaries = 1 + len(canary.SOURCES)  # one from each source, and one of spellings
    plan = [
        PlannedProbes(groups, perturbation),
        PlannedProbes(1, order),
        PlannedProbes(params.call_splits, split),
        PlannedProbes(canaries, canary.Canary.cost_of(params.canary_targets)),
    ]

    # The sum over all ids: of predictions, or of losses.
    if predicts:
        substitution = normalisation.Substitution.cost_of(
            normalisation.MAX_TOKENS_BEFORE - 1, normalisation.MAX_PIECE, params.substitutions, vocab_size
        )
        plan.append(PlannedProbes(params.distributions, substitution))
        plan.append(PlannedProbes(1, canary.SelfSampled.cost_of(params.sampled_targets)))
    else:
        ids = normalisation_blackbox.tried_ids(vocab_size, params.substitutions)
        plan.append(PlannedProbes(params.distributions, normalisation_blackbox.Counterfactual.cost_of(ids)))
    return plan


def probe_cost(params: AuditParams, vocab_size: int, predicts: bool) -> Cost:
    """Return an upper bound of what the probes ask of a scorer, and the runs on the first segment."""
    total = Cost()
    for probes in plan_probes(params, vocab_size, predicts):
        total += probes.cost * probes.number

    # The first segment, with the token before it, by two scorers and by all variants.
    first_segment = 1 + params.segment_targets
    reruns = Cost(calls=1, targets=first_segment) * FIRST_SEGMENT_RUNS
    return total + reruns + metamorphic.max_cost(first_segment)


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
        return FittedEffort(params, length, length)

    cost = probe_cost(params, vocab_size, predicts=True).targets
    while cost > limit // PROBE_SHARE and params.distributions > 2:
        params = reduced(params)
        cost = probe_cost(params, vocab_size, predicts=True).targets

    # The rest is for the stream, of which the first tokens are also encoded and decoded: all of a short one.
    rest = limit - cost
    if_all_decoded = rest // (STREAM_RUNS + ROUND_TRIP_RUNS)
    if_some_decoded = (rest - ROUND_TRIP_RUNS * effort.decoded_targets) // STREAM_RUNS
    tokens = max(if_all_decoded, if_some_decoded)
    if tokens < MIN_TOKENS:
        raise ValueError(
            f"--targets {limit} is too few: this level's checks alone ask for {cost}; allow more"
        )
    shown = min(length, tokens)
    return FittedEffort(params, shown, shown)


def fit_replay_scorer(
    effort: Effort, max_targets: int | None, length: int, vocab_size: int, window: int
) -> FittedEffort:
    """Fit an effort to a limit, for a scorer with score_stream alone.

    A fork of such a scorer scores its whole prefix again, so the probes show it four windows of the
    stream at most. Prefixes of the stream, each scored once, may be longer: half of the limit is theirs.
    """
    # What the probes show the scorer, and probes that are not longer than that.
    probed = min(length, MAX_REPLAYED_WINDOWS * window)
    params = effort.params()
    segment = min(params.segment_targets, probed // SEGMENTS_PER_REPLAY)
    params = dataclasses.replace(
        params,
        segment_targets=max(sampling.SHORTEST_SEGMENT, segment),
        canary_targets=min(params.canary_targets, CANARY_STREAMS * probed),
        sampled_targets=1,
    )
    limit = effort.max_targets if max_targets is None else max_targets
    if limit is None:
        return FittedEffort(params, length, probed)

    # Fewer probes, until they fit.
    allowed = limit - limit // PROBE_SHARE
    while _replay_targets(params, vocab_size, probed) > allowed and params.distributions > 1:
        params = reduced(params)
    needed = _replay_targets(params, vocab_size, probed)
    ledger_and_prefixes = (1 + prefixes.cost_of(effort.prefixes, 1).targets) * probed
    if needed + ledger_and_prefixes > limit:
        raise ValueError(
            f"--targets {limit} is too few for {probed} tokens in one call:"
            f" allow {needed + ledger_and_prefixes}, or a shorter --window"
        )

    # The stream that fits into the rest: the ledger, and the prefixes of it.
    shown = (limit - needed) // (1 + prefixes.cost_of(effort.prefixes, 1).targets)
    return FittedEffort(params, min(length, shown), probed)


def reduced(params: AuditParams) -> AuditParams:
    """Return parameters with about three quarters of the probes, but at least a few of each kind."""
    return dataclasses.replace(
        params,
        perturbations=max(3, params.perturbations * 3 // 4),
        distributions=max(1, params.distributions * 3 // 4),
        call_splits=max(1, params.call_splits * 3 // 4),
        substitutions=max(8, params.substitutions * 3 // 4),
    )


def _replay_targets(params: AuditParams, vocab_size: int, tokens: int) -> int:
    """Return an upper bound of the targets that a scorer with score_stream alone scores.

    tokens: of the stream that it is shown, which is the longest prefix that a call scores again.
    """
    cost = probe_cost(params, vocab_size, predicts=False)

    # The pass makes a call for each segment of a recomputed span; spans are cut where a probe starts.
    probes = sum(planned.number for planned in plan_probes(params, vocab_size, predicts=False))
    segments = -(-round(params.recomputed_share * tokens) // params.segment_targets)
    cost += Cost(calls=segments + probes)
    return cost.targets + cost.calls * tokens
