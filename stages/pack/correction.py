"""A low-rank correction of what rounding left of a matrix (LQER, arXiv 2402.02446; #1797).

With E the weights less the quantised ones, H = R R^T the Hessian of the inputs and g the importance of the rows, the loss to expect is
half of

    sum over rows r of  g_r E_r H E_r^T  =  |G E R|^2        G = diag(sqrt(g)), R^-1 = U of gptq.py

so the best correction of rank K is made of the K largest singular components of G E R = P S Q^T, brought back to weights:
A = G^-1 P sqrt(S) and B = sqrt(S) Q^T U. #1797 takes the components of E as it is, and keeps A with two bits and one step for all
components, although they differ in size. Here each component's two sides are integers of equal spread, and its one step is the product of
the sides' steps.

Shapes: R rows, C columns, K components.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stages.pack.gptq import Feedback

SPREAD = 1.8  # root mean square of the integers: about three bits each, and a fortieth of what is corrected lost by rounding
LARGEST = 127
MAX_RANK = 16  # that a file may declare
TINY = 1e-30


class Correction(NamedTuple):
    """A matrix of rank K, the sum of K outer products of integers, each with its step."""

    levels_KN: Tensor  # int8: N = R + C, the rows' side and then the columns'
    steps_K: Tensor  # float32


def correct(error_RC: Tensor, known: Feedback, importance_R: Tensor, rank: int) -> Correction:
    """The correction of an error, float32, in the measure of the Hessian and of the rows' importance."""
    order_C, root_R1 = known.order_C, importance_R.float().sqrt()[:, None]
    error_RC = error_RC.masked_fill(known.dead_C, 0.0)[:, order_C]
    weighed_RC = torch.linalg.solve_triangular(known.upper_CC, root_R1 * error_RC, upper=True, left=False).double()
    wide = weighed_RC.shape[0] < weighed_RC.shape[1]
    short = weighed_RC.T if wide else weighed_RC  # its Gram matrix is the smaller one
    squares, vectors = torch.linalg.eigh(short.T @ short)
    few = min(rank, len(squares))
    size_K = squares[-few:].flip(0).clamp_min(TINY).sqrt()  # falling
    small = vectors[:, -few:].flip(1)
    long = short @ small / size_K
    rows_RK, columns_CK = (small, long) if wide else (long, small)
    left_RK = rows_RK * size_K / root_R1
    right_CK = known.upper_CC.double().T @ columns_CK
    right_CK = right_CK[torch.argsort(order_C)]
    left, left_step = _rounded(left_RK.T)
    right, right_step = _rounded(right_CK.T)
    levels_KN, steps_K = torch.cat((left, right), dim=1), (left_step * right_step).float()
    missing = rank - few  # a matrix with fewer rows or columns than the rank
    return Correction(torch.nn.functional.pad(levels_KN, (0, 0, 0, missing)).cpu(), torch.nn.functional.pad(steps_K, (0, missing)).cpu())


def product(correction: Correction, rows: int) -> Tensor:
    """The correction as a matrix (R, C), float32: sums in the order of the components, the same on every machine."""
    levels_KN = correction.levels_KN.float()
    total = torch.zeros(rows, levels_KN.shape[1] - rows)
    for levels_N, step in zip(levels_KN, correction.steps_K, strict=True):
        total += (levels_N[:rows] * step)[:, None] * levels_N[rows:]
    return total


def _rounded(sides_KN: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as int8 of root mean square SPREAD, or smaller where its largest would not fit, and its step (K,)."""
    spread_K, largest_K = sides_KN.square().mean(1).sqrt() / SPREAD, sides_KN.abs().amax(1) / LARGEST
    step_K = torch.maximum(spread_K, largest_K).clamp_min(TINY)
    return torch.round(sides_KN / step_K[:, None]).to(torch.int8), step_K
