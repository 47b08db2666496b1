"""Muon with row normalisation (MuonEq-R, #1394): momentum, unit rows, nearest semi-orthogonal matrix.

Pure functions over stacks of matrices of one shape. The momentum buffers and the division of the
work over ranks are in optimizer.py.

Shapes: N matrices, R rows, C columns.
"""

from typing import Literal

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]
NewtonSchulz = Literal["fixed", "polar_express"]

# (a, b, c) of the quintic iteration X <- aX + (bA + cA^2)X with A = XX^T. Chosen for a steep slope
# at zero, not for convergence to exactly 1 (Muon).
FIXED: Coefficients = (3.4445, -4.7750, 2.0315)
# One triple for each iteration: the first ones lift small singular values, the last ones make them
# converge (Polar Express, arXiv 2505.16932, as in #1344).
POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
MIN_ROW_NORM = 1e-7  # a row with a smaller L2 norm is divided by this: a row of zeros stays zero
NORM_EPS = 1e-7  # added to the Frobenius norm of a matrix before the division by it


def newton_schulz_coefficients(kind: NewtonSchulz, iterations: int) -> tuple[Coefficients, ...]:
    """The coefficients of each iteration; Polar Express repeats its last triple after the fifth."""
    if kind == "fixed":
        return (FIXED,) * iterations
    return (POLAR_EXPRESS + POLAR_EXPRESS[-1:] * iterations)[:iterations]


def normalise_rows(update_NRC: Tensor) -> Tensor:
    """Divide each row by its L2 norm."""
    return update_NRC / update_NRC.norm(dim=-1, keepdim=True).clamp_min(MIN_ROW_NORM)


def orthogonalise(update_NRC: Tensor, coefficients: tuple[Coefficients, ...], dtype: torch.dtype) -> Tensor:
    """Move the singular values of each matrix towards one by Newton-Schulz iterations; (N, R, C) in `dtype`.

    The iteration runs on the wide orientation, where A = XX^T is the smaller of the two Gram
    matrices.
    """
    x = update_NRC.to(dtype)
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + NORM_EPS)

    for a, b, c in coefficients:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def muon_update(
    gradient_NRC: Tensor,
    momentum_NRC: Tensor,
    beta: float | Tensor,
    coefficients: tuple[Coefficients, ...],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """One Nesterov-momentum update of a stack of matrices; returns (update, new momentum), each (N, R, C).

    The update is scaled by sqrt(max(1, R / C)), so that its spectral norm does not depend on the
    orientation.
    """
    new_momentum = beta * momentum_NRC + gradient_NRC
    nesterov = gradient_NRC + beta * new_momentum
    update = orthogonalise(normalise_rows(nesterov), coefficients, dtype)
    rows, columns = gradient_NRC.shape[-2:]
    return update * max(1.0, rows / columns) ** 0.5, new_momentum
