"""The search for the levels of a matrix, which are steps on a trellis with GPTQ's feedback: Viterbi's, along each row.

Choosing level l_j for y_j moves y_k by -(y_j - l_j) V_jk for k > j. Of all paths into a state of the trellis the cheapest survives, and
each survivor carries its own y of the columns ahead (per-survivor processing: Raheli et al. 1995). A block of columns is searched at a
time; its last columns' decisions are taken back and searched again with the next block, since survivors have not yet merged there.

Shapes: R rows, C columns, S states, B columns of a block.
"""

from typing import NamedTuple

import numpy as np

from stages.common.jit import inlined, inner, outer
from stages.pack.trellis import Trellis

BLOCK, DELAY_PER_BIT = (
    128,
    8,
)  # columns searched at once, and how many of them are taken back for each bit of the trellis's state
ROWS_AT_ONCE = 16  # whose feedback shares a pass over V


class Task(NamedTuple):
    """What all rows of a search share; compiled code takes it apart."""

    unit_CC: np.ndarray
    cost_C: np.ndarray
    column_class_C: np.ndarray
    prices: np.ndarray  # bits times lambda, by class and magnitude
    into_S2: np.ndarray
    odd_S: np.ndarray  # float32: 1 where a state's levels are odd
    stride: int
    delay: int


class Survivors(NamedTuple):
    """Places for the survivors of one row and one block of columns; for values ahead there are two, which take turns."""

    start_R: np.ndarray  # of the rows that are searched at once: the state in which the next block begins
    parents_BS: np.ndarray
    levels_BS: np.ndarray
    ahead_2SB: np.ndarray
    costs_2S: np.ndarray
    branch_levels_2S: np.ndarray
    branch_errors_2S: np.ndarray
    branch_totals_2S: np.ndarray


