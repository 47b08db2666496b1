"""What one check found: the only thing that checks return and that the report is made of.

A check never passes because it could not look: what was not run is "cannot tell". Each verdict carries the two numbers that should agree,
how far apart they may be, and what a check of this kind can and cannot see, because a pass is worth no more than that.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["pass", "fail", "cannot tell"]
Number = float | int | str


@dataclass(frozen=True)
class Verdict:
    """One check on one subject."""

    check: str  # B1 ... B16, as numbered in the rules' list of tests, or "budget"
    name: str  # what the check is called
    subject: str  # the scorer it was run on, or "files"
    conditions: tuple[str, ...]  # C1 ... C4, "metric", "budget", "data"
    outcome: Outcome
    evidence: str  # one sentence: what was done and what came out; the reason when it failed
    saw: Number  # the two numbers that should agree ...
    expected: Number
    bound: Number  # ... and how far apart they may be; 0 means the same bits
    positions: tuple[
        int, ...
    ]  # token positions in the stream that the evidence is about; of a failure, where it failed first
    sees: str  # what a check like this detects
    blind: str  # and what it cannot

    def as_json(self) -> dict[str, Any]:
        """The verdict for report.json; a number that is not finite becomes a word, which JSON can hold."""
        fields = dataclasses.asdict(self)
        for key in ("saw", "expected", "bound"):
            fields[key] = _writable(fields[key])
        return fields | {"conditions": list(self.conditions), "positions": list(self.positions)}


def outcome(holds: bool) -> Outcome:
    """Pass or fail."""
    return "pass" if holds else "fail"


def convicted(verdicts: list[Verdict]) -> list[Verdict]:
    """The verdicts that failed."""
    return [verdict for verdict in verdicts if verdict.outcome == "fail"]


def reason(verdict: Verdict) -> str:
    """One line that says what failed, where, and by how much."""
    where = f" at {', '.join(map(str, verdict.positions[:3]))}" if verdict.positions else ""
    numbers = f"saw {_writable(verdict.saw)}, expected {_writable(verdict.expected)}, bound {_writable(verdict.bound)}"
    return f"{verdict.subject} fails {verdict.check} ({verdict.name}){where}: {verdict.evidence} [{numbers}]"


def _writable(number: Number) -> Number:
    return str(number) if isinstance(number, float) and not math.isfinite(number) else number
