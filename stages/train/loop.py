"""The training loop: the next batch, forward and backward, one step of the optimizers, one of the average, until the budget is spent."""

import contextlib
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stages.common.clock import Interval
from stages.common.parallel import World
from stages.common.progress import Report
from stages.train.checkpoint import Checkpoints, open_checkpoints
from stages.train.data import Prefetched, Windows, micro_batch_size
from stages.train.model import Model, initialise_, model_for, with_scaled_logits
from stages.train.ops import compiled, graphs_compiled
from stages.train.optimizer import Optimizers
from stages.train.params import Params
from stages.train.schedule import StepSchedule, pacing, settings

HOST_LEAD = 2  # steps the host may run ahead of the device: enough to hide launches, little enough that elapsed time is true
LOGGED_FIRST_STEPS = 5
WARM_UP_STEPS = 2  # of each kind: the second finds what the first has left behind, such as gradients


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
    model = model_for(params.model, world)
    initialise_(model, params.seed)
    local, micro = _batch_shape(params, world)
    report.log(
        f"train: {sum(p.numel() for p in model.parameters()):,} parameters, {params.train.batch_tokens:,} tokens a step"
        f" = {world.size} ranks x {local // micro} passes x {micro} windows x {params.model.context} tokens, on {world.device.type}"
    )
    checkpoints = open_checkpoints(params, shard_folder, scratch, world)
    loop = _Loop(params, model, world, checkpoints, micro)
    if world.device.type == "cuda":
        loop.warm_up()  # on a CPU there is nothing to compile
    clock.start()
    loop.resume(report)
    windows = Windows(shard_folder, params.model.context, params.model.vocab_size, params.seed)
    next_fraction = pacing(params.train, replay, lambda: world.max_of(clock.elapsed()))
    with (
        report.progress("train: % of the budget", 100) as progress,
        Prefetched(
            windows,
            lambda step: (step * world.size + world.rank) * local,
            local,
            loop.steps_done,
            world.device,
        ) as batches,
        _nothing_compiles(world),
    ):
        while (fraction := next_fraction(loop.steps_done)) is not None:
            progress.advance(100 * fraction - progress.done, loop.note())
            loop.step(settings(loop.steps_done, fraction, params.train), *batches.next())
            clock.mark()
            loop.tell(report)
    losses = loop.all_losses()
    clock.mark()
    checkpoints.remove()
    average = loop.optimizers.average()
    state = with_scaled_logits(
        {name: average[name] for name, _ in model.named_parameters()}, params.train.logit_scale
    )
    return Trained(
        state, losses, loop.schedule, loop.steps_done * params.train.batch_tokens, loop.measured(clock)
    )


Pass = Callable[
    [Tensor, Tensor], tuple[Tensor, dict[str, Tensor | None]]
]  # inputs and targets to the mean loss and its gradients


