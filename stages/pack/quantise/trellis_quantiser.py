"""Rate-distortion quantisation of a matrix: levels on a trellis, GPTQ's feedback inside the search.

An entropy coder follows, so no value has to be clipped, and steps need not match the weights'
magnitudes. The best steps make every weight's error equally expensive (reverse water-filling, with
the loss as the measure). The loss that an error D of a matrix causes is about half of

    sum over rows r of  g_r  D_r H D_r^T

with H the Hessian of the inputs and g_r the mean squared gradient of the row's output (a
Kronecker-factored Fisher matrix, diagonal on the output's side: Martens and Grosse 2015). Under
GPTQ's feedback a row's term is sum_j (e_rj / U_jj)^2 (gptq.py), where e_rj is the error of column
j, measured from the value that feedback has moved. Equal costs therefore need

    step_rj = step * U_jj / sqrt(g_r)

with one number `step` for the whole model, which the byte budget determines (WaterSIC, 2026,
derives the columns' part from rate-distortion theory). The factors of rows and columns are powers
of 2^(1/8) (pack/exponents.py).

Three units occur: weights; scaled weights, which are divided by the factors of their row and
column; and y, scaled weights divided by `step`. In units of y a level is an integer and feedback is
a unit upper triangular matrix V (`ColumnFeedback`). viterbi.py searches for the levels.

Shapes: R rows, C columns, K classes of deviation, L tabulated magnitudes.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from stages.common.concurrency import thread_map
from stages.pack.entropy.level_coder import MAX_LEVEL
from stages.pack.exponents import MAX_EXPONENT, exponents_to_factors
from stages.pack.forms import TrellisLevels
from stages.pack.quantise.viterbi import ROWS_AT_ONCE, allocate, search_, search_task
from stages.pack.trellis import build_trellis

WEIGHTS_PER_THREAD = 1 << 19  # weights of a matrix that one thread searches at a time

# Table of bits: by the deviation of a value in units of y, four classes an octave, from 2^-4 on.
DEVIATION_CLASSES = 72
CLASSES_PER_OCTAVE = 4
MIN_DEVIATION_OCTAVE = -4
TABLE_MAGNITUDES = 256
MIN_PROBABILITY = 1e-9

TINY = 1e-300  # floor of divisors and of arguments of a logarithm
TINY_VARIANCE = 1e-12  # in units of y: far below the lowest class


class SearchResult(NamedTuple):
    """A quantised matrix, and the values that were quantised, for measuring rate and distortion."""

    matrix: TrellisLevels
    pre_quantised_RC: np.ndarray  # float32: weights after feedback, in units of their own steps


class ColumnFeedback(NamedTuple):
    """GPTQ's feedback in units of the columns' steps.

    It is the same for all matrices with these inputs, and for every step.
    """

    exponents_C: np.ndarray  # int8: factors of the columns
    cost_C: np.ndarray  # float64: cost of a squared error of one step, without the row's factor
    feedback_CC: np.ndarray  # float32: V


class ScaledMatrix(NamedTuple):
    """The inputs of `quantise_matrix` that do not depend on the step."""

    scaled_RC: np.ndarray  # float32: weights divided by the factors of their row and column
    row_exponents_R: np.ndarray  # int8
    cost_R: np.ndarray  # float64: cost of a squared error of one step, without the column's factor
    columns: ColumnFeedback


def row_column_variances(values_RC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean squares of rows (R,), relative to that of the matrix, and of columns (C,); float64.

    A value's variance is modelled as the product of its row's and its column's.
    """
    squares_RC = values_RC.astype(np.float64) ** 2
    return squares_RC.mean(1) / max(float(squares_RC.mean()), TINY), squares_RC.mean(0)


def column_feedback(upper_CC: np.ndarray, exponents_C: np.ndarray) -> ColumnFeedback:
    """Convert GPTQ's U (C, C), float32 in the columns' own order, to units of the columns' steps.

    An error of 1 in column j moves column k by U_jk / U_jj. V is the same with both in units of
    their own steps.
    """
    factor_C = exponents_to_factors(exponents_C)
    diagonal_C = upper_CC.diagonal().astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # checked below
        feedback_CC = np.ascontiguousarray(upper_CC * (factor_C / diagonal_C)[:, None] / factor_C, np.float32)
        cost_C = (factor_C / diagonal_C) ** 2
    _require_finite(feedback_CC, cost_C)
    return ColumnFeedback(exponents_C, cost_C, feedback_CC)


def scale_matrix(
    weight_RC: np.ndarray, importance_R: np.ndarray, row_exponents_R: np.ndarray, columns: ColumnFeedback
) -> ScaledMatrix:
    """Prepare a float32 matrix for the search; `importance_R` is g, the rows' importance."""
    factor_R = exponents_to_factors(row_exponents_R)
    scaled_RC = np.ascontiguousarray(
        weight_RC / factor_R[:, None] / exponents_to_factors(columns.exponents_C)
    )
    cost_R = importance_R.astype(np.float64) * factor_R.astype(np.float64) ** 2
    return ScaledMatrix(scaled_RC, row_exponents_R, cost_R, columns)


def coarsened(matrix: ScaledMatrix, eighths_C: np.ndarray) -> ScaledMatrix:
    """The matrix with the exponents of its columns raised by `eighths_C`, integers (C,)."""
    columns = matrix.columns
    exponents_C = np.minimum(columns.exponents_C + eighths_C, MAX_EXPONENT).astype(np.int8)
    ratio_C = exponents_to_factors(exponents_C.astype(np.int16) - columns.exponents_C)
    coarser = ColumnFeedback(
        exponents_C,
        columns.cost_C * ratio_C.astype(np.float64) ** 2,
        columns.feedback_CC * ratio_C[:, None] / ratio_C,
    )
    return matrix._replace(scaled_RC=matrix.scaled_RC / ratio_C, columns=coarser)


