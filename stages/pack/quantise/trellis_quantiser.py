"""Quantisation at a rate: integer levels on scaled axes, on a trellis, with GPTQ's feedback inside the search.

Where the rate is that of an entropy coder, no value needs clipping and no row a step of its own size of weights: the best steps are those
that make every weight's error cost the same (reverse water-filling, with the loss as the measure). The loss that an error D of a matrix
causes is about half of

    sum over rows r of  g_r  D_r H D_r^T

with H the Hessian of the inputs and g_r the mean squared gradient of the row's output (a Kronecker-factored Fisher matrix, diagonal on the
output's side: Martens and Grosse 2015). Under GPTQ's feedback a row's term is sum_j (e_rj / U_jj)^2 (gptq.py), where e_rj is the error of
column j against the value that feedback has made of it. Equal costs therefore want

    step_rj = step * U_jj / sqrt(g_r)

one number for the whole model, which the byte budget decides (WaterSIC, 2026, derives the columns' part from rate-distortion theory). Rows
and columns keep their factors as powers of 2^(1/8), one byte each, which cost next to nothing once coded.

In units of its own step a value is y, a level l an integer, and feedback a unit upper triangular matrix V; viterbi.py finds the levels.

Shapes: R rows, C columns, S states.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from stages.common.concurrency import in_threads
from stages.pack.entropy.level_coder import LARGEST
from stages.pack.quantise.viterbi import ROWS_AT_ONCE, places, search, task_of
from stages.pack.trellis import trellis

PER_OCTAVE = 8  # factors of rows and columns are powers of 2^(1/8)
ROOTS = np.array(
    [1.0, 1.0905077, 1.1892071, 1.2968396, 1.4142135, 1.5422108, 1.6817929, 1.8340081], np.float32
)
FARTHEST = 127  # exponents are signed bytes

PIECE_WEIGHTS = 1 << 19  # of a matrix that are searched by one thread
CLASSES, CLASSES_PER_OCTAVE, NARROWEST = 72, 4, -4  # of a value's deviation, from 2^-4 levels on
TABULATED = 256  # magnitudes whose bits are tabulated
RAREST = 1e-9  # probability in the table of bits
TINY = 1e-300


class Lattice(NamedTuple):
    """A matrix as integer levels; the weight is level * step * 2^((row + column) / 8)."""

    levels_RC: np.ndarray  # int16
    rows_R: np.ndarray  # int8
    columns_C: np.ndarray  # int8
    step: float  # float32
    states: int


class Chosen(NamedTuple):
    """A lattice, and the values that entered the quantiser, in units of their steps: what rate and distortion are measured against."""

    lattice: Lattice
    entered_RC: np.ndarray  # float32


class Columns(NamedTuple):
    """What is known of a matrix's inputs; the same for all matrices that share them, and for every step."""

    exponents_C: np.ndarray  # int8: the columns' factors
    cost_C: np.ndarray  # float64: of an error of one step, but for the row's part
    unit_CC: np.ndarray  # float32: V


class Axes(NamedTuple):
    """What `choose` needs of a matrix but the step."""

    scaled_RC: np.ndarray  # float32: weights over the factors of their rows and columns
    rows_R: np.ndarray  # int8: exponents
    cost_R: np.ndarray  # float64: of an error of one step, but for the column's part
    columns: Columns


