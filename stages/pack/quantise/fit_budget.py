"""One-dimensional search for the finest quantisation that fits the byte budget.

One number, the coarseness, multiplies all steps of the model. Doubling it saves about one bit a
weight while the integers still spread over many values, and less once they do not. An attempt is
expensive (quantising and encoding the whole model), so the search predicts the size: from that
slope at first, then from the line through the two nearest attempts. It stays inside a bracket: the
coarsest attempt that is over the budget and the finest that fits.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

T = TypeVar("T")

MAX_UNUSED_BYTES = 2_000  # of the budget: an attempt this close under it ends the search
# Where the search aims, as a fraction of MAX_UNUSED_BYTES: sizes scatter by some hundred bytes, and
# over the budget is worse than under it.
TARGET_FRACTION = 0.4
# A bracket narrower than this, in log2 of the coarseness, ends the search: 450 bytes of 36 million
# weights.
MIN_BRACKET = 1.0e-4
MAX_ATTEMPTS = 12
# Bits a weight that doubling saves at first, where weights take 3.5 bits. Columns that take few
# bits save less.
BITS_PER_DOUBLING = 0.98


class CoarsenessRange(NamedTuple):
    """A quantiser's range of the coarseness, and where to begin."""

    first: float
    finest: float
    coarsest: float


class Measurement(NamedTuple):
    """The size of one attempt."""

    log2_coarseness: float
    excess: int  # bytes over the budget; 0 or less: it fits


def fit_to_budget(
    attempt: Callable[[float], T],
    size: Callable[[T], int],
    budget: int,
    weights: int,
    coarseness_range: CoarsenessRange,
) -> tuple[float, T]:
    """Find the coarseness whose attempt is the largest that fits `budget` bytes; returns both.

    `attempt` packs the model at a coarseness, `size` is the bytes of an attempt, `weights` the
    number of quantised weights. The search ends within MAX_UNUSED_BYTES of the budget, or at the
    finest coarseness: then the quantiser cannot use the whole budget. A ValueError when no attempt
    fits.
    """
    measured: list[Measurement] = []
    best: tuple[float, T] | None = None
    best_excess = -budget - 1
    coarseness = coarseness_range.first
    while len(measured) < MAX_ATTEMPTS:
        result = attempt(coarseness)
        excess = size(result) - budget
        measured.append(Measurement(math.log2(coarseness), excess))
        if best_excess < excess <= 0:
            best_excess = excess
            best = coarseness, result

        # Stop close under the budget, at the end of the range, or when the bracket is closed.
        end_of_range = coarseness_range.finest if excess <= 0 else coarseness_range.coarsest
        low, high = _bracket(measured)
        if -MAX_UNUSED_BYTES <= excess <= 0 or coarseness == end_of_range or high - low <= MIN_BRACKET:
            break
        predicted = 2.0 ** _predict(measured, weights)
        coarseness = min(max(predicted, coarseness_range.finest), coarseness_range.coarsest)

    if best is None:
        smallest = min(measured, key=lambda measurement: measurement.excess)
        raise ValueError(
            f"artifact over the byte budget: {smallest.excess + budget} bytes at coarseness"
            f" {2**smallest.log2_coarseness:.4g} after {len(measured)} attempts, {budget} allowed"
            " (pack.budget_bytes less pack.code_reserve_bytes);"
            " make the model smaller, or its bits fewer (pack.matrix_bits)"
        )
    return best


def _bracket(measured: list[Measurement]) -> tuple[float, float]:
    """log2 of the coarsest attempt that is over the budget, and of the finest above it that fits."""
    low = -math.inf
    for x, excess in measured:
        if excess > 0:
            low = max(low, x)
    high = math.inf
    for x, excess in measured:
        if excess <= 0 and x > low:
            high = min(high, x)
    return low, high


def _predict(measured: list[Measurement], weights: int) -> float:
    """log2 of the next coarseness: the line through the two attempts nearest to the target meets it there."""
    target = -TARGET_FRACTION * MAX_UNUSED_BYTES
    near = sorted(measured, key=lambda measurement: abs(measurement.excess - target))

    # Bytes that a doubling saves (negative): the measured slope, unless it is implausible.
    slope = -BITS_PER_DOUBLING * weights / 8
    if len(near) > 1 and near[0].log2_coarseness != near[1].log2_coarseness:
        measured_slope = (near[0].excess - near[1].excess) / (
            near[0].log2_coarseness - near[1].log2_coarseness
        )
        if 4 * slope < measured_slope < slope / 50:
            slope = measured_slope
    x = near[0].log2_coarseness + (target - near[0].excess) / slope

    # Stay a hundredth of the bracket away from its ends, so that it shrinks.
    low, high = _bracket(measured)
    margin = (high - low) / 100 if math.isfinite(high - low) else 0.0
    return min(max(x, low + margin), high - margin)
