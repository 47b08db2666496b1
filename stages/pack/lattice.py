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

In units of its own step a value is y, a level l an integer, and feedback a unit upper triangular matrix V: choosing l_j moves y_k by
-(y_j - l_j) V_jk for k > j. The search is Viterbi's, along each row: of all paths into a state of the trellis the cheapest survives, and
each survivor carries its own y of the columns ahead (per-survivor processing: Raheli et al. 1995). A block of columns is searched at a
time; its last DELAY decisions are taken back and searched again with the next block, since survivors have not yet merged there.

Shapes: R rows, C columns, S states.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from stages.pack.coder import LARGEST
from stages.pack.trellis import trellis

PER_OCTAVE = 8  # factors of rows and columns are powers of 2^(1/8)
ROOTS = np.array([1.0, 1.0905077, 1.1892071, 1.2968396, 1.4142135, 1.5422108, 1.6817929, 1.8340081], np.float32)
FARTHEST = 127  # exponents are signed bytes

BLOCK, DELAY_PER_BIT = 128, 8  # columns searched at once, and how many of them are taken back for each bit of the trellis's state
ROWS_AT_ONCE = 16  # whose feedback shares a pass over V
CLASSES, CLASSES_PER_OCTAVE, NARROWEST = 72, 4, -4.0  # of a value's deviation, from 2^-4 levels on
TABULATED = 256  # magnitudes whose bits are tabulated
RAREST = 1e-9  # probability in the table of bits


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


