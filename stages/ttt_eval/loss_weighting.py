"""Losses weighted by how surprising they were, as an option of both kinds of test-time training (#1879)."""

from torch import Tensor

LEAST, MOST = 1 / 3, 3.0


def weighted(nll_BT: Tensor, confidence: bool) -> Tensor:
    """The losses to train on: as they are or, with `confidence`, each times clip(loss / mean of its row, 1/3, 3), a constant.

    A weight is made of the very loss that it multiplies, so it cannot belong to a neighbour (#1879 read them one position off).
    """
    if not confidence:
        return nll_BT
    fixed = nll_BT.detach()
    return nll_BT * (fixed / fixed.mean(dim=-1, keepdim=True)).nan_to_num(1.0).clamp(LEAST, MOST)
