"""One style for all figures, and PNG bytes that depend on nothing but the numbers drawn.

Figures are drawn with matplotlib's Figure, without pyplot's global state, from matplotlib's own
defaults and the few settings below. The PNG has neither a date nor a version, so the same numbers
give the same bytes.
"""

import io
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

# Colours of data. The first three are Okabe and Ito's, which colour-blind readers can tell apart.
BLUE = "#0072b2"
ORANGE = "#d55e00"
GREEN = "#009e73"
PURPLE = "#7b4ea3"
GREY = "#8a8f98"
INK = "#22262c"  # text
FAINT = "#e4e7eb"  # grid
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
DPI = 144  # pixels per inch


def house_style() -> AbstractContextManager[None]:
    """Context manager: draw with matplotlib's own defaults, not the user's, and the settings of STYLE."""
    settings: dict[Any, Any] = {key: value for key, value in mpl.rcParamsDefault.items() if key != "backend"}
    return mpl.rc_context(settings | STYLE)


def new_figure(width: float, height: float, rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of `width` x `height` inches and its axes: one, or an array of `rows` of them.

    `options` are those of matplotlib's `Figure.subplots`.
    """
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, 1, **options)


def to_png(figure: Figure) -> bytes:
    """Render a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
