"""The training loop: the next batch, forward and backward, one step of the optimizers, one of the average, until the budget is spent."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.clock import Interval
from stages.parallel import World
from stages.report import Report
from stages.train.checkpoint import Checkpoints, open_checkpoints
from stages.train.data import Windows, micro_batch_size, to_device
from stages.train.model import Model, initialise_
from stages.train.optimizer import MovingAverage, Optimizers
from stages.train.params import Params
from stages.train.schedule import StepSchedule, pacing, settings

HOST_LEAD = 2  # steps the host may run ahead of the device: enough to hide launches, little enough that elapsed time is true
LOGGED_FIRST_STEPS = 5


class Trained(NamedTuple):
    """What training gives: averaged weights, one row of the loss table for each step, and what was measured."""

    state: dict[str, Tensor]  # EMA weights by name, float32, on the CPU
    losses: list[float]  # mean nats a token of each step's batch, over all ranks, before the step
    schedule: list[StepSchedule]
    tokens: int  # trained on, repeats included
    measured: dict[str, Any]


def train(
    params: Params,
    shard_folder: Path,
    world: World,
    report: Report,
    clock: Interval,
    replay: list[float] | None = None,
    scratch: Path = Path(".scratch"),
) -> Trained:
    """Train from the seed. `clock` is started at the first read of training data and marked at the last."""
    model = Model(params.model, world.dtype).to(world.device)
    initialise_(model, params.seed)
    local, micro = _batch_shape(params, world)
    report.log(
        f"train: {sum(p.numel() for p in model.parameters()):,} parameters, {params.train.batch_tokens:,} tokens a step"
        f" = {world.size} ranks x {local // micro} passes x {micro} windows x {params.model.context} tokens, on {world.device.type}"
    )
    loss_of: Callable[..., Tensor] = torch.compile(model, dynamic=False, fullgraph=True) if world.compile else model
    if world.compile:
        _warm_up(loss_of, model, micro, world)
    checkpoints = open_checkpoints(params, shard_folder, scratch, world)
    clock.start()
    windows = Windows(shard_folder, params.model.context, params.model.vocab_size, params.seed)
    loop = _Loop(params, model, loss_of, windows, world, checkpoints)
    loop.resume(report)
    next_fraction = pacing(params.train, replay, lambda: world.max_of(clock.elapsed()))
    with report.progress("train: % of the budget", 100) as progress:
        while (fraction := next_fraction(loop.steps_done)) is not None:
            progress.advance(100 * fraction - progress.done, loop.note())
            loop.step(settings(loop.steps_done, fraction, params.train), local, micro)
            clock.mark()
            loop.tell(report)
    losses = loop.all_losses()
    clock.mark()
    checkpoints.remove()
    return Trained(loop.average.state(), losses, loop.schedule, loop.steps_done * params.train.batch_tokens, loop.measured(clock))


class _Loop:
    """The state that one step hands to the next."""

    def __init__(
        self,
        params: Params,
        model: Model,
        loss_of: Callable[..., Tensor],
        windows: Windows,
        world: World,
        checkpoints: Checkpoints,
    ) -> None:
        self.params, self.model, self.loss_of = params, model, loss_of
        self.windows, self.world, self.checkpoints = windows, world, checkpoints
        self.optimizers = Optimizers(model, params.train, world)
        self.average = MovingAverage(model, params.train.ema_decay)
        self.schedule: list[StepSchedule] = []
        self.local_losses: list[Tensor] = []
        self.events: list[torch.cuda.Event] = []

    @property
    def steps_done(self) -> int:
        return len(self.schedule)

    def step(self, now: StepSchedule, local: int, micro: int) -> None:
        """One optimizer step on this rank's part of the global batch."""
        first = (self.steps_done * self.world.size + self.world.rank) * local
        inputs, targets = to_device(self.windows.batch(first, local), self.world.device)
        losses = []
        for part in range(0, local, micro):
            loss = self.loss_of(inputs[part : part + micro], targets[part : part + micro], now.looped).mean()
            (loss * (micro / local)).backward()
            losses.append(loss.detach())
        self.optimizers.step(now)
        self.average.update()
        self.local_losses.append(torch.stack(losses).mean())
        self.schedule.append(now)
        self._keep_pace()
        self.checkpoints.save(self.steps_done, self._state() if self._is_checkpoint() else {})

    def resume(self, report: Report) -> None:
        """Go on from the run's last checkpoint, if there is one."""
        state = self.checkpoints.load()
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.optimizers.load(state["optimizers"])
        self.average.average = state["average"]
        self.local_losses = list(state["losses"].unbind())
        self.schedule = [settings(step, fraction, self.params.train) for step, fraction in enumerate(state["fractions"])]
        report.log(f"train: resumed after step {self.steps_done}")

    def all_losses(self) -> list[float]:
        """Each step's loss, averaged over ranks."""
        losses = self.world.mean_(torch.stack(self.local_losses).double())
        return [float(loss) for loss in losses.cpu()]

    def tell(self, report: Report) -> None:
        """The first steps' losses are logged as they come: they show at once whether a run is sound."""
        if self.steps_done <= LOGGED_FIRST_STEPS:
            report.log(f"train: step {self.steps_done} loss {float(self.local_losses[-1]):.4f}")

    def note(self) -> str:
        """A loss that the device has certainly computed, for the progress line."""
        if self.steps_done <= HOST_LEAD:
            return ""
        return f"step {self.steps_done} loss {float(self.local_losses[-1 - HOST_LEAD]):.4f}{' looped' if self.schedule[-1].looped else ''}"

    def measured(self, clock: Interval) -> dict[str, Any]:
        """Speed and memory, for timing.json."""
        tokens = self.steps_done * self.params.train.batch_tokens
        peak = torch.cuda.max_memory_allocated(self.world.device) if self.world.device.type == "cuda" else None
        return {"tokens_per_second": tokens / max(1e-9, clock.seconds), "peak_memory_bytes": peak}

    def _is_checkpoint(self) -> bool:
        return self.checkpoints.every > 0 and self.steps_done % self.checkpoints.every == 0

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizers": self.optimizers.state(),
            "average": self.average.average,
            "losses": torch.stack(self.local_losses),
            "fractions": [now.fraction for now in self.schedule],
        }

    def _keep_pace(self) -> None:
        if self.world.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        self.events.append(event)
        if len(self.events) > HOST_LEAD:
            self.events.pop(0).synchronize()


def _batch_shape(params: Params, world: World) -> tuple[int, int]:
    """Windows of a rank's part of a step, and of one of its forward passes."""
    sequences = params.train.batch_tokens // params.model.context
    if sequences % world.size:
        raise ValueError(f"train.batch_tokens: {sequences} windows a step do not divide over {world.size} ranks")
    local = sequences // world.size
    return local, micro_batch_size(local, params.train.micro_batch_tokens // params.model.context)


def _warm_up(loss_of: Callable[..., Tensor], model: Model, micro: int, world: World) -> None:
    """Compile both graphs on random tokens, before any data is read; only gradients are touched, and they are cleared."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, micro, model.params.context)
    # Two tensors, not one twice: a graph compiled for inputs that share memory does not serve inputs that do not.
    inputs, targets = torch.randint(model.params.vocab_size, shape, generator=generator).to(world.device).unbind()
    for looped in (False, True):
        loss_of(inputs, targets, looped).mean().backward()
        model.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats(world.device)
    world.synchronize()
    world.barrier()
