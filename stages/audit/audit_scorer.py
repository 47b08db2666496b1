"""The audit of one scorer: draw positions, run the probes of all checks in one pass, judge their findings.

The audit gets a scorer as a factory, `n_targets -> scorer at the empty prefix`, and knows nothing else
of it. Checks that run in the pass are groups of probes, each with a function that judges what they
found; `_build_groups` lists all of them.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from sentencepiece import SentencePieceProcessor

from stages.audit import precision, probe_runner, sampling
from stages.audit.checks import (
    call_invariance,
    canary,
    causality,
    certified,
    coverage,
    document_order,
    metamorphic,
    normalisation,
    normalisation_blackbox,
)
from stages.audit.checks.certified import CertifiedLosses
from stages.audit.params import AuditParams
from stages.audit.precision import Precision
from stages.audit.verdict import Check, Verdict, Words
from stages.common.lossless_text import LosslessTokenizer
from stages.common.progress import Logger
from stages.common.scorer import Scorer
from stages.scoring.stream import ValidationStream

PROTOCOL = Check(
    "B6",
    "protocol",
    conditions=("C2", "C4"),
    sees="scorers that leave targets out or return no distribution",
    blind="everything that the checks which could not run would detect",
    words=Words(saw="other", expected="one loss for each token, one probability for each id"),
)
PERTURBATION = "perturbation"  # name of the group whose findings are judged a second time, with the ledger
ScorerFactory = Callable[[int], Scorer]
SHORTEST_STREAM = 9  # tokens, so that a segment of sampling.SHORTEST_SEGMENT targets fits


@dataclass(frozen=True)
class AuditedStream:
    """Validation stream, and everything that is known of it without a scorer."""

    tokens: np.ndarray  # (N,) uint16
    bos: int
    target_bytes: np.ndarray  # (N-1,) int64, counted by the byte table
    document_bytes: coverage.DocumentBytes  # counted by decoding
    token_bytes: Sequence[bytes] | None = None  # the bytes of each id, if they are known


@dataclass(frozen=True)
class ClaimedEvaluation:
    """Results of an evaluation that the audit verifies."""

    ledger: np.ndarray  # as read from its file: a check tests that it is complete
    chunk_table: str | None  # text of chunks.tsv, if there is one
    reported_bpb: Any  # from metrics.json
    precision: Precision  # of the arithmetic that wrote the ledger; the scorer declares its own


class ProbeGroup(NamedTuple):
    """Probes, and the function that turns their findings, one for each probe, into verdicts."""

    probes: Sequence[probe_runner.Probe]
    judge: Callable[[list[Any]], list[Verdict]]


@dataclass(frozen=True)
class AuditCase:
    """Inputs that the checks of one scorer share."""

    name: str
    factory: ScorerFactory
    stream: AuditedStream
    boundaries: sampling.Boundaries
    key: bytes  # of all random draws
    params: AuditParams
    variants: metamorphic.Variants = metamorphic.NO_VARIANTS

    @property
    def shown_tokens(self) -> np.ndarray:
        """Tokens that the scorer is shown, (n,) uint16.

        Only the first part of the stream if each chunk costs a training.
        """
        share = self.params.chunked_scorer_share if self.boundaries.chunk else 1.0
        return self.stream.tokens[: max(SHORTEST_STREAM, round(share * len(self.stream.tokens)))]


def audited_stream(stream: ValidationStream, tokenizer: SentencePieceProcessor) -> AuditedStream:
    """Add the bytes of each document, which the audit counts by itself, and the bytes of each id."""
    return AuditedStream(
        stream.tokens,
        stream.table.bos,
        stream.counted_bytes,
        coverage.count_decoded_bytes(stream.tokens, tokenizer),
        LosslessTokenizer(tokenizer).token_bytes,
    )


def audit_scorer(case: AuditCase, claim: ClaimedEvaluation, logger: Logger) -> list[Verdict]:
    """Run every check on one scorer and its ledger."""
    # Check the claimed files by themselves. An incomplete ledger is not compared with anything.
    name = case.name
    stream = case.stream
    complete = coverage.check_ledger(name, claim.ledger, len(stream.tokens) - 1)
    ledger = claim.ledger if complete.outcome == "pass" else None
    verdicts = [complete, coverage.check_reported(name, ledger, claim.reported_bpb, stream.document_bytes)]
    if claim.chunk_table is not None:
        verdicts.append(coverage.check_chunks(name, claim.chunk_table, ledger, stream.target_bytes))

    # Run the scorer; one that breaks the protocol fails, and its other checks have no verdicts.
    try:
        verdicts += _run_checks(case, ledger, claim, logger)
    except probe_runner.ProtocolError as error:
        verdicts.append(Verdict.failed(PROTOCOL, name, str(error), bound=0))
    return verdicts


def certify_scorer(
    case: AuditCase, factory: ScorerFactory, ledger: np.ndarray | None, logger: Logger
) -> CertifiedLosses | Verdict:
    """B17: compute losses of the stream target by target; a verdict if that is not possible.

    factory: makes the scorer that is fed, which must not have seen any part of the stream; it is called
    once. ledger: as it is claimed, or None if it is made later. The certified positions follow from the
    key and the ledger, so no ledger can be fitted to them.
    """
    targets = len(case.stream.tokens) - 1
    ledger_bytes = b"" if ledger is None else np.ascontiguousarray(ledger).tobytes()
    key = case.key + hashlib.sha256(ledger_bytes).digest()
    shown = len(case.shown_tokens)
    positions = sampling.certified_positions(key, shown, case.params.certified_targets)

    try:
        scorer = factory(targets)
        _precision(scorer)
        if not _predicts(scorer):
            evidence = "the scorer has score_stream alone: no distribution is known before its token"
            return Verdict.cannot_tell(certified.NO_DISTRIBUTION, case.name, evidence)
        with logger.progress(f"certified score of {case.name}", shown) as progress:
            return certified.certify(scorer, case.stream.tokens, positions, progress.advance)
    except probe_runner.ProtocolError as error:
        return Verdict.failed(PROTOCOL, case.name, str(error), bound=0)


def judge_certified(
    case: AuditCase, losses: CertifiedLosses | Verdict, own: Precision, claim: ClaimedEvaluation
) -> list[Verdict]:
    """B17: hold the ledger against certified losses; own: the precision of the scorer."""
    if isinstance(losses, Verdict):
        return [losses]
    targets = len(case.stream.tokens) - 1
    complete = coverage.check_ledger(case.name, claim.ledger, targets)
    ledger = claim.ledger if complete.outcome == "pass" else None
    stream_bytes = int(case.stream.target_bytes.sum())
    verdicts = certified.judge(case.name, losses, ledger, own, claim.precision, stream_bytes)
    shown = len(case.shown_tokens) - 1
    return [certified.limit_to_part(verdict, shown, targets) for verdict in verdicts]


def sum_losses(case: AuditCase, claim: ClaimedEvaluation) -> list[Verdict]:
    """B3 and B4 for a scorer without predict(): sums over ids that take the target's place, and its own loss.

    The scorer must not have seen any part of the stream before: it is shown nothing after the ids.
    """
    # An incomplete ledger is not compared with anything.
    tokens = case.shown_tokens
    complete = coverage.check_ledger(case.name, claim.ledger, len(case.stream.tokens) - 1)
    ledger = claim.ledger if complete.outcome == "pass" else None

    # One pass for these probes alone.
    positions = sampling.distribution_positions(case.key, len(tokens), case.params.distributions)
    try:
        scorer = case.factory(len(case.stream.tokens) - 1)
        own = _precision(scorer)
        probes = normalisation_blackbox.probes(
            case.key, positions, tokens, scorer.vocab_size, case.params.substitutions
        )
        results = probe_runner.run_probes(scorer, tokens, {"sums": probes}, [], case.params.segment_targets)
    except probe_runner.ProtocolError as error:
        return [Verdict.failed(PROTOCOL, case.name, str(error), bound=0)]

    findings = results.findings["sums"]
    compared = precision.coarser(own, claim.precision)
    return [
        normalisation_blackbox.judge(case.name, findings, own, case.params.canary_bits),
        normalisation_blackbox.judge_charged(case.name, ledger, findings, compared),
    ]


def _run_checks(
    case: AuditCase, ledger: np.ndarray | None, claim: ClaimedEvaluation, logger: Logger
) -> list[Verdict]:
    """Run the probes of all checks in one pass, and judge their findings.

    ledger: (N-1,) float32, or None without a complete one.
    """
    # The probes of every check, at positions that follow from the key.
    targets = len(case.stream.tokens) - 1
    scorer = case.factory(targets)
    segment = min(case.params.segment_targets, len(case.shown_tokens) - 1)
    perturbed = sampling.perturbation_groups(
        case.key, case.shown_tokens, case.stream.bos, case.boundaries, case.params.perturbations, segment
    )
    groups = _build_groups(case, scorer, perturbed, segment, ledger, claim.precision)

    # One pass over the stream for all of them, which also recomputes a share of the losses.
    probes = {name: group.probes for name, group in groups.items()}
    spans = sampling.recomputed_spans(case.key, len(case.shown_tokens), case.params.recomputed_share, segment)
    with logger.progress(f"audit of {case.name}", len(case.shown_tokens)) as progress:
        results = probe_runner.run_probes(scorer, case.shown_tokens, probes, spans, segment, progress.advance)

    # Judge the findings of each group.
    verdicts = []
    for name, group in groups.items():
        verdicts += group.judge(results.findings[name])

    # Compare the ledger with all losses that were computed without the future, also those of the
    # perturbed segments.
    recomputed = np.full(targets, np.nan, dtype=np.float32)
    recomputed[: len(results.losses)] = results.losses

    verdicts.append(
        causality.judge_recomputation(
            case.name,
            ledger,
            recomputed,
            perturbed,
            results.findings[PERTURBATION],
            precision.coarser(_precision(scorer), claim.precision),
        )
    )

    return verdicts + _rerun_checks(case, segment, scorer)


def _build_groups(
    case: AuditCase,
    scorer: Scorer,
    perturbed: list[sampling.PerturbationGroup],
    segment: int,
    ledger: np.ndarray | None,
    ledger_precision: Precision,
) -> dict[str, ProbeGroup]:
    """Build the probes of all checks that run in the common pass, by name, in the order of their verdicts."""
    vocab_size = scorer.vocab_size
    predicts = _predicts(scorer)
    own = _precision(scorer)

    # Causality.
    perturbations = causality.probes(
        case.key, perturbed, case.shown_tokens, vocab_size, case.stream.bos, own.rounding
    )
    groups = {
        PERTURBATION: ProbeGroup(
            perturbations,
            lambda segments: [causality.judge_perturbation(case.name, perturbed, segments, own.rounding)],
        )
    }

    # Normalisation: with predict() its sum can be computed; without it, see `sum_losses`.
    if predicts:
        groups["distributions"] = _distribution_probes(case, scorer, ledger, ledger_precision)

    # Order of documents, division into calls, and spans that nobody can predict.
    groups["document order"] = _document_order_probe(case, scorer)
    groups["call splits"] = _call_split_probes(case, scorer, segment)
    return groups | _canary_probes(case, scorer)


def _distribution_probes(
    case: AuditCase, scorer: Scorer, ledger: np.ndarray | None, ledger_precision: Precision
) -> ProbeGroup:
    """B2, B3 and B4: the distribution that predict() shows, and the losses that are charged."""
    params = case.params
    vocab_size = scorer.vocab_size
    own = _precision(scorer)
    compared = precision.coarser(own, ledger_precision)
    length = len(case.shown_tokens)
    positions = sampling.distribution_positions(case.key, length, params.distributions)
    return ProbeGroup(
        normalisation.probes(case.key, positions, length, vocab_size, params.substitutions, own.rounding),
        lambda findings: [
            normalisation.judge_independence(case.name, findings, own.rounding),
            normalisation.judge_sum(case.name, findings, own),
            normalisation.judge_substitution(case.name, findings, vocab_size, own),
            normalisation.judge_commitment(case.name, ledger, findings, compared),
        ],
    )


def _document_order_probe(case: AuditCase, scorer: Scorer) -> ProbeGroup:
    """B1c: in one call of several documents, no loss depends on a later document."""
    start = sampling.late_positions(case.key, "graph", len(case.shown_tokens), 1)[0]
    probe = document_order.probe(
        case.key,
        start,
        case.shown_tokens,
        scorer.vocab_size,
        case.stream.bos,
        case.params.order_documents,
        _precision(scorer).rounding,
    )
    scope = getattr(scorer, "scope", "stream")
    return ProbeGroup([probe], lambda findings: [document_order.judge(case.name, probe, findings[0], scope)])


def _call_split_probes(case: AuditCase, scorer: Scorer, segment: int) -> ProbeGroup:
    """B13: losses do not depend on how a span is divided into calls.

    With predict() also B5: they do not depend on predictions that were made in between.
    """
    tolerance = _precision(scorer).loss_tolerance
    predicts = _predicts(scorer)
    length = len(case.shown_tokens)
    positions = sampling.late_positions(case.key, "pieces", length, case.params.call_splits)
    probes = call_invariance.probes(case.key, positions, length, segment, predicts)

    def judge(findings: list[Any]) -> list[Verdict]:
        verdicts = [call_invariance.judge_pieces(case.name, probes, findings, tolerance)]
        if predicts:
            verdicts.append(call_invariance.judge_trace(case.name, probes, findings, tolerance))
        return verdicts

    return ProbeGroup(probes, judge)


def _canary_probes(case: AuditCase, scorer: Scorer) -> dict[str, ProbeGroup]:
    """Spans of known distribution, which no lawful scorer beats by more than `params.canary_bits`.

    B7: uniform ids; B9: other sources of known entropy; B8: drawn from the scorer's own predict(),
    if it has one.
    """
    params = case.params
    bits = params.canary_bits
    rounding = _precision(scorer).sum_tolerance

    # A probe of each source, at the given starts in turn.
    starts = sampling.late_positions(case.key, "canary", len(case.shown_tokens), 1 + len(canary.SOURCES))
    probes = canary.probes(
        case.key,
        starts,
        params.canary_targets,
        case.shown_tokens,
        scorer.vocab_size,
        case.stream.token_bytes,
        rounding,
    )

    def group(check: Check, probes: Sequence[probe_runner.Probe]) -> ProbeGroup:
        return ProbeGroup(probes, lambda results: [canary.judge(check, case.name, results, bits)])

    others = [probe for source, probe in probes.items() if source != "uniform"]
    groups = {
        "uniform canary": group(canary.UNIFORM_CANARY, [probes["uniform"]]),
        "known-entropy canaries": group(canary.KNOWN_ENTROPY_CANARIES, others),
    }
    if _predicts(scorer):
        sampled = canary.self_sampled_probe(case.key, starts[-1], params.sampled_targets, rounding)
        groups["self-sampled canary"] = group(canary.SELF_SAMPLED_CANARY, [sampled])
    return groups


def _rerun_checks(case: AuditCase, segment: int, shown: Scorer) -> list[Verdict]:
    """B13: two scorers of one factory give the same losses; B10: so do variants that must not matter.

    Both are run on the first segment of the stream. shown: a scorer of the factory, for what it declares.
    """
    own = _precision(shown)
    targets = len(case.stream.tokens) - 1
    first_segment = case.shown_tokens[: segment + 1]
    runs = []
    for _ in range(2):
        scorer = case.factory(targets)
        scorer.observe(int(first_segment[0]))
        runs.append(probe_runner.checked_score(scorer, first_segment[1:]))

    # Compare them with each other, and the variants with the first.
    return [
        call_invariance.judge_rerun(case.name, runs[0], runs[1], own.rounding),
        *metamorphic.check(
            case.name,
            case.variants,
            case.key,
            first_segment,
            runs[0],
            shown.vocab_size,
            own,
            case.params.canary_bits,
        ),
    ]


def _predicts(scorer: Scorer) -> bool:
    """True if the scorer has predict(), and not score_stream alone."""
    return bool(getattr(scorer, "predicts", True))


def _precision(scorer: Scorer) -> Precision:
    """Look up the precision that a scorer declares; a ProtocolError for an unknown one."""
    try:
        return precision.of_scorer(scorer)
    except ValueError as error:
        raise probe_runner.ProtocolError(str(error)) from error
