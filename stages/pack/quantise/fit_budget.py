"""One number that decides how coarse everything is: as fine as the byte budget allows.

Twice the scale is twice the step, which saves about one bit a weight while the integers still spread over many values, and less than that
once they do not. Attempts are dear (quantisation and coding of the whole model), so the search predicts: from that slope at first, then
from the line through the two nearest attempts, within the bracket of the coarsest that is over the budget and the finest that fits.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

T = TypeVar("T")
UNUSED = 2_000  # bytes of the budget that may be left
TARGET = 0.4  # of UNUSED at which the search aims: sizes scatter by some hundred bytes, and over the budget is worse than under
NARROWEST = 1.0e-4  # width of the bracket in log2 of the scale at which the search ends: 450 bytes of 36 million weights
MAX_ATTEMPTS = 12
SLOPE = (
    0.98  # bits a weight for a doubling, where weights take three and a half; columns that take few save less
)


class Scales(NamedTuple):
    """What a quantiser says of its scale: where to begin, and between which values it means anything."""

    first: float
    finest: float
    coarsest: float


class Point(NamedTuple):
    """One attempt: log2 of its scale, and the bytes by which it is over the budget (below zero: it fits)."""

    x: float
    excess: int


def fill(
    attempt: Callable[[float], T], size: Callable[[T], int], budget: int, weights: int, scales: Scales
) -> tuple[float, T]:
    """The scale and its attempt with the largest size found that is at most `budget`; a ValueError when none fits.

    It ends within UNUSED bytes of the budget, or at the finest scale: then the budget is more than the quantiser can use. `attempt` packs
    everything at a scale, `size` is its bytes, `weights` the number of quantised weights.
    """
    points: list[Point] = []
    best: tuple[float, T] | None = None
    largest, scale = -budget - 1, scales.first
    while len(points) < MAX_ATTEMPTS:
        result = attempt(scale)
        excess = size(result) - budget
        points.append(Point(math.log2(scale), excess))
        if largest < excess <= 0:
            largest, best = excess, (scale, result)
        if (
            -UNUSED <= excess <= 0
            or scale == (scales.finest if excess <= 0 else scales.coarsest)
            or _closed(points)
        ):
            break
        scale = min(max(2.0 ** _next(points, weights), scales.finest), scales.coarsest)
    if best is None:
        last = min(points, key=lambda point: point.excess)
        raise ValueError(
            f"artifact over the byte budget: {last.excess + budget} bytes at scale {2**last.x:.4g} after {len(points)} attempts, {budget}"
            " allowed (pack.budget_bytes less pack.code_reserve_bytes); make the model smaller, or its bits fewer (pack.matrix_bits)"
        )
    return best


def _bracket(points: list[Point]) -> tuple[float, float]:
    """log2 of the coarsest scale that is over the budget, and of the finest above it that fits."""
    low = max((point.x for point in points if point.excess > 0), default=-math.inf)
    return low, min((point.x for point in points if point.excess <= 0 and point.x > low), default=math.inf)


def _closed(points: list[Point]) -> bool:
    low, high = _bracket(points)
    return high - low <= NARROWEST


def _next(points: list[Point], weights: int) -> float:
    """log2 of the scale to try: where the line through the attempts nearest to the target meets it, within the bracket."""
    target = -TARGET * UNUSED
    near = sorted(points, key=lambda point: abs(point.excess - target))
    slope = -SLOPE * weights / 8  # bytes for a doubling
    if len(near) > 1 and near[0].x != near[1].x:
        measured = (near[0].excess - near[1].excess) / (near[0].x - near[1].x)
        slope = measured if 4 * slope < measured < slope / 50 else slope
    x = near[0].x + (target - near[0].excess) / slope
    low, high = _bracket(points)
    margin = (high - low) / 100 if math.isfinite(high - low) else 0.0
    return min(max(x, low + margin), high - margin)
