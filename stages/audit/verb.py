"""The audit of one scorer: draw positions, walk once, judge.

A scorer comes as a factory, `n_targets -> scorer at the empty prefix`, and nothing else of it is seen. The list of checks below is the list
of checks: a new one is a probe, if it needs the walk, and a judgement.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.audit import causality, coverage, normalisation, positions, walk
from stages.audit.params import AuditParams
from stages.audit.verdict import Verdict
from stages.report import Report
from stages.scorer import Scorer

Factory = Callable[[int], Scorer]


@dataclass(frozen=True)
class Stream:
    """The validation stream and what is known of it without any scorer."""

    tokens: np.ndarray  # (N,) uint16
    bos: int
    target_bytes: np.ndarray  # (N-1,) int64, by the byte table
    document_bytes: coverage.DocumentBytes  # by decoding


@dataclass(frozen=True)
class Claim:
    """What a scorer's evaluation left behind."""

    ledger: np.ndarray  # as read: whether it is whole is a finding, not an assumption
    chunks: str  # chunks.tsv
    reported_bpb: Any  # from metrics.json
    tolerances: tuple[float, float]  # nats, for one loss and for the mean: how closely the auditor's arithmetic can repeat the evaluation's


def audit_scorer(
    name: str, factory: Factory, stream: Stream, claim: Claim, edges: positions.Edges, key: bytes, params: AuditParams, report: Report
) -> list[Verdict]:
    """Every verdict on one scorer and its ledger."""
    whole = coverage.check_ledger(name, claim.ledger, len(stream.tokens) - 1)
    ledger = claim.ledger if whole.outcome == "pass" else None
    on_files = [
        whole,
        coverage.check_reported(name, ledger, claim.reported_bpb, stream.document_bytes),
        coverage.check_chunks(name, claim.chunks, ledger, stream.target_bytes),
    ]
    try:
        return on_files + _walked(name, factory, stream, ledger, claim.tolerances, edges, key, params, report)
    except walk.BrokenProtocol as error:
        return [*on_files, _broken(name, error)]


def _walked(
    name: str,
    factory: Factory,
    stream: Stream,
    ledger: np.ndarray | None,
    tolerances: tuple[float, float],
    edges: positions.Edges,
    key: bytes,
    params: AuditParams,
    report: Report,
) -> list[Verdict]:
    tokens, count = stream.tokens, len(stream.tokens)
    scorer = factory(count - 1)
    segment = min(params.segment_targets, count - 1)
    groups = positions.perturbation_groups(key, tokens, stream.bos, edges, params.perturbations, segment)
    places = positions.distribution_positions(key, count, params.distributions)
    stretches = positions.recomputed_stretches(key, count, params.recomputed_share, segment)
    futures = causality.probes(key, groups, tokens, scorer.vocab_size, stream.bos)
    commitments = normalisation.probes(key, places, count, scorer.vocab_size, params.substitutions)
    with report.progress(f"audit of {name}", count) as progress:
        losses, findings = walk.walk(scorer, tokens, [*futures, *commitments], stretches, segment, progress.advance)
    segments, seen = findings[: len(futures)], findings[len(futures) :]
    return [
        causality.judge_perturbation(name, groups, segments),
        causality.judge_recomputation(name, ledger, losses, groups, segments, tolerances),
        normalisation.judge_independence(name, seen),
        normalisation.judge_sum(name, seen, params.sum_tolerance),
        normalisation.judge_substitution(name, seen, scorer.vocab_size, params.loss_tolerance),
        normalisation.judge_commitment(name, ledger, seen, tolerances[0]),
    ]


def _broken(name: str, error: walk.BrokenProtocol) -> Verdict:
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
