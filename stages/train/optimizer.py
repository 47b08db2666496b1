"""Sharded optimizer: Muon for the block matrices, AdamW for the rest, and a moving average of the weights.

Parameters of one shape and one update rule live in one flat buffer, and the model's parameters are
views of it. A step is then a few large kernels whatever the number of layers (#1523's parameter
banks, here for every group and not for matrices alone). One step:

    gradients    reduce-scatter: each rank gets its shard of the mean over ranks of the sums over
                 passes
    update       each rank updates its shard of the weights, momenta and moving average
    weights      all-gather: every rank has all new weights

With one rank the shard is the whole buffer and nothing is sent.

Shapes: N units of a buffer, padded to a multiple of the W ranks; n = N / W units of one rank's
shard. A unit is a matrix (R, C) for Muon and a number for AdamW.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stages.common.parallel import World
from stages.train.model import Model, is_matrix, is_table
from stages.train.muon import Coefficients, muon_update, newton_schulz_coefficients
from stages.train.ops import maybe_compile
from stages.train.params import TrainParams
from stages.train.schedule import StepSchedule

CLIP_EPS = 1e-6  # added to the gradient's norm before the division by it, as in torch's clip_grad_norm_


def muon_step_(
    weights_nRC: Tensor,
    gradient_nRC: Tensor,
    momentum_nRC: Tensor,
    average_nRC: Tensor,
    scalars: dict[str, Tensor],
    *,
    lr: float,
    weight_decay: float,
    coefficients: tuple[Coefficients, ...],
    dtype: torch.dtype,
    ema_decay: float,
) -> None:
    """Muon with decoupled weight decay, then the moving average.

    The decay is multiplied by the current learning rate.
    """
    gradient = gradient_nRC * scalars["grad_scale"]
    update, momentum = muon_update(gradient, momentum_nRC, scalars["momentum"], coefficients, dtype)
    momentum_nRC.copy_(momentum)

    rate = lr * scalars["lr_multiplier"]
    weights_nRC.mul_(1 - rate * weight_decay).sub_(rate * update.to(weights_nRC.dtype))
    average_nRC.lerp_(weights_nRC, 1 - ema_decay)


def adamw_step_(
    weights_n: Tensor,
    gradient_n: Tensor,
    first_moment_n: Tensor,
    second_moment_n: Tensor,
    average_n: Tensor,
    scalars: dict[str, Tensor],
    *,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    ema_decay: float,
) -> None:
    """AdamW (arXiv 1711.05101), then the moving average."""
    gradient = gradient_n * scalars["grad_scale"]
    first_moment_n.lerp_(gradient, 1 - beta1)
    second_moment_n.mul_(beta2).add_(gradient * gradient * (1 - beta2))

    # The bias-corrected step with decoupled weight decay.
    rate = lr * scalars["lr_multiplier"]
    denominator = (second_moment_n / scalars["bias_correction2"]).sqrt() + eps
    update = rate * (first_moment_n / scalars["bias_correction1"]) / denominator
    weights_n.mul_(1 - rate * weight_decay).sub_(update)
    average_n.lerp_(weights_n, 1 - ema_decay)


class FlatParameters:
    """Parameters of one unit shape and one update rule in one buffer, and this rank's optimizer state.

    `update_fn` is one of the step functions above with its constants bound; `state_count` is its
    number of state tensors. The constructor moves the parameters into the buffer: afterwards they
    are views of it.
    """

    def __init__(
        self,
        named_parameters: Sequence[tuple[str, Tensor]],
        unit: torch.Size,
        update_fn: Callable[..., None],
        state_count: int,
        world: World,
    ) -> None:
        self.names = [name for name, _ in named_parameters]
        self.parameters = [parameter for _, parameter in named_parameters]
        self.update_fn = update_fn
        device = self.parameters[0].device

        # The whole buffer, padded so that it divides over the ranks, and this rank's part of it.
        units = sum(parameter.numel() // unit.numel() for parameter in self.parameters)
        shard_units = -(-units // world.size)
        self.weights = torch.zeros(shard_units * world.size, *unit, device=device)
        self.shard_slice = slice(world.rank * shard_units, (world.rank + 1) * shard_units)
        self._move_parameters_into_buffer_()

        # Gradients: `grad_buffer` holds this rank's sums over passes. After the reduce-scatter
        # `grad_shard` holds one shard of the mean over ranks of the sums over passes.
        self.grad_buffer = torch.zeros_like(self.weights)
        self.grad_views = self._parameter_views(self.grad_buffer)
        self.grad_shard = self.grad_buffer
        if world.size > 1:
            self.grad_shard = torch.zeros(shard_units, *unit, device=device)

        self.states = [torch.zeros(shard_units, *unit, device=device) for _ in range(state_count)]
        self.average_shard = self.weights[self.shard_slice].clone()

    def accumulate(self, gradients: dict[str, Tensor | None], add: bool) -> None:
        """Copy gradients by name into the buffer, or add them to it.

        A gradient of None counts as zero: the skips of a one-layer model have none before it is
        looped.
        """
        views = []
        present = []
        for name, view in zip(self.names, self.grad_views, strict=True):
            gradient = gradients[name]
            if gradient is not None:
                views.append(view)
                present.append(gradient.float())

        if not add and len(present) < len(self.names):
            self.grad_buffer.zero_()
        if not present:
            return
        if add:
            torch._foreach_add_(views, present)
        else:
            torch._foreach_copy_(views, present)

    def state(self) -> list[Tensor]:
        """All tensors that a resumed run needs of this rank: weights, moving average, optimizer states."""
        return [self.weights, self.average_shard, *self.states]

    def gather_averages(self, world: World) -> Iterator[tuple[str, Tensor]]:
        """Yield the averaged weights by name, float32, on the CPU."""
        whole = torch.empty_like(self.weights)
        world.all_gather(whole, self.average_shard).wait()
        for name, view in zip(self.names, self._parameter_views(whole.cpu()), strict=True):
            yield name, view.clone()

    def _move_parameters_into_buffer_(self) -> None:
        """Copy the parameters into `weights` and make each of them a view of its part."""
        for parameter, view in zip(self.parameters, self._parameter_views(self.weights), strict=True):
            view.copy_(parameter.detach())
            parameter.data = view

    def _parameter_views(self, buffer: Tensor) -> list[Tensor]:
        """Views of a buffer (N, ...) in the shapes of the parameters, without the padding."""
        sizes = [parameter.numel() for parameter in self.parameters]
        pieces = buffer.flatten()[: sum(sizes)].split(sizes)
        return [piece.view(parameter.shape) for piece, parameter in zip(pieces, self.parameters, strict=True)]


class ShardedOptimizer:
    """Muon for the block matrices, AdamW for the tables and for every vector; decoupled weight decay (#1493).

    The moving average of all weights is part of the step: it starts at the initial weights and is
    not bias-corrected.
    """

    def __init__(self, model: Model, params: TrainParams, world: World) -> None:
        self.params = params
        self.world = world
        self.passes = 1  # forward and backward passes whose gradients the next step averages
        self.groups = [*self._muon_groups(model), *self._adamw_groups(model)]
        # The largest buffer is sent first.
        self.groups.sort(key=lambda group: -group.weights.numel())

    @torch.no_grad()
    def accumulate(self, gradients: dict[str, Tensor | None], pass_index: int) -> None:
        """Add the gradients by name of the step's 0-based pass; the step uses the mean over its passes."""
        self.passes = pass_index + 1
        for group in self.groups:
            group.accumulate(gradients, add=pass_index > 0)

    @torch.no_grad()
    def step(self, schedule: StepSchedule, step: int) -> None:
        """Average the gradients over ranks, clip their global norm, and update; `step` is 0-based.

        The host never waits for the device, and the communication of one group overlaps the
        computation of others.
        """
        scattered = [
            self.world.reduce_scatter_mean(group.grad_shard, group.grad_buffer) for group in self.groups
        ]
        for work in scattered:
            work.wait()
        scalars = self._scalars(schedule, step)

        gathered = []
        for group in self.groups:
            weights = group.weights[group.shard_slice]
            group.update_fn(weights, group.grad_shard, *group.states, group.average_shard, scalars)
            gathered.append(self.world.all_gather(group.weights, weights))
        for work in gathered:
            work.wait()

    def averaged_weights(self) -> dict[str, Tensor]:
        """The averaged weights by name, float32, on the CPU, in the order of the groups."""
        averaged: dict[str, Tensor] = {}
        for group in self.groups:
            averaged.update(group.gather_averages(self.world))
        return averaged

    def state(self) -> list[list[Tensor]]:
        """All tensors that a resumed run needs of this rank, by group: the tensors themselves, not copies."""
        return [group.state() for group in self.groups]

    def load_state(self, state: list[list[Tensor]]) -> None:
        """Continue from a saved state; the model's parameters change with it, since they are views."""
        for group, saved in zip(self.groups, state, strict=True):
            torch._foreach_copy_(group.state(), saved)

    def _scalars(self, schedule: StepSchedule, step: int) -> dict[str, Tensor]:
        """All numbers that change from step to step, as 0-dimensional tensors on the device.

        Compiled update functions would be compiled again for each new Python number.
        """
        host = torch.tensor(
            [
                schedule.lr_multiplier,
                schedule.momentum,
                1 - self.params.adam_beta1 ** (step + 1),
                1 - self.params.adam_beta2 ** (step + 1),
            ]
        )
        if self.world.device.type == "cuda":
            host = host.pin_memory()

        # One copy for all of them.
        on_device = host.to(self.world.device, non_blocking=True)
        multiplier, momentum, bias_correction1, bias_correction2 = on_device.unbind()

        # The shards hold the mean over ranks of the sums over passes: the divisions by `passes`
        # make the norm and the update those of the mean gradient.
        norms = [torch.linalg.vector_norm(group.grad_shard) for group in self.groups]
        square = torch.stack(norms).square().sum()
        norm = self.world.sum_(square).sqrt() / self.passes
        grad_scale = (self.params.clip_norm / (norm + CLIP_EPS)).clamp_max(1.0) / self.passes
        return {
            "grad_scale": grad_scale,
            "lr_multiplier": multiplier,
            "momentum": momentum,
            "bias_correction1": bias_correction1,
            "bias_correction2": bias_correction2,
        }

    def _muon_groups(self, model: Model) -> list[FlatParameters]:
        """A group for each shape of block matrices."""
        update_fn = self._bind_step(
            muon_step_,
            lr=self.params.matrix_lr,
            weight_decay=self.params.matrix_weight_decay,
            coefficients=newton_schulz_coefficients(
                self.params.newton_schulz, self.params.newton_schulz_steps
            ),
            dtype=self.world.dtype,
        )
        by_shape: dict[torch.Size, list[tuple[str, Tensor]]] = {}
        for name, parameter in model.named_parameters():
            if is_matrix(name):
                by_shape.setdefault(parameter.shape, []).append((name, parameter))
        return [
            FlatParameters(named, shape, update_fn, state_count=1, world=self.world)
            for shape, named in by_shape.items()
        ]

    def _adamw_groups(self, model: Model) -> list[FlatParameters]:
        """A group of all tables and a group of all vectors."""
        tables = []
        vectors = []
        for name, parameter in model.named_parameters():
            if is_table(name):
                tables.append((name, parameter))
            elif not is_matrix(name):
                vectors.append((name, parameter))

        # Both have the same constants but for learning rate and decay.
        constants = {
            "beta1": self.params.adam_beta1,
            "beta2": self.params.adam_beta2,
            "eps": self.params.adam_eps,
        }
        groups = []
        for named, lr, weight_decay in (
            (tables, self.params.embedding_lr, self.params.embedding_weight_decay),
            (vectors, self.params.scalar_lr, self.params.scalar_weight_decay),
        ):
            update_fn = self._bind_step(adamw_step_, lr=lr, weight_decay=weight_decay, **constants)
            groups.append(FlatParameters(named, torch.Size(), update_fn, state_count=2, world=self.world))
        return groups

    def _bind_step(self, step: Callable[..., None], **constants: Any) -> Callable[..., None]:
        """A step function with its constants bound, compiled where the world compiles."""
        return maybe_compile(partial(step, **constants, ema_decay=self.params.ema_decay), self.world)
