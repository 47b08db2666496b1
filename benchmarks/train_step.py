"""Seconds of a training step by part, against floors computed from operations and bytes.

    python -m benchmarks.train_step --preset sprint --results FILE [--batch TOKENS ...] \\
        [--attention KIND ...] [--set KEY=VALUE ...]

Runs the training loop's own step on random documents, unlooped and looped; under torchrun on several
ranks. On a GPU the parts are the step's kernels by kind, from the profiler, and `host gaps` is the rest
of the measured time; on a CPU they are operators by kind.

The floor of an operation is its number of floating-point operations over the rate of a large matrix
product, or its number of bytes over the rate of a large copy, both measured in the same run. `floor of
products` is the share of the measured time that matrix products, attention and Newton-Schulz would need
at that rate.
"""

import itertools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks._command import command_line, write_results
from benchmarks._preset import train_params
from stages.common import environment, shards
from stages.common.parallel import World, distributed
from stages.train.checkpoint import Checkpoints
from stages.train.data import TrainingWindows, micro_batch_size
from stages.train.loop import TrainingLoop
from stages.train.model import Model, build_model, initialise_, is_matrix, visit_plan
from stages.train.params import Params
from stages.train.schedule import step_schedule

# Kinds of kernels and operators; a name is of the first kind that has one of the words in it.
KINDS = (
    ("attention", ("_attend", "_self_value", "fmha", "flash", "cudnn", "scaled_dot_product")),
    ("heads", ("_qk_norm_rope",)),
    ("loss", ("_loss_", "log_softmax", "nll_loss")),
    ("communication", ("nccl", "c10d", "gloo")),
    ("products", ("nvjet", "gemm", "cublas", "splitk", "_up_forward", "_down_backward")),
    ("products", ("aten::mm", "aten::bmm", "baddbmm", "addmm")),
    ("copies", ("memcpy", "memset")),
    ("elementwise", ("",)),
)
SERIES = 3  # series of repetitions; the device is waited for at the end of each
MEAN_DOCUMENT = 750  # tokens, as in FineWeb
ACTIVATION_BYTES = {torch.float32: 4, torch.bfloat16: 2}


def seconds_of(work: Callable[[], object], world: World, repetitions: int) -> list[float]:
    """Seconds of each of `repetitions` calls, after one call to warm up."""
    work()
    found = []
    for _ in range(repetitions):
        world.synchronize()
        started = time.perf_counter()
        work()
        world.synchronize()
        found.append(time.perf_counter() - started)
    return found


def ceilings(world: World) -> dict[str, float]:
    """Operations a second of a large product, and bytes a second (read and written) of a large copy."""
    size, numbers = (8192, 2**30) if world.device.type == "cuda" else (2048, 2**26)
    a, b = (torch.randn(size, size, device=world.device, dtype=world.dtype) for _ in range(2))
    product_seconds = min(seconds_of(lambda: a @ b, world, 10))

    source = torch.randn(numbers, device=world.device, dtype=world.dtype)
    target = torch.empty_like(source)
    copy_seconds = min(seconds_of(lambda: target.copy_(source), world, 10))
    copied_bytes = 2 * source.numel() * source.element_size()
    return {"product_rate": 2 * size**3 / product_seconds, "copy_rate": copied_bytes / copy_seconds}


def floors(
    params: Params, ranks: int, passes: int, looped: bool, dtype: torch.dtype, rates: dict[str, float]
) -> dict[str, float]:
    """Least seconds of a step on each of `ranks` ranks that these operations allow, by part.

    - Products: forward and backward are three for each weight.
    - Attention, causal over a whole window: two products forward and five backward, over half of the pairs.
    - Elementwise: each visit reads the residual stream, its input x0 and the outputs of attention and MLP
      once, and writes the new stream and the two normalised inputs; the backward pass moves twice as much.
      The hidden layer is written before and after its activation, and read and written once backward.
    - Optimizer: the gradient is read; weights, average and two states (Muon: one) are read and written.
    """
    model = params.model
    tokens = params.train.batch_tokens // ranks
    visits = sum(map(len, visit_plan(model, looped)))
    size = ACTIVATION_BYTES[dtype]

    # Weights in matrices, which Muon updates, and all others.
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Model(model).named_parameters()}
    matrices = [shape for name, shape in shapes.items() if is_matrix(name)]
    in_matrices = sum(shape.numel() for shape in matrices)
    others = sum(shape.numel() for shape in shapes.values()) - in_matrices

    # Parts that are bound by operations.
    pairs = tokens * (model.context + 1) / 2
    iteration = sum(newton_schulz_operations(*shape) for shape in matrices)
    operations = {
        "products": 6 * tokens * (visits * in_matrices / model.layers + model.vocab_size * model.width),
        "attention": visits * 7 * 2 * pairs * model.heads * model.head_dim,
        "newton_schulz": params.train.newton_schulz_steps / ranks * iteration,
    }

    # Parts that are bound by bytes.
    streams = 3 * visits * tokens * 7 * model.width * size
    hidden = visits * tokens * 4 * model.hidden * size
    moved = {
        "loss": tokens * model.vocab_size * size * 3,
        "elementwise": streams + hidden,
        "optimizer": 4 * (7 * in_matrices + 9 * others) / ranks,
        "data": tokens * 2 * 8,
        "gradients": passes * 4 * (in_matrices + others),
    }
    seconds = {part: count / rates["product_rate"] for part, count in operations.items()}
    return seconds | {part: count / rates["copy_rate"] for part, count in moved.items()}


