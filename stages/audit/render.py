"""The report: one verdict a row for a person, everything for a program. Neither holds a time or a date."""

from collections.abc import Mapping
from typing import Any

from stages.audit.verdict import Verdict, convicted, reason

CONDITIONS = {
    "C1": "strict causal dependence",
    "C2": "full normalised distribution",
    "C3": "score before update",
    "C4": "one left-to-right pass",
    "metric": "metric reporting",
    "budget": "budgets",
    "data": "train and val data",
}


def summary(verdicts: list[Verdict]) -> dict[str, Any]:
    """metrics.json: whether the audit passed, and how many verdicts there are of each kind."""
    counts = {name: sum(verdict.outcome == name for verdict in verdicts) for name in ("pass", "fail", "cannot tell")}
    return {
        "audit_passed": int(counts["fail"] == 0),
        "audit_pass": counts["pass"],
        "audit_fail": counts["fail"],
        "audit_cannot_tell": counts["cannot tell"],
    }


def as_json(verdicts: list[Verdict], declared: Mapping[str, Any]) -> dict[str, Any]:
    """report.json: every verdict whole, and what the audit was told (the stream's length, the key of the positions)."""
    return summary(verdicts) | {"declared": dict(declared), "verdicts": [verdict.as_json() for verdict in verdicts]}


def as_markdown(verdicts: list[Verdict], declared: Mapping[str, Any]) -> str:
    """report.md: the table of conditions by subject, the verdicts, and what each kind of check can and cannot see."""
    subjects = list(dict.fromkeys(verdict.subject for verdict in verdicts))
    guilty = convicted(verdicts)
    lines = ["# Audit", "", f"**{'fail' if guilty else 'pass'}**: " + _counted(verdicts), ""]
    lines += [f"- {reason(verdict)}" for verdict in guilty] + ([""] if guilty else [])
    lines += ["Declared: " + ", ".join(f"{name} {value}" for name, value in declared.items()) + ".", ""]
    lines += ["## Conditions", "", *_table(["condition", *subjects], [_condition_row(key, subjects, verdicts) for key in CONDITIONS])]
    for subject in subjects:
        rows = [_verdict_row(verdict) for verdict in verdicts if verdict.subject == subject]
        lines += ["", f"## {subject}", "", *_table(["check", "name", "on", "verdict", "evidence", "positions"], rows)]
    lines += ["", "## What each check can and cannot see", ""]
    lines += _table(["check", "name", "sees", "cannot see"], _sight_rows(verdicts))
    lines += ["", "A verdict speaks of the run that was audited and of the positions drawn, and of nothing else.", ""]
    return "\n".join(lines)


def _counted(verdicts: list[Verdict]) -> str:
    counts = summary(verdicts)
    return f"{counts['audit_pass']} passed, {counts['audit_fail']} failed, {counts['audit_cannot_tell']} cannot tell."


def _condition_row(key: str, subjects: list[str], verdicts: list[Verdict]) -> list[str]:
    cells = []
    for subject in subjects:
        outcomes = [verdict.outcome for verdict in verdicts if verdict.subject == subject and key in verdict.conditions]
        worst = next((name for name in ("fail", "cannot tell", "pass") if name in outcomes), "-")
        cells.append(f"**{worst}**" if worst == "fail" else worst)
    return [f"{key}: {CONDITIONS[key]}" if key.startswith("C") else CONDITIONS[key], *cells]


def _verdict_row(verdict: Verdict) -> list[str]:
    mark = f"**{verdict.outcome}**" if verdict.outcome == "fail" else verdict.outcome
    places = ", ".join(map(str, verdict.positions)) or "-"
    return [verdict.check, verdict.name, ", ".join(verdict.conditions), mark, verdict.evidence, places]


def _sight_rows(verdicts: list[Verdict]) -> list[list[str]]:
    rows = [[verdict.check, verdict.name, verdict.sees, verdict.blind] for verdict in verdicts]
    return [list(row) for row in dict.fromkeys(map(tuple, rows))]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
