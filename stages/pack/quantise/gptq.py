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

Matrices of one shape are worked on together: a column of one matrix is too little work for a GPU, and on a CPU too little to pay for the
calls. Each product is of one matrix by itself, so that on a CPU the company changes no bit (a test says so); cuBLAS chooses its algorithm
by the size of the batch too, and promises the same bits only for the same batch.

Shapes: B matrices worked on together, R rows (outputs), C columns (inputs), N columns of a block.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stages.common import cpu_math

SMALLEST_STEP = 1e-10  # floor of the divisor, so that a row of zeros divides
INVERTED_WHOLE = 64  # size up to which a triangular matrix is inverted by substitution


class Feedback(NamedTuple):
    """What GPTQ needs to know of a Hessian; the same for every matrix that has the same input, and for every grid."""

    order_C: Tensor  # int64: columns by falling diagonal (act-order), so that the costly ones are rounded while many are still free
    dead_C: Tensor  # bool: columns whose input was always zero
    upper_CC: Tensor  # float32: U, rows and columns in that order


def row_steps(weight_RC: Tensor, clip: float, qmax: int, name: str) -> Tensor:
    """SDClip (#1394): clip * std(row) / qmax in float16 (R,), with the unbiased deviation of the original row."""
    steps = (clip * weight_RC.float().std(dim=1) / qmax).clamp_min(SMALLEST_STEP).half()
    if not bool(torch.isfinite(steps).all()):
        raise ValueError(
            f"{name}: the step of a row is not a finite float16; its weights are not finite, or far too large"
        )
    return steps


def feedback(
    hessians_BCC: Tensor, damping: float, names: Sequence[str], act_order: bool = True
) -> list[Feedback]:
    """Dead columns, order and U of each Hessian; a ValueError names the first that is not positive definite after damping.

    Without act-order the columns stay as they are.
    """
    hessians = hessians_BCC.double()
    diagonals = hessians.diagonal(dim1=1, dim2=2)
    dead_BC = diagonals == 0
    diagonals = torch.where(dead_BC, 1.0, diagonals)
    columns = torch.arange(diagonals.shape[1], device=hessians.device).expand_as(diagonals)
    order_BC = torch.sort(diagonals, dim=1, descending=True, stable=True).indices if act_order else columns
    means_B1 = diagonals.mean(1, keepdim=True)
    damped = hessians.diagonal_scatter(diagonals + damping * means_B1, dim1=1, dim2=2)
    factors = _cholesky(_permuted(damped, order_BC.flip(1)))
    for name, factor, mean in zip(names, factors, means_B1, strict=True):
        if factor is None or not bool(torch.isfinite(factor).all()):
            raise ValueError(
                f"{name}: its Hessian is not positive definite with damping {damping} (mean diagonal {float(mean):.3g});"
                " calibrate on more data or raise pack.damping"
            )
    lower = torch.stack([factor for factor in factors if factor is not None])
    return [Feedback(*of) for of in zip(order_BC, dead_BC, _inverse(lower.flip(1, 2)).float(), strict=True)]


def _cholesky(matrices_BCC: Tensor) -> list[Tensor | None]:
    """The lower Cholesky factor of each matrix; None for one that is not positive definite."""
    if matrices_BCC.device.type == "cpu":
        return cpu_math.cholesky(matrices_BCC)
    lower, failed_B = torch.linalg.cholesky_ex(matrices_BCC)
    return [None if failed else factor for factor, failed in zip(lower, failed_B.tolist(), strict=True)]


def _permuted(matrices_BCC: Tensor, order_BC: Tensor) -> Tensor:
    """Rows and columns of each matrix in its order."""
    rows = order_BC[:, :, None].expand_as(matrices_BCC)
    return matrices_BCC.gather(1, rows).gather(2, rows.transpose(1, 2))


