"""The adapters of several documents side by side: one vector of weights for each, and the AdamW that trains them.

Every document starts from the same fresh adapters, so a document's own tokens are all that its weights can depend on.

Shapes: B documents, P weights of all adapters of one document, R rank.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stages.train.adapters import Adapter, Adapters, VisitAdapters
from stages.train.params import ModelParams
from stages.ttt_eval.params import LoraParams

SEED = 0  # of the fresh adapters, alike in every run


class Part(NamedTuple):
    """One adapter's place: the visit, -1 for the head, and the product that it is added to."""

    visit: int
    name: str
    inputs: int
    outputs: int


class Layout:
    """Where each adapter lies in a document's vector of weights: for every visit in order its adapters, then the head's; A before B."""

    def __init__(self, model: ModelParams, params: LoraParams, visits: int) -> None:
        outputs = {
            "query": model.width,
            "key": model.kv_heads * model.head_dim,
            "value": model.kv_heads * model.head_dim,
        }
        inner = [name for name in VisitAdapters._fields if name in params.adapters]
        self.params = params
        self.visits = visits
        self.parts = [
            Part(v, name, model.width, outputs.get(name, model.width))
            for v in range(visits)
            for name in inner
        ]
        if "head" in params.adapters:
            self.parts.append(Part(-1, "head", model.width, model.vocab_size))
        self.sizes = [
            size for part in self.parts for size in (params.rank * part.inputs, part.outputs * params.rank)
        ]

    def fresh(self, device: torch.device) -> Tensor:
        """The weights that every document starts with, (P,) float32: A uniform within 1 / sqrt(inputs), B zero."""
        generator = torch.Generator().manual_seed(SEED)
        pieces = []
        for part in self.parts:
            down = torch.rand(self.params.rank * part.inputs, generator=generator) * 2 - 1
            pieces += [down / math.sqrt(part.inputs), torch.zeros(part.outputs * self.params.rank)]
        return torch.cat(pieces).to(device)

    def adapters(self, weights_BP: Tensor) -> Adapters:
        """The weights as the model takes them; nothing is copied."""
        rank, scale = self.params.rank, self.params.alpha / self.params.rank
        pieces = iter(weights_BP.split(self.sizes, dim=1))
        made: list[dict[str, Adapter]] = [{} for _ in range(self.visits + 1)]
        for part in self.parts:
            down, up = (
                next(pieces).unflatten(1, (rank, part.inputs)),
                next(pieces).unflatten(1, (part.outputs, rank)),
            )
            made[part.visit][part.name] = Adapter(down, up, scale)
        return Adapters(tuple(VisitAdapters(**visit) for visit in made[:-1]), made[-1].get("head"))


class Bank(NamedTuple):
    """What training changes; AdamW has taken as many steps for each document as the chunk that is scored has number."""

    weights_BP: Tensor
    squares_BP: Tensor  # running mean of squared gradients

    def rows(self, count: int) -> "Bank":
        """The first documents, not copied."""
        return Bank(self.weights_BP[:count], self.squares_BP[:count])

    def copy(self, row: int) -> "Bank":
        """One document's weights and squares, as a bank of its own."""
        return Bank(self.weights_BP[row : row + 1].clone(), self.squares_BP[row : row + 1].clone())


def fresh_bank(fresh_P: Tensor, documents: int) -> Bank:
    """The bank of documents that nothing was learnt from yet."""
    weights = fresh_P.expand(documents, -1).clone()
    return Bank(weights, torch.zeros_like(weights))


def adamw_(bank: Bank, gradients_BP: Tensor, step: int, params: LoraParams) -> None:
    """One step of AdamW without momentum (beta1 = 0), in place; `step` counts from 1.

    s <- beta2 s + (1 - beta2) g^2; w <- (1 - lr decay) w - lr g / (sqrt(s / (1 - beta2^step)) + eps).
    """
    bank.squares_BP.mul_(params.beta2).addcmul_(gradients_BP, gradients_BP, value=1 - params.beta2)
    root = (bank.squares_BP / (1 - params.beta2**step)).sqrt_().add_(params.eps)
    bank.weights_BP.mul_(1 - params.lr * params.weight_decay).addcdiv_(gradients_BP, root, value=-params.lr)
