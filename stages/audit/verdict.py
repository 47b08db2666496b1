"""Verdict: the result of one check, and the only thing that the audit's report is made of.

A `Check` holds what is the same in all verdicts of one check: a module constant next to the code that
judges. A `Verdict` adds the outcome, the two numbers that should agree and the bound between them. A check
that could not run is "cannot tell", never "pass".

`Verdict.of` is for an outcome that one comparison decides, `passed`, `failed` and `cannot_tell` for one
that a branch decides:

    LENGTH = Check("B6", "length", ("C4",), sees="missing losses", blind="wrong losses")

    if ledger is None:
        return Verdict.cannot_tell(LENGTH, "scorer", "there is no ledger")
    n = len(ledger)
    return Verdict.of(LENGTH, "scorer", n == targets, f"{n} losses", saw=n, expected=targets, bound=0)
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

Outcome = Literal["pass", "fail", "cannot tell"]


class Words(NamedTuple):
    """Words that a report shows where a verdict has no number."""

    saw: str = "nothing"
    expected: str = "-"
    bound: str = "-"


NO_WORDS = Words()  # of a verdict without numbers


@dataclass(frozen=True)
class Check:
    """Constant part of a check's verdicts. A pass means no more than `sees` and `blind` say."""

    number: str  # "B1" ... "B18", "B1c" as in catalogue.py, or "budget"
    name: str  # one number may have several checks
    conditions: tuple[str, ...]  # keys of report.CONDITIONS: the rules of the challenge that it tests
    sees: str  # what a check like this detects; may have placeholders for `fill`
    blind: str  # what it cannot detect; likewise
    words: Words = NO_WORDS

    @property
    def label(self) -> str:
        """Number and name."""
        return f"{self.number} {self.name}"

    def fill(self, **numbers: float) -> "Check":
        """Replace the placeholders in `sees` and `blind`, as str.format does."""
        return dataclasses.replace(self, sees=self.sees.format(**numbers), blind=self.blind.format(**numbers))


class Numbers(TypedDict, total=False):
    """Numbers of a verdict, as in the fields of the same names."""

    saw: float | None
    expected: float | None
    bound: float | None
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Verdict:
    """Result of one check on one subject."""

    check: Check
    subject: str  # name of the scorer, or "files"
    outcome: Outcome
    evidence: str  # one sentence: what was done and what came out; for a failure, the reason
    # The observed number, the number that it should equal, and how far apart they may be (0: bit for bit
    # equal). None if there is no such number, or if it must not be in the report, as measured seconds.
    saw: float | None = None
    expected: float | None = None
    bound: float | None = None
    # Token positions in the stream that the evidence is about; for a failure, where it failed first.
    positions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert "{" not in self.check.sees + self.check.blind, f"{self.check.label} has unfilled placeholders"

    @classmethod
    def of(
        cls, check: Check, subject: str, holds: bool, evidence: str, **numbers: Unpack[Numbers]
    ) -> "Verdict":
        """Build a verdict that passes if `holds`, and fails otherwise."""
        return cls(check, subject, "pass" if holds else "fail", evidence, **numbers)

    @classmethod
    def passed(cls, check: Check, subject: str, evidence: str, **numbers: Unpack[Numbers]) -> "Verdict":
        """Build the verdict of a check that passed."""
        return cls(check, subject, "pass", evidence, **numbers)

    @classmethod
    def failed(cls, check: Check, subject: str, evidence: str, **numbers: Unpack[Numbers]) -> "Verdict":
        """Build the verdict of a check that failed."""
        return cls(check, subject, "fail", evidence, **numbers)

    @classmethod
    def cannot_tell(cls, check: Check, subject: str, evidence: str, **numbers: Unpack[Numbers]) -> "Verdict":
        """Build the verdict of a check that could not decide, or could not run."""
        return cls(check, subject, "cannot tell", evidence, **numbers)

    @property
    def shown_numbers(self) -> tuple[float | str, float | str, float | str]:
        """The numbers saw, expected and bound as a report shows them.

        A number that is not finite becomes a string, and the check's words are in place of a missing one.
        """
        # A check that could not tell saw nothing, whatever its other verdicts say.
        words = self.check.words
        saw = words.saw if self.outcome != "cannot tell" else NO_WORDS.saw
        return (
            _number_or(saw, self.saw),
            _number_or(words.expected, self.expected),
            _number_or(words.bound, self.bound),
        )

    def as_json(self) -> dict[str, Any]:
        """Return the verdict for report.json."""
        saw, expected, bound = self.shown_numbers
        return {
            "check": self.check.number,
            "name": self.check.name,
            "subject": self.subject,
            "conditions": list(self.check.conditions),
            "outcome": self.outcome,
            "evidence": self.evidence,
            "saw": saw,
            "expected": expected,
            "bound": bound,
            "positions": list(self.positions),
            "sees": self.check.sees,
            "blind": self.check.blind,
        }


def failures(verdicts: list[Verdict]) -> list[Verdict]:
    """Select the verdicts that failed."""
    return [verdict for verdict in verdicts if verdict.outcome == "fail"]


def failure_message(verdict: Verdict) -> str:
    """Format a failed verdict as one line: what failed, where, and by how much."""
    where = f" at {', '.join(map(str, verdict.positions[:3]))}" if verdict.positions else ""
    saw, expected, bound = verdict.shown_numbers
    check = verdict.check
    return (
        f"{verdict.subject} fails {check.number} ({check.name}){where}: {verdict.evidence} "
        f"[saw {saw}, expected {expected}, bound {bound}]"
    )


def _number_or(words: str, number: float | None) -> float | str:
    if number is None:
        return words
    return number if math.isfinite(number) else str(number)
