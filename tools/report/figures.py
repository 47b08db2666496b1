"""The report's pictures as PNG, of one run or of several side by side. A run keeps its colour in all of them.

Shapes: R runs, N-1 targets.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from stages.common import paired_bootstrap
from stages.common.bpb import bits_per_byte
from stages.common.figure_style import BLUE, GREEN, GREY, ORANGE, PURPLE, canvas, png, styled
from stages.scoring.evaluate import Stream
from stages.submission.plots import SMOOTHING, column, smoothed
from tools.compare.breakdown import EDGES
from tools.report.run_data import Seen

COLORS = (BLUE, ORANGE, GREEN, PURPLE, "#b8860b", "#cc79a7", GREY)
POINTS = 2000  # of a course that are drawn
MOST_TENSORS = 30  # with a bar of their own


def loss(runs: Sequence[Seen]) -> bytes:
    """Smoothed training loss over steps and over seconds; seconds are taken to divide evenly over steps."""
    with styled():
        figure, (by_step, by_second) = canvas(8, 7, 2)
        for run, color in zip(runs, _colors(runs), strict=True):
            steps, losses = column(run.losses, "step"), column(run.losses, "loss")
            smooth = smoothed(losses, max(1.0, SMOOTHING * len(losses)))
            for axes, x in ((by_step, steps), (by_second, steps * run.seconds / steps[-1])):
                axes.plot(x, losses, color=color, alpha=0.15, linewidth=0.8)
                axes.plot(x, smooth, color=color, linewidth=1.8, label=f"{run.name}: {smooth[-1]:.3f}")
        by_step.legend(frameon=False)
        by_step.set(title="Training loss by step", xlabel="optimizer step", ylabel="nats per token")
        by_second.set(
            title="and by second",
            xlabel="training seconds, divided evenly over steps",
            ylabel="nats per token",
        )
        return png(figure)


def classes(runs: Sequence[Seen], stream: Stream) -> bytes:
    """Bits per byte of the claimed scorer by the length of the document, and by the position in it."""
    documents = paired_bootstrap.document_of_target(stream.tokens, stream.table.bos)
    starts = np.flatnonzero(stream.tokens == stream.table.bos)
    length = np.diff(starts, append=len(stream.tokens))[documents]
    position = np.arange(1, len(stream.tokens)) - starts[documents]
    with styled():
        figure, both = canvas(8, 7, 2)
        for axes, value, what in zip(
            both, (length, position), ("length of the document", "position in the document"), strict=True
        ):
            _grouped(axes, runs, stream.counted_bytes, np.digitize(value, EDGES) - 1)
            axes.set(title=f"Bits per byte by {what}", xlabel=f"{what}, tokens", ylabel="bpb")
        both[0].legend(frameon=False, ncols=min(3, len(runs)))
        return png(figure)


def gain(runs: Sequence[Seen], stream: Stream) -> bytes:
    """What test-time training has gained of everything scored so far, along the stream; below zero it helps."""
    with styled():
        figure, axes = canvas(8, 4)
        so_far = np.cumsum(stream.counted_bytes)
        shown = np.unique(np.linspace(len(so_far) // 50, len(so_far) - 1, POINTS).astype(np.int64))
        for run, color in zip(runs, _colors(runs), strict=True):
            nats = run.ledgers["ttt_eval"].astype(np.float64) - run.ledgers["sliding_eval"]
            bpb = np.cumsum(nats)[shown] / np.log(2) / np.maximum(so_far[shown], 1)
            axes.plot(shown + 1, bpb, color=color, linewidth=1.8, label=f"{run.name}: {bpb[-1]:+.5f}")
        axes.axhline(0, color=GREY, linewidth=1)
        axes.legend(frameon=False)
        axes.set(
            title="Test-time training less sliding windows",
            xlabel="targets scored",
            ylabel="bpb of everything so far",
        )
        return png(figure)


def tensors(run: Seen) -> bytes:
    """Bytes of the largest tensors of a run, and of all others together."""
    sizes = sorted(((int(row["bytes"]), row["name"]) for row in run.layers), reverse=True)
    shown, rest = sizes[:MOST_TENSORS], sizes[MOST_TENSORS:]
    if rest:
        shown.append((sum(size for size, _ in rest), f"{len(rest)} others"))
    with styled():
        figure, axes = canvas(8, 1.2 + 0.22 * len(shown))
        bars = axes.barh(
            [name for _, name in shown][::-1], [size for size, _ in shown][::-1], color=BLUE, height=0.7
        )
        axes.bar_label(bars, [f"{size:,}" for size, _ in shown][::-1], padding=3, fontsize=8)
        axes.tick_params(axis="y", labelsize=8)
        axes.set(
            title=f"Bytes by tensor, {run.name}: {sum(size for size, _ in sizes):,} in model.bin",
            xlabel="bytes",
        )
        axes.margins(x=0.12)
        return png(figure)


def errors(run: Seen) -> bytes:
    """Relative squared error of a run's quantised matrices by layer, one line for each kind of matrix."""
    kinds: dict[str, list[tuple[int, float]]] = {}
    for row in run.layers:
        parts = row["name"].split(".")
        if row["relative_error"] and parts[0] == "blocks":
            kinds.setdefault(" ".join(parts[2:-1]), []).append((int(parts[1]), float(row["relative_error"])))
    with styled():
        figure, axes = canvas(8, 4)
        for i, (kind, points) in enumerate(sorted(kinds.items())):
            layers, values = zip(*sorted(points), strict=True)
            axes.plot(
                layers,
                values,
                color=COLORS[i % len(COLORS)],
                marker="o",
                markersize=4,
                linewidth=1.4,
                label=kind,
            )
        axes.set(
            title=f"Quantisation error by layer, {run.name}",
            xlabel="layer",
            ylabel="squared error of the square",
        )
        if kinds:
            axes.set_yscale("log")
            axes.legend(frameon=False, ncols=3, fontsize=8)
            axes.xaxis.get_major_locator().set_params(integer=True)
        return png(figure)


