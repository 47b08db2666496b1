"""The weights in banks, and the step that updates them: gradients scattered over ranks, each bank updated in part, weights gathered.

A bank is one tensor that holds all parameters of one shape and one rule, so that an update is a few large kernels whatever the number
of layers, and a rank keeps momenta and averages of its own part alone (#1523's banks; for every group here, not for matrices alone).
Parameters of the model are views of it. With one rank the part is the whole, and nothing is sent.

Shapes: N units of a bank, padded to a multiple of the W ranks; a unit is a matrix (R, C) for Muon and a number for AdamW.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stages.common.parallel import World
from stages.train.model import Model, is_matrix, is_table
from stages.train.muon import Coefficients, coefficients, muon_update
from stages.train.ops import compiled
from stages.train.params import TrainParams
from stages.train.schedule import StepSchedule

CLIP_FLOOR = 1e-6  # added to the gradient's norm, as in torch's clip_grad_norm_


def muon_step_(
    weights: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    average: Tensor,
    now: dict[str, Tensor],
    *,
    lr: float,
    weight_decay: float,
    triples: tuple[Coefficients, ...],
    dtype: torch.dtype,
    ema_decay: float,
) -> None:
    """Muon with decoupled weight decay at the current rate, then the moving average; all tensors (n, R, C)."""
    update, kept = muon_update(gradient * now["scale"], momentum, now["momentum"], triples, dtype)
    momentum.copy_(kept)
    rate = lr * now["lr_multiplier"]
    weights.mul_(1 - rate * weight_decay).sub_(rate * update.to(weights.dtype))
    average.lerp_(weights, 1 - ema_decay)


def adamw_step_(
    weights: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    average: Tensor,
    now: dict[str, Tensor],
    *,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    ema_decay: float,
) -> None:
    """AdamW (arXiv 1711.05101), then the moving average; all tensors (n,)."""
    gradient = gradient * now["scale"]
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).add_(gradient * gradient * (1 - beta2))
    rate = lr * now["lr_multiplier"]
    denominator = (second / now["adam_bias2"]).sqrt() + eps
    weights.mul_(1 - rate * weight_decay).sub_(rate * (first / now["adam_bias1"]) / denominator)
    average.lerp_(weights, 1 - ema_decay)


class Bank:
    """All parameters of one rule and one unit, the states of this rank's part, and the part's moving average."""

    def __init__(
        self,
        named: Sequence[tuple[str, Tensor]],
        unit: torch.Size,
        rule: Callable[..., None],
        states: int,
        world: World,
    ) -> None:
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.rule = rule
        device = self.parameters[0].device
        counts = [parameter.numel() // unit.numel() for parameter in self.parameters]
        units = -(-sum(counts) // world.size)  # of one rank
        self.weights = torch.zeros(units * world.size, *unit, device=device)
        self.gradients = torch.zeros_like(self.weights)
        self.mine = slice(world.rank * units, (world.rank + 1) * units)
        self.gradient = self.gradients if world.size == 1 else torch.zeros(units, *unit, device=device)
        self.places = self._views(self.gradients)
        for parameter, place in zip(self.parameters, self._views(self.weights), strict=True):
            place.copy_(parameter.detach())
            parameter.data = place
        self.states = [torch.zeros(units, *unit, device=device) for _ in range(states)]
        self.average = self.weights[self.mine].clone()

    def collect(self, gradients: dict[str, Tensor | None], add: bool) -> None:
        """Put gradients by name into the bank, or add them to what is there; None is zero (the skips of a one-layer model)."""
        pairs = [(place, gradients[name]) for name, place in zip(self.names, self.places, strict=True)]
        held = [(place, gradient.float()) for place, gradient in pairs if gradient is not None]
        if not add and len(held) < len(pairs):
            self.gradients.zero_()
        if held:
            places, found = (list(column) for column in zip(*held, strict=True))
            (torch._foreach_add_ if add else torch._foreach_copy_)(places, found)

    def state(self) -> list[Tensor]:
        """What a resumed run needs of this rank: weights, average, and the rule's states."""
        return [self.weights, self.average, *self.states]

    def averages(self, world: World) -> Iterator[tuple[str, Tensor]]:
        """The averaged weights by name, float32, on the CPU."""
        whole = torch.empty_like(self.weights)
        world.all_gather(whole, self.average).wait()
        for name, place in zip(self.names, self._views(whole.cpu()), strict=True):
            yield name, place.clone()

    def _views(self, bank: Tensor) -> list[Tensor]:
        pieces = bank.flatten()[: sum(parameter.numel() for parameter in self.parameters)].split(
            [p.numel() for p in self.parameters]
        )
        return [piece.view(parameter.shape) for piece, parameter in zip(pieces, self.parameters, strict=True)]


