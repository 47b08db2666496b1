"""Two ledgers side by side: `python -m tools.compare A B` says by how many bits per byte B differs from A, and where.

A and B are ledger files, folders that hold one, or revisions and experiments of this repository (`seed-999`, `HEAD~1:ttt_eval`). Both
scored one validation stream, so they are compared document by document (stages/common/ledger.py): this resolves what the scatter between
seeds hides.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from stages.common import paired_bootstrap
from stages.common.bpb import bits_per_byte
from stages.common.cli_errors import refusing
from stages.common.figure_style import BLUE, GREY, ORANGE, canvas, png, styled
from stages.scoring.evaluate import open_stream
from tools.compare import revisions
from tools.compare.breakdown import Comparison, Part, as_json, compare

PLOTTED_POINTS = 2000  # of the course; a stream has up to 40 million


def table(comparison: Comparison, names: tuple[str, str], scores: tuple[float, float]) -> str:
    """What is printed."""
    whole = comparison.whole
    sides = zip("AB", names, scores, strict=True)
    lines = [f"{side}  {score:.6f} bpb  {name}" for side, name, score in sides]
    lines.append(
        f"B - A  {_interval(whole)}, 95 %, paired over {comparison.documents:,} documents: {_verdict(whole)}"
    )
    for title, parts in (
        ("length of the document", comparison.by_length),
        ("position in the document", comparison.by_position),
    ):
        lines += [
            "",
            f"{title + ', tokens':<34}{'documents':>10}{'bytes':>13}   {'B - A there, bpb':<39}{'of the whole':>12}",
        ]
        lines += [
            f"{p.label:<34}{p.documents:>10,}{p.bytes:>13,}   {_interval(p.difference):<39}{p.contribution:>+12.6f}"
            for p in parts
        ]
    return "\n".join(lines)


def picture(comparison: Comparison) -> bytes:
    """The same as a PNG: the course along the stream, then both breakdowns."""
    with styled():
        figure, (course, by_length, by_position) = canvas(8, 9, 3)
        targets = len(comparison.course)
        shown = np.unique(np.linspace(0, targets - 1, PLOTTED_POINTS).astype(np.int64))
        course.plot((shown + 1) / 1000, comparison.course[shown], color=ORANGE, linewidth=1.8)
        course.set(
            title=f"B - A  {_interval(comparison.whole)}",
            xlabel="targets scored (thousands)",
            ylabel="so far, bpb of the whole stream",
        )
        course.axhline(0, color=GREY, linewidth=1)
        _bars(by_length, comparison.by_length, "By the length of the document", "tokens of the document")
        _bars(by_position, comparison.by_position, "By the position in the document", "position, tokens")
        return png(figure)


def _bars(axes: Axes, parts: list[Part], title: str, label: str) -> None:
    """Each class's difference with its interval."""
    values = np.array([part.difference.bpb for part in parts])
    reach = np.array(
        [
            [part.difference.bpb - part.difference.low, part.difference.high - part.difference.bpb]
            for part in parts
        ]
    ).T
    axes.bar(range(len(parts)), values, color=BLUE, alpha=0.35, width=0.7)
    axes.errorbar(range(len(parts)), values, np.maximum(reach, 0), fmt="o", color=BLUE, capsize=4)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set_xticks(range(len(parts)), [part.label.replace(" ", "\n", 1) for part in parts])
    axes.set(title=title, xlabel=label, ylabel="bpb")
    axes.grid(axis="x", visible=False)


def _interval(difference: paired_bootstrap.Difference) -> str:
    return f"{difference.bpb:+.6f} ({difference.low:+.6f} to {difference.high:+.6f})"


def _verdict(difference: paired_bootstrap.Difference) -> str:
    """What may be said."""
    if difference.low <= 0 <= difference.high:
        return "no difference is shown"
    return "B is better" if difference.high < 0 else "A is better"


def main(argv: list[str] | None = None) -> None:
    """The command; a user's error is one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare",
        description="Bits per byte of B less those of A, with paired intervals, by length of the document and position in it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    what = "ledger file, folder with nll.npy, or revision or experiment; of these, behind a colon, the scorer: sliding_eval or ttt_eval"
    parser.add_argument("a", metavar="A", help=what)
    parser.add_argument("b", metavar="B", help="the same")
    parser.add_argument(
        "--val",
        type=Path,
        default=Path("artifacts/tokenize/val"),
        metavar="DIR",
        help="the shards that were scored",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=Path("artifacts/tokenize/tokenizer.model"),
        metavar="FILE",
        help="theirs",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        default=Path(".scratch/comparison.png"),
        metavar="FILE",
        help="the picture to write",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all figures go, at full precision")
    arguments = parser.parse_args(argv)
    with refusing("compare"):
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Read, compare, print, write."""
    stream = open_stream(arguments.val, arguments.tokenizer)
    a, b = (revisions.read(name, stream.targets) for name in (arguments.a, arguments.b))
    comparison = compare(a, b, stream)
    scores = bits_per_byte(a, stream.counted_bytes), bits_per_byte(b, stream.counted_bytes)
    arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    arguments.plot.write_bytes(picture(comparison))
    if arguments.json is not None:
        figures = {
            "a": {"name": arguments.a, "bpb": scores[0]},
            "b": {"name": arguments.b, "bpb": scores[1]},
        } | as_json(comparison)
        arguments.json.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(table(comparison, (arguments.a, arguments.b), scores))
    print(f"\n{arguments.plot}")
