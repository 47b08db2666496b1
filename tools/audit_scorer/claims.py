"""Compare a claim, given as a JSON file, with what can be counted (checks B6, B11, B16 and the budgets).

Every field is optional; a check without its field is "cannot tell". `ledger` is the name of an .npy
file in the same folder: losses of every target in nats, in stream order. Budgets are the challenge's: a
claim cannot set them.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece

from stages.audit.audit_scorer import AuditedStream
from stages.audit.catalogue import CatalogueEntry, not_run
from stages.audit.checks import budgets, coverage, significance
from stages.audit.verdict import Check, Verdict, Words
from stages.common import challenge
from stages.common.json_object import read_json_object
from stages.tokenize import files

CLAIM_FIELDS = {
    "bpb",
    "targets",
    "bytes",
    "documents",
    "official",
    "ledger",
    "training_seconds",
    "evaluation_seconds",
    "seeds",
    "baseline_nats",
}
SEED_FIELDS = {"seed", "nats", "config", "ledger", "ledger_sha256"}
LARGEST_DOCUMENT = 100_000_000  # UTF-8 bytes of one document of the original text
REPORTED = CatalogueEntry((coverage.REPORTED_BPB,), needs="`bpb` and `ledger` in a claim (--claim)")
ORIGINAL_TEXT = CatalogueEntry((coverage.TEXT,), needs="the original text")
CLAIMED_TARGETS = Check(
    "B6",
    "claimed targets",
    conditions=("metric",),
    sees="subsets reported as the whole; bytes of a transformed text; spaces and byte pieces counted wrongly",
    blind=coverage.NOT_LOSSES,
    words=Words(saw="no number"),
)
CLAIMED_BYTES = dataclasses.replace(CLAIMED_TARGETS, number="B11", name="claimed bytes")
CLAIMED_DOCUMENTS = dataclasses.replace(CLAIMED_TARGETS, name="claimed documents")
CLAIMED_BPB = Check(
    "B6",
    "claimed bits per byte",
    conditions=("metric",),
    sees="a number that the scorer does not reach when it is run",
    blind=coverage.NOT_LOSSES,
    words=Words(saw="no number"),
)


class CheckedClaim(NamedTuple):
    """Verdicts on a claim, and its ledger."""

    verdicts: list[Verdict]
    ledger: np.ndarray | None  # (N-1,); None if none is claimed or it is incomplete


class OwnScore(NamedTuple):
    """Score that the audit found itself, against which a claimed one is held."""

    bpb: float  # bits per byte of the whole stream
    tolerance: float  # bits per byte by which the claimed number may differ: precision, and what was sampled
    source: str  # how it was found, in a few words


def read_claim(path: Path | None) -> dict[str, Any]:
    """Return the claim in a file, {} without one; its ledgers are loaded as arrays."""
    if path is None:
        return {}
    try:
        claim = read_json_object(path)
        if "budget_seconds" in claim:
            raise ValueError(
                "`budget_seconds` cannot be claimed: the budgets are those of stages/common/challenge.py; "
                "remove it"
            )
        _refuse_unknown(claim, CLAIM_FIELDS, "an object")
        if "ledger" in claim:
            claim["ledger"] = np.load(path.parent / str(claim["ledger"]), allow_pickle=False)
        if "seeds" in claim:
            claim["seeds"] = [_read_seed(path.parent, record) for record in claim["seeds"]]
    except (ValueError, EOFError, TypeError) as error:
        raise ValueError(f"--claim {path}: {error}") from error
    return claim


def read_texts(path: Path, key: str = "text") -> Iterator[str]:
    """Yield the original documents of a file: .jsonl with one under `key` a line, or .txt with one alone."""
    for document in files.read_file(path, files.ReadOptions(key, LARGEST_DOCUMENT)):
        yield document.text


def complete_ledger(claim: dict[str, Any], targets: int) -> np.ndarray | None:
    """Return the claimed ledger, (N-1,) float32; None if there is none or it is incomplete."""
    ledger = claim.get("ledger")
    if ledger is None or coverage.check_ledger("", ledger, targets).outcome != "pass":
        return None
    complete: np.ndarray = ledger
    return complete


def check_claim(
    subject: str,
    claim: dict[str, Any],
    stream: AuditedStream,
    tokenizer: sentencepiece.SentencePieceProcessor,
    texts: Iterable[str] | None = None,
    own: OwnScore | None = None,
) -> CheckedClaim:
    """Check everything that is claimed about the scorer `subject`.

    texts: the original documents, in stream order; own: the audit's own score, if there is one.
    """
    # The count of bytes, whether claimed or not.
    verdicts = [
        coverage.check_denominator(stream.tokens, stream.bos, stream.target_bytes, stream.document_bytes),
        coverage.check_table(tokenizer, coverage.AWKWARD_TEXTS),
        coverage.check_normaliser(stream.tokens, tokenizer),
    ]

    # The text itself, and the totals of the challenge's validation set.
    if texts is None:
        verdicts.append(not_run("files", ORIGINAL_TEXT, {}))
    else:
        verdicts.append(coverage.check_text(stream.tokens, stream.target_bytes, tokenizer, texts))
    documents = len(stream.document_bytes.counted)
    counted_bytes = int(stream.document_bytes.counted.sum())
    if claim.get("official", documents == challenge.VALIDATION_DOCUMENTS):
        verdicts.append(coverage.check_official(len(stream.tokens), documents, counted_bytes))

    # The ledger, and the score that follows from it.
    targets = len(stream.tokens) - 1
    ledger = complete_ledger(claim, targets)
    if "ledger" in claim:
        verdicts.append(coverage.check_ledger(subject, claim["ledger"], targets))
    if "bpb" in claim and "ledger" in claim:
        verdicts.append(coverage.check_reported(subject, ledger, claim["bpb"], stream.document_bytes))
    if "bpb" in claim and own is not None:
        verdicts.append(check_own_score(subject, claim["bpb"], own))
    if "bpb" not in claim or ("ledger" not in claim and own is None):
        verdicts.append(not_run(subject, REPORTED, {}))

    # Counts of the targets and bytes that were scored.
    if "targets" in claim:
        verdicts.append(_check_count(CLAIMED_TARGETS, subject, "targets", claim["targets"], targets))
    if "bytes" in claim:
        verdicts.append(_check_count(CLAIMED_BYTES, subject, "bytes", claim["bytes"], counted_bytes))
    if "documents" in claim:
        verdicts.append(_check_count(CLAIMED_DOCUMENTS, subject, "documents", claim["documents"], documents))

    # Training and evaluation each have their own budget.
    clock_budgets = {
        "training": challenge.MAX_TRAINING_SECONDS,
        "evaluation": challenge.MAX_EVALUATION_SECONDS,
    }
    for clock, budget in clock_budgets.items():
        field = f"{clock}_seconds"
        if field in claim:
            seconds = budgets.measured_seconds(claim, field)
            verdicts.append(budgets.check_clock(clock, "files", seconds, budget))

    # Scores by seed, against those of the baseline if it has any.
    if "seeds" in claim:
        baseline = claim.get("baseline_nats", [])
        verdicts.append(significance.check_seeds(claim["seeds"], baseline, targets, counted_bytes))
    return CheckedClaim(verdicts, ledger)


def check_own_score(subject: str, claimed: Any, own: OwnScore) -> Verdict:
    """B6: the claimed bits per byte are those that the audit found itself."""
    is_number = isinstance(claimed, (int, float)) and not isinstance(claimed, bool)
    holds = is_number and abs(claimed - own.bpb) <= own.tolerance
    evidence = f"{claimed!r} bits per byte are claimed; the audit found {own.bpb:.6f} ({own.source})"
    return Verdict.of(
        CLAIMED_BPB,
        subject,
        holds,
        evidence,
        saw=float(claimed) if is_number else None,
        expected=own.bpb,
        bound=own.tolerance,
    )


def _read_seed(folder: Path, record: Any) -> dict[str, Any]:
    """Load the ledger of one seed's record, if it names one; its hash must be the stated one."""
    if not isinstance(record, dict):
        raise ValueError(f"`seeds` holds {record!r}, expected an object for each seed")
    _refuse_unknown(record, SEED_FIELDS, "for each seed an object")
    if "ledger" not in record:
        return record
    path = folder / str(record["ledger"])
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    stated = str(record.get("ledger_sha256", found)).lower()
    if stated != found:
        raise ValueError(f"{path} has the sha256 {found}, `ledger_sha256` says {stated}")
    return record | {"ledger": np.load(path, allow_pickle=False), "ledger_sha256": found}


def _refuse_unknown(record: dict[str, Any], known: set[str], what: str) -> None:
    unknown = sorted(set(record) - known)
    if unknown:
        raise ValueError(
            f"unknown field {', '.join(unknown)}; expected {what} with some of {', '.join(sorted(known))}"
        )


def _check_count(check: Check, subject: str, unit: str, claimed: Any, counted: int) -> Verdict:
    """Compare a claimed number of targets or bytes with the same number counted."""
    evidence = f"{claimed} {unit} are claimed, the stream has {counted}"
    number = claimed if isinstance(claimed, (int, float)) else None
    return Verdict.of(check, subject, claimed == counted, evidence, saw=number, expected=counted, bound=0)
