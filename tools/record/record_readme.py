"""Render the README of a record from its submission.json and data/leaderboard.yaml.

Like the README of one seed (stages/submission/readme.py), it contains no measurement.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.audit.report import CONDITIONS
from stages.common.challenge import VALIDATION_BYTES
from stages.submission.readme import markdown_table
from tools.record.leaderboard import PULL_REQUESTS, Credit, Leaderboard
from tools.record.record import is_official


def render_readme(summary: Mapping[str, Any], board: Leaderboard) -> str:
    """Return the text of README.md."""
    head = (
        f"# {summary['name']}\n\n{summary['blurb']}\n\n"
        f"**val_bpb {summary['val_bpb']:.6f}** (mean of {len(summary['seeds'])} seeds,"
        f" sample deviation {summary['val_bpb_std']:.6f}),"
        f" **{summary['bytes_total']:,} bytes** (the worst seed), track {summary['track']},"
        f" by {summary['author']} ({summary['github_id']})"
    )
    sections = [
        head,
        _seeds(summary),
        *([_claim(summary["claim"])] if "claim" in summary else []),
        _new(summary, board),
        _credits(board.credited(summary["parameters"])),
        _reproduce(summary),
        _compliance(summary),
        _experimental(summary),
        _coverage(summary),
        "This folder is generated. `submission.json` has all parameters, hashes, verdicts and commits"
        " and, in the field `measured`, times, hardware and versions of each run;"
        " `train_seed*.log` have the logs of all stages.",
    ]
    return "\n\n".join(sections) + "\n"


def _seeds(summary: Mapping[str, Any]) -> str:
    header = (
        "seed",
        "val_bpb",
        "val_loss (nats per token)",
        "steps",
        "bytes_code",
        "bytes_model",
        "bytes_total",
    )
    rows = []
    for seed, result in summary["seed_results"].items():
        rows.append(_result_row(seed, result, f"{result['steps']:,}"))
    rows.append(_result_row("mean; worst bytes", summary, ""))
    deviations = (f"{summary['val_bpb_std']:.8f}", f"{summary['val_loss_std']:.8f}")
    rows.append(("sample deviation", *deviations, "", "", "", ""))
    intro = f"Scored with {summary['scorer']}, which was named before the runs."
    return f"## Seeds\n\n{intro}\n\n" + markdown_table(header, rows)


def _result_row(name: str, result: Mapping[str, Any], steps: str) -> tuple[str, ...]:
    sizes = (f"{result[key]:,}" for key in ("bytes_code", "bytes_model", "bytes_total"))
    return (name, f"{result['val_bpb']:.8f}", f"{result['val_loss']:.8f}", steps, *sizes)


def _claim(claim: Mapping[str, Any]) -> str:
    # The baseline.
    against = claim["against"]
    spread = "no deviation stated"
    if against["deviation"] is not None:
        spread = f"deviation {against['deviation']:.6f}, {against['seeds']} seeds"
    intro = (
        f"Against {against['name']} ({against['source']}, {against['status']}):"
        f" {against['mean']:.6f} bpb, {spread}."
    )

    # A row for each test.
    header = (
        "better by",
        "tested over other",
        "margin, bpb",
        "gain, bpb",
        "p",
        f"at p < {claim['level']}",
        "seeds needed",
    )

    # Margin: the claimed nats in bits per byte, which the gain must exceed at the level of p.
    rows = []
    for test in claim["tests"]:
        # Tests over documents have no seeds_needed, nor have those that MAX_SEEDS seeds would not pass.
        rows.append(
            (
                f"{claim['nats']} nats per {test['unit']}",
                test["chance"],
                f"{test['margin_bpb']:.6f}",
                f"{test['gain_bpb']:+.6f}",
                f"{test['p']:.2g}",
                "shown" if test["shown"] else "not shown",
                str(test["seeds_needed"] or "-"),
            )
        )

    # The verdict sums up the tests, so it comes before their table.
    return f"## Claim\n\n{intro} {claim['verdict']}\n\n" + markdown_table(header, rows)


def _new(summary: Mapping[str, Any], board: Leaderboard) -> str:
    items = [f"- {entry.what}" for entry in board.own if entry.applies(summary["parameters"])]
    nothing = "Nothing: the parameters switch on only what the credits below name."
    return "## What is new\n\n" + ("\n".join(items) if items else nothing)


def _credits(credited: Sequence[Credit]) -> str:
    always = [_credit(credit) for credit in credited if not credit.when]
    switched_on = [_credit(credit) for credit in credited if credit.when]
    text = "## Base and credits\n\n" + "\n".join(always)
    if switched_on:
        text += "\n\nSwitched on by the parameters:\n\n" + "\n".join(switched_on)
    return text


def _credit(credit: Credit) -> str:
    author = f", {credit.author}" if credit.author else ""
    return f"- [#{credit.number}]({PULL_REQUESTS}pull/{credit.number}){author}: {credit.what}"


def _reproduce(summary: Mapping[str, Any]) -> str:
    processes = summary["parameters"]["parallel"]["nproc"]
    start = "python" if processes == 1 else f"torchrun --standalone --nproc-per-node={processes}"
    lines = [f"SEED={seed} {start} train_gpt.py && {start} train_gpt.py eval" for seed in summary["seeds"]]
    return (
        "## How to reproduce\n\n"
        "In a folder with `train_gpt.py`, the training shards in `data/train/`, the validation shards in\n"
        "`data/val/` and `data/tokenizer.model`; each line trains, calibrates and packs `model.bin`, then\n"
        "scores it in a fresh process:\n\n"
        "```sh\npip install -r requirements.txt\n" + "\n".join(lines) + "\n```\n\n"
        "In a clone of the repository that made this folder, `python -m tools.rebuild` with this folder\n"
        "runs the whole pipeline again from the recorded commit and compares every byte."
    )


def _compliance(summary: Mapping[str, Any]) -> str:
    audits = summary["audit"]
    counts = []
    for seed, verdicts in audits.items():
        passed = sum(verdict["outcome"] == "pass" for verdict in verdicts)
        counts.append(f"seed {seed}: {passed} of {len(verdicts)} pass")
    parts = [
        "## Compliance",
        f"None of the audit's verdicts is a fail ({'; '.join(counts)})."
        " The evidence is that of the first seed; submission.json has all.",
    ]

    # A table for each condition of the challenge, and for the other groups of checks.
    for condition, words in CONDITIONS.items():
        rows = _verdict_rows(audits, summary["scorer"], condition)
        if rows:
            is_numbered = condition.startswith("C")  # C1 to C4
            parts.append(f"{condition}, {words}:" if is_numbered else f"{words[0].upper()}{words[1:]}:")
            header = ("check", "on", *(f"seed {seed}" for seed in audits), "evidence")
            parts.append(markdown_table(header, rows))
    return "\n\n".join(parts)


def _verdict_rows(
    audits: Mapping[str, Sequence[Mapping[str, Any]]], scorer: str, condition: str
) -> list[tuple[str, ...]]:
    """Return a row for each verdict on the claimed scorer and the files, with its outcome in every run."""
    outcomes_by_run = []
    for verdicts in audits.values():
        outcomes_by_run.append({(v["check"], v["name"], v["subject"]): v["outcome"] for v in verdicts})

    rows = []
    first_audit = next(iter(audits.values()))
    for v in first_audit:
        if condition in v["conditions"] and v["subject"] in (scorer, "files"):
            key = (v["check"], v["name"], v["subject"])
            outcomes = [found.get(key, "absent") for found in outcomes_by_run]
            rows.append((f"{v['check']} {v['name']}", v["subject"], *outcomes, v["evidence"]))
    return rows


def _experimental(summary: Mapping[str, Any]) -> str:
    rows = []
    for name, score in summary["scores"].items():
        if name != summary["scorer"]:
            rows.append((name, f"{score['bpb']:.8f}", f"{score['bpb_std']:.8f}"))
    table = markdown_table(("scorer", "bpb, mean", "sample deviation"), rows)
    return f"## Experimental\n\nOther scores of the same models, which are not claimed.\n\n{table}"


def _coverage(summary: Mapping[str, Any]) -> str:
    if is_official(summary):
        text = f"The challenge's logs count {VALIDATION_BYTES:,} bytes of the same text."
    else:
        text = (
            f"The challenge's validation text has {VALIDATION_BYTES:,} bytes: this is another text,"
            " and its score does not compare with that leaderboard."
        )
    return f"## Coverage\n\n{summary['val_bpb_note']}\n\n{text}"