def choose(
    weight_RC: np.ndarray,
    upper_CC: np.ndarray,
    importance_R: np.ndarray,
    rows_R: np.ndarray,
    columns_C: np.ndarray,
    step: float,
    states: int,
    rate_weight: float,
) -> Chosen:
    """The levels of float32 weights. `upper_CC` is GPTQ's U in the order of the columns, `importance_R` the rows' g.

    `rate_weight` is lambda over the squared distance of the levels to choose from. 0 takes the nearest path. At 0.1 bits and squared error
    are at their best together, but the levels are drawn towards zero, and trained weights suffer from that more than from errors without
    a direction: at equal bytes 0 lost a quarter of what 0.1 lost (docs/log.md). A ValueError when a level would not fit 16 bits.
    """
    code = trellis(states)
    across_C, down_R = scales(columns_C), scales(rows_R) * np.float32(step)
    y_RC = np.ascontiguousarray(weight_RC / down_R[:, None] / across_C)
    largest = float(np.abs(y_RC).max(initial=0.0))
    if not largest <= LARGEST // 2:  # feedback may add to it
        raise ValueError(f"a weight is {largest:.4g} steps from zero, {LARGEST // 2} are allowed; its step is too fine")
    diagonal_C = upper_CC.diagonal().astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # looked at below
        # U_jk / U_jj is what an error of 1 in column j takes from column k; here both are in steps of their own columns.
        unit_CC = np.ascontiguousarray(upper_CC / diagonal_C[:, None] * across_C[:, None] / across_C, np.float32)
        cost_R = importance_R.astype(np.float64) * scales(rows_R).astype(np.float64) ** 2
        cost_C = (across_C / diagonal_C) ** 2
        cost_R = cost_R / (cost_R.mean() * cost_C.mean())
    if not all(np.isfinite(of).all() for of in (unit_CC, cost_R, cost_C)):
        raise ValueError("the costs of errors are not finite numbers above zero; see to the Hessian and to the importance of rows")
    row_class_R, column_class_C = _classes(y_RC)
    levels_RC = np.zeros(y_RC.shape, np.int16)
    delay = min(BLOCK // 2, DELAY_PER_BIT * (states.bit_length() - 1))
    lagrangian = np.float32(rate_weight * code.stride**2)
    _search(
        y_RC,
        unit_CC,
        cost_R.astype(np.float32),
        cost_C.astype(np.float32),
        row_class_R,
        column_class_C,
        lagrangian * bit_table(states),
        code.into_S2,
        code.stride,
        delay,
        levels_RC,
    )
    largest = float(np.abs(y_RC).max(initial=0.0))
    if not largest < LARGEST - 2 * code.stride:
        raise ValueError(f"feedback drives a weight to {largest:.4g} steps from zero, where 16 bits end; its step is too fine")
    return Chosen(Lattice(levels_RC, rows_R, columns_C, float(np.float32(step)), states), y_RC)


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
    """Classes of deviation for rows and for columns, whose sum is a value's: deviations are taken for a product of both."""
    squares = y_RC.astype(np.float64) ** 2
    mean = max(squares.mean(), 1e-12)

    def class_of(means: np.ndarray) -> np.ndarray:
        return np.rint(CLASSES_PER_OCTAVE * np.log2(np.maximum(means, 1e-12)) / 2).astype(np.int64)

    return class_of(squares.mean(1) / mean), class_of(squares.mean(0)) - round(CLASSES_PER_OCTAVE * NARROWEST)


@njit(nogil=True)
def _search(
    y_RC: np.ndarray,
    unit_CC: np.ndarray,
    cost_R: np.ndarray,
    cost_C: np.ndarray,
    row_class_R: np.ndarray,
    column_class_C: np.ndarray,
    prices: np.ndarray,
    into_S2: np.ndarray,
    stride: int,
    delay: int,
    levels_RC: np.ndarray,
) -> None:
    """Fill `levels_RC`; `y_RC` ends as the values that entered the quantiser. Sums have a fixed order, so results do too."""
    rows, columns = y_RC.shape
    start_R = np.zeros(rows, np.int64)
    parents = np.empty((BLOCK, len(into_S2)), np.int64)
    candidates = np.empty((BLOCK, len(into_S2)), np.int64)
    ahead = np.empty((2, len(into_S2), BLOCK), np.float32)
    for first_row in range(0, rows, ROWS_AT_ONCE):
        last_row = min(first_row + ROWS_AT_ONCE, rows)
        first = 0
        while first < columns:
            last = min(first + BLOCK, columns)
            kept = last if last == columns else last - delay
            for row in range(first_row, last_row):
                best = _survivors(
                    y_RC[row], unit_CC, cost_R[row], cost_C, row_class_R[row], column_class_C, prices, into_S2, stride,
                    start_R[row], first, last, parents, candidates, ahead,
                )  # fmt: skip
                for column in range(last - 1, first - 1, -1):
                    if column == kept - 1:
                        start_R[row] = best
                    if column < kept:
                        levels_RC[row, column] = candidates[column - first, best]
                    best = parents[column - first, best]
            for column in range(first, kept):
                moved_by = unit_CC[column, column + 1 :]
                for row in range(first_row, last_row):
                    error = y_RC[row, column] - np.float32(levels_RC[row, column])
                    ahead_of_row = y_RC[row, column + 1 :]
                    for i in range(len(moved_by)):
                        ahead_of_row[i] -= error * moved_by[i]
            first = kept


@njit(nogil=True)
def _survivors(
    y_C: np.ndarray,
    unit_CC: np.ndarray,
    row_cost: float,
    cost_C: np.ndarray,
    row_class: int,
    column_class_C: np.ndarray,
    prices: np.ndarray,
    into_S2: np.ndarray,
    stride: int,
    start: int,
    first: int,
    last: int,
    parents: np.ndarray,
    candidates: np.ndarray,
    ahead: np.ndarray,
) -> int:
    """Search one row's columns first..last from state `start`; the cheapest path's last state. Parents and levels are left to trace it."""
    states = len(into_S2)
    costs, new_costs = np.full(states, np.float32(np.inf), np.float32), np.empty(states, np.float32)
    costs[start] = 0.0
    levels_2S, errors_2S = np.empty((2, states), np.float32), np.empty((2, states), np.float32)
    totals_2S = np.empty((2, states), np.float32)
    y_S, odd_S = np.empty(states, np.float32), np.zeros(states, np.float32)
    if stride == 2:
        odd_S[1::2] = 1.0
    spacing, half, most = np.float32(2 * stride), np.float32(0.5), np.float32(prices.shape[1] - 1)
    now, new = ahead[0], ahead[1]
    now[:] = 0.0  # survivors that are not yet there cost infinitely much, and must only be numbers
    for column in range(first, last):
        now[start, column - first] = y_C[column]
    for column in range(first, last):
        place = column - first
        cost = row_cost * cost_C[column]
        a_class = min(max(row_class + column_class_C[column], 0), len(prices) - 1)
        priced = prices[a_class]
        for state in range(states):
            y_S[state] = now[state, place]
        for branch in range(2):
            levels, errors, totals, shift = levels_2S[branch], errors_2S[branch], totals_2S[branch], np.float32(stride * branch)
            for state in range(states):
                offset = odd_S[state] + shift
                level = np.floor((y_S[state] - offset) / spacing + half) * spacing + offset
                error = y_S[state] - level
                levels[state], errors[state] = level, error
                totals[state] = costs[state] + error * error * cost + priced[np.int32(min(abs(level), most))]
        moved_by = unit_CC[column, column + 1 : last]
        for state in range(states):
            step, other = into_S2[state, 0], into_S2[state, 1]
            if totals_2S[other & 1, other >> 1] < totals_2S[step & 1, step >> 1]:
                step = other
            parent, branch = step >> 1, step & 1
            new_costs[state] = totals_2S[branch, parent]
            parents[place, state], candidates[place, state] = parent, np.int64(levels_2S[branch, parent])
            values, error, into = now[parent, place + 1 :], errors_2S[branch, parent], new[state, place + 1 :]
            for i in range(len(moved_by)):
                into[i] = values[i] - error * moved_by[i]
        now, new = new, now
        costs, new_costs = new_costs, costs
    best = 0
    for state in range(1, states):
        if costs[state] < costs[best]:
            best = state
    return best