def newton_schulz_operations(rows: int, columns: int) -> int:
    """Operations of one iteration on one matrix: A = XX^T, A^2, and their polynomial times X, with X wide."""
    short, long = min(rows, columns), max(rows, columns)
    return 2 * (2 * short * short * long + short**3)


def batch(params: Params, world: World) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step, (windows, context): random ids, some of which begin a document."""
    generator = torch.Generator().manual_seed(world.rank)
    shape = (2, params.train.batch_tokens // world.size // params.model.context, params.model.context)
    ids = torch.randint(params.model.vocab_size, shape, generator=generator)
    begins = torch.rand(shape, generator=generator) < 1 / MEAN_DOCUMENT
    inputs, targets = ids.masked_fill(begins, params.model.bos_id).to(world.device)
    return inputs, targets


def reading_seconds(params: Params, world: World) -> float:
    """Median seconds to read one batch from a shard of random tokens, as the loop's reading thread does."""
    local = params.train.batch_tokens // world.size // params.model.context
    generator = np.random.Generator(np.random.PCG64(0))
    tokens = generator.integers(0, params.model.vocab_size, 2**23, dtype=np.uint16)
    with tempfile.TemporaryDirectory() as folder:
        shards.write(Path(folder) / "train_000000.bin", tokens)
        windows = TrainingWindows(Path(folder), params.model.context, params.model.vocab_size, seed=0)
        return statistics.median(seconds_of(lambda: windows.batch(0, local), world, 5))


def kind_of(name: str) -> str:
    """The kind of a kernel or operator."""
    return next(kind for kind, words in KINDS if any(word in name.lower() for word in words))


def parts(step: Callable[[], object], world: World) -> tuple[dict[str, float], list[tuple[str, float, int]]]:
    """Seconds of one step by kind, and its kernels by cost, each with its seconds and number of calls."""
    on_gpu = world.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        step()
        world.synchronize()

    found: dict[str, float] = defaultdict(float)
    rows = []
    for event in profiler.key_averages():
        spent = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        if spent > 0:
            found[kind_of(event.key)] += spent
            rows.append((event.key[:100], spent, event.count))
    return dict(found), sorted(rows, key=lambda row: -row[1])


