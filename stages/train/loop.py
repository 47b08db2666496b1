"""Training loop: batches, forward and backward passes, optimizer steps, until the budget is spent.

Unusual here:

* everything is compiled and, on a GPU, captured in CUDA graphs before the clock starts and before
  any data is read; compiling inside the clock is an error;
* the host runs at most MAX_STEPS_IN_FLIGHT steps ahead of the device, so that a budget of seconds
  is measured truly; until the last step it waits for a loss only in the first LOGGED_FIRST_STEPS
  steps and where a checkpoint is written;
* the result is the moving average of the weights, not the weights of the last step.

`train` is the whole run. `TrainingLoop` is the state that lives across steps.

Shapes: B windows of one pass, T tokens of a window, n windows of one rank's part of a step.
"""

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
from stages.common.progress import Logger
from stages.train.checkpoint import Checkpoints, open_checkpoints
from stages.train.data import PrefetchedBatches, TrainingWindows, micro_batch_size
from stages.train.model import Model, build_model, initialise_, scale_logits
from stages.train.ops import compiled_graph_count, maybe_compile
from stages.train.optimizer import ShardedOptimizer
from stages.train.params import Params
from stages.train.schedule import StepSchedule, budget_tracker, step_schedule

# Steps that the host may run ahead of the device: enough to hide the launches of kernels, few
# enough that the elapsed seconds are true.
MAX_STEPS_IN_FLIGHT = 2
LOGGED_FIRST_STEPS = 5  # steps whose loss is logged at once: it shows early whether a run is sound
WARM_UP_STEPS = 2  # of each kind; the second one meets what the first has left, such as gradients


class TrainResult(NamedTuple):
    """The result of a training run: averaged weights, what happened at each step, measured values."""

    state: dict[str, Tensor]  # moving average of the weights by name, float32, on the CPU
    losses: list[float]  # nats per token of each step's global batch, before the step
    schedule: list[StepSchedule]
    tokens: int  # tokens trained on, repeated ones included
    timing: dict[str, Any]  # speed, memory and compilation, for timing.json


def train(
    params: Params,
    shard_folder: Path,
    world: World,
    logger: Logger,
    clock: Interval,
    replay: list[float] | None = None,
    scratch: Path = Path(".scratch"),
) -> TrainResult:
    """Train a model from the seed.

    `clock` is started at the first read of training data and marked at the last. `replay` is the
    fraction of the budget spent at each step of an earlier run (schedule.py). Checkpoints are
    written below `scratch`.
    """
    model = build_model(params.model, world)
    initialise_(model, params.seed)
    batch_shape = _batch_shape(params, world)
    logger.log(
        f"train: {sum(p.numel() for p in model.parameters()):,} parameters,"
        f" {params.train.batch_tokens:,} tokens a step = {world.size} ranks"
        f" x {batch_shape.windows_per_rank // batch_shape.windows_per_pass} passes"
        f" x {batch_shape.windows_per_pass} windows"
        f" x {params.model.context} tokens, on {world.device.type}"
    )

    # Compile and warm up before the clock starts.
    checkpoints = open_checkpoints(params, shard_folder, scratch, world)
    loop = TrainingLoop(params, model, world, checkpoints, batch_shape.windows_per_pass)
    if world.device.type == "cuda":
        loop.warm_up()  # on a CPU there is nothing to compile

    # The clock runs from here: everything below reads training data.
    clock.start()
    loop.resume(logger)
    windows = TrainingWindows(shard_folder, params.model.context, params.model.vocab_size, params.seed)
    budget_spent_at = budget_tracker(params.train, replay, lambda: world.max_of(clock.elapsed()))

    def first_window(step: int) -> int:
        """Number of this rank's first window in the global batch of a step."""
        return (step * world.size + world.rank) * batch_shape.windows_per_rank

    with (
        logger.progress("train: % of the budget", 100) as progress,
        PrefetchedBatches(
            windows, first_window, batch_shape.windows_per_rank, loop.steps_done, world.device
        ) as batches,
        _forbid_recompilation(world),
    ):
        while (budget_spent := budget_spent_at(loop.steps_done)) is not None:
            progress.advance(100 * budget_spent - progress.done, loop.progress_note())
            loop.step(step_schedule(loop.steps_done, budget_spent, params.train), *batches.next())
            clock.mark()
            loop.log_first_steps(logger)

    # The result. The last loss is read before the clock's last mark: reading waits for the device.
    losses = loop.global_losses()
    clock.mark()

    checkpoints.remove()
    averaged = loop.optimizer.averaged_weights()
    in_model_order = {name: averaged[name] for name, _ in model.named_parameters()}
    return TrainResult(
        state=scale_logits(in_model_order, params.train.logit_scale),
        losses=losses,
        schedule=loop.schedule,
        tokens=loop.steps_done * params.train.batch_tokens,
        timing=loop.timing(clock),
    )


