"""The README of a submission, generated from submission.json: figures, how to reproduce them, compliance, plots.

It holds no measured value, so it is the same for each run; times and hardware are in submission.json, below `measured`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

PLOTS = {
    "plots/bpb_by_chunk.png": "Bits per byte by chunk, with and without test-time training",
    "plots/loss.png": "Training loss over steps",
    "plots/bytes_by_part.png": "Counted bytes by part",
}


def render(summary: Mapping[str, Any]) -> str:
    """The text of README.md for a submission.json."""
    sections = [
        f"# {summary['name']}\n\n{summary['blurb']}",
        f"**val_bpb {summary['val_bpb']:.6f}** ({summary['scorer']}), **{summary['bytes_total']:,} bytes**, track {summary['track']},"
        f" by {summary['author']} ({summary['github_id']})",
        "## Figures\n\n" + table(("what", "value"), _figures(summary)),
        summary["val_bpb_note"],
        *(f"![{text}]({path})" for path, text in PLOTS.items()),
        _reproduce(summary),
        _compliance(summary["audit"]),
        "Everything here is generated. `submission.json` has all effective parameters, hashes and, below `measured`, times, hardware and"
        " versions; `train.log` has the logs of all stages.",
    ]
    return "\n\n".join(sections) + "\n"


def _figures(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    gain, covered = summary["ttt_minus_sliding_bpb"], summary["coverage"]
    return [
        ("val_bpb", f"{summary['val_bpb']:.8f}"),
        ("val_loss (nats per token)", f"{summary['val_loss']:.8f}"),
        *(
            (f"{name} bpb{' (claimed)' if name == summary['scorer'] else ''}", f"{score['bpb']:.8f}")
            for name, score in summary["scores"].items()
        ),
        (
            "TTT minus sliding, bpb",
            f"{gain['bpb']:+.6f} (95 % interval {gain['low']:+.6f} to {gain['high']:+.6f}, paired over documents)",
        ),
        ("brotli 11 on the same text, bpb, for scale", f"{summary['reference']['brotli_bpb']:.4f}"),
        (
            "targets, bytes, documents scored",
            f"{covered['targets']:,}, {covered['bytes']:,}, {covered['documents']:,}",
        ),
        ("bytes_code (train_gpt.py)", f"{summary['bytes_code']:,}"),
        ("bytes_model (model.bin)", f"{summary['bytes_model']:,}"),
        ("bytes_total", f"{summary['bytes_total']:,} of {summary['parameters']['pack']['budget_bytes']:,}"),
        ("seeds", ", ".join(map(str, summary["seeds"]))),
        *((f"sha256 of {name}", f"`{value}`") for name, value in summary["sha256"].items()),
    ]


def _reproduce(summary: Mapping[str, Any]) -> str:
    processes = summary["parameters"]["parallel"]["nproc"]
    start = "python" if processes == 1 else f"torchrun --standalone --nproc-per-node={processes}"
    return (
        "## Reproduce\n\n"
        "In a folder with `train_gpt.py`, the training shards in `data/train/`, the validation shards in `data/val/` and\n"
        "`data/tokenizer.model`:\n\n"
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
        + table(("check", "subject", "verdict", "evidence"), rows)
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [
        header,
        ["---"] * len(header),
        *([str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
