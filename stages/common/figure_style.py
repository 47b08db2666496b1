"""What pictures are drawn on: one style, and PNG bytes that are a function of the numbers alone.

Drawn through matplotlib's Figure, without pyplot's global state, from matplotlib's own defaults and the few settings below; the picture
holds no date and no version, so the same numbers give the same bytes.
"""

import io
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE, GREY = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#7b4ea3",
    "#8a8f98",
)  # the first three: Okabe and Ito
INK, FAINT = "#22262c", "#e4e7eb"
STYLE = {
    "font.size": 10,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.solid_capstyle": "round",
}
DPI = 144


def styled() -> AbstractContextManager[None]:
    """Within this, matplotlib draws with its own defaults, not the user's, and our settings."""
    settings: dict[Any, Any] = {key: value for key, value in mpl.rcParamsDefault.items() if key != "backend"}
    return mpl.rc_context(settings | STYLE)


def canvas(width: float, height: float, rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of so many inches and its axes: one, or an array of `rows` below each other."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, 1, **options)


def png(figure: Figure) -> bytes:
    """The picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
