"""The audit of an external scorer: its processes in order, and the verdicts on what they answered.

Every process of the scorer runs in a sandbox (stages/audit/isolated.py lists them). Nothing of the scorer
is imported here, and the report is written after the last process has ended.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from sentencepiece import SentencePieceProcessor

from stages.audit import catalogue, isolated, precision
from stages.audit.audit_scorer import PROTOCOL, AuditedStream, ClaimedEvaluation, judge_certified
from stages.audit.checks import certified, coverage, prefixes
from stages.audit.checks.certified import CertifiedLosses
from stages.audit.isolated import IsolatedScorer, ScorerProcesses
from stages.audit.precision import Precision
from stages.audit.probe_runner import ProtocolError
from stages.audit.remote.process import Description, ScorerSource
from stages.audit.sampling import Boundaries
from stages.audit.verdict import Verdict, failures
from stages.common.progress import Logger
from tools.audit_scorer import claims, effort

SUBJECT = "scorer"  # its name in verdicts
ROUNDED_BPB = 5.0e-5  # error of a number that is claimed to four decimals, as leaderboards print them


@dataclass(frozen=True)
class Settings:
    """Options of an audit that concern the scorer."""

    level: str
    max_targets: int | None
    window: int
    chunk: int | None
    key: bytes  # of all draws
    answer_seconds: float
    logger: Logger


class ScorerAudit(NamedTuple):
    """Result of the checks that run the scorer."""

    verdicts: list[Verdict]
    declared: dict[str, Any]  # extent of the audit, for the report
    own: claims.OwnScore | None  # the audit's own score, if it covers the whole stream


def audit_external(
    source: ScorerSource,
    stream: AuditedStream,
    tokenizer: SentencePieceProcessor,
    claimed_ledger: np.ndarray | None,
    settings: Settings,
) -> ScorerAudit:
    """Run every check of the scorer; claimed_ledger: (N-1,) float32, or None if it is to make its own.

    Raises ScorerError if a process failed, ValueError if the scorer does not belong to the stream.
    """
    processes = ScorerProcesses(tokenizer.vocab_size(), settings.answer_seconds)
    description = _describe(source, processes)
    declared_precision = precision.by_name(description.precision)

    # The part of the stream that the scorer is shown.
    length = len(stream.tokens)
    fitted = _fit_effort(settings, description, length, tokenizer.vocab_size())
    part = shorten_stream(stream, fitted.tokens, tokenizer)

    ledger = np.empty(0, dtype=np.float32) if claimed_ledger is None else claimed_ledger
    claim = ClaimedEvaluation(ledger[: fitted.tokens - 1], None, None, declared_precision)

    # Without a claimed ledger, the scorer's is made below.
    boundaries = Boundaries(window=settings.window, chunk=settings.chunk)
    scorer = IsolatedScorer(
        SUBJECT,
        certified_source=source,
        probed_source=source,
        stream=part,
        boundaries=boundaries,
        key=settings.key,
        params=fitted.params,
        claim=claim,
    )

    # Processes that must not know later tokens come first. Then the ledger, unless it was claimed.
    verdicts = [isolated.check_sandbox(SUBJECT)]
    losses: CertifiedLosses | Verdict | None = None

    # The certified score, before anything else is shown to the scorer.
    if description.predicts:
        is_claimed = claimed_ledger is not None
        losses = isolated.certify_isolated(scorer, processes, is_claimed, settings.logger)

    # One call for the whole part.
    if claimed_ledger is None:
        made = make_ledger(source, processes, part.tokens)
        if isinstance(made, Verdict):
            verdicts.append(made)
        else:
            ledger = made
        claim = dataclasses.replace(claim, ledger=ledger)
        scorer = dataclasses.replace(scorer, claim=claim)

    # The ledger against the certified losses, or against prefixes and sums; then the probes.
    level = effort.EFFORTS[settings.level]
    if losses is not None:
        verdicts += judge_certified(scorer.case(), losses, declared_precision, claim)
        if not failures(verdicts):
            verdicts += isolated.decode_isolated(scorer, processes, level.decoded_targets)
    else:
        verdicts += check_prefixes(scorer, processes, declared_precision, level.prefixes)
        short = shorten_stream(stream, fitted.probed_tokens, tokenizer)
        claim = dataclasses.replace(claim, ledger=ledger[: fitted.probed_tokens - 1])
        scorer = dataclasses.replace(scorer, stream=short, claim=claim)
        verdicts += isolated.sum_isolated(scorer, processes)

    verdicts += isolated.probe_isolated(scorer, processes, settings.logger)

    # Everything that a reader needs to judge the extent of this audit.
    declared = {
        "targets in the stream": length - 1,
        "targets shown": fitted.tokens - 1,
        "interface": "predict, observe, fork" if description.predicts else "score_stream only",
        "precision": description.precision,
        "documents": "each by itself" if description.scope == "document" else "one stream",
        "work": f"{processes.cost.calls} calls of score_stream, {processes.cost.targets} targets scored or "
        f"observed, {processes.cost.predictions} predictions",
    }
    is_part = fitted.tokens < length
    own = None if is_part else own_score(ledger, claimed_ledger is None, part, declared_precision)
    return ScorerAudit(_limit_to_part(verdicts, fitted.tokens, length), declared, own)


def make_ledger(source: ScorerSource, processes: ScorerProcesses, tokens: np.ndarray) -> np.ndarray | Verdict:
    """Let a process of its own score a stream (N,) in one call; returns the losses as they come, float32.

    A verdict if there is not one for each target.
    """
    try:
        with processes.start(source) as process:
            return process.new_scorer().score_stream(tokens)
    except ProtocolError as error:
        return Verdict.failed(PROTOCOL, SUBJECT, str(error), bound=0)


def check_prefixes(
    scorer: IsolatedScorer, processes: ScorerProcesses, declared: Precision, count: int
) -> list[Verdict]:
    """B1 and B7: score prefixes of the stream, each in a process of its own, one after another."""
    tokens = scorer.stream.tokens
    drawn = prefixes.draw(scorer.key, tokens, processes.vocab_size, count)
    losses = []
    try:
        for prefix in drawn:
            with processes.start(scorer.certified_source) as process:
                losses.append(prefixes.score(prefix, process.new_scorer))
    except ProtocolError as error:
        return [Verdict.failed(PROTOCOL, SUBJECT, str(error), bound=0)]

    complete = coverage.check_ledger(SUBJECT, scorer.claim.ledger, len(tokens) - 1)
    ledger = scorer.claim.ledger if complete.outcome == "pass" else None
    bits = scorer.params.canary_bits
    rounding = declared.sum_tolerance
    return [
        prefixes.judge(SUBJECT, drawn, losses, ledger, declared),
        prefixes.judge_tails(SUBJECT, drawn, losses, processes.vocab_size, bits, rounding),
    ]


def own_score(
    ledger: np.ndarray, is_made_here: bool, stream: AuditedStream, declared: Precision
) -> claims.OwnScore | None:
    """The score of a ledger of the whole stream that the audit made or held against the scorer."""
    if ledger.shape != stream.target_bytes.shape or not np.isfinite(ledger).all():
        return None
    bits = float(ledger.sum(dtype=np.float64)) / certified.NATS_PER_BIT
    counted = int(stream.document_bytes.counted.sum())
    shift = declared.mean_tolerance * len(ledger) / certified.NATS_PER_BIT / counted
    source = "one call of score_stream" if is_made_here else "the claimed ledger"
    return claims.OwnScore(bits / counted, shift + ROUNDED_BPB, source)


def shorten_stream(stream: AuditedStream, shown: int, tokenizer: SentencePieceProcessor) -> AuditedStream:
    """Return the first `shown` tokens of the stream."""
    if shown == len(stream.tokens):
        return stream
    tokens = stream.tokens[:shown]
    return AuditedStream(
        tokens,
        stream.bos,
        stream.target_bytes[: shown - 1],
        coverage.count_decoded_bytes(tokens, tokenizer),
        stream.token_bytes,
    )


def _describe(source: ScorerSource, processes: ScorerProcesses) -> Description:
    """Ask a process of its own what the scorers of the factory offer."""
    with processes.start(source) as process:
        description = process.description
    if description.vocab_size not in (None, processes.vocab_size):
        raise ValueError(
            f"the scorer has vocab_size {description.vocab_size}, the tokenizer {processes.vocab_size} ids:"
            " they do not belong together"
        )
    return description


def _fit_effort(
    settings: Settings, description: Description, length: int, vocab_size: int
) -> effort.FittedEffort:
    level = effort.EFFORTS[settings.level]
    if description.predicts:
        return effort.fit_stepwise_scorer(level, settings.max_targets, length, vocab_size)
    return effort.fit_replay_scorer(level, settings.max_targets, length, vocab_size, settings.window)


def _limit_to_part(verdicts: list[Verdict], shown: int, length: int) -> list[Verdict]:
    """Drop or restrict the verdicts that a part of the stream does not prove for the whole."""
    kept = []
    for verdict in verdicts:
        is_part = shown < length and verdict.outcome != "fail"
        if verdict.check == prefixes.PREFIXES and is_part:
            evidence = f"of the first {shown - 1} targets: {verdict.evidence}; the others were not covered"
            kept.append(Verdict.cannot_tell(prefixes.PREFIXES, verdict.subject, evidence))
        elif verdict.check != coverage.REPORTED_BPB and not (verdict.check == coverage.COVERAGE and is_part):
            # The reported number was checked with the claim.
            kept.append(certified.limit_to_part(verdict, shown - 1, length - 1))
    return kept


def draw_key(nonce: bytes, files_hash: bytes, ledger: np.ndarray | None) -> bytes:
    """Key of all draws: it is not known before the ledger is fixed, and no ledger can be fitted to it."""
    ledger_bytes = b"" if ledger is None else np.ascontiguousarray(ledger).tobytes()
    return hashlib.sha256(nonce + files_hash + hashlib.sha256(ledger_bytes).digest()).digest()


def missing_reasons(shown: int, length: int, failed: bool) -> dict[str, str]:
    """Return the reasons why a check may be missing from the verdicts, by check."""
    reasons = {}
    if shown < length:
        reasons["B6"] = (
            "no complete ledger was claimed (--claim);"
            f" the audit itself was allowed {shown - 1} of {length - 1} targets"
        )
    if failed:
        reasons["B12"] = "the scorer has failed another check"
    return reasons


def complete_catalogue(verdicts: list[Verdict], shown: int, length: int) -> list[Verdict]:
    """Add a "cannot tell" for each check that did not run."""
    reasons = missing_reasons(shown, length, bool(failures(verdicts)))
    return catalogue.with_missing(verdicts, [SUBJECT], reasons)
