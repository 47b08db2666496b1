"""Render the README of a submission from its submission.json: figures, reproduction, compliance, plots.

The text has no measured value, so it is the same in each run; times and hardware are in
submission.json, in the field `measured`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

PLOT_CAPTIONS = {
    "plots/bpb_by_chunk.png": "Bits per byte by chunk, with and without test-time training",
    "plots/loss.png": "Training loss by step",
    "plots/bytes_by_part.png": "Counted bytes by part",
}


def render_readme(summary: Mapping[str, Any]) -> str:
    """Return the text of README.md for a submission.json."""
    headline = (
        f"**val_bpb {summary['val_bpb']:.6f}** ({summary['scorer']}),"
        f" **{summary['bytes_total']:,} bytes**,"
        f" track {summary['track']}, by {summary['author']} ({summary['github_id']})"
    )
    sections = [
        f"# {summary['name']}\n\n{summary['blurb']}",
        headline,
        "## Figures\n\n" + markdown_table(("quantity", "value"), _figure_rows(summary)),
        summary["val_bpb_note"],
        *(f"![{caption}]({path})" for path, caption in PLOT_CAPTIONS.items()),
        _reproduce(summary),
        _compliance(summary["audit"]),
        "This folder is generated. `submission.json` has all effective parameters, all hashes and,"
        " in the field `measured`, times, hardware and versions; `train.log` has the logs of all stages.",
    ]
    return "\n\n".join(sections) + "\n"


def _figure_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    # Scores.
    gain = summary["ttt_minus_sliding_bpb"]
    coverage = summary["coverage"]
    rows = [
        ("val_bpb", f"{summary['val_bpb']:.8f}"),
        ("val_loss (nats per token)", f"{summary['val_loss']:.8f}"),
    ]
    for name, score in summary["scores"].items():
        label = f"{name} bpb (claimed)" if name == summary["scorer"] else f"{name} bpb"
        rows.append((label, f"{score['bpb']:.8f}"))

    # The interval tells if the difference that TTT makes is more than chance.
    interval = f"95 % interval {gain['low']:+.6f} to {gain['high']:+.6f}, paired by document"
    budget_bytes = summary["parameters"]["pack"]["budget_bytes"]

    # Difference and scale of the scores, coverage, sizes.
    rows += [
        ("bpb with TTT minus bpb without", f"{gain['bpb']:+.6f} ({interval})"),
        ("for scale: bpb of brotli 11 on the same text", f"{summary['reference']['brotli_bpb']:.4f}"),
        (
            "targets, bytes, documents scored",
            f"{coverage['targets']:,}, {coverage['bytes']:,}, {coverage['documents']:,}",
        ),
        ("bytes_code (train_gpt.py)", f"{summary['bytes_code']:,}"),
        ("bytes_model (model.bin)", f"{summary['bytes_model']:,}"),
        ("bytes_total", f"{summary['bytes_total']:,} of {budget_bytes:,} allowed"),
        ("seeds", ", ".join(map(str, summary["seeds"]))),
    ]

    # Hashes of the counted files and of their inputs.
    rows += [(f"sha256 of {name}", f"`{value}`") for name, value in summary["sha256"].items()]
    return rows


def _reproduce(summary: Mapping[str, Any]) -> str:
    processes = summary["parameters"]["parallel"]["nproc"]
    start = "python" if processes == 1 else f"torchrun --standalone --nproc-per-node={processes}"
    return (
        "## Reproduce\n\n"
        "In a folder with `train_gpt.py`, the training shards in `data/train/`, the validation shards in\n"
        "`data/val/` and `data/tokenizer.model`:\n\n"
        "```sh\n"
        "pip install -r requirements.txt\n"
        f"SEED={summary['seeds'][0]} {start} train_gpt.py      # trains, calibrates, packs: model.bin\n"
        f"{start} train_gpt.py eval  # scores in a fresh process with {summary['scorer']}\n"
        "```\n\n"
        "The pipeline that made this folder does the same with `dvc repro`."
    )


def _compliance(verdicts: Sequence[Mapping[str, Any]]) -> str:
    passed = sum(verdict["outcome"] == "pass" for verdict in verdicts)
    rows = [(f"{v['check']} {v['name']}", v["subject"], v["outcome"], v["evidence"]) for v in verdicts]
    return (
        f"## Compliance\n\nThe audit passed: {passed} of {len(verdicts)} verdicts pass, none fails.\n\n"
        + markdown_table(("check", "subject", "verdict", "evidence"), rows)
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; bars and newlines in cells are escaped."""
    lines = [list(header), ["---"] * len(header)]
    for row in rows:
        lines.append([str(cell).replace("|", "\\|").replace("\n", " ") for cell in row])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