# A function from inputs and targets, (B, T) each, to the mean loss and its gradients by name.
ForwardBackward = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor | None]]]


def loss_and_gradients(
    named_parameters: dict[str, nn.Parameter],
    model: Callable[..., Tensor],
    looped: bool,
    inputs_BT: Tensor,
    targets_BT: Tensor,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The mean loss of a batch and its gradients by name; None where it does not depend on a parameter."""
    loss = model(inputs_BT, targets_BT, looped).mean()
    gradients = torch.autograd.grad(loss, list(named_parameters.values()), allow_unused=True)
    return loss.detach(), dict(zip(named_parameters, gradients, strict=True))


class CudaGraphPass:
    """A forward and backward pass captured in one CUDA graph, which shrinks the gaps between kernels.

    A thousand kernel launches become one. Results are valid until the next call. Captured passes
    that never run at the same time share the memory `pool`.
    """

    def __init__(self, work: ForwardBackward, inputs_BT: Tensor, targets_BT: Tensor, pool: Any) -> None:
        self.inputs_BT = inputs_BT.clone()
        self.targets_BT = targets_BT.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.results = work(self.inputs_BT, self.targets_BT)

    def __call__(self, inputs_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Replay the graph on a batch of the captured shape."""
        self.inputs_BT.copy_(inputs_BT)
        self.targets_BT.copy_(targets_BT)
        self.graph.replay()
        return self.results


class TrainingLoop:
    """The state of a run across steps: model, optimizer, losses and schedule so far."""

    def __init__(
        self,
        params: Params,
        model: Model,
        world: World,
        checkpoints: Checkpoints,
        windows_per_pass: int,
    ) -> None:
        self.params = params
        self.model = model
        self.world = world
        self.checkpoints = checkpoints
        self.windows_per_pass = windows_per_pass

        named_parameters = dict(model.named_parameters())
        forward = maybe_compile(model, world)
        self.passes: dict[bool, ForwardBackward] = {
            looped: partial(loss_and_gradients, named_parameters, forward, looped) for looped in (False, True)
        }
        self.optimizer = ShardedOptimizer(model, params.train, world)
        self.schedule: list[StepSchedule] = []  # of the steps done
        self.local_losses: list[Tensor] = []  # this rank's mean loss of each step, on the device

        # The last losses on the host, and events that tell when the device has finished a step.
        self.host_losses: deque[Tensor] = deque(maxlen=MAX_STEPS_IN_FLIGHT + 1)
        self.events: deque[torch.cuda.Event] = deque()
        self.graphs_of_warm_up = 0  # graphs that torch.compile made before the clock started

    @property
    def steps_done(self) -> int:
        """Optimizer steps so far, those before a resumption included."""
        return len(self.schedule)

    def step(self, schedule: StepSchedule, inputs_nT: Tensor, targets_nT: Tensor) -> None:
        """One optimizer step on this rank's part of the global batch."""
        loss = self._accumulate_gradients(schedule.looped, inputs_nT, targets_nT)
        self.optimizer.step(schedule, self.steps_done)
        self.local_losses.append(loss)
        self.schedule.append(schedule)
        self._throttle_host()
        if self.checkpoints.is_due(self.steps_done):
            self.checkpoints.save(self.steps_done, self._state())

    def warm_up(self) -> None:
        """Compile and capture everything that a step runs, on random tokens, then restore the initial state.

        No training data is read, so this is outside the clock. (#1530 warmed up on validation
        tokens and kept the momenta that they left.)
        """
        saved = [[tensor.clone() for tensor in group] for group in self.optimizer.state()]

        # Two tensors, not one twice: a graph that was compiled for inputs that share memory does
        # not serve inputs that do not.
        generator = torch.Generator().manual_seed(0)
        token_shape = (2, self.windows_per_pass, self.params.model.context)
        tokens = torch.randint(self.params.model.vocab_size, token_shape, generator=generator)
        tokens = tokens.to(self.world.device)
        inputs_BT = tokens[0].clone()
        targets_BT = tokens[1].clone()

        pool = torch.cuda.graph_pool_handle() if self.world.compile else None
        for looped in (False, True):
            for _ in range(WARM_UP_STEPS):
                self._accumulate_gradients(looped, inputs_BT, targets_BT)
                self.optimizer.step(step_schedule(0, 0.0, self.params.train), 0)
            if self.world.compile:
                self.passes[looped] = CudaGraphPass(self.passes[looped], inputs_BT, targets_BT, pool)

        self.optimizer.load_state(saved)
        self.graphs_of_warm_up = compiled_graph_count(self.world)
        if self.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.world.device)
        self.world.synchronize()
        self.world.barrier()

    def resume(self, logger: Logger) -> None:
        """Continue from the run's last checkpoint, if there is one."""
        state = self.checkpoints.load()
        if state is None:
            return
        self.optimizer.load_state(state["optimizer"])
        self.local_losses = list(state["losses"].unbind())
        self.schedule = [
            step_schedule(step, budget_spent, self.params.train)
            for step, budget_spent in enumerate(state["budget_spent"])
        ]
        logger.log(f"train: resumed after step {self.steps_done}")

    def global_losses(self) -> list[float]:
        """Each step's loss averaged over the ranks, nats per token."""
        losses = self.world.mean_(torch.stack(self.local_losses).double())
        return [float(loss) for loss in losses.cpu()]

    def log_first_steps(self, logger: Logger) -> None:
        """Log this rank's loss of the first steps; waits for the device."""
        if self.steps_done <= LOGGED_FIRST_STEPS:
            logger.log(f"train: step {self.steps_done} loss {float(self.local_losses[-1]):.4f}")

    def progress_note(self) -> str:
        """The newest loss that the device has certainly computed, for the progress line."""
        if len(self.host_losses) <= MAX_STEPS_IN_FLIGHT:
            return ""
        suffix = " looped" if self.schedule[-1].looped else ""
        return f"step {self.steps_done} loss {float(self.host_losses[0]):.4f}{suffix}"

    def timing(self, clock: Interval) -> dict[str, Any]:
        """Speed, memory and compilation, for timing.json."""
        tokens = self.steps_done * self.params.train.batch_tokens

        # Reserved, not allocated: a replayed CUDA graph does not count its memory as allocated.
        peak_memory = None
        if self.world.device.type == "cuda":
            peak_memory = torch.cuda.max_memory_reserved(self.world.device)

        recompilations = compiled_graph_count(self.world) - self.graphs_of_warm_up
        assert recompilations == 0, f"{recompilations} graphs were compiled after the warm-up"
        return {
            "tokens_per_second": tokens / max(1e-9, clock.seconds),
            "peak_memory_bytes": peak_memory,
            "recompilations": recompilations,
            "graphs_of_warm_up": self.graphs_of_warm_up,
        }

    def _state(self) -> dict[str, Any]:
        """The content of a checkpoint."""
        return {
            "optimizer": self.optimizer.state(),
            "losses": torch.stack(self.local_losses),
            "budget_spent": [schedule.budget_spent for schedule in self.schedule],
        }

    def _accumulate_gradients(self, looped: bool, inputs_nT: Tensor, targets_nT: Tensor) -> Tensor:
        """Give the optimizer the gradients of all passes of a step; returns the mean loss, a scalar tensor.

        All passes have one size, so the mean of their losses is the mean over tokens.
        """
        micro_batches = zip(
            inputs_nT.split(self.windows_per_pass), targets_nT.split(self.windows_per_pass), strict=True
        )
        losses = []
        for index, (inputs_BT, targets_BT) in enumerate(micro_batches):
            loss, gradients = self.passes[looped](inputs_BT, targets_BT)
            losses.append(loss.clone())
            self.optimizer.accumulate(gradients, index)
        return torch.stack(losses).mean()

    def _throttle_host(self) -> None:
        """Wait while more than MAX_STEPS_IN_FLIGHT steps are unfinished on the device.

        The loss is copied to pinned memory, so that reading it later does not wait for the steps
        after it.
        """
        loss = self.local_losses[-1]
        if self.world.device.type != "cuda":
            self.host_losses.append(loss)
            return
        self.host_losses.append(torch.empty((), pin_memory=True).copy_(loss, non_blocking=True))
        event = torch.cuda.Event()
        event.record()
        self.events.append(event)
        if len(self.events) > MAX_STEPS_IN_FLIGHT:
            self.events.popleft().synchronize()


def _forbid_recompilation(world: World) -> contextlib.AbstractContextManager[object]:
    """Context in which torch.compile raises an error instead of compiling: shapes and settings are fixed."""
    return torch.compiler.set_stance("fail_on_recompile") if world.compile else contextlib.nullcontext()


class BatchShape(NamedTuple):
    """Windows of one rank's part of a step, and of one of its forward passes."""

    windows_per_rank: int
    windows_per_pass: int


def _batch_shape(params: Params, world: World) -> BatchShape:
    """Divide the global batch over ranks and passes; a ValueError if it does not divide over the ranks."""
    windows = params.train.batch_tokens // params.model.context
    if windows % world.size:
        raise ValueError(
            f"train.batch_tokens: {windows} windows a step do not divide over {world.size} ranks"
        )
    windows_per_rank = windows // world.size
    max_windows = params.train.micro_batch_tokens // params.model.context
    return BatchShape(windows_per_rank, micro_batch_size(windows_per_rank, max_windows))
