"""The audit's report: report.md for people, report.json for programs.

Neither holds a time or a date, so both repeat exactly.
"""

from collections.abc import Mapping
from typing import Any

from stages.audit.verdict import Outcome, Verdict, failure_message, failures

CONDITIONS = {  # the rules of the challenge; C1 to C4 are the four conditions of a lawful score (#1017)
    "C1": "strict causal dependence",
    "C2": "full normalised distribution",
    "C3": "score before update",
    "C4": "one left-to-right pass",
    "metric": "metric reporting",
    "budget": "budgets",
    "clean room": "clean room",
    "data": "train and val data",
    "statistics": "statistics",
}
# Checks without which a condition cannot be said to hold; the other checks add to them.
ESSENTIAL = {
    "C1": {"B1", "B17", "B18"},
    "C2": {"B3", "B17", "B18"},
    "C3": {"B3", "B17", "B18"},
    "C4": {"B1", "B6", "B17", "B18"},
    "metric": {"B6", "B11"},
    "budget": {"budget"},
    "clean room": {"B14"},
    "data": {"B15"},
    "statistics": {"B16"},
}
WORST_FIRST: tuple[Outcome, ...] = ("fail", "cannot tell", "pass")
SHOWN_POSITIONS = 6  # of a verdict in report.md; report.json has all
HEADER = ["subject", "check", "verdict", "saw", "expected", "bound", "evidence", "positions"]


def outcomes_by_condition(verdicts: list[Verdict]) -> dict[str, dict[str, Outcome]]:
    """Combine the verdicts to one outcome for each condition and each subject that was checked against it.

    "fail" if one check fails; "cannot tell" if an essential check could not tell, or nothing passed;
    else "pass".
    """
    table: dict[str, dict[str, Outcome]] = {}
    for condition in CONDITIONS:
        relevant = [verdict for verdict in verdicts if condition in verdict.check.conditions]
        table[condition] = {
            subject: _combine(condition, [verdict for verdict in relevant if verdict.subject == subject])
            for subject in dict.fromkeys(verdict.subject for verdict in relevant)
        }
    return table


def count_outcomes(verdicts: list[Verdict]) -> dict[str, Any]:
    """Build metrics.json: whether the audit passed (1 or 0), and the number of verdicts with each outcome."""
    outcomes = [verdict.outcome for verdict in verdicts]
    return {
        "audit_passed": int("fail" not in outcomes),
        "audit_pass": outcomes.count("pass"),
        "audit_fail": outcomes.count("fail"),
        "audit_cannot_tell": outcomes.count("cannot tell"),
    }


def as_json(verdicts: list[Verdict], declared: Mapping[str, Any]) -> dict[str, Any]:
    """Build report.json: counts, declared inputs, outcomes by condition, and every verdict in full."""
    return count_outcomes(verdicts) | {
        "declared": dict(declared),
        "conditions": outcomes_by_condition(verdicts),
        "verdicts": [verdict.as_json() for verdict in verdicts],
    }


def as_markdown(verdicts: list[Verdict], declared: Mapping[str, Any]) -> str:
    """Build report.md: outcomes by condition, the verdicts on each, and the limits of each kind of check."""
    failed = failures(verdicts)
    counts = count_outcomes(verdicts)
    lines = [
        "# Audit",
        "",
        f"**{_headline(verdicts)}**: {counts['audit_pass']} passed, {counts['audit_fail']} failed,"
        f" {counts['audit_cannot_tell']} cannot tell.",
        "",
    ]
    if failed:
        lines += [*(f"- {failure_message(verdict)}" for verdict in failed), ""]
    lines += ["Declared: " + ", ".join(f"{name} {value}" for name, value in declared.items()) + ".", ""]

    lines += ["## Conditions", "", *_overview(verdicts)]
    for condition in CONDITIONS:
        lines += ["", f"## {_title(condition)}", "", *_table(HEADER, _verdict_rows(condition, verdicts))]

    lines += ["", "## What each check can and cannot detect", ""]
    lines += _table(["check", "name", "detects", "cannot detect"], _detection_rows(verdicts))
    lines += ["", "A verdict holds for this run and the drawn positions only.", ""]
    return "\n".join(lines)