class Steps:
    """The training loop's step on one batch, compiled and recorded as training does it."""

    def __init__(self, params: Params, world: World) -> None:
        self.params = params
        self.world = world
        torch.compiler.reset()
        model = build_model(params.model, world)
        initialise_(model, 0)
        self.local = params.train.batch_tokens // world.size // params.model.context
        self.micro = micro_batch_size(self.local, params.train.micro_batch_tokens // params.model.context)
        self.loop = TrainingLoop(params, model, world, Checkpoints(None, 0, world), self.micro)

        started = time.perf_counter()
        if world.device.type == "cuda":
            self.loop.warm_up()
        self.reading_seconds = reading_seconds(params, world)
        self.compile_seconds = time.perf_counter() - started
        self.batch = batch(params, world)

    def measure(self, looped: bool, rates: dict[str, float], repetitions: int, show: int) -> dict[str, Any]:
        """One row of the results; prints the `show` costliest kernels."""
        now = step_schedule(1, 1.0 if looped else 0.0, replace(self.params.train, warmdown=0.0))
        world = self.world

        def step() -> None:
            self.loop.step(now, *self.batch)

        def series() -> None:
            for _ in range(repetitions):
                step()

        def updates() -> None:
            for _ in range(repetitions):
                self.loop.optimizer.step(now, 1)

        # Time whole series, then profile one step, then time the optimizer alone.
        seconds = [spent / repetitions for spent in seconds_of(series, world, SERIES)]
        median = statistics.median(seconds)
        by_kind, kernels = parts(step, world)
        optimizing = seconds_of(updates, world, 1)[0] / repetitions
        if world.device.type == "cuda":
            by_kind["host gaps"] = max(0.0, median - sum(by_kind.values()))
        for name, spent, count in kernels[:show]:
            print(f"    {1e3 * spent:9.3f} ms x{count:5d}  {name}", flush=True)

        bounds = floors(self.params, world.size, self.local // self.micro, looped, world.dtype, rates)
        products = bounds["products"] + bounds["attention"] + bounds["newton_schulz"]
        tokens = self.params.train.batch_tokens

        return {
            "batch_tokens": tokens,
            "micro_batch_tokens": self.micro * self.params.model.context,
            "looped": looped,
            "attention": self.params.model.attention,
            "kernels": world.kernels,
            "ranks": world.size,
            "seconds": median,
            "seconds_least_and_most": [min(seconds), max(seconds)],
            "tokens_per_second": tokens / median,
            "floor_seconds": sum(bounds.values()),
            "products_floor_share": products / median,
            "parts_seconds": by_kind,
            "optimizer_seconds": optimizing,  # its kernels are among the parts, too
            "floors_seconds": bounds,
            "compile_seconds": self.compile_seconds,
            "reading_seconds": self.reading_seconds,  # in a thread, while the step runs
            "peak_memory_bytes": torch.cuda.max_memory_reserved() if world.device.type == "cuda" else None,
        }


def table(rows: list[dict[str, Any]]) -> str:
    """The cases as columns, times in milliseconds."""
    kinds = sorted({kind for row in rows for kind in row["parts_seconds"]})
    bounds = sorted({kind for row in rows for kind in row["floors_seconds"]})
    shown: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("tokens a step", lambda row: f"{row['batch_tokens']:,}"),
        ("", lambda row: "looped" if row["looped"] else "unlooped"),
        ("attention over", lambda row: row["attention"]),
        ("tokens/s", lambda row: f"{row['tokens_per_second']:,.0f}"),
        ("floor of products", lambda row: f"{row['products_floor_share']:.3f}"),
        ("step", lambda row: f"{1e3 * row['seconds']:.2f}"),
        ("optimizer alone", lambda row: f"{1e3 * row['optimizer_seconds']:.2f}"),
        ("reading, in a thread", lambda row: f"{1e3 * row['reading_seconds']:.2f}"),
        ("sum of floors", lambda row: f"{1e3 * row['floor_seconds']:.2f}"),
    ]
    shown += [(kind, partial(_milliseconds, "parts_seconds", kind)) for kind in kinds]
    shown += [(f"floor: {kind}", partial(_milliseconds, "floors_seconds", kind)) for kind in bounds]
    return "\n".join(f"{label:<22}" + "".join(f"{value(row):>12}" for row in rows) for label, value in shown)


def _milliseconds(group: str, kind: str, row: dict[str, Any]) -> str:
    return f"{1e3 * row[group].get(kind, 0):.2f}"


def main() -> None:
    """Measure every case, print the table, write the JSON file."""
    parser = command_line(__doc__)
    parser.add_argument("--preset", default="smoke")
    parser.add_argument("--batch", type=int, nargs="+", help="tokens of a step; the preset's if absent")
    parser.add_argument("--attention", nargs="+", help="windows, documents or both; the preset's if absent")
    parser.add_argument("--phases", nargs="+", choices=("unlooped", "looped"), default=("unlooped", "looped"))
    parser.add_argument("--repetitions", type=int, default=5, help="steps of each of three series")
    parser.add_argument("--show", type=int, default=0, help="number of costliest kernels to print of a case")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--results", type=Path, required=True, help="the JSON file to write")
    arguments = parser.parse_args()

    params = train_params(arguments.preset, arguments.set)
    batches = arguments.batch or [params.train.batch_tokens]
    attentions = arguments.attention or [params.model.attention]
    with distributed(params.parallel, compiles=True) as world:
        show = arguments.show if world.is_main else 0
        rates = ceilings(world)
        rows = []

        for tokens, attention in itertools.product(batches, attentions):
            train = replace(params.train, batch_tokens=tokens)
            model = replace(params.model, attention=attention)
            steps = Steps(replace(params, train=train, model=model), world)
            for phase in arguments.phases:
                row = steps.measure(phase == "looped", rates, arguments.repetitions, show)
                rows.append(row)
                print(f"{tokens:,} {attention} {phase}: {row['tokens_per_second']:,.0f} tokens/s", flush=True)
            del steps  # the next case needs its memory

        if world.is_main:
            settings = {"preset": arguments.preset, "changes": arguments.set}
            result = settings | {"ceilings": rates, "cases": rows} | environment.run_environment(world.device)
            write_results(arguments.results, result)
            product = f"{rates['product_rate'] / 1e12:.3f} TFLOP/s"
            copy = f"{rates['copy_rate'] / 1e9:.1f} GB/s"
            print(f"large product {product}, large copy {copy}; milliseconds:")
            print(table(rows))


if __name__ == "__main__":
    main()
