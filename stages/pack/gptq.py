"""GPTQ: round a matrix column by column, and let the columns not yet rounded make up for each rounding error.

The layer computes W x; with H = sum of x x^T over calibration data, rounding W to Q costs tr((W - Q) H (W - Q)^T). Rounding to nearest
ignores H. GPTQ (Frantar et al. 2022) rounds one column at a time and then moves the columns still free to their least-cost values given
that error. With U the upper Cholesky factor of H^-1 (U^T U = H^-1) this is, for column j,

    e = (w_j - q_j) / U_jj        w_k <- w_k - e U_jk   for every k > j

A 2x2 case: one row W = (0.4, 0.4), grid step 1, H = [[1, 0.9], [0.9, 1]]: the two inputs are nearly the same. Nearest gives Q = (0, 0),
and costs (0.4, 0.4) H (0.4, 0.4)^T = 0.608. GPTQ: H^-1 = [[5.263, -4.737], [-4.737, 5.263]], so U = [[2.294, -2.065], [0, 1]]. Column 0
rounds to 0, e = 0.4 / 2.294 = 0.1744, and column 1 becomes 0.4 + 0.1744 * 2.065 = 0.76, which rounds to 1. Q = (0, 1) costs
(0.4, -0.6) H (0.4, -0.6)^T = 0.088: seven times less, although column 1 is now further from its weight.

What is unusual here: U comes from one Cholesky factorisation and one triangular inverse, in float64, without forming H^-1. Reverse the
order of rows and columns of H (J H J), factor it as L L^T, and reverse L: H = R R^T with R = J L J upper triangular, so
H^-1 = R^-T R^-1 and U = R^-1. All else is float32. Nothing here alters its arguments.

Shapes: R rows (outputs), C columns (inputs), N columns of a block.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_STEP = 1e-10  # floor of the divisor, so that a row of zeros divides


class Quantised(NamedTuple):
    """A matrix as integers and one step for each row."""

    values_RC: Tensor  # int8
    steps_R: Tensor  # float16


class Feedback(NamedTuple):
    """What GPTQ needs to know of a Hessian; the same for every matrix that has the same input, and for every grid."""

    order_C: Tensor  # int64: columns by falling diagonal (act-order), so that the costly ones are rounded while many are still free
    dead_C: Tensor  # bool: columns whose input was always zero
    upper_CC: Tensor  # float32: U, rows and columns in that order


def row_steps(weight_RC: Tensor, clip: float, qmax: int, name: str) -> Tensor:
    """SDClip (#1394): clip * std(row) / qmax in float16 (R,), with the unbiased deviation of the original row."""
    steps = (clip * weight_RC.float().std(dim=1) / qmax).clamp_min(SMALLEST_STEP).half()
    if not bool(torch.isfinite(steps).all()):
        raise ValueError(f"{name}: the step of a row is not a finite float16; its weights are not finite, or far too large")
    return steps


def feedback(hessian_CC: Tensor, damping: float, name: str, act_order: bool = True) -> Feedback:
    """Dead columns, order and U of a Hessian; a ValueError when it is not positive definite after damping.

    Without act-order the columns stay as they are.
    """
    hessian = hessian_CC.double()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal = torch.where(dead, 1.0, diagonal)
    columns = torch.arange(len(diagonal), device=hessian.device)
    order = torch.sort(diagonal, descending=True, stable=True).indices if act_order else columns
    damped = hessian - torch.diag(hessian.diagonal()) + torch.diag(diagonal + damping * diagonal.mean())
    reversed_order = order.flip(0)
    lower, failed = torch.linalg.cholesky_ex(damped[reversed_order][:, reversed_order])
    if int(failed) or not bool(torch.isfinite(lower).all()):
        raise ValueError(
            f"{name}: its Hessian is not positive definite with damping {damping} (mean diagonal {float(diagonal.mean()):.3g});"
            " calibrate on more data or raise pack.damping"
        )
    identity = torch.eye(len(order), dtype=torch.float64, device=hessian.device)
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return Feedback(order, dead, upper.float())


def quantise(weight_RC: Tensor, known: Feedback, steps_R: Tensor, qmax: int, block_columns: int) -> tuple[Tensor, Tensor]:
    """The integers of GPTQ, (R, C) int8, and the values that were rounded to them: weights after feedback (R, C), float32.

    Columns are rounded in blocks of N. Inside a block, column j gathers the errors of the block's earlier columns just before it is
    rounded; the columns after the block receive the errors of the whole block in one matrix product (the lazy update):

        | done | block: e_0 .. e_N-1 | the rest: W -= U[block, rest]^T e, once a block |
    """
    rows, columns = weight_RC.shape
    step = steps_R.float()
    divisor = step.clamp_min(SMALLEST_STEP)
    left_CR = weight_RC.float().masked_fill(known.dead_C, 0.0)[:, known.order_C].T.contiguous()
    rounded_CR, entered_CR = torch.empty_like(left_CR), torch.empty_like(left_CR)
    for start in range(0, columns, block_columns):
        stop = min(start + block_columns, columns)
        lower_NN = known.upper_CC[start:stop, start:stop].T.contiguous()
        errors_NR = torch.empty(stop - start, rows, device=left_CR.device)
        for j in range(stop - start):
            column = torch.addmv(left_CR[start + j], errors_NR[:j].T, lower_NN[j, :j], alpha=-1.0)
            rounded = torch.round(column / divisor).clamp_(-qmax, qmax)
            errors_NR[j] = (column - rounded * step) / lower_NN[j, j]
            rounded_CR[start + j], entered_CR[start + j] = rounded, column
        left_CR[stop:].addmm_(known.upper_CC[start:stop, stop:].T, errors_NR, alpha=-1.0)
    back_C = torch.argsort(known.order_C)
    return rounded_CR[back_C].T.contiguous().to(torch.int8), entered_CR[back_C].T.contiguous()


def gptq(
    weight_RC: Tensor, hessian_CC: Tensor, *, qmax: int, clip: float, damping: float, block_columns: int, name: str = "matrix"
) -> Quantised:
    """A matrix to integers and steps; `name` is the layer's, for errors."""
    if hessian_CC.shape != (weight_RC.shape[1],) * 2:
        raise ValueError(f"{name}: a Hessian of shape {tuple(hessian_CC.shape)} does not fit the weights {tuple(weight_RC.shape)}")
    steps = row_steps(weight_RC, clip, qmax, name)
    return Quantised(quantise(weight_RC, feedback(hessian_CC, damping, name), steps, qmax, block_columns)[0], steps)


def dequantise(quantised: Quantised) -> Tensor:
    """The weights that the decoder sees, float32 (R, C)."""
    return quantised.values_RC.float() * quantised.steps_R.float()[:, None]


def costs(difference_RC: Tensor, hessian_CC: Tensor) -> Tensor:
    """D_r H D_r^T of every row (R,), float64: what the difference D of two matrices does to each of the layer's outputs."""
    return ((difference_RC.float() @ hessian_CC.float()) * difference_RC).sum(1, dtype=torch.float64)
