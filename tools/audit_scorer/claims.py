"""What somebody claims, in one JSON file, held against what can be counted (B6, B11, B16, clocks).

Every field is optional; what is not claimed is "cannot tell". `ledger` names an .npy beside the file: nats of every target in stream order.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from stages.audit.audit_scorer import Stream
from stages.audit.catalogue import Entry, not_run
from stages.audit.checks import budgets, coverage, significance
from stages.audit.verdict import Verdict, outcome

FIELDS = {
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
BUDGET_SECONDS = 600.0  # of training and of evaluation (challenge)
REPORTED = Entry("reported bits per byte", ("metric",), "`bpb` and `ledger` in a claim (--claim)")


def read(path: Path | None) -> dict[str, Any]:
    """The claim; empty without a file. `ledger` becomes an array."""
    if path is None:
        return {}
    try:
        claim = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(claim, dict) or set(claim) - FIELDS:
            raise ValueError(f"expected an object with some of {', '.join(sorted(FIELDS))}")
        if "ledger" in claim:
            claim["ledger"] = np.load(path.parent / str(claim["ledger"]), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"--claim {path}: {error}") from error
    return claim


def check(
    subject: str, claim: dict[str, Any], stream: Stream, tokenizer: sentencepiece.SentencePieceProcessor
) -> tuple[list[Verdict], np.ndarray | None]:
    """The verdicts on what is claimed, and its ledger if that is whole."""
    verdicts = [
        coverage.check_denominator(stream.tokens, stream.bos, stream.target_bytes, stream.document_bytes),
        coverage.check_table(tokenizer, coverage.FUZZ),
    ]
    ledger = None
    if "ledger" in claim:
        whole = coverage.check_ledger(subject, claim["ledger"], len(stream.tokens) - 1)
        verdicts.append(whole)
        ledger = claim["ledger"] if whole.outcome == "pass" else None
    if "bpb" in claim and "ledger" in claim:
        verdicts.append(coverage.check_reported(subject, ledger, claim["bpb"], stream.document_bytes))
    else:
        verdicts.append(not_run(subject, "B6", REPORTED, {}))
    for name, counted in (
        ("targets", len(stream.tokens) - 1),
        ("bytes", int(stream.document_bytes.counted.sum())),
    ):
        if name in claim:
            verdicts.append(_count(subject, name, claim[name], counted))
    budget = float(claim.get("budget_seconds", BUDGET_SECONDS))
    for what in ("training", "evaluation"):
        if f"{what}_seconds" in claim:
            verdicts.append(
                budgets.check_clock(what, "files", budgets.seconds_of(claim, f"{what}_seconds"), budget)
            )
    if "seeds" in claim:
        verdicts.append(significance.check_seeds(claim["seeds"], claim.get("baseline_nats", [])))
    return verdicts, ledger


def _count(subject: str, name: str, claimed: Any, counted: int) -> Verdict:
    """B6 or B11: a number that was claimed, and the same number counted."""
    return Verdict(
        check="B11" if name == "bytes" else "B6",
        name=f"claimed {name}",
        subject=subject,
        conditions=("metric",),
        outcome=outcome(claimed == counted),
        evidence=f"{claimed} {name} are claimed, the stream has {counted}",
        saw=claimed if isinstance(claimed, (int, float)) else "no number",
        expected=counted,
        bound=0,
        positions=(),
        sees="subsets reported as the whole; bytes of a transformed text; spaces and byte pieces counted wrongly",
        blind="whether the losses are right (B1, B3, B4)",
    )
