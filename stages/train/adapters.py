"""Low-rank adapters of the model's products, an independent set for every row of a batch (#1530).

An adapter adds scale B A x to a product's output. One whose B is zero adds exactly nothing: a model with fresh adapters is the plain model.
All of a block's adapters read its normed input, also the one beside the output projection, which is parallel to attention.

Shapes: B batch, T tokens, I inputs, O outputs, R rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Adapter(NamedTuple):
    """The two factors, in the dtype of the activations; the model names them A and B after LoRA's paper (arXiv 2106.09685)."""

    down_BRI: Tensor  # A
    up_BOR: Tensor  # B
    scale: float

    def added_to(self, y_BTO: Tensor, x_BTI: Tensor) -> Tensor:
        """y + scale B A x, each row of the batch with factors of its own."""
        low_BTR = torch.bmm(x_BTI, self.down_BRI.mT)
        return torch.baddbmm(y_BTO, low_BTR, self.up_BOR.mT, alpha=self.scale)


class VisitAdapters(NamedTuple):
    """The adapters of one visit of a block; None where there is none."""

    query: Adapter | None = None
    key: Adapter | None = None
    value: Adapter | None = None
    output: Adapter | None = None
    mlp: Adapter | None = None


class Adapters(NamedTuple):
    """The adapters of a forward pass: a set for every visit in order, since a looped block does another thing at each, and the head's."""

    visits: tuple[VisitAdapters, ...] = ()
    head: Adapter | None = None


def adapted(y_BTO: Tensor, x_BTI: Tensor, adapter: Adapter | None) -> Tensor:
    """y as it is, or what the adapter makes of it."""
    return y_BTO if adapter is None else adapter.added_to(y_BTO, x_BTI)
