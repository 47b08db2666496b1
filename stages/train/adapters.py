"""Low-rank adapters (LoRA, arXiv 2106.09685) of the model's products, independent for each row of a batch.

An adapter adds scale * B A x to a product's output (#1530). An adapter whose B is zero adds exactly
zero, so a model with fresh adapters is the plain model. The adapters of attention all read its
normalised input; the one of the output projection does too, and is therefore parallel to attention.
In the same way the adapter of the MLP is parallel to the whole MLP.

Shapes: B batch, T tokens, I inputs, O outputs, R rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Adapter(NamedTuple):
    """The two factors of each row's low-rank product, in the dtype of the activations."""

    down_BRI: Tensor  # A of the paper
    up_BOR: Tensor  # B of the paper
    scale: float

    def add_to(self, y_BTO: Tensor, x_BTI: Tensor) -> Tensor:
        """y + scale * B A x, each row of the batch with its own factors."""
        low_BTR = torch.bmm(x_BTI, self.down_BRI.mT)
        return torch.baddbmm(y_BTO, low_BTR, self.up_BOR.mT, alpha=self.scale)


class VisitAdapters(NamedTuple):
    """The adapters of one visit of a block; None where a product has none."""

    query: Adapter | None = None
    key: Adapter | None = None
    value: Adapter | None = None
    output: Adapter | None = None
    mlp: Adapter | None = None


class Adapters(NamedTuple):
    """The adapters of a forward pass: one set for each visit in order, or none at all, and the head's.

    A looped block has a set for each of its visits, because it computes something else at each.
    """

    visits: tuple[VisitAdapters, ...] = ()
    head: Adapter | None = None


NO_VISIT_ADAPTERS = VisitAdapters()


def adapters_of_visit(adapters: Adapters, visit: int) -> VisitAdapters:
    """The adapters of the visit with this number."""
    return adapters.visits[visit] if adapters.visits else NO_VISIT_ADAPTERS


def apply_adapter(y_BTO: Tensor, x_BTI: Tensor, adapter: Adapter | None) -> Tensor:
    """y with the adapter's product added; y itself without an adapter."""
    return y_BTO if adapter is None else adapter.add_to(y_BTO, x_BTI)
