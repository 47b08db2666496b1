"""One number that decides how coarse everything is: as fine as the byte budget allows.

`fit` is SDClip's: a factor on all clip widths that is never below 1.

A wider clip is a coarser step: twice the width saves about one bit a weight while the integers still spread over many values, and less
than that once they do not. Attempts are dear (GPTQ and the codec over the whole model), so the search predicts: from that slope until the
budget is bracketed, then by linear interpolation between the ends of the bracket, in log2 of the factor.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

T = TypeVar("T")
MAX_FACTOR = 8.0  # beyond it hardly anything but zeros is left
TOLERANCE = 1.0e-3  # of the budget: an attempt that leaves less than this unused ends the search
MAX_ATTEMPTS = 12
UNUSED = 2_000  # bytes of the budget that `fill` may leave
TARGET = 0.4  # of UNUSED at which it aims: sizes scatter by some hundred bytes, and over the budget is worse than under
NARROWEST = 1.0e-3  # width of the bracket in log2 of the factor at which the search ends: 0.07 % of the step


class Point(NamedTuple):
    """One attempt: log2 of its factor, and the bytes by which it is over the budget (below zero: it fits)."""

    x: float
    excess: int


def fit(attempt: Callable[[float], T], size: Callable[[T], int], budget: int, weights: int) -> tuple[float, T]:
    """The factor and its attempt: 1 when that fits, else the smallest found to fit; a ValueError when none within MAX_FACTOR does.

    `attempt` packs everything with a factor, `size` is its bytes, `weights` the number of quantised weights.
    """
    factor, result = 1.0, attempt(1.0)
    low, high, best = Point(0.0, size(result) - budget), None, None
    if low.excess <= 0:
        return factor, result
    for attempts in range(1, MAX_ATTEMPTS):
        factor = round(2 ** (_further(low, budget, weights, attempts) if high is None else _between(low, high, budget)), 6)
        result = attempt(factor)
        point = Point(math.log2(factor), size(result) - budget)
        if point.excess > 0:
            low = point
        else:
            high, best = point, (factor, result)
        if factor == MAX_FACTOR and high is None:
            break
        if high is not None and (-high.excess <= TOLERANCE * budget or high.x - low.x <= NARROWEST):
            break
    if best is None:
        raise ValueError(
            f"artifact over the byte budget: {budget + low.excess} bytes at {2**low.x:.4g} times the clip widths, {budget} allowed"
            " (pack.budget_bytes less pack.code_reserve_bytes); make the model smaller or its bit widths fewer"
        )
    return best


def _further(low: Point, budget: int, weights: int, attempts: int) -> float:
    """Beyond a point that is over the budget: a bit a weight for a doubling, and twice as bold at each attempt."""
    step = 1.1 * max(8 * (low.excess + TOLERANCE * budget / 2) / max(1, weights), NARROWEST)
    return min(low.x + step * 2 ** (attempts - 1), math.log2(MAX_FACTOR))


def _between(low: Point, high: Point, budget: int) -> float:
    """Inside a bracket: where the line through its ends leaves half the tolerance unused, off the ends by a tenth."""
    target = -TOLERANCE * budget / 2
    share = (low.excess - target) / (low.excess - high.excess)
    return low.x + min(max(share, 0.1), 0.9) * (high.x - low.x)


def fill(attempt: Callable[[float], T], size: Callable[[T], int], budget: int, weights: int, first: float) -> tuple[float, T]:
    """The scale and its attempt with the largest size found that is at most `budget`; a ValueError when none fits.

    Twice the scale saves a bit a weight at first; then the line through the two nearest attempts predicts. What `first` predicts is taken
    as it is when it is under the budget by more than a tenth: then the budget is more than the model can use.
    """
    points: list[Point] = []
    best: tuple[float, T] | None = None
    largest, scale = -budget - 1, first
    for _ in range(MAX_ATTEMPTS):
        result = attempt(scale)
        excess = size(result) - budget
        points.append(Point(math.log2(scale), excess))
        if largest < excess <= 0:
            largest, best = excess, (scale, result)
        if -UNUSED <= excess <= 0 or (len(points) == 1 and -excess > 0.1 * budget):
            break
        scale = 2.0 ** _next(points, weights)
    if best is None:
        raise ValueError(
            f"artifact over the byte budget: {min(point.excess for point in points) + budget} bytes after {len(points)} attempts, {budget}"
            " allowed (pack.budget_bytes less pack.code_reserve_bytes); make the model smaller"
        )
    return best


def _next(points: list[Point], weights: int) -> float:
    """log2 of the scale to try: where the line through the attempts nearest to the target meets it."""
    target = -TARGET * UNUSED
    near = sorted(points, key=lambda point: abs(point.excess - target))
    slope = -weights / 8  # bytes for a doubling
    if len(near) > 1 and near[0].x != near[1].x:
        measured = (near[0].excess - near[1].excess) / (near[0].x - near[1].x)
        slope = measured if 4 * slope < measured < slope / 50 else slope
    return near[0].x + (target - near[0].excess) / slope
