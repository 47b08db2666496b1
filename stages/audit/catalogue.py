"""Catalogue of the checks, B1 to B16: the report has a verdict for each of them on each subject.

A check that did not run gets the verdict "cannot tell" with the reason, so that it is never forgotten.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from stages.audit.verdict import Verdict


class CatalogueEntry(NamedTuple):
    """One check of the catalogue."""

    name: str
    conditions: tuple[str, ...]  # keys of report.CONDITIONS
    needs: str  # without this it cannot run


ANY_SCORER = "a scorer that could be run"
STEPWISE = "predict(), observe() and fork()"
SCORER_CHECKS = {
    "B1": CatalogueEntry("future perturbation", ("C1", "C3", "C4"), ANY_SCORER),
    "B1c": CatalogueEntry("dependency graph", ("C1", "C4"), ANY_SCORER),
    "B2": CatalogueEntry("own-token independence", ("C1", "C2", "C3"), STEPWISE),
    "B3": CatalogueEntry("counterfactual sum", ("C2", "C3"), ANY_SCORER),
    "B4": CatalogueEntry("ledger equals commitment", ("C1", "C2", "C3", "metric"), "predict(), and a ledger"),
    "B5": CatalogueEntry("reading leaves no trace", ("C3", "C4"), STEPWISE),
    "B6": CatalogueEntry("coverage", ("C4", "metric"), "a ledger of the whole stream"),
    "B7": CatalogueEntry("uniform canary", ("C1", "C2"), ANY_SCORER),
    "B8": CatalogueEntry("self-sampled canary", ("C1", "C2"), STEPWISE),
    "B9": CatalogueEntry("known-entropy canaries", ("C1", "C2"), ANY_SCORER),
    "B10": CatalogueEntry(
        "metamorphic variants", ("C2",), "a factory that takes `permutation`, `buckets` or `memory_weight`"
    ),
    "B12": CatalogueEntry("decoder round trip", ("C1", "C2", "C3", "C4"), f"{STEPWISE}, and a fresh process"),
    "B13": CatalogueEntry("whole or in pieces", ("C1", "C3", "C4"), ANY_SCORER),
}
FILE_CHECKS = {
    "B11": CatalogueEntry("denominator", ("metric",), "tokens and their tokenizer"),
    "B14": CatalogueEntry("clean room", ("clean room",), "a command that scores in an empty folder"),
    "B15": CatalogueEntry("train and val disjoint", ("data",), "the training documents, or their hashes"),
    "B16": CatalogueEntry("significance", ("statistics",), "three seeds of one configuration and a baseline"),
    "budget": CatalogueEntry("bytes", ("budget",), "the counted files"),
}


def with_missing(
    verdicts: Sequence[Verdict], scorers: Sequence[str], reasons: Mapping[str, str] | None = None
) -> list[Verdict]:
    """Add a "cannot tell" for each check of the catalogue that has no verdict.

    scorers: subjects that need every check of SCORER_CHECKS; reasons: explanations by check number,
    instead of `needs`.
    """
    reasons = reasons or {}
    complete = list(verdicts)

    checks_on_subject = {(verdict.subject, verdict.check) for verdict in verdicts}
    for subject in scorers:
        for check, entry in SCORER_CHECKS.items():
            if (subject, check) not in checks_on_subject:
                complete.append(not_run(subject, check, entry, reasons))

    checks_on_anything = {verdict.check for verdict in verdicts}
    for check, entry in FILE_CHECKS.items():
        if check not in checks_on_anything:
            complete.append(not_run("files", check, entry, reasons))
    return complete


def not_run(subject: str, check: str, entry: CatalogueEntry, reasons: Mapping[str, str]) -> Verdict:
    """Build the verdict of a check that did not run."""
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
