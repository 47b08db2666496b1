"""GPTQ's feedback inside a trellis search: each survivor its own, one for all survivors, or none within a block of columns.

    python -m benchmarks.feedback [--model FILE --hessians FILE --tensor NAME] [--results FILE]

The search of stages/pack/quantise/trellis_quantiser.py lets every survivor carry the values that its own errors have made of the columns
ahead. Simpler are `shared`, where the best survivor's error of each column moves the one set of values that all see, and `blocks of N`,
where values move between blocks only. All take nearest levels (no rate weight) at steps that make every error cost the same, and are run at
three of them. What is compared is the rate, as the coder writes it, at equal Hessian-weighted error: the survivors' at the middle step, on
the line through two points.

Without files the matrix is normal, 512 x 512, with the Hessian of strongly correlated inputs.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from numba import njit
from safetensors.torch import load_file

from stages.calibrate.hessians import hessian_name
from stages.common import environment
from stages.pack.entropy import level_coder
from stages.pack.quantise import gptq, trellis_quantiser
from stages.pack.trellis import trellis

DAMPING, SIZE, RATIOS = 0.05, 512, (0.8, 1.0, 1.25)
BLOCKS = (8, 16, 32, 64)
WAYS = ("each survivor", "shared", *(f"blocks of {size}" for size in BLOCKS))


def made_up() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and a Hessian whose eigenvalues span about three decades."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, SIZE, generator=generator)
    spread = (
        torch.diag(10 ** torch.linspace(-1.5, 0, SIZE))
        @ torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator)).Q
    )
    inputs = torch.randn(4 * SIZE, SIZE, generator=generator) @ spread
    return weight, inputs.T @ inputs


@njit(nogil=True)
def search(
    y_RC: np.ndarray,
    unit_CC: np.ndarray,
    cost_C: np.ndarray,
    into_S2: np.ndarray,
    block: int,
    levels_RC: np.ndarray,
) -> None:
    """Viterbi's search with one set of values for all survivors; `block` 0 moves them after each column by the best survivor's error."""
    rows, columns = y_RC.shape
    states = len(into_S2)
    parents, levels = np.zeros((columns, states), np.int64), np.zeros((columns, states), np.int64)
    errors = np.zeros(states, np.float32)
    for row in range(rows):
        y_C = y_RC[row]
        costs = np.full(states, np.inf)
        costs[0] = 0.0
        for first in range(0, columns, block or columns):
            last = min(first + (block or columns), columns)
            for column in range(first, last):
                new_costs = np.full(states, np.inf)
                for state in range(states):
                    for step in into_S2[state]:
                        offset = np.float32(((step >> 1) & 1) + 2 * (step & 1))
                        level = (
                            np.floor((y_C[column] - offset) / np.float32(4) + np.float32(0.5)) * np.float32(4)
                            + offset
                        )
                        error = y_C[column] - level
                        total = costs[step >> 1] + error * error * cost_C[column]
                        if total < new_costs[state]:
                            new_costs[state], parents[column, state], levels[column, state] = (
                                total,
                                step >> 1,
                                np.int64(level),
                            )
                            errors[state] = error
                costs = new_costs
                if block == 0:
                    y_C[column + 1 :] -= errors[np.argmin(costs)] * unit_CC[column, column + 1 :]
            state = int(np.argmin(costs))
            if block:
                costs[:] = np.inf
                costs[state] = 0.0
            for column in range(last - 1, first - 1, -1):
                levels_RC[row, column] = levels[column, state]
                state = parents[column, state]
            for column in range(first, last if block else first):
                y_C[last:] -= (y_C[column] - np.float32(levels_RC[row, column])) * unit_CC[column, last:]


def levels_of(way: str, axes: trellis_quantiser.Axes, step: float, states: int) -> trellis_quantiser.Lattice:
    """The levels that one way takes."""
    if way == WAYS[0]:
        return trellis_quantiser.choose(axes, step, states, 0.0).lattice
    levels_RC = np.zeros(axes.scaled_RC.shape, np.int16)
    columns = axes.columns
    block = 0 if way == "shared" else int(way.split()[-1])
    search(
        axes.scaled_RC / np.float32(step),
        columns.unit_CC,
        columns.cost_C,
        trellis(states).into_S2,
        block,
        levels_RC,
    )
    return trellis_quantiser.Lattice(levels_RC, axes.rows_R, columns.exponents_C, step, states)


def point(
    way: str,
    axes: trellis_quantiser.Axes,
    step: float,
    states: int,
    weight: torch.Tensor,
    hessian: torch.Tensor,
) -> tuple[float, float, float]:
    """Half of log2 of the Hessian-weighted error, relative to the weights'; bits a weight; processor seconds of the search."""
    started = time.process_time()
    chosen = levels_of(way, axes, step, states)
    seconds = time.process_time() - started
    difference = torch.from_numpy(trellis_quantiser.weights(chosen)) - weight
    error = float(gptq.costs(difference, hessian).sum() / gptq.costs(weight, hessian).sum())
    payload = level_coder.encode(chosen.levels_RC, chosen.rows_R, chosen.columns_C, states)
    return float(np.log2(error) / 2), 8 * len(payload) / weight.numel(), seconds


