"""Muon with row normalisation: momentum, rows to unit length, then the nearest semi-orthogonal matrix (Muon; MuonEq-R, #1394).

Pure functions over stacks of matrices of one shape; optimizer.py holds the momentum and divides the work over ranks.
"""

from typing import Literal

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]
NewtonSchulz = Literal["fixed", "polar_express"]

# One step of the quintic iteration X <- aX + (bA + cA^2)X with A = XX^T; chosen for a steep slope at zero, not for convergence to 1.
FIXED: Coefficients = (3.4445, -4.7750, 2.0315)
# One triple for each step: the first lift small singular values, the last settle them (Polar Express, arXiv 2505.16932, as in #1344).
POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
ROW_NORM_FLOOR = 1e-7


def coefficients(kind: NewtonSchulz, steps: int) -> tuple[Coefficients, ...]:
    """The triples of `steps` iterations; Polar Express goes on with its last one."""
    if kind == "fixed":
        return (FIXED,) * steps
    return (POLAR_EXPRESS + POLAR_EXPRESS[-1:] * steps)[:steps]


def normalise_rows(update: Tensor) -> Tensor:
    """Each row of (..., R, C) over its L2 norm."""
    return update / update.norm(dim=-1, keepdim=True).clamp_min(ROW_NORM_FLOOR)


def orthogonalise(update_NRC: Tensor, triples: tuple[Coefficients, ...], dtype: torch.dtype) -> Tensor:
    """Singular values of each matrix of (N, R, C) moved towards one by Newton-Schulz iterations in `dtype`.

    The iteration runs on the wide orientation, where A = XX^T is the smaller Gram matrix.
    """
    x = update_NRC.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for a, b, c in triples:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def muon_update(
    gradient_NRC: Tensor,
    momentum_NRC: Tensor,
    beta: float | Tensor,
    triples: tuple[Coefficients, ...],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """One Nesterov-momentum update for a stack of matrices; returns (update, new momentum).

    The update of an R x C matrix is scaled by sqrt(max(1, R / C)), so that its spectral norm does not depend on the orientation.
    """
    momentum = beta * momentum_NRC + gradient_NRC
    direction = orthogonalise(normalise_rows(gradient_NRC + beta * momentum), triples, dtype)
    rows, columns = gradient_NRC.shape[-2:]
    return direction * max(1.0, rows / columns) ** 0.5, momentum
