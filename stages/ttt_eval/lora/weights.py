"""The adapters of several documents: a vector of weights for each, and the AdamW that trains them.

Every document starts from the same fresh adapters, so that its weights depend on nothing but its
own tokens.

Shapes: B documents, P weights of all adapters of one document, R rank, I inputs and O outputs of
an adapter.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stages.train.adapters import Adapter, Adapters, VisitAdapters
from stages.train.params import ModelParams
from stages.ttt_eval.params import LoraParams

SEED = 0  # of the fresh adapters, the same in every run
HEAD_VISIT = -1  # `visit` of the head's slot


class AdapterSlot(NamedTuple):
    """One adapter: the visit of a block that it is in, and the product that it is added to."""

    visit: int  # HEAD_VISIT for the head
    name: str
    inputs: int
    outputs: int


class AdapterLayout:
    """Order of the adapters in a document's vector of weights.

    First come those of every visit, then the head's; of each adapter, A (R, I) comes before B (O,
    R).
    """

    def __init__(self, model: ModelParams, params: LoraParams, visits: int) -> None:
        self.params = params
        self.visits = visits

        kv_width = model.kv_heads * model.head_dim
        outputs = {"key": kv_width, "value": kv_width}  # model.width for all others
        names = [name for name in VisitAdapters._fields if name in params.adapters]
        self.slots = []
        for visit in range(visits):
            for name in names:
                self.slots.append(AdapterSlot(visit, name, model.width, outputs.get(name, model.width)))
        if "head" in params.adapters:
            self.slots.append(AdapterSlot(HEAD_VISIT, "head", model.width, model.vocab_size))

        self.sizes: list[int] = []  # weights of A and B of each slot
        for slot in self.slots:
            self.sizes += [params.rank * slot.inputs, slot.outputs * params.rank]

    def fresh(self, device: torch.device) -> Tensor:
        """Initial weights of every document, (P,) float32: A uniform within 1 / sqrt(I), B zero."""
        generator = torch.Generator().manual_seed(SEED)
        pieces = []
        for slot in self.slots:
            down = torch.rand(self.params.rank * slot.inputs, generator=generator) * 2 - 1
            pieces += [down / math.sqrt(slot.inputs), torch.zeros(slot.outputs * self.params.rank)]
        return torch.cat(pieces).to(device)

    def adapters(self, weights_BP: Tensor) -> Adapters:
        """The weights in the form that the model takes; views, not copies."""
        rank = self.params.rank
        scale = self.params.alpha / rank
        by_visit: list[dict[str, Adapter]] = [{} for _ in range(self.visits)]
        head = None
        pieces = iter(weights_BP.split(self.sizes, dim=1))
        for slot in self.slots:
            down_BRI = next(pieces).unflatten(1, (rank, slot.inputs))
            up_BOR = next(pieces).unflatten(1, (slot.outputs, rank))
            adapter = Adapter(down_BRI, up_BOR, scale)
            if slot.visit == HEAD_VISIT:
                head = adapter
            else:
                by_visit[slot.visit][slot.name] = adapter
        return Adapters(tuple(VisitAdapters(**adapters) for adapters in by_visit), head)


class AdapterBatch(NamedTuple):
    """Weights and optimizer state of B documents: all that training changes.

    The number of AdamW's steps is not part of it: it is the number of the chunk that comes next.
    """

    weights_BP: Tensor
    squares_BP: Tensor  # running mean of squared gradients

    def first(self, count: int) -> "AdapterBatch":
        """Those of the first documents; views, not copies."""
        return AdapterBatch(self.weights_BP[:count], self.squares_BP[:count])

    def copy(self, row: int) -> "AdapterBatch":
        """A copy of one document's, as a batch of one."""
        return AdapterBatch(self.weights_BP[row : row + 1].clone(), self.squares_BP[row : row + 1].clone())


def fresh_adapters(fresh_P: Tensor, documents: int) -> AdapterBatch:
    """The adapters of new documents; `fresh_P` is that of `AdapterLayout.fresh`."""
    weights_BP = fresh_P.expand(documents, -1).clone()
    return AdapterBatch(weights_BP, torch.zeros_like(weights_BP))


def adamw_(adapters: AdapterBatch, gradients_BP: Tensor, step: int, params: LoraParams) -> None:
    """One step of AdamW without momentum (beta1 = 0), in place; `step` counts from 1.

    s <- beta2 s + (1 - beta2) g^2
    w <- (1 - lr decay) w - lr g / (sqrt(s / (1 - beta2^step)) + eps)
    """
    adapters.squares_BP.mul_(params.beta2).addcmul_(gradients_BP, gradients_BP, value=1 - params.beta2)
    root_BP = (adapters.squares_BP / (1 - params.beta2**step)).sqrt_().add_(params.eps)
    decay = 1 - params.lr * params.weight_decay
    adapters.weights_BP.mul_(decay).addcdiv_(gradients_BP, root_BP, value=-params.lr)
