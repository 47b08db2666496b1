"""Every test of the list of rules, B1 to B16: what was not run is said, and not forgotten.

The report has a verdict for each of them on each subject. Where nothing ran, that verdict is "cannot tell" with the reason.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from stages.audit.verdict import Verdict


class Entry(NamedTuple):
    """A test of the list."""

    name: str
    conditions: tuple[str, ...]
    needs: str  # why it may not have been run


OF_SCORERS = {
    "B1": Entry("future perturbation", ("C1", "C3", "C4"), "a scorer that could be run"),
    "B1c": Entry("dependency graph", ("C1", "C4"), "a scorer that could be run"),
    "B2": Entry("own-token independence", ("C1", "C2", "C3"), "predict(), observe() and fork()"),
    "B3": Entry("counterfactual sum", ("C2", "C3"), "a scorer that could be run"),
    "B4": Entry("ledger equals commitment", ("C1", "C2", "C3", "metric"), "predict(), and a ledger"),
    "B5": Entry("reading leaves no trace", ("C3", "C4"), "predict(), observe() and fork()"),
    "B6": Entry("coverage", ("C4", "metric"), "a ledger of the whole stream"),
    "B7": Entry("uniform canary", ("C1", "C2"), "a scorer that could be run"),
    "B8": Entry("self-sampled canary", ("C1", "C2"), "predict(), observe() and fork()"),
    "B9": Entry("known-entropy canaries", ("C1", "C2"), "a scorer that could be run"),
    "B10": Entry(
        "metamorphic variants", ("C2",), "a factory that takes `permutation`, `buckets` or `memory_weight`"
    ),
    "B12": Entry(
        "decoder round trip", ("C1", "C2", "C3", "C4"), "predict(), observe() and fork(), and a fresh process"
    ),
    "B13": Entry("whole or in pieces", ("C1", "C3", "C4"), "a scorer that could be run"),
}
OF_FILES = {
    "B11": Entry("denominator", ("metric",), "tokens and their tokenizer"),
    "B14": Entry("clean room", ("clean room",), "a command that scores in an empty folder"),
    "B15": Entry("train and val disjoint", ("data",), "the training documents, or their hashes"),
    "B16": Entry("significance", ("statistics",), "three seeds of one configuration and a baseline"),
    "budget": Entry("bytes", ("budget",), "the counted files"),
}


def complete(
    verdicts: Sequence[Verdict], scorers: Sequence[str], reasons: Mapping[str, str] | None = None
) -> list[Verdict]:
    """The verdicts, and one "cannot tell" for each test that is missing among them; `reasons` says why, by test."""
    found = {(verdict.subject, verdict.check) for verdict in verdicts}
    wanted = [(subject, check, entry) for subject in scorers for check, entry in OF_SCORERS.items()]
    absent = [
        not_run(subject, check, entry, reasons or {})
        for subject, check, entry in wanted
        if (subject, check) not in found
    ]
    run = {verdict.check for verdict in verdicts}
    absent += [
        not_run("files", check, entry, reasons or {}) for check, entry in OF_FILES.items() if check not in run
    ]
    return [*verdicts, *absent]


def not_run(subject: str, check: str, entry: Entry, reasons: Mapping[str, str]) -> Verdict:
    """The verdict of a test that was not run."""
    return Verdict(
        check=check,
        name=entry.name,
        subject=subject,
        conditions=entry.conditions,
        outcome="cannot tell",
        evidence=f"not run: {reasons.get(check, f'needs {entry.needs}')}",
        saw="nothing",
        expected="-",
        bound="-",
        positions=(),
        sees="nothing here",
        blind="everything: it was not run",
    )