def at(error: float, points: list[tuple[float, float, float]]) -> float:
    """Bits a weight at an error, on the line through the two nearest points."""
    (x0, b0, _), (x1, b1, _) = sorted(points, key=lambda of: abs(of[0] - error))[:2]
    return b0 + (b1 - b0) * (error - x0) / (x1 - x0)


def compared(weight: torch.Tensor, hessian: torch.Tensor, states: int) -> dict[str, dict[str, float]]:
    """Bits above each survivor's own feedback at equal error, and times of the search."""
    (known,) = gptq.feedback(hessian[None], DAMPING, ["the matrix"], act_order=False)
    diagonal_C = known.upper_CC.diagonal().double().numpy()
    columns = trellis_quantiser.columns_of(
        known.upper_CC.numpy(), trellis_quantiser.exponents(diagonal_C / np.exp(np.log(diagonal_C).mean()))
    )
    axes = trellis_quantiser.axes_of(
        weight.numpy(), np.ones(len(weight)), np.zeros(len(weight), np.int8), columns
    )
    middle = 0.2 * float(np.sqrt((axes.scaled_RC**2).mean()))
    for way in WAYS:
        levels_of(way, axes, middle, states)  # compiles
    found = {
        way: [point(way, axes, middle * ratio, states, weight, hessian) for ratio in RATIOS] for way in WAYS
    }
    error, bits, _ = found[WAYS[0]][1]
    print(f"{states} states, {bits:.4f} bits a weight at a relative error of {4**error:.3e}")
    result = {}
    for way, points in found.items():
        result[way] = {"more_bits": at(error, points) - bits, "seconds": min(of[2] for of in points)}
        print(
            f"  {way:<16} {result[way]['more_bits']:+.4f} bits a weight {result[way]['seconds']:8.3f} s",
            flush=True,
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--hessians", type=Path)
    parser.add_argument("--tensor", metavar="NAME")
    parser.add_argument("--states", type=int, nargs="+", default=[4, 8, 32])
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    weight, hessian = made_up()
    if arguments.model:
        weight, hessian = (
            load_file(arguments.model)[arguments.tensor].float(),
            load_file(arguments.hessians)[hessian_name(arguments.tensor)],
        )
    result = {f"{states} states": compared(weight, hessian, states) for states in arguments.states}
    if arguments.results:
        matrix = {"tensor": arguments.tensor, "shape": list(weight.shape), "ways": result}
        arguments.results.write_text(
            json.dumps(matrix | environment.facts(torch.device("cpu")), indent=2, sort_keys=True) + "\n"
        )


if __name__ == "__main__":
    main()
