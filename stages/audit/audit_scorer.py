"""The audit of one scorer: draw positions, walk once, judge.

A scorer comes as a factory, `n_targets -> scorer at the empty prefix`, and nothing else of it is seen. The list of checks below is the list
of checks: a new one is some probes for the walk, and a judgement on what they found.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from stages.audit import probe_runner, sampling
from stages.audit.checks import (
    call_invariance,
    canary,
    causality,
    coverage,
    document_order,
    metamorphic,
    normalisation,
    normalisation_blackbox,
)
from stages.audit.params import AuditParams
from stages.audit.verdict import Verdict
from stages.common.progress import Report
from stages.common.scorer import Scorer

Factory = Callable[[int], Scorer]


@dataclass(frozen=True)
class Stream:
    """The validation stream and what is known of it without any scorer."""

    tokens: np.ndarray  # (N,) uint16
    bos: int
    target_bytes: np.ndarray  # (N-1,) int64, by the byte table
    document_bytes: coverage.DocumentBytes  # by decoding
    spelling: Sequence[bytes] | None = None  # the bytes of each id, where they are known


@dataclass(frozen=True)
class Claim:
    """What a scorer's evaluation left behind."""

    ledger: np.ndarray  # as read: whether it is whole is a finding, not an assumption
    chunks: str | None  # chunks.tsv, where there is one
    reported_bpb: Any  # from metrics.json
    tolerances: tuple[
        float, float
    ]  # nats, for one loss and for the mean: how closely the auditor's arithmetic can repeat the evaluation's


class Check(NamedTuple):
    """Probes, and what is made of their findings."""

    probes: Sequence[probe_runner.Probe]
    judge: Callable[[list[Any]], list[Verdict]]


@dataclass(frozen=True)
class Case:
    """One scorer before the audit: how to make it, what it is to score, where its machinery changes gear, and the key of all draws."""

    name: str
    factory: Factory
    stream: Stream
    edges: sampling.Edges
    key: bytes
    params: AuditParams
    variants: metamorphic.Variants = metamorphic.NONE

    @property
    def tokens(self) -> np.ndarray:
        """The part of the stream that the scorer is led over: less than all where each chunk costs a training."""
        share = self.params.trained_share if self.edges.chunk else 1.0
        return self.stream.tokens[: max(9, round(share * len(self.stream.tokens)))]


def audit_scorer(
    name: str,
    factory: Factory,
    stream: Stream,
    claim: Claim,
    edges: sampling.Edges,
    key: bytes,
    params: AuditParams,
    report: Report,
    variants: metamorphic.Variants = metamorphic.NONE,
) -> list[Verdict]:
    """Every verdict on one scorer and its ledger."""
    whole = coverage.check_ledger(name, claim.ledger, len(stream.tokens) - 1)
    ledger = claim.ledger if whole.outcome == "pass" else None
    on_files = [whole, coverage.check_reported(name, ledger, claim.reported_bpb, stream.document_bytes)]
    if claim.chunks is not None:
        on_files.append(coverage.check_chunks(name, claim.chunks, ledger, stream.target_bytes))
    try:
        return on_files + _walked(
            Case(name, factory, stream, edges, key, params, variants), ledger, claim.tolerances, report
        )
    except probe_runner.BrokenProtocol as error:
        return [*on_files, _broken(name, error)]


def _walked(
    case: Case, ledger: np.ndarray | None, tolerances: tuple[float, float], report: Report
) -> list[Verdict]:
    tokens, params = case.tokens, case.params
    targets = len(case.stream.tokens) - 1
    scorer = case.factory(targets)
    segment = min(params.segment_targets, len(tokens) - 1)
    predicts = bool(getattr(scorer, "predicts", True))
    groups = sampling.perturbation_groups(
        case.key, tokens, case.stream.bos, case.edges, params.perturbations, segment
    )
    futures = Check(
        causality.probes(case.key, groups, tokens, scorer.vocab_size, case.stream.bos),
        lambda seen: [causality.judge_perturbation(case.name, groups, seen)],
    )
    checks = [
        futures,
        _distributions(case, ledger, tolerances[0], scorer.vocab_size)
        if predicts
        else _totals(case, scorer.vocab_size),
        _documents(case, scorer),
        _handings(case, segment, predicts),
        *_canaries(case, scorer.vocab_size, predicts),
    ]
    stretches = sampling.recomputed_stretches(case.key, len(tokens), params.recomputed_share, segment)
    probes = [probe for check in checks for probe in check.probes]
    with report.progress(f"audit of {case.name}", len(tokens)) as progress:
        losses, findings = probe_runner.walk(scorer, tokens, probes, stretches, segment, progress.advance)
    again = np.full(targets, np.nan, dtype=np.float32)
    again[: len(losses)] = losses
    first_of = np.cumsum([0, *(len(check.probes) for check in checks)])
    found = [findings[a:b] for a, b in itertools.pairwise(first_of)]
    return [
        *(verdict for check, seen in zip(checks, found, strict=True) for verdict in check.judge(seen)),
        causality.judge_recomputation(case.name, ledger, again, groups, found[0], tolerances),
        *_restarted(case, segment, scorer.vocab_size),
    ]


