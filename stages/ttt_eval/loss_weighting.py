"""Losses weighted by surprise: an option of both kinds of test-time training (#1879)."""

from torch import Tensor

# Smallest and largest weight.
MIN_WEIGHT = 1 / 3
MAX_WEIGHT = 3.0


def weighted(nll_BT: Tensor, weight_by_surprise: bool) -> Tensor:
    """The losses to train on, (B, T): unchanged or, with `weight_by_surprise`, each times a weight.

    The weight, a constant without gradient, is clip(loss / mean loss of its row, 1/3, 3). It is made
    of the very loss that it multiplies, so it cannot be a neighbour's (#1879 read weights one
    position off).
    """
    if not weight_by_surprise:
        return nll_BT
    constant_BT = nll_BT.detach()
    relative_BT = constant_BT / constant_BT.mean(dim=-1, keepdim=True)
    return nll_BT * relative_BT.nan_to_num(1.0).clamp(MIN_WEIGHT, MAX_WEIGHT)
