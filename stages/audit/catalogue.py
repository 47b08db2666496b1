"""Catalogue of the checks, B1 to B18: the report has a verdict for each of them on each subject.

A check that did not run gets the verdict "cannot tell" with the reason, so that it is never forgotten.
Everything else that is constant of a check is declared with the code that judges.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from stages.audit import isolated
from stages.audit.audit_scorer import PROTOCOL
from stages.audit.checks import (
    budgets,
    call_invariance,
    canary,
    causality,
    certified,
    contamination,
    coverage,
    document_order,
    metamorphic,
    normalisation,
    normalisation_blackbox,
    prefixes,
    round_trip,
    significance,
)
from stages.audit.sandbox import clean_room
from stages.audit.verdict import Check, Verdict


class CatalogueEntry(NamedTuple):
    """All checks of one number."""

    checks: tuple[Check, ...]
    needs: str  # without this none of them can run
    name: str = ""  # of them together, if it is not that of the first

    @property
    def not_run(self) -> Check:
        """The check in the verdict of an entry of which none did run."""
        first = self.checks[0]
        return Check(
            first.number,
            self.name or first.name,
            first.conditions,
            sees="nothing here",
            blind="everything: it was not run",
        )


ANY_SCORER = "a scorer that could be run"
STEPWISE = "predict(), observe() and fork()"
SCORER_CHECKS = (
    CatalogueEntry(
        (causality.FUTURE_PERTURBATION, causality.LEDGER_WITHOUT_FUTURE, prefixes.PREFIXES), needs=ANY_SCORER
    ),
    CatalogueEntry((document_order.DEPENDENCY_GRAPH,), needs=ANY_SCORER),
    CatalogueEntry((normalisation.OWN_TOKEN,), needs=STEPWISE),
    CatalogueEntry(
        (
            normalisation.COUNTERFACTUAL_SUM,
            normalisation.SAMPLED_COUNTERFACTUAL_SUM,
            normalisation.COMMITTED_SUM,
            normalisation_blackbox.COUNTERFACTUAL_SUM,
            normalisation_blackbox.SAMPLED_COUNTERFACTUAL_SUM,
        ),
        needs=ANY_SCORER,
    ),
    CatalogueEntry(
        (normalisation.LEDGER_COMMITMENT, normalisation_blackbox.CHARGED_BLINDLY), needs="a ledger"
    ),
    CatalogueEntry((call_invariance.TRACE,), needs=STEPWISE),
    CatalogueEntry(
        (coverage.COVERAGE, coverage.REPORTED_BPB, coverage.CHUNK_TABLE, PROTOCOL, budgets.VAL_SHARDS),
        needs="a ledger of the whole stream",
    ),
    CatalogueEntry((canary.UNIFORM_CANARY, prefixes.UNIFORM_TAILS), needs=ANY_SCORER),
    CatalogueEntry((canary.SELF_SAMPLED_CANARY,), needs=STEPWISE),
    CatalogueEntry((canary.KNOWN_ENTROPY_CANARIES,), needs=ANY_SCORER),
    CatalogueEntry(
        (metamorphic.PERMUTED_IDS, metamorphic.WITHOUT_MEMORY, metamorphic.ONE_BUCKET),
        needs="a factory that takes `permutation`, `buckets` or `memory_weight`",
        name="metamorphic variants",
    ),
    CatalogueEntry((round_trip.ROUND_TRIP,), needs=f"{STEPWISE}, and another process"),
    CatalogueEntry((call_invariance.PIECES, call_invariance.RERUN), needs=ANY_SCORER),
    CatalogueEntry(
        (
            certified.CERTIFIED_LEDGER,
            certified.CERTIFIED_SUMS,
            certified.CERTIFIED_POWER,
            certified.NO_DISTRIBUTION,
        ),
        needs="predict() and observe()",
        name="certified score",
    ),
    CatalogueEntry((isolated.SANDBOX,), needs="a process of its own"),
)
FILE_CHECKS = (
    CatalogueEntry(
        (
            coverage.DENOMINATOR,
            coverage.BYTE_TABLE,
            coverage.NORMALISER,
            coverage.TEXT,
            coverage.OFFICIAL_TOTALS,
            budgets.TOKENIZER_FILE,
        ),
        needs="tokens and their tokenizer",
    ),
    CatalogueEntry(
        (
            clean_room.COUNTED_FILES_ALONE,
            clean_room.OPENED_FILES,
            clean_room.LINKS_MOUNTS_SOCKETS,
            clean_room.NO_NETWORK,
            clean_room.WALL_CLOCK,
        ),
        needs="a command that scores in an empty folder",
        name="clean room",
    ),
    CatalogueEntry(
        (budgets.DISJOINT, contamination.SHARED_PASSAGES), needs="the training documents, or their hashes"
    ),
    CatalogueEntry((significance.SIGNIFICANCE,), needs="three seeds of one configuration and a baseline"),
    CatalogueEntry((budgets.SIZES, *budgets.CLOCKS.values()), needs="the counted files"),
)


def with_missing(
    verdicts: Sequence[Verdict], scorers: Sequence[str], reasons: Mapping[str, str] | None = None
) -> list[Verdict]:
    """Add a "cannot tell" for each number of the catalogue that has no verdict.

    scorers: subjects that need every number of SCORER_CHECKS; reasons: explanations by number, instead
    of `needs`.
    """
    reasons = reasons or {}
    complete = list(verdicts)

    numbers_on_subject = {(verdict.subject, verdict.check.number) for verdict in verdicts}
    for subject in scorers:
        for entry in SCORER_CHECKS:
            if (subject, entry.not_run.number) not in numbers_on_subject:
                complete.append(not_run(subject, entry, reasons))

    numbers_on_anything = {verdict.check.number for verdict in verdicts}
    for entry in FILE_CHECKS:
        if entry.not_run.number not in numbers_on_anything:
            complete.append(not_run("files", entry, reasons))
    return complete


def not_run(subject: str, entry: CatalogueEntry, reasons: Mapping[str, str]) -> Verdict:
    """Build the verdict of checks that did not run."""
    check = entry.not_run
    reason = reasons.get(check.number, f"needs {entry.needs}")
    return Verdict.cannot_tell(check, subject, f"not run: {reason}")
