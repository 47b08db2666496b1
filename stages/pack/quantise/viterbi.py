"""Viterbi search for the levels of a matrix on a trellis, with GPTQ's feedback inside the search.

Choosing level l_j for value y_j moves the later values y_k by -(y_j - l_j) V_jk, for k > j. Of all
paths into a trellis state the cheapest survives, and every survivor has its own copy of the values
ahead, as its own errors have moved them (per-survivor processing: Raheli et al. 1995).

Columns are searched a block at a time. Survivors have not merged yet at the end of a block, so the
decisions of its last columns (`delay`) are dropped and searched again with the next block:

    | committed | first ... block ... kept | ... delay ... last |
                  committed after this block, searched again with the next

Results do not depend on threads: rows are independent, and sums have a fixed order.

Shapes: R rows, C columns, S states, B columns of a block, L tabulated magnitudes, K classes of
deviation.
"""

from typing import Any, NamedTuple

import numpy as np

from stages.common.jit import jit_entry, jit_internal
from stages.pack.trellis import Trellis

BLOCK_COLUMNS = 128
DELAY_PER_BIT = 8  # columns of a block that are searched again, for each bit of the trellis state
ROWS_AT_ONCE = 16  # rows whose feedback shares a pass over V, so that V is read from memory less often

# np.int64(0) instead of 0: numba gives a literal a type of its own, and would compile what it is
# passed to twice.
ZERO: Any = np.int64(0)


class SearchTask(NamedTuple):
    """The inputs that all rows share."""

    feedback_CC: np.ndarray  # float32: V, upper triangular with a unit diagonal
    cost_C: np.ndarray  # float32: of a squared error of 1, without the row's factor
    # int64: the column's part of the class: row class + column class is the row of `prices_KL`.
    column_class_C: np.ndarray
    # float32: lambda times the bits of a magnitude, by class of deviation; L = 1: no prices.
    prices_KL: np.ndarray
    incoming_S2: np.ndarray  # int64: pack/trellis.py
    odd_S: np.ndarray  # float32: 1 where a state's levels are odd
    stride: int
    delay: int  # columns


class Buffers(NamedTuple):
    """Working memory of one thread.

    A leading dimension of 2 is for the current and the next column, or for the two branches.
    """

    start_state_R: np.ndarray  # int64, R = ROWS_AT_ONCE: the state of each row at the start of the block
    parents_BS: np.ndarray  # int64: the survivor's state one column before
    levels_BS: np.ndarray  # int64: and the level that led here
    values_2SB: np.ndarray  # float32: each survivor's values of the block
    costs_2S: np.ndarray  # float32
    branch_levels_2S: np.ndarray  # float32: by branch and state before it
    branch_errors_2S: np.ndarray  # float32
    branch_costs_2S: np.ndarray  # float32: cost of the path including this column


