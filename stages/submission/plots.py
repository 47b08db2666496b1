"""The plots of a submission as PNG: loss over steps, bits per byte by chunk, bytes by part."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from stages.common.figure_style import BLUE, GREEN, GREY, ORANGE, PURPLE, canvas, png, styled
from stages.submission.artifacts import Row

SMOOTHING = 0.05  # of all steps: the time constant of the smoothed loss
# Parts of the model in the order of a forward pass, by what their tensors' names contain, and their colours.
PARTS = {
    "embedding (tied head)": ("embedding.weight", ORANGE),
    "attention: query": ("attention.query.", BLUE),
    "attention: key": ("attention.key.", BLUE),
    "attention: value": ("attention.value.", BLUE),
    "attention: output": ("attention.output.", BLUE),
    "MLP: up": ("mlp.up.", GREEN),
    "MLP: down": ("mlp.down.", GREEN),
}
OTHER = "gains, scales, mixes, skips"
CODE = "code (train_gpt.py)"


def loss(rows: Sequence[Row]) -> bytes:
    """Training loss over steps: each step faint, its smoothed course strong, a mark where looping begins."""
    steps, losses = column(rows, "step"), column(rows, "loss")
    smooth = smoothed(losses, max(1.0, SMOOTHING * len(losses)))
    with styled():
        figure, axes = canvas(8, 4.2)
        axes.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=1)
        axes.plot(steps, smooth, color=BLUE, linewidth=2)
        axes.set(
            title="Training loss", xlabel="optimizer step", ylabel="loss of the step's batch (nats per token)"
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _label_end(axes, steps[-1], smooth[-1], f"{smooth[-1]:.3f} smoothed", BLUE)
        looped = column(rows, "looped") > 0
        if looped.any() and not looped[0]:
            axes.axvline(steps[looped.argmax()], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
            axes.text(
                steps[looped.argmax()],
                1.0,
                " looping begins",
                transform=axes.get_xaxis_transform(),
                va="top",
                color=GREY,
            )
        axes.set_xlim(steps[0], steps[-1] + max(1.0, 0.02 * len(steps)))
        return png(figure)


def chunks(sliding: Sequence[Row], ttt: Sequence[Row]) -> bytes:
    """Bits per byte along the validation stream, chunk by chunk and so far, with and without test-time training."""
    lines = (("sliding", sliding, GREY), ("with TTT", ttt, ORANGE))
    with styled():
        figure, (above, below) = canvas(8, 6.4, 2, sharex=True)
        for name, rows, color in lines:
            first, targets = column(rows, "first_target"), column(rows, "targets")
            edges = np.append(first, first[-1] + targets[-1]) / 1000
            above.stairs(column(rows, "bpb"), edges, baseline=None, color=color, linewidth=1.6, label=name)
            so_far = column(rows, "cumulative_bpb")
            below.plot(
                edges[1:], so_far, color=color, linewidth=2, marker="o", markersize=3 if len(rows) < 60 else 0
            )
        ends = [column(rows, "cumulative_bpb")[-1] for _, rows, _ in lines]
        bottom, top = below.get_ylim()
        for (name, rows, color), end, shift in zip(lines, ends, _apart(ends, top - bottom), strict=True):
            last = (column(rows, "first_target")[-1] + column(rows, "targets")[-1]) / 1000
            _label_end(below, last, end, f"{name}\n{end:.4f}", color, shift)
        above.legend(
            frameon=False, loc="upper right", ncols=2, labelcolor="linecolor", bbox_to_anchor=(1, 1.14)
        )
        above.set(title="Bits per byte by chunk of the validation stream", ylabel="bpb of the chunk")
        below.set(
            title="and of everything so far",
            ylabel="cumulative bpb",
            xlabel="targets scored (thousands of tokens)",
        )
        return png(figure)


def parts(layers: Sequence[Row], bytes_code: int, budget_bytes: int) -> bytes:
    """Where the counted bytes go: the model by kind of tensor, and the code; the cap for comparison."""
    sizes = part_sizes(layers, bytes_code)
    total = sum(sizes.values())
    colors = {name: color for name, (_, color) in PARTS.items()} | {CODE: PURPLE}
    names = list(sizes)[::-1]
    with styled():
        figure, axes = canvas(8, 0.9 + 0.42 * len(names))
        bars = axes.barh(
            names,
            [sizes[name] for name in names],
            color=[colors.get(name, GREY) for name in names],
            height=0.72,
        )
        axes.bar_label(bars, [f" {sizes[name]:,} B   {sizes[name] / total:.1%}" for name in names], padding=2)
        axes.set_title(f"{total:,} bytes counted, {budget_bytes:,} allowed", pad=10)
        axes.set_xlabel("bytes")
        axes.xaxis.set_major_formatter(FuncFormatter(_si))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, max(sizes.values()) * 1.28)
        return png(figure)


def part_sizes(layers: Sequence[Row], bytes_code: int) -> dict[str, int]:
    """Bytes by part, in the order of a forward pass; they add up to the two counted files."""
    sizes = dict.fromkeys((*PARTS, OTHER, "container", CODE), 0)
    for row in layers:
        name = row["name"]
        part = next(
            (part for part, (fragment, _) in PARTS.items() if fragment in name),
            "container" if name == "container" else OTHER,
        )
        sizes[part] += int(row["bytes"])
    sizes[CODE] = bytes_code
    return {part: size for part, size in sizes.items() if size}


def smoothed(values: np.ndarray, steps: float) -> np.ndarray:
    """The exponential average with a time constant of so many steps, corrected for its start.

    >>> smoothed(np.array([2.0, 2.0]), 10).tolist()
    [2.0, 2.0]
    """
    keep = math.exp(-1 / steps)
    result, total, weight = np.empty(len(values)), 0.0, 0.0
    for i, value in enumerate(values):
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result[i] = total / weight
    return result


def column(rows: Sequence[Row], name: str) -> np.ndarray:
    """A column of a table as numbers; a ValueError when it is absent or holds something else."""
    try:
        return np.array([float(row[name]) for row in rows])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"a table has no column {name} of numbers ({error}); it has {', '.join(map(str, rows[0]))}"
        ) from error


def _label_end(axes: Axes, x: float, y: float, text: str, color: str, shift: float = 0) -> None:
    """A label to the right of a line's last point, moved up by `shift` points."""
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


def _apart(ends: Sequence[float], height: float) -> tuple[float, float]:
    """By how many points to move two labels that would overlap on axes of this height in data units: the upper one up."""
    if abs(ends[0] - ends[1]) > 0.12 * height:
        return 0, 0
    return (14, -14) if ends[0] >= ends[1] else (-14, 14)


def _si(value: float, _: object) -> str:
    return f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} k" if value >= 1e3 else f"{value:g}"
