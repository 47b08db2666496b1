"""Draw the report's figures as PNG, of one run or of several; a run has the same colour in all of them.

Shapes: N-1 targets of the validation stream.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from stages.common import paired_bootstrap
from stages.common.bpb import bits_per_byte
from stages.common.figure_style import BLUE, GREEN, GREY, ORANGE, PURPLE, house_style, new_figure, to_png
from stages.scoring.stream import ValidationStream
from stages.submission.plots import SMOOTHING, exponential_average, number_column
from tools.compare.breakdown import BUCKET_EDGES
from tools.report.run_data import RunData

COLORS = (BLUE, ORANGE, GREEN, PURPLE, "#b8860b", "#cc79a7", GREY)
PLOTTED_POINTS = 2000  # of a line along the stream, which has up to 40 million targets
SKIPPED_PART = 50  # the first 1/50 of the stream is not drawn: averages of so few targets are noise
MAX_TENSORS = 30  # with a bar of their own; the others are added up


def training_loss(runs: Sequence[RunData]) -> bytes:
    """Plot the smoothed training loss by step and by second.

    Seconds are assumed to be the same for every step.
    """
    with house_style():
        figure, (by_step, by_second) = new_figure(8, 7, 2)
        for run, color in zip(runs, _colors(runs), strict=True):
            steps = number_column(run.losses, "step")
            losses = number_column(run.losses, "loss")
            smooth = exponential_average(losses, max(1.0, SMOOTHING * len(losses)))
            seconds = steps * run.training_seconds / steps[-1]
            for axes, x in ((by_step, steps), (by_second, seconds)):
                axes.plot(x, losses, color=color, alpha=0.15, linewidth=0.8)
                axes.plot(x, smooth, color=color, linewidth=1.8, label=f"{run.name}: {smooth[-1]:.3f}")

        by_step.legend(frameon=False)
        by_step.set(title="Training loss by step", xlabel="optimizer step", ylabel="nats per token")
        by_second.set(
            title="Training loss by second",
            xlabel="training seconds, divided evenly over steps",
            ylabel="nats per token",
        )
        return to_png(figure)


def bpb_by_bucket(runs: Sequence[RunData], stream: ValidationStream) -> bytes:
    """Plot bits per byte of the claimed scorer by length of the document and by position in it."""
    documents = paired_bootstrap.document_of_target(stream.tokens, stream.table.bos)
    starts = np.flatnonzero(stream.tokens == stream.table.bos)
    length = np.diff(starts, append=len(stream.tokens))[documents]
    position = np.arange(1, len(stream.tokens)) - starts[documents]
    with house_style():
        figure, (by_length, by_position) = new_figure(8, 7, 2)
        for axes, value, name in (
            (by_length, length, "length of the document"),
            (by_position, position, "position in the document"),
        ):
            _draw_grouped_bars(axes, runs, stream.counted_bytes, np.digitize(value, BUCKET_EDGES) - 1)
            axes.set(title=f"Bits per byte by {name}", xlabel=f"{name}, tokens", ylabel="bpb")
        by_length.legend(frameon=False, ncols=min(3, len(runs)))
        return to_png(figure)


def ttt_gain(runs: Sequence[RunData], stream: ValidationStream) -> bytes:
    """Plot bpb with test-time training minus bpb without, of everything scored so far; negative is better."""
    with house_style():
        figure, axes = new_figure(8, 4)
        bytes_so_far = np.cumsum(stream.counted_bytes)
        first, last = len(bytes_so_far) // SKIPPED_PART, len(bytes_so_far) - 1
        shown = np.unique(np.linspace(first, last, PLOTTED_POINTS).astype(np.int64))
        for run, color in zip(runs, _colors(runs), strict=True):
            nats = run.ledgers["ttt_eval"].astype(np.float64) - run.ledgers["sliding_eval"]
            bpb = np.cumsum(nats)[shown] / np.log(2) / np.maximum(bytes_so_far[shown], 1)
            axes.plot(shown + 1, bpb, color=color, linewidth=1.8, label=f"{run.name}: {bpb[-1]:+.5f}")

        axes.axhline(0, color=GREY, linewidth=1)
        axes.legend(frameon=False)
        axes.set(
            title="Test-time training minus sliding windows",
            xlabel="targets scored",
            ylabel="bpb of everything so far",
        )
        return to_png(figure)


def bytes_by_tensor(run: RunData) -> bytes:
    """Plot the bytes of a run's largest tensors, and of all others together."""
    sizes = sorted(((int(row["bytes"]), row["name"]) for row in run.layers), reverse=True)
    shown = sizes[:MAX_TENSORS]
    others = sizes[MAX_TENSORS:]
    if others:
        shown.append((sum(size for size, _ in others), f"{len(others)} others"))
    shown.reverse()  # bars are drawn from the bottom

    with house_style():
        figure, axes = new_figure(8, 1.2 + 0.22 * len(shown))
        bars = axes.barh([name for _, name in shown], [size for size, _ in shown], color=BLUE, height=0.7)
        axes.bar_label(bars, [f"{size:,}" for size, _ in shown], padding=3, fontsize=8)
        axes.tick_params(axis="y", labelsize=8)
        total = sum(size for size, _ in sizes)
        axes.set(title=f"Bytes by tensor, {run.name}: {total:,} in model.bin", xlabel="bytes")
        axes.margins(x=0.12)
        return to_png(figure)


