"""Compare two ledgers: `python -m tools.compare A B` prints bits per byte of B minus A, in total and by part.

A and B are ledger files, folders with a ledger, or revisions or experiments of this repository
(`seed-999`, `HEAD~1:ttt_eval`). Both must have scored the same validation stream, so they are
compared document by document (stages/common/paired_bootstrap.py), which shows differences smaller
than the noise between seeds.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from stages.common import paired_bootstrap
from stages.common.bpb import bits_per_byte
from stages.common.cli_errors import user_errors
from stages.common.figure_style import BLUE, GREY, ORANGE, house_style, new_figure, to_png
from stages.scoring.stream import open_validation_stream
from tools import add_path_option, require_file, require_folder
from tools.compare import revisions
from tools.compare.breakdown import Bucket, Comparison, as_json, compare_ledgers

PLOTTED_POINTS = 2000  # of the running difference; a stream has up to 40 million targets


def format_comparison(comparison: Comparison, names: tuple[str, str], scores: tuple[float, float]) -> str:
    """Return the text to print: both scores (bpb), the difference, and a table for each breakdown."""
    lines = []
    for side, name, score in zip("AB", names, scores, strict=True):
        lines.append(f"{side}  {score:.6f} bpb  {name}")
    whole = comparison.whole
    lines.append(
        f"B - A  {_format_interval(whole)}, 95 %,"
        f" paired over {comparison.documents:,} documents: {_verdict(whole)}"
    )
    lines += _format_buckets("length of the document", comparison.by_length)
    lines += _format_buckets("position in the document", comparison.by_position)
    return "\n".join(lines)


def _format_buckets(title: str, buckets: list[Bucket]) -> list[str]:
    lines = [
        "",
        f"{title + ', tokens':<34}{'documents':>10}{'bytes':>13}"
        f"   {'B - A there, bpb':<39}{'of the whole':>12}",
    ]
    for bucket in buckets:
        interval = _format_interval(bucket.difference)
        lines.append(
            f"{bucket.label:<34}{bucket.documents:>10,}{bucket.bytes:>13,}"
            f"   {interval:<39}{bucket.contribution:>+12.6f}"
        )
    return lines


def draw_comparison(comparison: Comparison) -> bytes:
    """Draw the comparison as a PNG: the running difference along the stream, then both breakdowns."""
    with house_style():
        figure, (running, by_length, by_position) = new_figure(8, 9, 3)
        targets = len(comparison.running_difference)
        shown = np.unique(np.linspace(0, targets - 1, PLOTTED_POINTS).astype(np.int64))
        running.plot((shown + 1) / 1000, comparison.running_difference[shown], color=ORANGE, linewidth=1.8)
        running.set(
            title=f"B - A  {_format_interval(comparison.whole)}",
            xlabel="targets scored (thousands)",
            ylabel="so far, bpb of the whole stream",
        )
        running.axhline(0, color=GREY, linewidth=1)
        _draw_buckets(by_length, comparison.by_length, "By length of the document", "tokens of the document")
        _draw_buckets(by_position, comparison.by_position, "By position in the document", "position, tokens")
        return to_png(figure)


def _draw_buckets(axes: Axes, buckets: list[Bucket], title: str, label: str) -> None:
    """Draw a bar for the difference in each bucket, with its interval."""
    differences = [bucket.difference for bucket in buckets]
    values = np.array([difference.bpb for difference in differences])
    below = [difference.bpb - difference.low for difference in differences]
    above = [difference.high - difference.bpb for difference in differences]
    axes.bar(range(len(buckets)), values, color=BLUE, alpha=0.35, width=0.7)
    axes.errorbar(range(len(buckets)), values, np.maximum([below, above], 0), fmt="o", color=BLUE, capsize=4)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set_xticks(range(len(buckets)), [bucket.label.replace(" ", "\n", 1) for bucket in buckets])
    axes.set(title=title, xlabel=label, ylabel="bpb")
    axes.grid(axis="x", visible=False)


def _format_interval(difference: paired_bootstrap.Difference) -> str:
    return f"{difference.bpb:+.6f} ({difference.low:+.6f} to {difference.high:+.6f})"


def _verdict(difference: paired_bootstrap.Difference) -> str:
    """Say in words what the interval shows."""
    if difference.low <= 0 <= difference.high:
        return "no difference is shown"
    return "B is better" if difference.high < 0 else "A is better"


def main(argv: list[str] | None = None) -> None:
    """Run the command; a user error is one line and exit code 2."""
    arguments = _parser().parse_args(argv)
    with user_errors("compare"):
        compare_and_print(arguments)


def compare_and_print(arguments: argparse.Namespace) -> None:
    """Read both ledgers, compare them, write the files and print the tables."""
    # The names first: the stream takes longer to read.
    for name in (arguments.a, arguments.b):
        revisions.require_ledger_name(name)
    require_file(arguments.tokenizer, "run `dvc repro tokenize`, or name another with --tokenizer")
    require_folder(arguments.val, "run `dvc repro tokenize`, or name another with --val")

    stream = open_validation_stream(arguments.val, arguments.tokenizer)
    a = revisions.read_ledger(arguments.a, stream.targets)
    b = revisions.read_ledger(arguments.b, stream.targets)
    comparison = compare_ledgers(a, b, stream)
    scores = bits_per_byte(a, stream.counted_bytes), bits_per_byte(b, stream.counted_bytes)

    arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    arguments.plot.write_bytes(draw_comparison(comparison))
    if arguments.json is not None:
        names = {
            "a": {"name": arguments.a, "bpb": scores[0]},
            "b": {"name": arguments.b, "bpb": scores[1]},
        }
        text = json.dumps(names | as_json(comparison), indent=2, sort_keys=True)
        arguments.json.write_text(text + "\n", encoding="utf-8")

    print(format_comparison(comparison, (arguments.a, arguments.b), scores))
    print(f"\n{arguments.plot}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare",
        description="Print bits per byte of B minus those of A, with paired 95 % intervals,"
        " in total, by length of the document and by position in it.",
    )

    # The two ledgers.
    ledger_help = (
        "ledger file, folder with nll.npy, or revision or experiment;"
        " a revision may be followed by a colon and the scorer: sliding_eval (default) or ttt_eval"
    )
    parser.add_argument("a", metavar="A", help=ledger_help)
    parser.add_argument("b", metavar="B", help="the same")

    # The stream that both have scored; it defines documents and targets.
    add_path_option(parser, "--val", "artifacts/tokenize/val", "folder of the shards that were scored")

    # The tokenizer defines the bytes of each target, by which losses become bits per byte.
    add_path_option(parser, "--tokenizer", "artifacts/tokenize/tokenizer.model", "tokenizer of the shards")

    # Outputs.
    add_path_option(parser, "--plot", ".scratch/comparison.png", "PNG to write")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="JSON file for all figures at full precision"
    )
    return parser