def _distributions(case: Case, ledger: np.ndarray | None, tolerance: float, vocab_size: int) -> Check:
    """B2, B3, B4: what predict() shows, and what is charged."""
    count, params = len(case.tokens), case.params
    places = sampling.distribution_positions(case.key, count, params.distributions)
    return Check(
        normalisation.probes(case.key, places, count, vocab_size, params.substitutions),
        lambda seen: [
            normalisation.judge_independence(case.name, seen),
            normalisation.judge_sum(case.name, seen, params.sum_tolerance),
            normalisation.judge_substitution(case.name, seen, vocab_size, params.loss_tolerance),
            normalisation.judge_commitment(case.name, ledger, seen, tolerance),
        ],
    )


def _totals(case: Case, vocab_size: int) -> Check:
    """B3 where there is no predict()."""
    params = case.params
    places = sampling.distribution_positions(case.key, len(case.tokens), params.distributions)
    return Check(
        normalisation_blackbox.probes(case.key, places, case.tokens, vocab_size, params.substitutions),
        lambda seen: [
            normalisation_blackbox.judge(case.name, seen, params.loss_tolerance, params.canary_bits)
        ],
    )


def _documents(case: Case, scorer: Scorer) -> Check:
    """B1c."""
    start = sampling.spread(case.key, "graph", len(case.tokens), 1)[0]
    probe = document_order.probe(
        case.key, start, case.tokens, scorer.vocab_size, case.stream.bos, case.params.graph_documents
    )
    scope = getattr(scorer, "scope", "stream")
    return Check([probe], lambda seen: [document_order.judge(case.name, probe, seen[0], scope)])


def _handings(case: Case, segment: int, predicts: bool) -> Check:
    """B5 and B13."""
    tolerance = case.params.loss_tolerance
    places = sampling.spread(case.key, "pieces", len(case.tokens), case.params.handed_stretches)
    probes = call_invariance.probes(case.key, places, len(case.tokens), segment, predicts)
    return Check(
        probes,
        lambda seen: [
            call_invariance.judge_pieces(case.name, probes, seen, tolerance),
            *([call_invariance.judge_trace(case.name, probes, seen, tolerance)] if predicts else []),
        ],
    )


def _canaries(case: Case, vocab_size: int, predicts: bool) -> list[Check]:
    """B7, B8, B9."""
    params, tokens = case.params, case.tokens
    starts = sampling.spread(case.key, "canary", len(tokens), 1 + len(canary.SOURCES))
    known = canary.probes(case.key, starts, params.canary_targets, tokens, vocab_size, case.stream.spelling)
    sampled = [canary.self_sampled(case.key, starts[-1], params.sampled_targets)] if predicts else []
    made = [
        Check(known[:1], _judge_canary(case, "B7", "uniform canary")),
        Check(known[1:], _judge_canary(case, "B9", "known-entropy canaries")),
        Check(sampled, _judge_canary(case, "B8", "self-sampled canary")),
    ]
    return [check for check in made if check.probes]


def _judge_canary(case: Case, check: str, name: str) -> Callable[[list[Any]], list[Verdict]]:
    return lambda seen: [canary.judge(case.name, check, name, seen, case.params.canary_bits)]


def _restarted(case: Case, segment: int, vocab_size: int) -> list[Verdict]:
    """B13 and B10: other scorers from the same factory, on the stream's first segment."""
    targets = len(case.stream.tokens) - 1
    first = case.tokens[: segment + 1]
    runs = []
    for _ in range(2):
        scorer = case.factory(targets)
        scorer.observe(int(first[0]))
        runs.append(probe_runner.score(scorer, first[1:]))
    tolerances = (case.params.loss_tolerance, case.params.canary_bits)
    return [
        call_invariance.judge_again(case.name, runs[0], runs[1]),
        *metamorphic.check(case.name, case.variants, case.key, first, runs[0], vocab_size, tolerances),
    ]


def _broken(name: str, error: probe_runner.BrokenProtocol) -> Verdict:
    return Verdict(
        check="B6",
        name="protocol",
        subject=name,
        conditions=("C2", "C4"),
        outcome="fail",
        evidence=str(error),
        saw="other",
        expected="one loss for each token, one probability for each id",
        bound=0,
        positions=(),
        sees="scorers that leave targets out or show no distribution",
        blind="everything that the checks which could not be run would see",
    )