def task_of(
    code: Trellis, unit_CC: np.ndarray, cost_C: np.ndarray, column_class_C: np.ndarray, prices: np.ndarray
) -> Task:
    """A search on a trellis."""
    odd_S = (np.arange(code.states) % 2).astype(np.float32)
    delay = min(BLOCK // 2, DELAY_PER_BIT * (code.states.bit_length() - 1))
    return Task(unit_CC, cost_C, column_class_C, prices, code.into_S2, odd_S, code.stride, delay)


def places(states: int) -> Survivors:
    """Where a thread's search keeps its survivors."""
    sizes = (ROWS_AT_ONCE,), (BLOCK, states), (BLOCK, states), (2, states, BLOCK), *[(2, states)] * 4
    return Survivors(*(np.empty(size, np.int64 if i < 3 else np.float32) for i, size in enumerate(sizes)))


@outer
def search(
    y_RC: np.ndarray,
    cost_R: np.ndarray,
    row_class_R: np.ndarray,
    task: Task,
    of: Survivors,
    levels_RC: np.ndarray,
) -> None:
    """Fill `levels_RC`; `y_RC` ends as the values that entered the quantiser. Sums have a fixed order, so results do too."""
    rows, columns = y_RC.shape
    unit_CC, delay = task.unit_CC, task.delay
    for first_row in range(0, rows, ROWS_AT_ONCE):
        last_row = min(first_row + ROWS_AT_ONCE, rows)
        of.start_R[:] = 0
        first = np.int64(0)  # 0 would have all that is called with it compiled twice
        while first < columns:
            last = min(first + BLOCK, columns)
            kept = last if last == columns else last - delay
            for row in range(first_row, last_row):
                start = of.start_R[row - first_row]
                best = _survive(y_RC[row], cost_R[row], row_class_R[row], start, first, last, task, of)
                of.start_R[row - first_row] = _trace(
                    best, first, last, kept, of.parents_BS, of.levels_BS, levels_RC[row]
                )
            for column in range(first, kept):
                moved_by = unit_CC[column, column + 1 :]
                for row in range(first_row, last_row):
                    _move(
                        y_RC[row, column + 1 :],
                        y_RC[row, column] - np.float32(levels_RC[row, column]),
                        moved_by,
                    )
            first = kept


@inlined
def _move(ahead: np.ndarray, error: float, moved_by: np.ndarray) -> None:
    """Let an error move the columns after it."""
    for i in range(len(moved_by)):
        ahead[i] -= error * moved_by[i]


@inner
def _trace(
    best: int,
    first: int,
    last: int,
    kept: int,
    parents_BS: np.ndarray,
    levels_BS: np.ndarray,
    levels_C: np.ndarray,
) -> int:
    """The levels of columns first..kept on the path that ends in state `best` at `last`, into `levels_C`; its state at `kept`."""
    start = best
    for column in range(last - 1, first - 1, -1):
        if column == kept - 1:
            start = best
        if column < kept:
            levels_C[column] = levels_BS[column - first, best]
        best = parents_BS[column - first, best]
    return start


@inner
def _survive(
    y_C: np.ndarray,
    row_cost: float,
    row_class: int,
    start: int,
    first: int,
    last: int,
    task: Task,
    of: Survivors,
) -> int:
    """Search one row's columns first..last from state `start`; the cheapest path's last state. Parents and levels are left to trace it."""
    unit_CC, cost_C, column_class_C, prices, into_S2, odd_S, stride, _ = task
    _, parents_BS, levels_BS, ahead_2SB, costs_2S, levels_2S, errors_2S, totals_2S = of
    costs, new_costs, now, new = costs_2S[0], costs_2S[1], ahead_2SB[0], ahead_2SB[1]
    costs[:] = np.float32(np.inf)
    costs[start] = 0.0
    now[:] = 0.0  # survivors that are not yet there cost infinitely much, and must only be numbers
    for column in range(first, last):
        now[start, column - first] = y_C[column]
    for column in range(first, last):
        place = column - first
        priced = prices[min(max(row_class + column_class_C[column], 0), len(prices) - 1)]
        for branch in range(2):
            _branch(
                now,
                place,
                odd_S,
                stride,
                branch,
                costs,
                row_cost * cost_C[column],
                priced,
                levels_2S[branch],
                errors_2S[branch],
                totals_2S[branch],
            )
        moved_by = unit_CC[column, column + 1 : last]
        for state in range(len(costs)):
            step, other = into_S2[state, 0], into_S2[state, 1]
            if totals_2S[other & 1, other >> 1] < totals_2S[step & 1, step >> 1]:
                step = other
            parent, branch = step >> 1, step & 1
            new_costs[state] = totals_2S[branch, parent]
            parents_BS[place, state], levels_BS[place, state] = parent, np.int64(levels_2S[branch, parent])
            values, error, into = now[parent, place + 1 :], errors_2S[branch, parent], new[state, place + 1 :]
            for i in range(len(moved_by)):
                into[i] = values[i] - error * moved_by[i]
        now, new = new, now
        costs, new_costs = new_costs, costs
    return int(np.argmin(costs))


@inlined
def _branch(
    now: np.ndarray,
    place: int,
    odd_S: np.ndarray,
    stride: int,
    branch: int,
    costs: np.ndarray,
    cost: float,
    priced: np.ndarray,
    levels: np.ndarray,
    errors: np.ndarray,
    totals: np.ndarray,
) -> None:
    """Each state's nearest level on one branch, its error, and what the path would then have cost."""
    spacing, shift, half, most = (
        np.float32(2 * stride),
        np.float32(stride * branch),
        np.float32(0.5),
        np.float32(len(priced) - 1),
    )
    inverse = np.float32(0.5 / stride)
    for state in range(len(costs)):
        y, offset = now[state, place], odd_S[state] + shift
        level = np.floor((y - offset) * inverse + half) * spacing + offset
        error = y - level
        levels[state], errors[state] = level, error
        totals[state] = costs[state] + error * error * cost
    if len(priced) > 1:
        for state in range(len(costs)):
            totals[state] += priced[np.int32(min(abs(levels[state]), most))]
