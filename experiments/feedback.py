"""GPTQ's feedback inside a trellis search, compared with two simpler kinds of feedback.

    python -m experiments.feedback [--model FILE --hessians FILE --tensor NAME] [--results FILE]

In stages/pack/quantise/trellis_quantiser.py every survivor of the search carries its own values of the
columns ahead, which its own errors have moved. The simpler kinds are `shared`, one set of values for all
survivors, which the best survivor's error of each column moves; and `blocks of N`, where values move
between blocks of N columns only.

All take the nearest levels (no rate weight), with steps that make every error cost the same, at three
sizes of the steps. They are compared by the rate, as the coder writes it, at equal Hessian-weighted
error: that of the pack stage at the middle size. Rates are interpolated between two sizes.

Without files the matrix is normal, 512 x 512, with the Hessian of strongly correlated inputs.
"""

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from safetensors.torch import load_file

from benchmarks._command import command_line, write_results
from stages.calibrate.hessians import hessian_name
from stages.common import environment
from stages.pack.entropy import level_coder
from stages.pack.exponents import factors_to_exponents
from stages.pack.forms import TrellisForm, TrellisLevels
from stages.pack.quantise import gptq, trellis_quantiser
from stages.pack.quantise.trellis_quantiser import ScaledMatrix
from stages.pack.trellis import build_trellis

DAMPING = 0.05  # of the Hessian, as in pack
SIZE = 512  # rows and columns of the made-up matrix
RATIOS = (0.8, 1.0, 1.25)  # sizes of the steps, relative to the middle one
BLOCKS = (8, 16, 32, 64)
WAYS = ("each survivor", "shared", *(f"blocks of {size}" for size in BLOCKS))


class Point(NamedTuple):
    """One quantisation of the matrix."""

    half_log2_error: float  # half of log2 of the Hessian-weighted error, relative to that of zeros
    bits: float  # a weight
    seconds: float  # of processor time, of the search


def made_up() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (512, 512) and a Hessian whose eigenvalues span about three decades."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, SIZE, generator=generator)
    rotation = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator)).Q
    spread = torch.diag(10 ** torch.linspace(-1.5, 0, SIZE)) @ rotation
    inputs = torch.randn(4 * SIZE, SIZE, generator=generator) @ spread
    return weight, inputs.T @ inputs


@njit(nogil=True)
def search(
    y_RC: np.ndarray,
    unit_CC: np.ndarray,
    cost_C: np.ndarray,
    incoming_S2: np.ndarray,
    block: int,
    levels_RC: np.ndarray,
) -> None:
    """Viterbi search with one set of values `y_RC` for all survivors; writes `levels_RC`, changes `y_RC`.

    With `block` 0 the best survivor's error moves the values after each column; otherwise the errors of a
    block of columns move them after the block. `unit_CC` is the feedback of an error to later columns.
    """
    rows, columns = y_RC.shape
    states = len(incoming_S2)
    width = block or columns
    parents = np.zeros((columns, states), np.int64)
    levels = np.zeros((columns, states), np.int64)
    errors = np.zeros(states, np.float32)
    for row in range(rows):
        y_C = y_RC[row]
        costs = np.full(states, np.inf)
        costs[0] = 0.0
        for first in range(0, columns, width):
            last = min(first + width, columns)

            # Forward: the best predecessor of each state, column by column.
            for column in range(first, last):
                new_costs = np.full(states, np.inf)
                for state in range(states):
                    for step in incoming_S2[state]:
                        # The nearest level of the coset that this step allows, and its cost.
                        parent = step >> 1
                        offset = np.float32((parent & 1) + 2 * (step & 1))
                        quarter = (y_C[column] - offset) / np.float32(4)
                        level = np.floor(quarter + np.float32(0.5)) * np.float32(4) + offset
                        error = y_C[column] - level
                        total = costs[parent] + error * error * cost_C[column]

                        if total < new_costs[state]:
                            new_costs[state] = total
                            parents[column, state] = parent
                            levels[column, state] = np.int64(level)
                            errors[state] = error
                costs = new_costs
                if block == 0:
                    y_C[column + 1 :] -= errors[np.argmin(costs)] * unit_CC[column, column + 1 :]

            # Backward: the levels along the best path, on which alone the next block begins.
            state = int(np.argmin(costs))
            if block:
                costs[:] = np.inf
                costs[state] = 0.0
            for column in range(last - 1, first - 1, -1):
                levels_RC[row, column] = levels[column, state]
                state = parents[column, state]

            # Feedback of the block's errors.
            for column in range(first, last if block else first):
                y_C[last:] -= (y_C[column] - np.float32(levels_RC[row, column])) * unit_CC[column, last:]


