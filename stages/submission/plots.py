"""Draw the plots of a submission as PNG: training loss, bits per byte by chunk, counted bytes by part."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from stages.common.figure_style import BLUE, GREEN, GREY, ORANGE, PURPLE, house_style, new_figure, to_png
from stages.submission.artifacts import TableRow

SMOOTHING = 0.05  # time constant of the smoothed loss, as a fraction of all steps
MAX_CHUNKS_WITH_MARKERS = 60  # more would hide the line
LABEL_HEIGHT = 0.12  # of the axes: two labels that are closer than this overlap
LABEL_SHIFT = 14  # points by which each of two overlapping labels moves

# Parts of the model in the order of a forward pass: a fragment of their tensors' names, and a
# colour.
PARTS = {
    "embedding (tied head)": ("embedding.weight", ORANGE),
    "attention: query": ("attention.query.", BLUE),
    "attention: key": ("attention.key.", BLUE),
    "attention: value": ("attention.value.", BLUE),
    "attention: output": ("attention.output.", BLUE),
    "MLP: up": ("mlp.up.", GREEN),
    "MLP: down": ("mlp.down.", GREEN),
}
OTHER_PART = "gains, scales, mixes, skips"
CONTAINER_PART = "container"  # header and index of model.bin
CODE_PART = "code (train_gpt.py)"


def training_loss(rows: Sequence[TableRow]) -> bytes:
    """Plot the training loss: every step faintly, the smoothed loss on top, a mark where looping begins."""
    steps = number_column(rows, "step")
    losses = number_column(rows, "loss")
    smooth = exponential_average(losses, max(1.0, SMOOTHING * len(losses)))
    with house_style():
        figure, axes = new_figure(8, 4.2)
        axes.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=1)
        axes.plot(steps, smooth, color=BLUE, linewidth=2)
        axes.set(
            title="Training loss", xlabel="optimizer step", ylabel="loss of the step's batch (nats per token)"
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _label_end(axes, steps[-1], smooth[-1], f"{smooth[-1]:.3f} smoothed", BLUE)

        # A dashed line at the first looped step, unless all or none are looped.
        looped = number_column(rows, "looped") > 0
        if looped.any() and not looped[0]:
            first_looped = steps[looped.argmax()]
            axes.axvline(first_looped, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
            top_of_axes = axes.get_xaxis_transform()
            axes.text(first_looped, 1.0, " looping begins", transform=top_of_axes, va="top", color=GREY)
        axes.set_xlim(steps[0], steps[-1] + max(1.0, 0.02 * len(steps)))
        return to_png(figure)


def bpb_by_chunk(sliding: Sequence[TableRow], ttt: Sequence[TableRow]) -> bytes:
    """Plot bits per byte along the validation stream with and without test-time training.

    The upper axes show each chunk, the lower axes everything scored so far. The rows are those of
    chunks.tsv.
    """
    lines = (("sliding", sliding, GREY), ("with TTT", ttt, ORANGE))
    with house_style():
        figure, (by_chunk, cumulative) = new_figure(8, 6.4, 2, sharex=True)
        for name, rows, color in lines:
            first = number_column(rows, "first_target")
            targets = number_column(rows, "targets")
            edges = np.append(first, first[-1] + targets[-1]) / 1000
            bpb = number_column(rows, "bpb")
            by_chunk.stairs(bpb, edges, baseline=None, color=color, linewidth=1.6, label=name)
            so_far = number_column(rows, "cumulative_bpb")
            marker_size = 3 if len(rows) < MAX_CHUNKS_WITH_MARKERS else 0
            cumulative.plot(edges[1:], so_far, color=color, linewidth=2, marker="o", markersize=marker_size)

        # Label the end of each cumulative line with its value.
        ends = [number_column(rows, "cumulative_bpb")[-1] for _, rows, _ in lines]
        bottom, top = cumulative.get_ylim()
        shifts = _label_shifts(ends, top - bottom)
        for (name, rows, color), end, shift in zip(lines, ends, shifts, strict=True):
            last = (number_column(rows, "first_target")[-1] + number_column(rows, "targets")[-1]) / 1000
            _label_end(cumulative, last, end, f"{name}\n{end:.4f}", color, shift)

        by_chunk.legend(
            frameon=False, loc="upper right", ncols=2, labelcolor="linecolor", bbox_to_anchor=(1, 1.14)
        )
        by_chunk.set(title="Bits per byte by chunk of the validation stream", ylabel="bpb of the chunk")
        cumulative.set(
            title="Bits per byte of everything scored so far",
            ylabel="cumulative bpb",
            xlabel="targets scored (thousands of tokens)",
        )
        return to_png(figure)


def bytes_by_part(layers: Sequence[TableRow], bytes_code: int, budget_bytes: int) -> bytes:
    """Plot the counted bytes: the model by kind of tensor, and the code; the title has sum and budget."""
    sizes = sizes_by_part(layers, bytes_code)
    total = sum(sizes.values())
    color_of = {name: color for name, (_, color) in PARTS.items()} | {CODE_PART: PURPLE}
    names = list(sizes)[::-1]  # bars are drawn from the bottom
    with house_style():
        figure, axes = new_figure(8, 0.9 + 0.42 * len(names))
        values = [sizes[name] for name in names]
        colors = [color_of.get(name, GREY) for name in names]
        bars = axes.barh(names, values, color=colors, height=0.72)
        axes.bar_label(bars, [f" {size:,} B   {size / total:.1%}" for size in values], padding=2)

        axes.set_title(f"{total:,} bytes counted, {budget_bytes:,} allowed", pad=10)
        axes.set_xlabel("bytes")
        axes.xaxis.set_major_formatter(FuncFormatter(_format_si))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, max(sizes.values()) * 1.28)
        return to_png(figure)


def sizes_by_part(layers: Sequence[TableRow], bytes_code: int) -> dict[str, int]:
    """Return the bytes of each part, in the order of a forward pass; they add up to the two counted files."""
    sizes = dict.fromkeys((*PARTS, OTHER_PART, CONTAINER_PART, CODE_PART), 0)
    for row in layers:
        sizes[_part_of(row["name"])] += int(row["bytes"])
    sizes[CODE_PART] = bytes_code
    return {part: size for part, size in sizes.items() if size}


def _part_of(tensor: str) -> str:
    for part, (fragment, _) in PARTS.items():
        if fragment in tensor:
            return part
    return CONTAINER_PART if tensor == "container" else OTHER_PART


def exponential_average(values: np.ndarray, steps: float) -> np.ndarray:
    """Return the exponential moving average of `values` (N,) with a time constant of `steps` steps.

    The average is corrected for its start, as in Adam.

    >>> exponential_average(np.array([2.0, 2.0]), 10).tolist()
    [2.0, 2.0]
    """
    keep = math.exp(-1 / steps)
    result = np.empty(len(values))
    total = 0.0
    weight = 0.0
    for i, value in enumerate(values):
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        result[i] = total / weight
    return result


def number_column(rows: Sequence[TableRow], name: str) -> np.ndarray:
    """Return a column of a table, (rows,) float64; ValueError if it is absent or has something else."""
    try:
        return np.array([float(row[name]) for row in rows])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"a table has no column {name} of numbers ({error}); it has {', '.join(map(str, rows[0]))}"
        ) from error


def _label_end(axes: Axes, x: float, y: float, text: str, color: str, shift: float = 0) -> None:
    """Put a label to the right of a line's last point, moved up by `shift` points."""
    axes.annotate(
        text,
        (x, y),
        (6, shift),
        textcoords="offset points",
        va="center",
        color=color,
        fontweight="bold",
        annotation_clip=False,
    )


def _label_shifts(ends: Sequence[float], height: float) -> tuple[float, float]:
    """Return shifts in points that keep labels at `ends` apart; `height` of the axes is in data units."""
    if abs(ends[0] - ends[1]) > LABEL_HEIGHT * height:
        return 0, 0
    return (LABEL_SHIFT, -LABEL_SHIFT) if ends[0] >= ends[1] else (-LABEL_SHIFT, LABEL_SHIFT)


def _format_si(value: float, _: object) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g} M"
    return f"{value / 1e3:g} k" if value >= 1e3 else f"{value:g}"