def scales(exponents: np.ndarray) -> np.ndarray:
    """2^(e / 8) in float32, the same on every machine.

    >>> scales(np.array([0, 8, -16, 4]))
    array([1.       , 2.       , 0.25     , 1.4142135], dtype=float32)
    """
    wide = exponents.astype(np.int32)
    return np.ldexp(ROOTS[wide % PER_OCTAVE], wide // PER_OCTAVE)


def exponents(factors: np.ndarray) -> np.ndarray:
    """The nearest powers of 2^(1/8) to positive factors, as signed bytes."""
    return np.clip(np.rint(PER_OCTAVE * np.log2(factors)), -FARTHEST, FARTHEST).astype(np.int8)


def weights(lattice: Lattice) -> np.ndarray:
    """The decoded matrix (R, C), float32."""
    columns_C = scales(lattice.columns_C) * np.float32(lattice.step)
    return lattice.levels_RC.astype(np.float32) * columns_C * scales(lattice.rows_R)[:, None]


def variances(values_RC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean squares of rows (R,), relative to all, and of columns (C,): a value's variance is taken for the product of both."""
    squares = values_RC.astype(np.float64) ** 2
    return squares.mean(1) / max(float(squares.mean()), TINY), squares.mean(0)


def columns_of(upper_CC: np.ndarray, exponents_C: np.ndarray) -> Columns:
    """The columns' part of the search, from GPTQ's U in the order of the columns. U_jk / U_jj is what an error of 1 in column j takes
    from column k; in V both are in steps of their own columns."""
    across_C, diagonal_C = scales(exponents_C), upper_CC.diagonal().astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # looked at below
        unit_CC = np.ascontiguousarray(upper_CC * (across_C / diagonal_C)[:, None] / across_C, np.float32)
        cost_C = (across_C / diagonal_C) ** 2
    _require_finite(unit_CC, cost_C)
    return Columns(exponents_C, cost_C, unit_CC)


def axes_of(weight_RC: np.ndarray, importance_R: np.ndarray, rows_R: np.ndarray, columns: Columns) -> Axes:
    """A matrix of float32 weights for the search; `importance_R` are the rows' g, `rows_R` their exponents."""
    down_R = scales(rows_R)
    scaled_RC = np.ascontiguousarray(weight_RC / down_R[:, None] / scales(columns.exponents_C))
    return Axes(scaled_RC, rows_R, importance_R.astype(np.float64) * down_R.astype(np.float64) ** 2, columns)


def widened(axes: Axes, eighths_C: np.ndarray) -> Axes:
    """The same with columns whose exponents are larger by so many eighths of an octave."""
    scaled_RC, rows_R, cost_R, columns = axes
    exponents_C = np.minimum(columns.exponents_C + eighths_C, FARTHEST).astype(np.int8)
    by_C = scales(exponents_C.astype(np.int16) - columns.exponents_C)
    unit_CC = columns.unit_CC * by_C[:, None] / by_C
    wider = Columns(exponents_C, columns.cost_C * by_C.astype(np.float64) ** 2, unit_CC)
    return Axes(scaled_RC / by_C, rows_R, cost_R, wider)


def choose(axes: Axes, step: float, states: int, rate_weight: float) -> Chosen:
    """The levels of a matrix at one step, on a trellis of so many states.

    `rate_weight` is lambda over the squared distance of the levels to choose from. 0 takes the nearest path. At 0.1 bits and squared error
    are at their best together, but the levels are drawn towards zero, and trained weights suffer from that more than from errors without
    a direction: at equal bytes 0 lost a quarter of what 0.1 lost (docs/decisions.md). A ValueError when a level would not fit 16 bits.
    """
    code, columns = trellis(states), axes.columns
    y_RC = axes.scaled_RC / np.float32(step)
    _require_room(y_RC, LARGEST // 2)  # feedback may add to it
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_cost = axes.cost_R.mean() * columns.cost_C.mean()
        cost_R = axes.cost_R / mean_cost
    _require_finite(cost_R)
    if rate_weight > 0:
        row_class_R, column_class_C = _classes(y_RC)
        prices = np.float32(rate_weight * code.stride**2) * bit_table(states)
    else:
        row_class_R, column_class_C = np.zeros(len(y_RC), np.int64), np.zeros(y_RC.shape[1], np.int64)
        prices = np.zeros((1, 1), np.float32)
    task = task_of(code, columns.unit_CC, columns.cost_C.astype(np.float32), column_class_C, prices)
    levels_RC, cost_R = np.zeros(y_RC.shape, np.int16), cost_R.astype(np.float32)

    def piece(rows: slice) -> None:
        search(y_RC[rows], cost_R[rows], row_class_R[rows], task, places(states), levels_RC[rows])

    in_threads(piece, pieces := _pieces(*y_RC.shape), lambda rows: rows.stop - rows.start, len(pieces))
    _require_room(y_RC, LARGEST - 2 * code.stride)
    return Chosen(Lattice(levels_RC, axes.rows_R, columns.exponents_C, float(np.float32(step)), states), y_RC)


def compile_ahead() -> None:
    """Have the search compiled, which takes seconds."""
    one, none = np.ones((1, 1), np.float32), np.zeros(1, np.int8)
    choose(axes_of(one, one[0], none, columns_of(one, none)), 1.0, 1, 0.0)


def _pieces(rows: int, columns: int) -> list[slice]:
    """Rows that a thread searches on its own, so that the largest matrix is not waited for; no row depends on another."""
    count = max(1, PIECE_WEIGHTS // max(1, columns) // ROWS_AT_ONCE) * ROWS_AT_ONCE
    return [slice(first, min(first + count, rows)) for first in range(0, rows, count)]


def _require_finite(*costs: np.ndarray) -> None:
    if not all(np.isfinite(of).all() for of in costs):
        raise ValueError(
            "the costs of errors are not finite numbers above zero; see to the Hessian and to the importance of rows"
        )


def _require_room(y_RC: np.ndarray, most: int) -> None:
    """A ValueError when a value lies too many steps from zero for levels of 16 bits."""
    largest = float(np.abs(y_RC).max(initial=0.0))
    if not largest <= most:
        raise ValueError(
            f"a weight is {largest:.4g} steps from zero, {most} are allowed; its step is too fine"
        )


@functools.cache
def bit_table(states: int) -> np.ndarray:
    """Bits of a level by class of deviation, parity and magnitude, for normal values: (CLASSES, TABULATED) float32.

    On a trellis a level stands for what is within one step of it, among the levels of its parity; on the uniform grid within half a step.
    """
    reach = trellis(states).stride / 2
    deviations = 2.0 ** (NARROWEST + np.arange(CLASSES) / CLASSES_PER_OCTAVE)
    below = np.vectorize(math.erf)((np.arange(TABULATED) - reach) / deviations[:, None] / math.sqrt(2))
    above = np.vectorize(math.erf)((np.arange(TABULATED) + reach) / deviations[:, None] / math.sqrt(2))
    return -np.log2(np.maximum((above - below) / 2, RAREST)).astype(np.float32)


def _classes(y_RC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classes of deviation for rows and for columns, whose sum is a value's row in the table of bits."""
    rows_R, columns_C = (
        np.rint(CLASSES_PER_OCTAVE * np.log2(np.maximum(of, 1e-12)) / 2).astype(np.int64)
        for of in variances(y_RC)
    )
    return rows_R, columns_C - CLASSES_PER_OCTAVE * NARROWEST