def untold_conditions(verdicts: list[Verdict]) -> list[str]:
    """List the conditions C1 to C4 that cannot be told for some subject."""
    table = outcomes_by_condition(verdicts)
    return [name for name in ("C1", "C2", "C3", "C4") if "cannot tell" in table[name].values()]


def _headline(verdicts: list[Verdict]) -> str:
    if failures(verdicts):
        return "fail"
    untold = untold_conditions(verdicts)
    return f"no check failed, but {', '.join(untold)} cannot be told" if untold else "pass"


def _combine(condition: str, verdicts: list[Verdict]) -> Outcome:
    """Combine the verdicts of one subject on one condition."""
    outcomes = {verdict.outcome for verdict in verdicts}
    if "fail" in outcomes:
        return "fail"
    essential = {verdict.outcome for verdict in verdicts if verdict.check.number in ESSENTIAL[condition]}
    if "cannot tell" in essential or "pass" not in outcomes:
        return "cannot tell"
    return "pass"


def _title(condition: str) -> str:
    name = CONDITIONS[condition]
    return f"{condition}: {name}" if condition.startswith("C") else name[0].upper() + name[1:]


def _overview(verdicts: list[Verdict]) -> list[str]:
    """Build the table with a row for each condition and a column for each subject."""
    subjects = list(dict.fromkeys(verdict.subject for verdict in verdicts))
    rows = []
    for condition, outcomes in outcomes_by_condition(verdicts).items():
        cells = [_overview_cell(condition, subject, outcomes, verdicts) for subject in subjects]
        rows.append([_title(condition), *cells])
    return _table(["condition", *subjects], rows)


def _overview_cell(
    condition: str, subject: str, outcomes: Mapping[str, Outcome], verdicts: list[Verdict]
) -> str:
    if subject not in outcomes:
        return "-"
    relevant = [v for v in verdicts if v.subject == subject and condition in v.check.conditions]
    unsure = sum(verdict.outcome == "cannot tell" for verdict in relevant)
    if outcomes[subject] == "pass" and unsure:
        return f"pass ({unsure} could not tell)"
    return _bold_fail(outcomes[subject])


def _verdict_rows(condition: str, verdicts: list[Verdict]) -> list[list[str]]:
    """Build a row for each verdict on the condition, the worst first."""
    relevant = [verdict for verdict in verdicts if condition in verdict.check.conditions]
    relevant.sort(key=lambda verdict: WORST_FIRST.index(verdict.outcome))
    if not relevant:
        return [["-", "-", "cannot tell", "-", "-", "-", "no check covers this condition", "-"]]
    return [_verdict_row(verdict) for verdict in relevant]


def _verdict_row(verdict: Verdict) -> list[str]:
    numbers = [
        f"{number:.9g}" if isinstance(number, float) else str(number) for number in verdict.shown_numbers
    ]
    positions = ", ".join(map(str, verdict.positions[:SHOWN_POSITIONS]))
    if len(verdict.positions) > SHOWN_POSITIONS:
        positions += ", ..."
    outcome = _bold_fail(verdict.outcome)
    return [verdict.subject, verdict.check.label, outcome, *numbers, verdict.evidence, positions or "-"]


def _detection_rows(verdicts: list[Verdict]) -> list[list[str]]:
    """Build a row for each kind of check that ran, without repetitions."""
    checks = [verdict.check for verdict in verdicts if verdict.outcome != "cannot tell"]
    rows = [(check.number, check.name, check.sees, check.blind) for check in checks]
    return [list(row) for row in dict.fromkeys(rows)]


def _bold_fail(outcome: str) -> str:
    return f"**{outcome}**" if outcome == "fail" else outcome


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Format a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