def quantisation_errors(run: RunData) -> bytes:
    """Plot the relative squared error of a run's quantised matrices by layer, one line per kind of matrix."""
    # Tensors are called blocks.LAYER.KIND....weight.
    points_by_kind: dict[str, list[tuple[int, float]]] = {}
    for row in run.layers:
        parts = row["name"].split(".")
        if row["relative_error"] and parts[0] == "blocks":
            point = (int(parts[1]), float(row["relative_error"]))
            points_by_kind.setdefault(" ".join(parts[2:-1]), []).append(point)

    with house_style():
        figure, axes = new_figure(8, 4)
        for i, (kind, points) in enumerate(sorted(points_by_kind.items())):
            layers, values = zip(*sorted(points), strict=True)
            color = COLORS[i % len(COLORS)]
            axes.plot(layers, values, color=color, marker="o", markersize=4, linewidth=1.4, label=kind)
        axes.set(
            title=f"Quantisation error by layer, {run.name}",
            xlabel="layer",
            ylabel="squared error / squared norm",
        )

        # Without points, a logarithmic scale and a legend have nothing to show.
        if points_by_kind:
            axes.set_yscale("log")
            axes.legend(frameon=False, ncols=3, fontsize=8)
            axes.xaxis.get_major_locator().set_params(integer=True)
        return to_png(figure)


def side_by_side(runs: Sequence[RunData], stream: ValidationStream) -> bytes:
    """Plot each run's claimed bits per byte, and its difference from the first run.

    The 95 % intervals are those of a bootstrap over documents, paired for the differences.
    """
    documents = paired_bootstrap.document_of_target(stream.tokens, stream.table.bos)

    # A score is its difference from a ledger of zeros. A single run has no second panel.
    panels = [("Bits per byte", np.zeros_like(runs[0].claimed))]
    if len(runs) > 1:
        panels.append((f"Difference from {runs[0].name}, paired", runs[0].claimed))

    with house_style():
        height = len(panels) * (1.2 + 0.35 * len(runs))
        figure, all_axes = new_figure(8, height, len(panels), squeeze=False)
        for axes, (title, base) in zip(all_axes.flat, panels, strict=True):
            for i, (run, color) in enumerate(zip(runs, _colors(runs), strict=True)):
                difference = paired_bootstrap.paired_difference(
                    base, run.claimed, stream.counted_bytes, documents
                )

                # A bootstrap interval need not contain its estimate, but the arms of an error bar
                # cannot be negative.
                below = max(0.0, difference.bpb - difference.low)
                above = max(0.0, difference.high - difference.bpb)
                axes.errorbar([difference.bpb], [i], xerr=[[below], [above]], fmt="o", color=color, capsize=4)
                axes.annotate(
                    f"{difference.bpb:.5f}",
                    (difference.bpb, i),
                    (0, 7),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )

            axes.set_yticks(range(len(runs)), [f"{run.name} (seed {run.seed})" for run in runs])
            axes.set_ylim(len(runs) - 0.4, -0.6)
            axes.set(title=title, xlabel="bpb, 95 % interval over documents")
        return to_png(figure)


def _draw_grouped_bars(
    axes: Axes, runs: Sequence[RunData], counted_bytes: np.ndarray, bucket: np.ndarray
) -> None:
    """Draw bars of bpb by bucket, the runs side by side.

    `counted_bytes` and `bucket` (an index into BUCKET_EDGES) are (N-1,). Buckets without bytes are
    left out.
    """
    present = [i for i in range(len(BUCKET_EDGES)) if counted_bytes[bucket == i].sum()]
    labels = []
    for i in present:
        if i + 1 < len(BUCKET_EDGES):
            labels.append(f"{BUCKET_EDGES[i]} to\n{BUCKET_EDGES[i + 1] - 1}")
        else:
            labels.append(f"{BUCKET_EDGES[i]}\nor more")

    width = 0.8 / len(runs)
    for r, (run, color) in enumerate(zip(runs, _colors(runs), strict=True)):
        values = [bits_per_byte(run.claimed[bucket == i], counted_bytes[bucket == i]) for i in present]
        centres = np.arange(len(present)) + (r + 0.5) * width - 0.4
        axes.bar(centres, values, width * 0.92, color=color, label=run.name)
    axes.set_xticks(range(len(present)), labels)
    axes.grid(axis="x", visible=False)


def _colors(runs: Sequence[RunData]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(runs))]