class Optimizers:
    """Muon for the block matrices, AdamW for the tables and for every vector; weight decay is decoupled everywhere (#1493).

    The moving average of all weights is part of the step: it starts at the initial weights and is not bias-corrected.
    """

    def __init__(self, model: Model, params: TrainParams, world: World) -> None:
        self.params = params
        self.world = world
        self.passes = 1
        self.banks = [*self._muon_banks(model), *self._adam_banks(model)]
        self.banks.sort(key=lambda bank: -bank.weights.numel())  # the largest is sent first

    @torch.no_grad()
    def collect(self, gradients: dict[str, Tensor | None], number: int) -> None:
        """Take the gradients by name of the step's 0-based pass `number`; the step uses their mean over passes."""
        self.passes = number + 1
        for bank in self.banks:
            bank.collect(gradients, add=number > 0)

    @torch.no_grad()
    def step(self, now: StepSchedule, number: int) -> None:
        """Average the collected gradients over ranks, clip their global norm, and update; `number` is the 0-based step.

        Nothing waits for the device, and communication of one bank goes on while others are computed.
        """
        sent = [self.world.reduce_scatter_mean(bank.gradient, bank.gradients) for bank in self.banks]
        for handle in sent:
            handle.wait()
        scalars = self._scalars(now, number)
        gathered = []
        for bank in self.banks:
            bank.rule(bank.weights[bank.mine], bank.gradient, *bank.states, bank.average, scalars)
            gathered.append(self.world.all_gather(bank.weights, bank.weights[bank.mine]))
        for handle in gathered:
            handle.wait()

    def average(self) -> dict[str, Tensor]:
        """The averaged weights by name, float32, on the CPU, in the order of the banks."""
        return {name: tensor for bank in self.banks for name, tensor in bank.averages(self.world)}

    def state(self) -> list[list[Tensor]]:
        """Everything that a resumed run needs of this rank: the tensors themselves, not copies."""
        return [bank.state() for bank in self.banks]

    def load(self, state: list[list[Tensor]]) -> None:
        """Continue from a saved state; the model's parameters follow, being views."""
        for bank, saved in zip(self.banks, state, strict=True):
            torch._foreach_copy_(bank.state(), saved)

    def _scalars(self, now: StepSchedule, number: int) -> dict[str, Tensor]:
        """What changes from step to step, as 0-dimensional tensors on the device, so that compiled rules see no new constants."""
        host = torch.tensor(
            [
                now.lr_multiplier,
                now.momentum,
                1 - self.params.adam_beta1 ** (number + 1),
                1 - self.params.adam_beta2 ** (number + 1),
            ]
        )
        if self.world.device.type == "cuda":
            host = host.pin_memory()
        multiplier, momentum, bias1, bias2 = host.to(self.world.device, non_blocking=True).unbind()
        squares = torch.stack([torch.linalg.vector_norm(bank.gradient) for bank in self.banks]).square().sum()
        norm = self.world.sum_(squares).sqrt() / self.passes
        scale = (self.params.clip_norm / (norm + CLIP_FLOOR)).clamp_max(1.0) / self.passes
        return {
            "scale": scale,
            "lr_multiplier": multiplier,
            "momentum": momentum,
            "adam_bias1": bias1,
            "adam_bias2": bias2,
        }

    def _muon_banks(self, model: Model) -> list[Bank]:
        rule = self._rule(
            muon_step_,
            lr=self.params.matrix_lr,
            weight_decay=self.params.matrix_weight_decay,
            triples=coefficients(self.params.newton_schulz, self.params.newton_schulz_steps),
            dtype=self.world.dtype,
        )
        by_shape: dict[torch.Size, list[tuple[str, Tensor]]] = {}
        for name, parameter in model.named_parameters():
            if is_matrix(name):
                by_shape.setdefault(parameter.shape, []).append((name, parameter))
        return [Bank(named, shape, rule, 1, self.world) for shape, named in by_shape.items()]

    def _adam_banks(self, model: Model) -> list[Bank]:
        tables = [(name, parameter) for name, parameter in model.named_parameters() if is_table(name)]
        vectors = [
            (n, parameter)
            for n, parameter in model.named_parameters()
            if not is_matrix(n) and not is_table(n)
        ]
        banks = []
        for named, lr, weight_decay in (
            (tables, self.params.embedding_lr, self.params.embedding_weight_decay),
            (vectors, self.params.scalar_lr, self.params.scalar_weight_decay),
        ):
            rule = self._rule(
                adamw_step_,
                lr=lr,
                weight_decay=weight_decay,
                beta1=self.params.adam_beta1,
                beta2=self.params.adam_beta2,
                eps=self.params.adam_eps,
            )
            banks.append(Bank(named, torch.Size(), rule, 2, self.world))
        return banks

    def _rule(self, step: Callable[..., None], **constants: Any) -> Callable[..., None]:
        return compiled(partial(step, **constants, ema_decay=self.params.ema_decay), self.world)
