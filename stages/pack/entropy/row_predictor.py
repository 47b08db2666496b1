"""Rank-1 prediction of a matrix's levels: a shared direction times a coefficient for each row.

Rows of an embedding have such a direction. It is learnt from the rows that are already coded by
Oja's rule (1982), an online estimate of the first principal component. A row's coefficient is
fitted to its levels so far by ridge regression. The predicted level of column c is coefficient *
direction[c]. Integers only; _qN names N fractional bits.

Shapes: C columns.
"""

from typing import Any, NamedTuple

import numpy as np

from stages.common.jit import jit_internal
from stages.pack.entropy.records import new_record

PREDICTION_BITS = 12  # fractional bits of predicted levels and of the direction
LEVEL_LIMIT = 4095  # levels are clamped to this here, so that no sum of products overflows 64 bits
PREDICTION_LIMIT_Q12 = LEVEL_LIMIT << PREDICTION_BITS
COEFFICIENT_LIMIT_Q8 = 16383
INITIAL_DIRECTION_Q12 = 1 << (PREDICTION_BITS - 2)  # 1/4 in every column
RIDGE_LIMIT_Q8: Any = np.int64(1 << 40)
MAX_DECAY_SHIFT = 7  # running means of the statistics forget by 1/128 a row at least
SAVED_DECAY_SHIFT = 6  # the running sum of savings forgets by 1/64 a row

# Initial values of DirectionStats. The large weight lets the direction learn slowly at first.
INITIAL_RESIDUAL_VAR_Q8 = 256
INITIAL_COEFFICIENT_VAR_Q16 = 6000
INITIAL_WEIGHT_Q16 = 2_000_000


class DirectionStats:
    """Record of running statistics over the rows of a matrix."""

    residual_var_q8: int  # mean square of the differences between levels and predictions
    coefficient_var_q16: int  # mean square of the rows' coefficients
    weight_q16: int  # sum of the squared coefficients that the direction is learnt from
    saved_q12: int  # by how much predicting has made levels smaller; above zero: it pays


class Direction(NamedTuple):
    """The shared direction and its statistics."""

    direction_q12_C: np.ndarray  # int64
    stats: DirectionStats


def initial_direction(columns: int) -> Direction:
    """A flat direction, before the first row."""
    stats = new_record(
        DirectionStats,
        residual_var_q8=INITIAL_RESIDUAL_VAR_Q8,
        coefficient_var_q16=INITIAL_COEFFICIENT_VAR_Q16,
        weight_q16=INITIAL_WEIGHT_Q16,
    )
    return Direction(np.full(columns, INITIAL_DIRECTION_Q12, np.int64), stats)


@jit_internal
def clamp_level(level: int) -> int:
    """The level as the predictor counts it, within +-LEVEL_LIMIT."""
    if level > LEVEL_LIMIT:
        return LEVEL_LIMIT
    return max(level, -LEVEL_LIMIT)


@jit_internal
def prediction(coefficient_q8: int, direction_q12: int) -> int:
    """The predicted level of a column, in q12."""
    return min(max((coefficient_q8 * direction_q12) >> 8, -PREDICTION_LIMIT_Q12), PREDICTION_LIMIT_Q12)


@jit_internal
def coefficient(dot_q8: int, norm_q8: int) -> int:
    """Least-squares coefficient of a row, in q8.

    It is the sum of direction * level over the sum of direction^2, which includes the ridge.
    """
    return min(max((dot_q8 << 8) // norm_q8, -COEFFICIENT_LIMIT_Q8), COEFFICIENT_LIMIT_Q8)


@jit_internal
def ridge(stats: DirectionStats) -> int:
    """Ridge that shrinks a coefficient towards zero: the initial sum of direction^2, in q8.

    It is the ratio of the variance of residuals to that of coefficients.
    """
    return min((stats.residual_var_q8 << 16) // (stats.coefficient_var_q16 + 1), RIDGE_LIMIT_Q8) + 1


@jit_internal
def update_direction(row: int, levels_C: np.ndarray, saved_q12: int, direction: Direction) -> None:
    """Learn from a coded row by Oja's rule: the direction moves by coefficient * residual.

    `row` is the number of rows before this one, `levels_C` (C,) int16 its levels. `saved_q12` is
    the sum of the levels' magnitudes less that of their differences to the prediction.
    """
    direction_q12_C, stats = direction

    # The coefficient of the whole row.
    dot_q8 = np.int64(0)
    norm_q8 = ridge(stats)
    for column in range(len(levels_C)):
        direction_q8 = direction_q12_C[column] >> 4
        dot_q8 += direction_q8 * clamp_level(np.int64(levels_C[column]))
        norm_q8 += (direction_q8 * direction_q8) >> 8
    coefficient_q8 = coefficient(dot_q8, norm_q8)

    # Running means: rates 1/2, 1/4, ... while rows are few, 1/128 in the end.
    decay_shift = 0
    while decay_shift < MAX_DECAY_SHIFT and (row + 2) >> (decay_shift + 1):
        decay_shift += 1
    squared_q16 = coefficient_q8 * coefficient_q8
    stats.saved_q12 += saved_q12 - (stats.saved_q12 >> SAVED_DECAY_SHIFT)
    stats.weight_q16 = min(stats.weight_q16 + squared_q16, (stats.coefficient_var_q16 + 1) << 10)
    stats.coefficient_var_q16 += (squared_q16 - stats.coefficient_var_q16) >> decay_shift

    # Oja's rule: the rate is the row's coefficient over the weight of the rows so far.
    rate_q12 = (coefficient_q8 << 20) // stats.weight_q16
    squares_q8 = np.int64(0)
    for column in range(len(levels_C)):
        direction_q12 = direction_q12_C[column]
        level_q12 = clamp_level(np.int64(levels_C[column])) << PREDICTION_BITS
        residual_q12 = level_q12 - prediction(coefficient_q8, direction_q12)
        squares_q8 += (residual_q12 >> 8) * (residual_q12 >> 8)
        moved_q12 = direction_q12 + ((rate_q12 * residual_q12 + 2048) >> 12)
        direction_q12_C[column] = min(max(moved_q12, -PREDICTION_LIMIT_Q12), PREDICTION_LIMIT_Q12)

    residual_var_q8 = squares_q8 // max(len(levels_C), 1)
    stats.residual_var_q8 = max(
        1, stats.residual_var_q8 + ((residual_var_q8 - stats.residual_var_q8) >> decay_shift)
    )