def search_task(
    trellis: Trellis,
    feedback_CC: np.ndarray,
    cost_C: np.ndarray,
    column_class_C: np.ndarray,
    prices_KL: np.ndarray,
) -> SearchTask:
    """The task of a search on this trellis."""
    odd_S = (np.arange(trellis.states) % 2).astype(np.float32)
    delay = min(BLOCK_COLUMNS // 2, DELAY_PER_BIT * (trellis.states.bit_length() - 1))
    return SearchTask(
        feedback_CC, cost_C, column_class_C, prices_KL, trellis.incoming_S2, odd_S, trellis.stride, delay
    )


def allocate(states: int) -> Buffers:
    """Buffers for one thread."""
    return Buffers(
        start_state_R=np.empty(ROWS_AT_ONCE, np.int64),
        parents_BS=np.empty((BLOCK_COLUMNS, states), np.int64),
        levels_BS=np.empty((BLOCK_COLUMNS, states), np.int64),
        values_2SB=np.empty((2, states, BLOCK_COLUMNS), np.float32),
        costs_2S=np.empty((2, states), np.float32),
        branch_levels_2S=np.empty((2, states), np.float32),
        branch_errors_2S=np.empty((2, states), np.float32),
        branch_costs_2S=np.empty((2, states), np.float32),
    )


@jit_entry
def search_(
    y_RC: np.ndarray,
    cost_R: np.ndarray,
    row_class_R: np.ndarray,
    task: SearchTask,
    buffers: Buffers,
    levels_RC: np.ndarray,
) -> None:
    """Fill `levels_RC` (int16) for the float32 values `y_RC`, which become the values after feedback.

    `cost_R` (float32) is the row's factor of an error's cost, `row_class_R` (int64) its class of
    deviation.
    """
    rows, columns = y_RC.shape
    for first_row in range(0, rows, ROWS_AT_ONCE):
        last_row = min(first_row + ROWS_AT_ONCE, rows)
        buffers.start_state_R[:] = 0
        first = ZERO
        while first < columns:
            last = min(first + BLOCK_COLUMNS, columns)
            kept = last if last == columns else last - task.delay

            # Search the block, and commit the levels up to `kept`.
            for row in range(first_row, last_row):
                start_state = buffers.start_state_R[row - first_row]
                final_state = _forward(
                    y_RC[row], cost_R[row], row_class_R[row], start_state, first, last, task, buffers
                )
                buffers.start_state_R[row - first_row] = _traceback(
                    final_state, first, last, kept, buffers, levels_RC[row]
                )

            # Let the errors of the committed columns move all later ones.
            for column in range(first, kept):
                feedback_C = task.feedback_CC[column, column + 1 :]
                for row in range(first_row, last_row):
                    error = y_RC[row, column] - np.float32(levels_RC[row, column])
                    later_C = y_RC[row, column + 1 :]
                    for i in range(len(feedback_C)):
                        later_C[i] -= error * feedback_C[i]
            first = kept


@jit_internal
def _traceback(
    final_state: int, first: int, last: int, kept: int, buffers: Buffers, levels_C: np.ndarray
) -> int:
    """Follow the path that ends in `final_state` at column `last` back to `first`.

    Writes the levels of columns first..kept to `levels_C`; returns the path's state at `kept`.
    """
    state = final_state
    kept_state = final_state
    for column in range(last - 1, first - 1, -1):
        if column == kept - 1:
            kept_state = state
        if column < kept:
            levels_C[column] = buffers.levels_BS[column - first, state]
        state = buffers.parents_BS[column - first, state]
    return kept_state


@jit_internal
def _forward(
    y_C: np.ndarray,
    row_cost: float,
    row_class: int,
    start_state: int,
    first: int,
    last: int,
    task: SearchTask,
    buffers: Buffers,
) -> int:
    """Viterbi's forward pass over columns first..last of one row.

    Returns the final state of the cheapest path. Fills parents and levels of the buffers, for
    `_traceback`.
    """
    costs_S = buffers.costs_2S[0]
    next_costs_S = buffers.costs_2S[1]
    values_SB = buffers.values_2SB[0]
    next_values_SB = buffers.values_2SB[1]

    # Levels of one branch are 2 * stride apart: offset, offset + spacing, ... All is float32.
    spacing = np.float32(2 * task.stride)
    inverse = np.float32(0.5 / task.stride)
    half = np.float32(0.5)
    has_prices = task.prices_KL.shape[1] > 1
    max_magnitude = np.float32(task.prices_KL.shape[1] - 1)

    # One survivor, in the start state. The others cost infinitely much; their values only have to
    # be numbers.
    costs_S[:] = np.float32(np.inf)
    costs_S[start_state] = 0.0
    values_SB[:] = 0.0
    for column in range(first, last):
        values_SB[start_state, column - first] = y_C[column]

    for column in range(first, last):
        position = column - first
        price_class = min(max(row_class + task.column_class_C[column], 0), len(task.prices_KL) - 1)
        prices_L = task.prices_KL[price_class]
        error_cost = row_cost * task.cost_C[column]

        # Extend every survivor by both branches: its nearest level, the error, and the path's cost.
        for branch in range(2):
            levels_S = buffers.branch_levels_2S[branch]
            errors_S = buffers.branch_errors_2S[branch]
            path_costs_S = buffers.branch_costs_2S[branch]
            branch_offset = np.float32(task.stride * branch)

            for state in range(len(costs_S)):
                value = values_SB[state, position]
                offset = task.odd_S[state] + branch_offset
                level = np.floor((value - offset) * inverse + half) * spacing + offset
                error = value - level
                levels_S[state] = level
                errors_S[state] = error
                path_costs_S[state] = costs_S[state] + error * error * error_cost

            # Prices have a loop of their own, so that the loop above has no table look-ups.
            if has_prices:
                for state in range(len(costs_S)):
                    magnitude = np.int32(min(abs(levels_S[state]), max_magnitude))
                    path_costs_S[state] += prices_L[magnitude]

        # Of the two transitions into each state the cheaper survives, and moves its own copy of the
        # values ahead.
        feedback_B = task.feedback_CC[column, column + 1 : last]
        for state in range(len(costs_S)):
            transition = task.incoming_S2[state, 0]
            other_transition = task.incoming_S2[state, 1]
            cost = buffers.branch_costs_2S[transition & 1, transition >> 1]
            other_cost = buffers.branch_costs_2S[other_transition & 1, other_transition >> 1]
            if other_cost < cost:
                transition = other_transition

            parent = transition >> 1
            branch = transition & 1
            next_costs_S[state] = buffers.branch_costs_2S[branch, parent]
            buffers.parents_BS[position, state] = parent
            buffers.levels_BS[position, state] = np.int64(buffers.branch_levels_2S[branch, parent])

            error = buffers.branch_errors_2S[branch, parent]
            parent_values_B = values_SB[parent, position + 1 :]
            state_values_B = next_values_SB[state, position + 1 :]
            for i in range(len(feedback_B)):
                state_values_B[i] = parent_values_B[i] - error * feedback_B[i]

        values_SB, next_values_SB = next_values_SB, values_SB
        costs_S, next_costs_S = next_costs_S, costs_S
    return int(np.argmin(costs_S))
