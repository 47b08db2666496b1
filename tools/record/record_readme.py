"""The README of a record, from its submission.json and data/leaderboard.yaml; like that of one seed it holds no measured value."""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.audit.report import CONDITIONS
from stages.common.clock import OFFICIAL_BYTES
from stages.submission.readme import table
from tools.record.leaderboard import PULLS, Credit, Leaderboard
from tools.record.record import is_official


def render(summary: Mapping[str, Any], board: Leaderboard) -> str:
    """The text of README.md."""
    head = (
        f"# {summary['name']}\n\n{summary['blurb']}\n\n"
        f"**val_bpb {summary['val_bpb']:.6f}** (mean of {len(summary['seeds'])} seeds, sample deviation {summary['val_bpb_std']:.6f}),"
        f" **{summary['bytes_total']:,} bytes** (the worst seed), track {summary['track']}, by {summary['author']} ({summary['github_id']})"
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
        "Everything here is generated. `submission.json` has all parameters, hashes, verdicts and commits and, below `measured`, times,"
        " hardware and versions of each run; `train_seed*.log` have the logs of all stages.",
    ]
    return "\n\n".join(sections) + "\n"


def _seeds(summary: Mapping[str, Any]) -> str:
    rows = [_row(seed, result, f"{result['steps']:,}") for seed, result in summary["seed_results"].items()]
    rows.append(_row("mean; worst bytes", summary, ""))
    rows.append(
        (
            "sample deviation",
            f"{summary['val_bpb_std']:.8f}",
            f"{summary['val_loss_std']:.8f}",
            "",
            "",
            "",
            "",
        )
    )
    header = (
        "seed",
        "val_bpb",
        "val_loss (nats per token)",
        "steps",
        "bytes_code",
        "bytes_model",
        "bytes_total",
    )
    return f"## Seeds\n\nScored with {summary['scorer']}, named before the runs.\n\n" + table(header, rows)


def _row(name: str, result: Mapping[str, Any], steps: str) -> tuple[str, ...]:
    sizes = (f"{result[key]:,}" for key in ("bytes_code", "bytes_model", "bytes_total"))
    return (name, f"{result['val_bpb']:.8f}", f"{result['val_loss']:.8f}", steps, *sizes)


def _claim(claim: Mapping[str, Any]) -> str:
    against = claim["against"]
    spread = (
        "no deviation stated"
        if against["deviation"] is None
        else f"deviation {against['deviation']:.6f}, {against['seeds']} seeds"
    )
    rows = []
    for test in claim["tests"]:
        sizes = f"{test['margin_bpb']:.6f}", f"{test['gain_bpb']:+.6f}", f"{test['p']:.2g}"
        shown = "shown" if test["shown"] else "not shown"
        rows.append(
            (
                f"{claim['nats']} nats per {test['unit']}",
                test["chance"],
                *sizes,
                shown,
                str(test["seeds_needed"] or "-"),
            )
        )
    header = (
        "better by",
        "over other",
        "margin, bpb",
        "gain, bpb",
        "p",
        f"at p < {claim['level']}",
        "seeds needed",
    )
    intro = f"Against {against['name']} ({against['source']}, {against['status']}): {against['mean']:.6f} bpb, {spread}."
    return f"## Claim\n\n{intro} {claim['verdict']}\n\n" + table(header, rows)


def _new(summary: Mapping[str, Any], board: Leaderboard) -> str:
    own = [f"- {entry.what}" for entry in board.own if entry.applies(summary["parameters"])]
    return "## What is new\n\n" + (
        "\n".join(own) if own else "Nothing: the parameters switch on only what the credits below name."
    )


def _credits(credited: Sequence[Credit]) -> str:
    base = [_credit(credit) for credit in credited if not credit.when]
    more = [_credit(credit) for credit in credited if credit.when]
    text = "## Base and credits\n\n" + "\n".join(base)
    return text + ("\n\nSwitched on by the parameters:\n\n" + "\n".join(more) if more else "")


def _credit(credit: Credit) -> str:
    by = f", {credit.author}" if credit.author else ""
    return f"- [#{credit.number}]({PULLS}pull/{credit.number}){by}: {credit.what}"


def _reproduce(summary: Mapping[str, Any]) -> str:
    processes = summary["parameters"]["parallel"]["nproc"]
    start = "python" if processes == 1 else f"torchrun --standalone --nproc-per-node={processes}"
    lines = [f"SEED={seed} {start} train_gpt.py && {start} train_gpt.py eval" for seed in summary["seeds"]]
    return (
        "## How to reproduce\n\n"
        "In a folder with `train_gpt.py`, the training shards in `data/train/`, the validation shards in `data/val/` and\n"
        "`data/tokenizer.model`; each line trains, calibrates and packs `model.bin`, then scores it in a fresh process:\n\n"
        "```sh\npip install -r requirements.txt\n" + "\n".join(lines) + "\n```\n\n"
        "From a clone of the repository that made this folder, `python -m tools.rebuild` with this folder runs the whole\n"
        "pipeline again from the recorded commit and compares every byte."
    )


def _compliance(summary: Mapping[str, Any]) -> str:
    parts = ["## Compliance"]
    audits, scorer = summary["audit"], summary["scorer"]
    counts = [f"seed {seed}: {_passed(verdicts)}" for seed, verdicts in audits.items()]
    parts.append(
        f"None of the audit's verdicts is a fail ({'; '.join(counts)}). The evidence is the first seed's; submission.json has all."
    )
    for condition, words in CONDITIONS.items():
        rows = _verdicts(audits, scorer, condition)
        if rows:
            parts.append(
                f"{condition}, {words}:" if condition.startswith("C") else f"{words[0].upper()}{words[1:]}:"
            )
            parts.append(table(("check", "on", *(f"seed {seed}" for seed in audits), "evidence"), rows))
    return "\n\n".join(parts)


def _passed(verdicts: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum(verdict['outcome'] == 'pass' for verdict in verdicts)} of {len(verdicts)} pass"


def _verdicts(
    audits: Mapping[str, Sequence[Mapping[str, Any]]], scorer: str, condition: str
) -> list[tuple[str, ...]]:
    """A row for each verdict on the claimed scorer and the files: its outcome in every run."""
    outcomes = [
        {(v["check"], v["name"], v["subject"]): v["outcome"] for v in verdicts}
        for verdicts in audits.values()
    ]
    first = next(iter(audits.values()))
    rows = []
    for v in first:
        if condition in v["conditions"] and v["subject"] in (scorer, "files"):
            key = (v["check"], v["name"], v["subject"])
            rows.append(
                (
                    f"{v['check']} {v['name']}",
                    v["subject"],
                    *(found.get(key, "absent") for found in outcomes),
                    v["evidence"],
                )
            )
    return rows


def _experimental(summary: Mapping[str, Any]) -> str:
    rows = [
        (name, f"{score['bpb']:.8f}", f"{score['bpb_std']:.8f}")
        for name, score in summary["scores"].items()
        if name != summary["scorer"]
    ]
    return "## Experimental\n\nScored beside the claim; never in val_bpb.\n\n" + table(
        ("scorer", "bpb, mean", "sample deviation"), rows
    )


def _coverage(summary: Mapping[str, Any]) -> str:
    text = f"The challenge's logs count {OFFICIAL_BYTES:,} bytes of the same text."
    if not is_official(summary):
        text = f"The challenge's validation text has {OFFICIAL_BYTES:,} bytes: this is other text, its score no figure for that leaderboard."
    return f"## Coverage\n\n{summary['val_bpb_note']}\n\n{text}"
