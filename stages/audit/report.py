"""The report: one verdict a row for a person, everything for a program. Neither holds a time or a date."""

from collections.abc import Mapping
from typing import Any

from stages.audit.verdict import Outcome, Verdict, convicted, reason

CONDITIONS = {
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
# Without these a condition cannot be said to hold; the other checks add to them.
ESSENTIAL = {
    "C1": {"B1"},
    "C2": {"B3"},
    "C3": {"B3"},
    "C4": {"B1", "B6"},
    "metric": {"B6", "B11"},
    "budget": {"budget"},
    "clean room": {"B14"},
    "data": {"B15"},
    "statistics": {"B16"},
}
WORST_FIRST: tuple[Outcome, ...] = ("fail", "cannot tell", "pass")
SHOWN = 6  # positions of a verdict in the readable report; report.json has all


def of_conditions(verdicts: list[Verdict]) -> dict[str, dict[str, Outcome]]:
    """For each condition and each subject that was held against it: one outcome.

    "fail" if one check fails; "cannot tell" if an essential check could not tell, or nothing passed; else "pass".
    """
    table: dict[str, dict[str, Outcome]] = {key: {} for key in CONDITIONS}
    for key, row in table.items():
        for subject in dict.fromkeys(verdict.subject for verdict in verdicts if key in verdict.conditions):
            held = [
                verdict for verdict in verdicts if verdict.subject == subject and key in verdict.conditions
            ]
            outcomes = {verdict.outcome for verdict in held}
            missing = any(
                verdict.outcome == "cannot tell" and verdict.check in ESSENTIAL[key] for verdict in held
            )
            row[subject] = (
                "fail"
                if "fail" in outcomes
                else "cannot tell"
                if missing or "pass" not in outcomes
                else "pass"
            )
    return table


def summary(verdicts: list[Verdict]) -> dict[str, Any]:
    """metrics.json: whether the audit passed, and how many verdicts there are of each kind."""
    counts = {
        name: sum(verdict.outcome == name for verdict in verdicts) for name in ("pass", "fail", "cannot tell")
    }
    return {
        "audit_passed": int(counts["fail"] == 0),
        "audit_pass": counts["pass"],
        "audit_fail": counts["fail"],
        "audit_cannot_tell": counts["cannot tell"],
    }


def as_json(verdicts: list[Verdict], declared: Mapping[str, Any]) -> dict[str, Any]:
    """report.json: conditions by subject, every verdict whole, and what the audit was told (the stream's length, the positions' key)."""
    return summary(verdicts) | {
        "declared": dict(declared),
        "conditions": of_conditions(verdicts),
        "verdicts": [verdict.as_json() for verdict in verdicts],
    }


def as_markdown(verdicts: list[Verdict], declared: Mapping[str, Any]) -> str:
    """report.md: conditions by subject, the verdicts under each condition, and what each kind of check can and cannot see."""
    guilty = convicted(verdicts)
    lines = ["# Audit", "", f"**{'fail' if guilty else 'pass'}**: " + _counted(verdicts), ""]
    lines += [f"- {reason(verdict)}" for verdict in guilty] + ([""] if guilty else [])
    lines += ["Declared: " + ", ".join(f"{name} {value}" for name, value in declared.items()) + ".", ""]
    lines += ["## Conditions", "", *_overview(verdicts)]
    for key, name in CONDITIONS.items():
        lines += ["", f"## {_title(key, name)}", "", *_table(HEAD, _rows(key, verdicts))]
    lines += ["", "## What each check can and cannot see", ""]
    lines += _table(["check", "name", "sees", "cannot see"], _sight_rows(verdicts))
    lines += [
        "",
        "A verdict speaks of the run that was audited and of the positions drawn, and of nothing else.",
        "",
    ]
    return "\n".join(lines)


HEAD = ["subject", "check", "verdict", "saw", "expected", "bound", "evidence", "positions"]


def _title(key: str, name: str) -> str:
    return f"{key}: {name}" if key.startswith("C") else name[0].upper() + name[1:]


def _overview(verdicts: list[Verdict]) -> list[str]:
    subjects = list(dict.fromkeys(verdict.subject for verdict in verdicts))
    table = of_conditions(verdicts)
    rows = [
        [_title(key, name), *(_cell(key, subject, table[key], verdicts) for subject in subjects)]
        for key, name in CONDITIONS.items()
    ]
    return _table(["condition", *subjects], rows)


def _cell(key: str, subject: str, row: Mapping[str, Outcome], verdicts: list[Verdict]) -> str:
    unsure = sum(v.outcome == "cannot tell" for v in verdicts if v.subject == subject and key in v.conditions)
    more = f" ({unsure} could not tell)" if unsure and row[subject] == "pass" else ""
    return _marked(row.get(subject, "-")) + more


def _rows(key: str, verdicts: list[Verdict]) -> list[list[str]]:
    """The verdicts on one condition, the worst first; a condition that nothing looked at says so."""
    held = [verdict for verdict in verdicts if key in verdict.conditions]
    held.sort(key=lambda verdict: WORST_FIRST.index(verdict.outcome))
    return [_row(verdict) for verdict in held] or [
        ["-", "-", "cannot tell", "-", "-", "-", "no check looked at it", "-"]
    ]


def _row(verdict: Verdict) -> list[str]:
    places = ", ".join(map(str, verdict.positions[:SHOWN])) + (
        ", ..." if len(verdict.positions) > SHOWN else ""
    )
    numbers = [
        f"{number:.9g}" if isinstance(number, float) else str(number)
        for number in (verdict.saw, verdict.expected, verdict.bound)
    ]
    return [
        verdict.subject,
        f"{verdict.check} {verdict.name}",
        _marked(verdict.outcome),
        *numbers,
        verdict.evidence,
        places or "-",
    ]


def _marked(result: str) -> str:
    return f"**{result}**" if result == "fail" else result


def _counted(verdicts: list[Verdict]) -> str:
    counts = summary(verdicts)
    return f"{counts['audit_pass']} passed, {counts['audit_fail']} failed, {counts['audit_cannot_tell']} cannot tell."


def _sight_rows(verdicts: list[Verdict]) -> list[list[str]]:
    rows = [
        [verdict.check, verdict.name, verdict.sees, verdict.blind]
        for verdict in verdicts
        if verdict.outcome != "cannot tell"
    ]
    return [list(row) for row in dict.fromkeys(map(tuple, rows))]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