def side_by_side(runs: Sequence[Seen], stream: Stream) -> bytes:
    """Each run's claimed bits per byte, and its difference to the first run's, with 95 % intervals of a bootstrap over documents."""
    documents = paired_bootstrap.document_of_target(stream.tokens, stream.table.bos)
    zero = np.zeros_like(runs[0].claimed)
    bases = [("Bits per byte", zero), (f"less those of {runs[0].name}, paired", runs[0].claimed)][: len(runs)]
    with styled():
        figure, panels = canvas(8, len(bases) * (1.2 + 0.35 * len(runs)), len(bases), squeeze=False)
        for axes, (title, base) in zip(panels.flat, bases, strict=True):
            for i, (run, color) in enumerate(zip(runs, _colors(runs), strict=True)):
                found = paired_bootstrap.paired_difference(base, run.claimed, stream.counted_bytes, documents)
                reach = [[max(0.0, found.bpb - found.low)], [max(0.0, found.high - found.bpb)]]
                axes.errorbar([found.bpb], [i], xerr=reach, fmt="o", color=color, capsize=4)
                axes.annotate(
                    f"{found.bpb:.5f}",
                    (found.bpb, i),
                    (0, 7),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
            axes.set_yticks(range(len(runs)), [f"{run.name} (seed {run.seed})" for run in runs])
            axes.set_ylim(len(runs) - 0.4, -0.6)
            axes.set(title=title, xlabel="bpb, 95 % interval over documents")
        return png(figure)


def _grouped(axes: Axes, runs: Sequence[Seen], counted_bytes: np.ndarray, group: np.ndarray) -> None:
    """Bars of bpb by class, the runs side by side; a class without a byte is left out."""
    present = [i for i in range(len(EDGES)) if counted_bytes[group == i].sum()]
    labels = [
        f"{EDGES[i]} to\n{EDGES[i + 1] - 1}" if i + 1 < len(EDGES) else f"{EDGES[i]}\nor more"
        for i in present
    ]
    width = 0.8 / len(runs)
    for r, (run, color) in enumerate(zip(runs, _colors(runs), strict=True)):
        values = [bits_per_byte(run.claimed[group == i], counted_bytes[group == i]) for i in present]
        axes.bar(
            np.arange(len(present)) + (r + 0.5) * width - 0.4,
            values,
            width * 0.92,
            color=color,
            label=run.name,
        )
    axes.set_xticks(range(len(present)), labels)
    axes.grid(axis="x", visible=False)


def _colors(runs: Sequence[Seen]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(runs))]
