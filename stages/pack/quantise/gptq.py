"""GPTQ: round a matrix column by column, and let later columns compensate for each error.

The layer computes W x. With H = sum of x x^T over calibration data, rounding W to Q costs tr((W -
Q) H (W - Q)^T). Rounding to nearest ignores H. GPTQ (Frantar et al. 2022) rounds one column at a
time and then moves the columns still free to their least-cost values given that error. With U the
upper Cholesky factor of H^-1 (U^T U = H^-1) this is, for column j,

    e = (w_j - q_j) / U_jj        w_k <- w_k - e U_jk   for every k > j

A 2x2 case: one row W = (0.4, 0.4), grid step 1, H = [[1, 0.9], [0.9, 1]]: the two inputs are nearly
the same. Nearest gives Q = (0, 0), which costs (0.4, 0.4) H (0.4, 0.4)^T = 0.608. GPTQ: H^-1 =
[[5.263, -4.737], [-4.737, 5.263]], so U = [[2.294, -2.065], [0, 1]]. Column 0 rounds to 0, e = 0.4
/ 2.294 = 0.1744, and column 1 becomes 0.4 + 0.1744 * 2.065 = 0.76, which rounds to 1. Q = (0, 1)
costs (0.4, -0.6) H (0.4, -0.6)^T = 0.088: seven times less, although column 1 is now further from
its weight.

Unusual here: U comes from one Cholesky factorisation and one triangular inverse, in float64,
without forming H^-1. Reverse the order of rows and columns of H (J H J), factor it as L L^T, and
reverse L: H = R R^T with R = J L J upper triangular, so H^-1 = R^-T R^-1 and U = R^-1. Everything
else is float32. Arguments are never changed.

Matrices of one shape are processed together: a column of one matrix is too little work for a GPU,
and on a CPU too little to pay for the calls. Each product is of one matrix by itself, so on a CPU
the batch changes no bit (a test verifies it). cuBLAS chooses its algorithm by the size of the batch
too, and promises the same bits only for the same batch.

Shapes: B matrices of a batch, R rows (outputs), C columns (inputs), N columns of a block.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stages.common import cpu_math

MIN_STEP = 1e-10  # floor of the divisor, so that a row of zeros does not divide by zero
SUBSTITUTION_SIZE = 64  # triangular matrices up to this size are inverted by substitution


class GPTQFactors(NamedTuple):
    """Factors of a Hessian. The same for every matrix with the same input, and for every grid."""

    order_C: Tensor  # int64: columns in the order of rounding; act-order: the costly ones first
    dead_C: Tensor  # bool: columns whose input was always zero
    upper_CC: Tensor  # float32: U, with rows and columns in that order


def row_steps(weight_RC: Tensor, clip: float, qmax: int, name: str) -> Tensor:
    """Steps of SDClip (#1394): clip * std(row) / qmax, (R,) float16.

    The deviation is the unbiased one of the original row. A ValueError names a matrix without
    finite steps.
    """
    steps_R = (clip * weight_RC.float().std(dim=1) / qmax).clamp_min(MIN_STEP).half()
    if not bool(torch.isfinite(steps_R).all()):
        raise ValueError(
            f"{name}: the step of a row is not a finite float16; its weights are not finite, or far too large"
        )
    return steps_R


def factorise(
    hessians_BCC: Tensor, damping: float, names: Sequence[str], act_order: bool = True
) -> list[GPTQFactors]:
    """Factorise a batch of Hessians for GPTQ.

    `damping` times the mean diagonal is added to the diagonal. Without `act_order` the columns keep
    their order. A ValueError names the first matrix that is not positive definite.
    """
    hessians = hessians_BCC.double()
    diagonals_BC = hessians.diagonal(dim1=1, dim2=2)
    dead_BC = diagonals_BC == 0
    diagonals_BC = torch.where(dead_BC, 1.0, diagonals_BC)

    # The order of rounding.
    if act_order:
        order_BC = torch.sort(diagonals_BC, dim=1, descending=True, stable=True).indices
    else:
        order_BC = torch.arange(diagonals_BC.shape[1], device=hessians.device).expand_as(diagonals_BC)

    # J H J = L L^T in that order, with damping.
    means_B1 = diagonals_BC.mean(1, keepdim=True)
    damped_BCC = hessians.diagonal_scatter(diagonals_BC + damping * means_B1, dim1=1, dim2=2)
    lower_factors = _cholesky(_permuted(damped_BCC, order_BC.flip(1)))
    for name, factor, mean in zip(names, lower_factors, means_B1, strict=True):
        if factor is None or not bool(torch.isfinite(factor).all()):
            raise ValueError(
                f"{name}: its Hessian is not positive definite with damping {damping}"
                f" (mean diagonal {float(mean):.3g}); calibrate on more data or raise pack.damping"
            )

    # U = (J L J)^-1.
    lower_BCC = torch.stack([factor for factor in lower_factors if factor is not None])
    upper_BCC = _inverse(lower_BCC.flip(1, 2)).float()
    return [GPTQFactors(*parts) for parts in zip(order_BC, dead_BC, upper_BCC, strict=True)]


def _cholesky(matrices_BCC: Tensor) -> list[Tensor | None]:
    """The lower Cholesky factors (C, C); None for a matrix that is not positive definite."""
    if matrices_BCC.device.type == "cpu":
        return cpu_math.cholesky(matrices_BCC)
    lower, failed_B = torch.linalg.cholesky_ex(matrices_BCC)
    return [None if failed else factor for factor, failed in zip(lower, failed_B.tolist(), strict=True)]


def _permuted(matrices_BCC: Tensor, order_BC: Tensor) -> Tensor:
    """Permute rows and columns of each matrix to its order."""
    rows_BCC = order_BC[:, :, None].expand_as(matrices_BCC)
    return matrices_BCC.gather(1, rows_BCC).gather(2, rows_BCC.transpose(1, 2))


def _inverse(upper_BCC: Tensor) -> Tensor:
    """Invert upper triangular matrices by halves.

    That is a third of the work of solving for the identity, and most of it is matrix products:

        [[A, X], [0, B]]^-1 = [[A^-1, -A^-1 X B^-1], [0, B^-1]]
    """
    size = upper_BCC.shape[1]
    if size <= SUBSTITUTION_SIZE:
        if upper_BCC.device.type == "cpu":
            return cpu_math.invert(upper_BCC)
        identity = torch.eye(size, dtype=upper_BCC.dtype, device=upper_BCC.device).expand_as(upper_BCC)
        return torch.linalg.solve_triangular(upper_BCC, identity, upper=True)

    half = size // 2
    first = _inverse(upper_BCC[:, :half, :half])
    last = _inverse(upper_BCC[:, half:, half:])
    inverse_BCC = torch.zeros_like(upper_BCC)
    inverse_BCC[:, :half, :half] = first
    inverse_BCC[:, half:, half:] = last
    inverse_BCC[:, :half, half:] = -(first @ upper_BCC[:, :half, half:] @ last)
    return inverse_BCC


def quantise(
    weights_BRC: Tensor,
    gptq_factors: Sequence[GPTQFactors],
    steps_BR: Tensor,
    extra_bits_BC: Tensor,
    qmax: int,
    block_columns: int,
) -> tuple[Tensor, Tensor]:
    """Quantise a batch by GPTQ.

    Returns the integers (B, R, C), int8, and the weights after feedback that were rounded, (B, R,
    C) float32.

    Columns are rounded in blocks of N. Inside a block, column j collects the errors of the block's
    earlier columns just before it is rounded. The columns after the block receive the errors of the
    whole block in one matrix product (the lazy update):

        | done | block: e_0 .. e_N-1 | the rest: W -= U[block, rest]^T e, once a block |

    `steps_BR` are the rows' steps. A column with f extra bits has steps 2^f times as fine, and
    integers up to 2^f * qmax.
    """
    count, rows, columns = weights_BRC.shape
    order_BC, dead_BC, upper_BCC = (torch.stack(parts) for parts in zip(*gptq_factors, strict=True))

    # Weights in the order of rounding, transposed: a column is contiguous. Dead columns become
    # zero.
    order_BRC = order_BC[:, None].expand_as(weights_BRC)
    alive_BRC = weights_BRC.float().masked_fill(dead_BC[:, None], 0.0)
    left_BCR = alive_BRC.gather(2, order_BRC).transpose(1, 2).contiguous()
    fineness_BC1 = torch.exp2(extra_bits_BC.float()).gather(1, order_BC)[:, :, None]

    quantised_BCR = torch.empty_like(left_BCR)
    pre_quantised_BCR = torch.empty_like(left_BCR)
    for start in range(0, columns, block_columns):
        stop = min(start + block_columns, columns)
        lower_BNN = upper_BCC[:, start:stop, start:stop].transpose(1, 2).contiguous()
        errors_BNR = torch.empty(count, stop - start, rows, device=left_BCR.device)
        for j in range(stop - start):
            # Feedback from the block's earlier columns.
            column_BR = left_BCR[:, start + j]
            if j:
                column_BR = torch.baddbmm(
                    column_BR[:, None], lower_BNN[:, j : j + 1, :j], errors_BNR[:, :j], alpha=-1.0
                )[:, 0]

            # Round.
            fineness_B1 = fineness_BC1[:, start + j]
            step_BR = steps_BR.float() / fineness_B1
            integers_BR = torch.round(column_BR / step_BR.clamp_min(MIN_STEP))
            integers_BR.clamp_(-qmax * fineness_B1, qmax * fineness_B1)
            errors_BNR[:, j] = (column_BR - integers_BR * step_BR) / lower_BNN[:, j, j, None]
            quantised_BCR[:, start + j] = integers_BR
            pre_quantised_BCR[:, start + j] = column_BR

        # The lazy update.
        left_BCR[:, stop:].baddbmm_(upper_BCC[:, start:stop, stop:].transpose(1, 2), errors_BNR, alpha=-1.0)

    # Back to the original order.
    back_BRC = torch.argsort(order_BC, dim=1)[:, None].expand_as(weights_BRC)
    quantised_BRC = quantised_BCR.transpose(1, 2).gather(2, back_BRC)
    pre_quantised_BRC = pre_quantised_BCR.transpose(1, 2).gather(2, back_BRC)
    return quantised_BRC.to(torch.int8), pre_quantised_BRC


def squared_output_errors(difference_RC: Tensor, hessian_CC: Tensor) -> Tensor:
    """Squared error of each output for a difference D of two matrices: D_r H D_r^T, (R,) float64."""
    return ((difference_RC.float() @ hessian_CC.float()) * difference_RC).sum(1, dtype=torch.float64)
