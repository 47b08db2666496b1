"""Muon with row normalisation: momentum, rows to unit length, then the nearest semi-orthogonal matrix (Muon; MuonEq-R, #1394).

The mathematics is in pure functions over stacks of matrices of one shape; the class holds the momentum and divides the work over ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.parallel import World

# One step of the quintic iteration X <- aX + (bA + cA^2)X with A = XX^T; chosen for a steep slope at zero, not for convergence to 1.
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROW_NORM_FLOOR = 1e-7


def normalise_rows(update: Tensor) -> Tensor:
    """Each row of (..., R, C) over its L2 norm."""
    return update / update.norm(dim=-1, keepdim=True).clamp_min(ROW_NORM_FLOOR)


def orthogonalise(update: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Singular values of each matrix of (..., R, C) moved towards one by Newton-Schulz iterations in `dtype`.

    The iteration runs on the wide orientation, where A = XX^T is the smaller Gram matrix.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    x = update.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def muon_update(gradient: Tensor, momentum: Tensor, beta: float, steps: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One Nesterov-momentum update for a stack of matrices (N, R, C); returns (update, new momentum).

    The update of an R x C matrix is scaled by sqrt(max(1, R / C)), so that its spectral norm does not depend on the orientation.
    """
    momentum = beta * momentum + gradient
    direction = orthogonalise(normalise_rows(gradient + beta * momentum), steps, dtype)
    rows, columns = gradient.shape[-2:]
    return direction * max(1.0, rows / columns) ** 0.5, momentum


class Muon:
    """Muon over matrices, grouped by shape; rank r of W updates matrices r, r + W, ... of each group and all ranks get all results."""

    def __init__(self, matrices: Sequence[Tensor], weight_decay: float, newton_schulz_steps: int, world: World) -> None:
        self.weight_decay = weight_decay
        self.steps = newton_schulz_steps
        self.world = world
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        self.groups = list(by_shape.values())
        self.momenta = [torch.zeros((len(self._mine(group)), *group[0].shape), device=group[0].device) for group in self.groups]

    @torch.no_grad()
    def step(self, lr: float, momentum: float) -> None:
        """Update every matrix from its gradient: decoupled weight decay at the current rate, then the step."""
        for index, group in enumerate(self.groups):
            updates = self._updates(index, group, momentum)
            torch._foreach_mul_(group, 1 - lr * self.weight_decay)
            torch._foreach_add_(group, list(updates.unbind()), alpha=-lr)

    def _updates(self, index: int, group: list[Tensor], momentum: float) -> Tensor:
        """The updates of a whole group, (N, R, C), in the group's dtype."""
        mine = self._mine(group)
        updates = torch.zeros((len(group), *group[0].shape), device=group[0].device, dtype=self.world.dtype)
        if mine:
            gradient = torch.stack([matrix.grad for matrix in mine if matrix.grad is not None])
            update, self.momenta[index] = muon_update(gradient, self.momenta[index], momentum, self.steps, self.world.dtype)
            updates[self.world.rank :: self.world.size] = update.to(updates.dtype)
        return self.world.sum_(updates).to(group[0].dtype)

    def _mine(self, group: list[Tensor]) -> list[Tensor]:
        return group[self.world.rank :: self.world.size]
