"""Compare a claim, given as a JSON file, with what can be counted (checks B6, B11, B16 and the budgets).

Every field is optional; a check without its field is "cannot tell". `ledger` is the name of an .npy
file in the same folder: losses of every target in nats, in stream order.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece

from stages.audit.audit_scorer import AuditedStream
from stages.audit.catalogue import CatalogueEntry, not_run
from stages.audit.checks import budgets, coverage, significance
from stages.audit.verdict import Check, Verdict, Words
from stages.common.challenge import MAX_EVALUATION_SECONDS
from stages.common.json_object import read_json_object

CLAIM_FIELDS = {
    "bpb",
    "targets",
    "bytes",
    "ledger",
    "training_seconds",
    "evaluation_seconds",
    "budget_seconds",
    "seeds",
    "baseline_nats",
}
REPORTED = CatalogueEntry((coverage.REPORTED_BPB,), needs="`bpb` and `ledger` in a claim (--claim)")
CLAIMED_TARGETS = Check(
    "B6",
    "claimed targets",
    conditions=("metric",),
    sees="subsets reported as the whole; bytes of a transformed text; spaces and byte pieces counted wrongly",
    blind=coverage.NOT_LOSSES,
    words=Words(saw="no number"),
)
CLAIMED_BYTES = dataclasses.replace(CLAIMED_TARGETS, number="B11", name="claimed bytes")


class CheckedClaim(NamedTuple):
    """Verdicts on a claim, and its ledger."""

    verdicts: list[Verdict]
    ledger: np.ndarray | None  # (N-1,); None if none is claimed or it is incomplete


def read_claim(path: Path | None) -> dict[str, Any]:
    """Return the claim in a file, {} without one; its `ledger` is loaded as an array."""
    if path is None:
        return {}
    try:
        claim = read_json_object(path)
        if set(claim) - CLAIM_FIELDS:
            raise ValueError(f"expected an object with some of {', '.join(sorted(CLAIM_FIELDS))}")
        if "ledger" in claim:
            claim["ledger"] = np.load(path.parent / str(claim["ledger"]), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"--claim {path}: {error}") from error
    return claim


def check_claim(
    subject: str,
    claim: dict[str, Any],
    stream: AuditedStream,
    tokenizer: sentencepiece.SentencePieceProcessor,
) -> CheckedClaim:
    """Check everything that is claimed about the scorer `subject`."""
    # The count of bytes, whether claimed or not.
    verdicts = [
        coverage.check_denominator(stream.tokens, stream.bos, stream.target_bytes, stream.document_bytes),
        coverage.check_table(tokenizer, coverage.AWKWARD_TEXTS),
    ]

    # The ledger, and the score that follows from it.
    targets = len(stream.tokens) - 1
    ledger = None
    if "ledger" in claim:
        complete = coverage.check_ledger(subject, claim["ledger"], targets)
        verdicts.append(complete)
        ledger = claim["ledger"] if complete.outcome == "pass" else None
    if "bpb" in claim and "ledger" in claim:
        verdicts.append(coverage.check_reported(subject, ledger, claim["bpb"], stream.document_bytes))
    else:
        verdicts.append(not_run(subject, REPORTED, {}))

    # Counts of the targets and bytes that were scored.
    if "targets" in claim:
        verdicts.append(_check_count(CLAIMED_TARGETS, subject, "targets", claim["targets"], targets))
    if "bytes" in claim:
        counted_bytes = int(stream.document_bytes.counted.sum())
        verdicts.append(_check_count(CLAIMED_BYTES, subject, "bytes", claim["bytes"], counted_bytes))

    # Training and evaluation are each allowed the same time.
    budget = float(claim.get("budget_seconds", MAX_EVALUATION_SECONDS))
    for clock in ("training", "evaluation"):
        field = f"{clock}_seconds"
        if field in claim:
            seconds = budgets.measured_seconds(claim, field)
            verdicts.append(budgets.check_clock(clock, "files", seconds, budget))

    # Scores by seed, against those of the baseline if it has any.
    if "seeds" in claim:
        verdicts.append(significance.check_seeds(claim["seeds"], claim.get("baseline_nats", [])))
    return CheckedClaim(verdicts, ledger)


def _check_count(check: Check, subject: str, unit: str, claimed: Any, counted: int) -> Verdict:
    """Compare a claimed number of targets or bytes with the same number counted."""
    evidence = f"{claimed} {unit} are claimed, the stream has {counted}"
    number = claimed if isinstance(claimed, (int, float)) else None
    return Verdict.of(check, subject, claimed == counted, evidence, saw=number, expected=counted, bound=0)
