"""Verdict: the result of one check, and the only thing that the audit's report is made of.

A check that could not run is "cannot tell", never "pass". Each verdict holds the two numbers that
should agree, the bound between them, and what a check of this kind can and cannot detect: a pass means
no more than that.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["pass", "fail", "cannot tell"]
Number = float | int | str


@dataclass(frozen=True)
class Verdict:
    """Result of one check on one subject."""

    check: str  # "B1" ... "B16" as in catalogue.py, or "budget"
    name: str  # name of the check; one number may have several checks
    subject: str  # name of the scorer, or "files"
    conditions: tuple[str, ...]  # keys of report.CONDITIONS: the rules of the challenge that this check tests
    outcome: Outcome
    evidence: str  # one sentence: what was done and what came out; for a failure, the reason
    saw: Number  # the observed number ...
    expected: Number  # ... the number that it should equal ...
    bound: Number  # ... and how far apart they may be; 0 means bit for bit equal
    positions: tuple[
        int, ...
    ]  # token positions in the stream that the evidence is about; for a failure, where it failed first
    sees: str  # what a check like this detects
    blind: str  # what it cannot detect

    def as_json(self) -> dict[str, Any]:
        """Return the verdict for report.json; a number that is not finite becomes a string."""
        fields = dataclasses.asdict(self)
        for key in ("saw", "expected", "bound"):
            fields[key] = _json_number(fields[key])
        return fields | {"conditions": list(self.conditions), "positions": list(self.positions)}


def pass_or_fail(holds: bool) -> Outcome:
    """Convert a test's result to an outcome."""
    return "pass" if holds else "fail"


def failures(verdicts: list[Verdict]) -> list[Verdict]:
    """Select the verdicts that failed."""
    return [verdict for verdict in verdicts if verdict.outcome == "fail"]


def failure_message(verdict: Verdict) -> str:
    """Format a failed verdict as one line: what failed, where, and by how much."""
    where = f" at {', '.join(map(str, verdict.positions[:3]))}" if verdict.positions else ""
    saw, expected, bound = map(_json_number, (verdict.saw, verdict.expected, verdict.bound))
    numbers = f"saw {saw}, expected {expected}, bound {bound}"
    return f"{verdict.subject} fails {verdict.check} ({verdict.name}){where}: {verdict.evidence} [{numbers}]"


def _json_number(number: Number) -> Number:
    return str(number) if isinstance(number, float) and not math.isfinite(number) else number