def gradients_of(
    named: dict[str, nn.Parameter],
    loss_of: Callable[..., Tensor],
    looped: bool,
    inputs: Tensor,
    targets: Tensor,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The mean loss of a batch and its gradients by name; None where the loss does not depend on a parameter."""
    loss = loss_of(inputs, targets, looped).mean()
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return loss.detach(), dict(zip(named, gradients, strict=True))


class Recorded:
    """A pass as one CUDA graph: a thousand launches become one, and the gaps between kernels shrink. Results live until the next call.

    Recorded passes that never run at once share the memory `pool`.
    """

    def __init__(self, work: Pass, inputs: Tensor, targets: Tensor, pool: Any) -> None:
        self.inputs, self.targets = inputs.clone(), targets.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.results = work(self.inputs, self.targets)

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The recorded work on a batch of the same shape."""
        self.inputs.copy_(inputs)
        self.targets.copy_(targets)
        self.graph.replay()
        return self.results


class _Loop:
    """The state that one step hands to the next."""

    def __init__(
        self, params: Params, model: Model, world: World, checkpoints: Checkpoints, micro: int
    ) -> None:
        self.params, self.model, self.world, self.checkpoints, self.micro = (
            params,
            model,
            world,
            checkpoints,
            micro,
        )
        named = dict(model.named_parameters())
        loss_of = compiled(model, world)
        self.passes: dict[bool, Pass] = {
            looped: partial(gradients_of, named, loss_of, looped) for looped in (False, True)
        }
        self.optimizers = Optimizers(model, params.train, world)
        self.schedule: list[StepSchedule] = []
        self.local_losses: list[Tensor] = []
        self.host_losses: deque[Tensor] = deque(maxlen=HOST_LEAD + 1)
        self.events: deque[torch.cuda.Event] = deque()
        self.graphs_of_warm_up = 0

    @property
    def steps_done(self) -> int:
        return len(self.schedule)

    def step(self, now: StepSchedule, inputs: Tensor, targets: Tensor) -> None:
        """One optimizer step on this rank's part of the global batch, (n, T) tokens each."""
        losses = self._gradients(now.looped, inputs, targets)
        self.optimizers.step(now, self.steps_done)
        self.local_losses.append(losses)
        self.schedule.append(now)
        self._keep_pace()
        self.checkpoints.save(self.steps_done, self._state() if self._is_checkpoint() else {})

    def warm_up(self) -> None:
        """Compile and record everything that a step runs, on random tokens and before any data is read, and take back what it changed.

        (#1530 trained on validation tokens here; its momenta kept what they saw, D41.)
        """
        saved = [[tensor.clone() for tensor in bank] for bank in self.optimizers.state()]
        generator = torch.Generator().manual_seed(0)
        shape = (2, self.micro, self.params.model.context)
        # Two tensors, not one twice: a graph compiled for inputs that share memory does not serve inputs that do not.
        tokens = torch.randint(self.params.model.vocab_size, shape, generator=generator).to(self.world.device)
        inputs, targets = tokens[0].clone(), tokens[1].clone()
        pool = torch.cuda.graph_pool_handle() if self.world.compile else None
        for looped in (False, True):
            for _ in range(WARM_UP_STEPS):
                self._gradients(looped, inputs, targets)
                self.optimizers.step(settings(0, 0.0, self.params.train), 0)
            if self.world.compile:
                self.passes[looped] = Recorded(self.passes[looped], inputs, targets, pool)
        self.optimizers.load(saved)
        self.graphs_of_warm_up = graphs_compiled(self.world)
        if self.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.world.device)
        self.world.synchronize()
        self.world.barrier()

    def resume(self, report: Report) -> None:
        """Go on from the run's last checkpoint, if there is one."""
        state = self.checkpoints.load()
        if state is None:
            return
        self.optimizers.load(state["optimizers"])
        self.local_losses = list(state["losses"].unbind())
        self.schedule = [
            settings(step, fraction, self.params.train) for step, fraction in enumerate(state["fractions"])
        ]
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
        if len(self.host_losses) <= HOST_LEAD:
            return ""
        return f"step {self.steps_done} loss {float(self.host_losses[0]):.4f}{' looped' if self.schedule[-1].looped else ''}"

    def measured(self, clock: Interval) -> dict[str, Any]:
        """Speed, memory and compilation, for timing.json."""
        tokens = self.steps_done * self.params.train.batch_tokens
        # Reserved, not allocated: what a recorded pass uses is not seen as allocated when it is replayed.
        peak = torch.cuda.max_memory_reserved(self.world.device) if self.world.device.type == "cuda" else None
        recompilations = graphs_compiled(self.world) - self.graphs_of_warm_up
        assert recompilations == 0, f"{recompilations} graphs were compiled after the warm-up"
        return {
            "tokens_per_second": tokens / max(1e-9, clock.seconds),
            "peak_memory_bytes": peak,
            "recompilations": recompilations,
            "graphs_of_warm_up": self.graphs_of_warm_up,
        }

    def _is_checkpoint(self) -> bool:
        return self.checkpoints.every > 0 and self.steps_done % self.checkpoints.every == 0

    def _state(self) -> dict[str, Any]:
        return {
            "optimizers": self.optimizers.state(),
            "losses": torch.stack(self.local_losses),
            "fractions": [now.fraction for now in self.schedule],
        }

    def _gradients(self, looped: bool, inputs: Tensor, targets: Tensor) -> Tensor:
        """Collect the gradients of the mean loss over all micro-batches, which have one size; gives that loss."""
        parts = list(zip(inputs.split(self.micro), targets.split(self.micro), strict=True))
        losses = []
        for number, part in enumerate(parts):
            loss, gradients = self.passes[looped](*part)
            losses.append(loss.clone())
            self.optimizers.collect(gradients, number)
        return torch.stack(losses).mean()

    def _keep_pace(self) -> None:
        """Let the host run HOST_LEAD steps ahead, no further; losses reach the host without its waiting for the steps after them."""
        loss = self.local_losses[-1]
        if self.world.device.type != "cuda":
            self.host_losses.append(loss)
            return
        self.host_losses.append(torch.empty((), pin_memory=True).copy_(loss, non_blocking=True))
        event = torch.cuda.Event()
        event.record()
        self.events.append(event)
        if len(self.events) > HOST_LEAD:
            self.events.popleft().synchronize()


def _nothing_compiles(world: World) -> contextlib.AbstractContextManager[object]:
    """Within the clock a graph that has to be compiled again is a defect, and ends the run: shapes and settings are fixed."""
    return torch.compiler.set_stance("fail_on_recompile") if world.compile else contextlib.nullcontext()


def _batch_shape(params: Params, world: World) -> tuple[int, int]:
    """Windows of a rank's part of a step, and of one of its forward passes."""
    sequences = params.train.batch_tokens // params.model.context
    if sequences % world.size:
        raise ValueError(
            f"train.batch_tokens: {sequences} windows a step do not divide over {world.size} ranks"
        )
    local = sequences // world.size
    return local, micro_batch_size(local, params.train.micro_batch_tokens // params.model.context)