def quantise_matrix(matrix: ScaledMatrix, step: float, states: int, rate_weight: float) -> SearchResult:
    """Quantise a matrix with one step on a trellis of `states` states.

    `rate_weight` is lambda, in units of the squared distance between the levels that a state
    allows. 0 takes the nearest path. At 0.1, bits and squared error are at their joint optimum, but
    levels are drawn towards zero, which hurts trained weights more than errors without a direction:
    at equal bytes, 0 lost a quarter of what 0.1 lost (docs/decisions.md). A ValueError when a level
    would not fit 16 bits.
    """
    trellis = build_trellis(states)
    columns = matrix.columns
    y_RC = matrix.scaled_RC / np.float32(step)
    _require_room(y_RC, MAX_LEVEL // 2)  # feedback may add to it

    # Costs in units of the matrix's mean, so that lambda weighs bits against the mean cost of an
    # error.
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_cost = matrix.cost_R.mean() * columns.cost_C.mean()
        cost_R = matrix.cost_R / mean_cost
    _require_finite(cost_R)
    cost_R = cost_R.astype(np.float32)

    # Prices of bits; a table of one column means none.
    if rate_weight > 0:
        row_class_R, column_class_C = _deviation_classes(y_RC)
        prices_KL = np.float32(rate_weight * trellis.stride**2) * bit_table(states)
    else:
        row_class_R = np.zeros(y_RC.shape[0], np.int64)
        column_class_C = np.zeros(y_RC.shape[1], np.int64)
        prices_KL = np.zeros((1, 1), np.float32)

    # Search pieces of rows on several threads, so that the largest matrix does not keep all others
    # waiting. Rows are independent, so the pieces do not change the result.
    levels_RC = np.zeros(y_RC.shape, np.int16)
    task = search_task(
        trellis, columns.feedback_CC, columns.cost_C.astype(np.float32), column_class_C, prices_KL
    )

    def search_rows(rows: slice) -> None:
        search_(y_RC[rows], cost_R[rows], row_class_R[rows], task, allocate(states), levels_RC[rows])

    pieces = _row_pieces(*y_RC.shape)
    thread_map(search_rows, pieces, lambda rows: rows.stop - rows.start, len(pieces))

    # y_RC now holds the values after feedback.
    _require_room(y_RC, MAX_LEVEL - 2 * trellis.stride)

    stored_step = float(np.float32(step))
    quantised = TrellisLevels(levels_RC, matrix.row_exponents_R, columns.exponents_C, stored_step)
    return SearchResult(quantised, y_RC)


def compile_ahead() -> None:
    """Compile the search, which takes seconds."""
    one = np.ones((1, 1), np.float32)
    zero = np.zeros(1, np.int8)
    quantise_matrix(scale_matrix(one, one[0], zero, column_feedback(one, zero)), 1.0, 1, 0.0)


def _row_pieces(rows: int, columns: int) -> list[slice]:
    """Cut the rows into pieces of about WEIGHTS_PER_THREAD weights, multiples of ROWS_AT_ONCE rows."""
    size = max(1, WEIGHTS_PER_THREAD // max(1, columns) // ROWS_AT_ONCE) * ROWS_AT_ONCE
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def _require_finite(*costs: np.ndarray) -> None:
    if not all(np.isfinite(values).all() for values in costs):
        raise ValueError(
            "the costs of errors are not finite numbers above zero;"
            " check the Hessian and the importance of rows"
        )


def _require_room(y_RC: np.ndarray, limit: int) -> None:
    """A ValueError when a value is too many steps from zero for levels of 16 bits."""
    largest = float(np.abs(y_RC).max(initial=0.0))
    if not largest <= limit:
        raise ValueError(
            f"a weight is {largest:.4g} steps from zero, {limit} are allowed; its step is too fine"
        )


@functools.cache
def bit_table(states: int) -> np.ndarray:
    """Bits of a level of normal values, by class of deviation and magnitude: (K, L) float32.

    A level represents all values nearer to it than to another level that the state allows: within
    one step on a trellis, within half a step on the uniform grid.
    """
    reach = build_trellis(states).stride / 2
    deviation_K1 = 2.0 ** (MIN_DEVIATION_OCTAVE + np.arange(DEVIATION_CLASSES) / CLASSES_PER_OCTAVE)[:, None]
    magnitude_L = np.arange(TABLE_MAGNITUDES)
    erf = np.vectorize(math.erf)
    below_KL = erf((magnitude_L - reach) / deviation_K1 / math.sqrt(2))
    above_KL = erf((magnitude_L + reach) / deviation_K1 / math.sqrt(2))
    return -np.log2(np.maximum((above_KL - below_KL) / 2, MIN_PROBABILITY)).astype(np.float32)


def _deviation_classes(y_RC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classes of rows (R,) and of columns (C,), int64; their sum is the row of `bit_table` for a value."""
    variance_R, variance_C = row_column_variances(y_RC)
    return _log_class(variance_R), _log_class(variance_C) - CLASSES_PER_OCTAVE * MIN_DEVIATION_OCTAVE


def _log_class(variances: np.ndarray) -> np.ndarray:
    """log2 of the deviations, in classes."""
    deviations = np.log2(np.maximum(variances, TINY_VARIANCE)) / 2
    return np.rint(CLASSES_PER_OCTAVE * deviations).astype(np.int64)