def _inverse(upper_BCC: Tensor) -> Tensor:
    """The inverses of upper triangular matrices, by halves: a third of the work of solving for the identity, most of it products."""
    size = upper_BCC.shape[1]
    if size <= INVERTED_WHOLE:
        if upper_BCC.device.type == "cpu":
            return cpu_math.invert(upper_BCC)
        identity = torch.eye(size, dtype=upper_BCC.dtype, device=upper_BCC.device).expand_as(upper_BCC)
        return torch.linalg.solve_triangular(upper_BCC, identity, upper=True)
    half = size // 2
    first, last = _inverse(upper_BCC[:, :half, :half]), _inverse(upper_BCC[:, half:, half:])
    inverse = torch.zeros_like(upper_BCC)
    inverse[:, :half, :half], inverse[:, half:, half:] = first, last
    inverse[:, :half, half:] = -(first @ upper_BCC[:, :half, half:] @ last)
    return inverse


def quantise(
    weights_BRC: Tensor,
    known: Sequence[Feedback],
    steps_BR: Tensor,
    finer_BC: Tensor,
    qmax: int,
    block_columns: int,
) -> tuple[Tensor, Tensor]:
    """The integers of GPTQ, (B, R, C) int8, and the values that were rounded to them: weights after feedback (B, R, C), float32.

    Columns are rounded in blocks of N. Inside a block, column j gathers the errors of the block's earlier columns just before it is
    rounded; the columns after the block receive the errors of the whole block in one matrix product (the lazy update):

        | done | block: e_0 .. e_N-1 | the rest: W -= U[block, rest]^T e, once a block |

    A column that is finer by f takes steps 2^f times as fine, and integers up to as many times qmax.
    """
    count, rows, columns = weights_BRC.shape
    order_BC, dead_BC, upper_BCC = (torch.stack(of) for of in zip(*known, strict=True))
    order_BRC = order_BC[:, None].expand_as(weights_BRC)
    left_BCR = (
        weights_BRC.float()
        .masked_fill(dead_BC[:, None], 0.0)
        .gather(2, order_BRC)
        .transpose(1, 2)
        .contiguous()
    )
    rounded_BCR, entered_BCR = torch.empty_like(left_BCR), torch.empty_like(left_BCR)
    times_BC1 = torch.exp2(finer_BC.float()).gather(1, order_BC)[:, :, None]
    for start in range(0, columns, block_columns):
        stop = min(start + block_columns, columns)
        lower_BNN = upper_BCC[:, start:stop, start:stop].transpose(1, 2).contiguous()
        errors_BNR = torch.empty(count, stop - start, rows, device=left_BCR.device)
        for j in range(stop - start):
            column_BR, times_B1 = left_BCR[:, start + j], times_BC1[:, start + j]
            if j:
                column_BR = torch.baddbmm(
                    column_BR[:, None], lower_BNN[:, j : j + 1, :j], errors_BNR[:, :j], alpha=-1.0
                )[:, 0]
            step_BR = steps_BR.float() / times_B1
            rounded_BR = torch.round(column_BR / step_BR.clamp_min(SMALLEST_STEP)).clamp_(
                -qmax * times_B1, qmax * times_B1
            )
            errors_BNR[:, j] = (column_BR - rounded_BR * step_BR) / lower_BNN[:, j, j, None]
            rounded_BCR[:, start + j], entered_BCR[:, start + j] = rounded_BR, column_BR
        left_BCR[:, stop:].baddbmm_(upper_BCC[:, start:stop, stop:].transpose(1, 2), errors_BNR, alpha=-1.0)
    back_BRC = torch.argsort(order_BC, dim=1)[:, None].expand_as(weights_BRC)
    rounded_BRC, entered_BRC = (of.transpose(1, 2).gather(2, back_BRC) for of in (rounded_BCR, entered_BCR))
    return rounded_BRC.to(torch.int8), entered_BRC


def costs(difference_RC: Tensor, hessian_CC: Tensor) -> Tensor:
    """D_r H D_r^T of every row (R,), float64: what the difference D of two matrices does to each of the layer's outputs."""
    return ((difference_RC.float() @ hessian_CC.float()) * difference_RC).sum(1, dtype=torch.float64)