def levels_of(way: str, matrix: ScaledMatrix, step: float, states: int) -> TrellisLevels:
    """Quantise with one kind of feedback."""
    if way == WAYS[0]:
        return trellis_quantiser.quantise_matrix(matrix, step, states, 0.0).matrix
    levels_RC = np.zeros(matrix.scaled_RC.shape, np.int16)
    columns = matrix.columns
    block = 0 if way == "shared" else int(way.split()[-1])
    values_RC = matrix.scaled_RC / np.float32(step)
    incoming_S2 = build_trellis(states).incoming_S2
    search(values_RC, columns.feedback_CC, columns.cost_C, incoming_S2, block, levels_RC)
    return TrellisLevels(levels_RC, matrix.row_exponents_R, columns.exponents_C, step)


def point(
    way: str,
    matrix: ScaledMatrix,
    step: float,
    states: int,
    weight: torch.Tensor,
    hessian: torch.Tensor,
) -> Point:
    """Quantise and code `weight` (R, C), whose Hessian is (C, C)."""
    started = time.process_time()
    chosen = levels_of(way, matrix, step, states)
    seconds = time.process_time() - started

    difference = torch.from_numpy(TrellisForm(states).dequantise(chosen)) - weight
    absolute = gptq.squared_output_errors(difference, hessian).sum()
    relative = float(absolute / gptq.squared_output_errors(weight, hessian).sum())
    payload = level_coder.encode(chosen.levels_RC, chosen.row_exponents_R, chosen.column_exponents_C, states)
    return Point(float(np.log2(relative) / 2), 8 * len(payload) / weight.numel(), seconds)


def bits_at(half_log2_error: float, points: list[Point]) -> float:
    """Bits a weight at an error, on the line through the two nearest points."""
    a, b = sorted(points, key=lambda point: abs(point.half_log2_error - half_log2_error))[:2]
    slope = (b.bits - a.bits) / (b.half_log2_error - a.half_log2_error)
    return a.bits + slope * (half_log2_error - a.half_log2_error)


def compared(weight: torch.Tensor, hessian: torch.Tensor, states: int) -> dict[str, dict[str, float]]:
    """Bits a weight above the stage's own feedback at equal error, and seconds of the search, by way."""
    (factors,) = gptq.factorise(hessian[None], DAMPING, ["the matrix"], act_order=False)
    diagonal_C = factors.upper_CC.diagonal().double().numpy()
    relative_C = diagonal_C / np.exp(np.log(diagonal_C).mean())
    exponents_C = factors_to_exponents(relative_C)
    columns = trellis_quantiser.column_feedback(factors.upper_CC.numpy(), exponents_C)
    flat_R = np.zeros(len(weight), np.int8)
    matrix = trellis_quantiser.scale_matrix(weight.numpy(), np.ones(len(weight)), flat_R, columns)

    # Three points of each way; the first call compiles.
    middle = 0.2 * float(np.sqrt((matrix.scaled_RC**2).mean()))
    points = {}
    for way in WAYS:
        levels_of(way, matrix, middle, states)
        points[way] = [point(way, matrix, middle * ratio, states, weight, hessian) for ratio in RATIOS]

    base = points[WAYS[0]][1]
    error = 4**base.half_log2_error
    print(f"{states} states, {base.bits:.4f} bits a weight at a relative error of {error:.3e}")
    result = {}
    for way, found in points.items():
        more_bits = bits_at(base.half_log2_error, found) - base.bits
        seconds = min(one.seconds for one in found)
        result[way] = {"more_bits": more_bits, "seconds": seconds}
        print(f"  {way:<16} {more_bits:+.4f} bits a weight {seconds:8.3f} s", flush=True)
    return result


def main() -> None:
    """Compare the ways at several numbers of states."""
    parser = command_line(__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--hessians", type=Path)
    parser.add_argument("--tensor", metavar="NAME")
    parser.add_argument("--states", type=int, nargs="+", default=[4, 8, 32])
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    if arguments.model:
        weight = load_file(arguments.model)[arguments.tensor].float()
        hessian = load_file(arguments.hessians)[hessian_name(arguments.tensor)]
    else:
        weight, hessian = made_up()
    ways = {f"{states} states": compared(weight, hessian, states) for states in arguments.states}
    if arguments.results:
        result = {"tensor": arguments.tensor, "shape": list(weight.shape), "ways": ways}
        write_results(arguments.results, result | environment.run_environment(torch.device("cpu")))


if __name__ == "__main__":
    main()
