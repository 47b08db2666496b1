"""A training step by part, against floors computed from operations and bytes.

    python -m benchmarks.train_step --preset sprint --results FILE [--batch TOKENS ...] [--attention KIND ...] [--set KEY=VALUE ...]

Runs the training loop's own step on random documents, unlooped and looped; under torchrun on several ranks. On a GPU the parts are the
step's kernels by kind, from the profiler, and `host gaps` is what remains of the measured time; on a CPU they are operators by kind.
Floors: operations of the products and of causal attention over the rate of a large product measured in the same run, bytes that must
move over the rate of a large copy. `floor of products` is the share of the measured time that the products alone would take so.
"""

import argparse
import json
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

from benchmarks._preset import train_params
from stages.common import environment, shards
from stages.common.parallel import World, world
from stages.train.checkpoint import Checkpoints
from stages.train.data import Windows, micro_batch_size
from stages.train.loop import _Loop
from stages.train.model import Model, initialise_, is_matrix, model_for, visit_plan
from stages.train.params import Params
from stages.train.schedule import settings

KINDS = (  # the first whose words are in a kernel's or operator's name
    ("attention", ("_attend", "_delta", "fmha", "flash", "cudnn", "scaled_dot_product")),
    ("heads", ("_split_forward", "_split_backward", "_exclude")),
    ("loss", ("_loss_", "log_softmax", "nll_loss")),
    ("communication", ("nccl", "c10d", "gloo")),
    (
        "products",
        (
            "nvjet",
            "gemm",
            "cublas",
            "splitk",
            "_up_forward",
            "_down_backward",
            "aten::mm",
            "aten::bmm",
            "baddbmm",
            "addmm",
        ),
    ),
    ("copies", ("memcpy", "memset")),
    ("elementwise", ("",)),
)
SERIES = 3  # of repetitions
MEAN_DOCUMENT = 750  # tokens: FineWeb's
ACTIVATION_BYTES = {torch.float32: 4, torch.bfloat16: 2}


def seconds_of(work: Callable[[], object], here: World, repetitions: int) -> list[float]:
    """Seconds of each repetition after one to warm up."""
    work()
    found = []
    for _ in range(repetitions):
        here.synchronize()
        started = time.perf_counter()
        work()
        here.synchronize()
        found.append(time.perf_counter() - started)
    return found


def ceilings(here: World) -> dict[str, float]:
    """Operations a second of a large product, and bytes a second (read and written) of a large copy."""
    size, numbers = (8192, 2**30) if here.device.type == "cuda" else (2048, 2**26)
    a, b = (torch.randn(size, size, device=here.device, dtype=here.dtype) for _ in range(2))
    source = torch.randn(numbers, device=here.device, dtype=here.dtype)
    target = torch.empty_like(source)
    return {
        "product_rate": 2 * size**3 / min(seconds_of(lambda: a @ b, here, 10)),
        "copy_rate": 2
        * source.numel()
        * source.element_size()
        / min(seconds_of(lambda: target.copy_(source), here, 10)),
    }


def floors(
    params: Params, ranks: int, passes: int, looped: bool, dtype: torch.dtype, rates: dict[str, float]
) -> dict[str, float]:
    """Seconds of a step on each of `ranks` that no implementation with these products goes below, by part.

    Forward and backward are three products for each weight; causal attention over a whole window has two products forward and five
    backward over half of the pairs. Elementwise: each visit reads the stream, its input x0, and the attention and MLP outputs once and
    writes the new stream and the two normalised inputs, and as much again twice backward; the hidden layer is written before and after its
    activation and read and written once backward. Optimizer: gradient read; weights, average and two states (Muon: one) read and written.
    """
    model, tokens = params.model, params.train.batch_tokens // ranks
    visits = sum(map(len, visit_plan(model, looped)))
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Model(model).named_parameters()}
    matrices = [shape for name, shape in shapes.items() if is_matrix(name)]
    in_matrices = sum(shape.numel() for shape in matrices)
    others = sum(shape.numel() for shape in shapes.values()) - in_matrices
    pairs = tokens * (model.context + 1) / 2
    size = ACTIVATION_BYTES[dtype]
    elementwise = 3 * visits * tokens * 7 * model.width * size + visits * tokens * 4 * model.hidden * size
    operations_of = {
        "products": 6 * tokens * (visits * in_matrices / model.layers + model.vocab_size * model.width),
        "attention": visits * 7 * 2 * pairs * model.heads * model.head_dim,
        "newton_schulz": params.train.newton_schulz_steps
        / ranks
        * sum(newton_schulz_operations(*shape) for shape in matrices),
    }
    bytes_of = {
        "loss": tokens * model.vocab_size * size * 3,
        "elementwise": elementwise,
        "optimizer": 4 * (7 * in_matrices + 9 * others) / ranks,
        "data": tokens * 2 * 8,
        "gradients": passes * 4 * (in_matrices + others),
    }
    return {part: count / rates["product_rate"] for part, count in operations_of.items()} | {
        part: count / rates["copy_rate"] for part, count in bytes_of.items()
    }


def newton_schulz_operations(rows: int, columns: int) -> int:
    """Of one iteration on one matrix: A = XX^T, A^2, and their polynomial times X, with X wide."""
    short, long = min(rows, columns), max(rows, columns)
    return 2 * (2 * short * short * long + short**3)


def batch(params: Params, here: World) -> tuple[Tensor, Tensor]:
    """A step's inputs and targets: random ids, a document's first now and then."""
    generator = torch.Generator().manual_seed(here.rank)
    shape = (2, params.train.batch_tokens // here.size // params.model.context, params.model.context)
    ids = torch.randint(params.model.vocab_size, shape, generator=generator)
    begins = torch.rand(shape, generator=generator) < 1 / MEAN_DOCUMENT
    inputs, targets = ids.masked_fill(begins, params.model.bos_id).to(here.device)
    return inputs, targets


def reading_seconds(params: Params, here: World) -> float:
    """Of one batch, as the loop has it read by a thread, from a shard of random tokens."""
    local = params.train.batch_tokens // here.size // params.model.context
    generator = np.random.Generator(np.random.PCG64(0))
    with tempfile.TemporaryDirectory() as folder:
        shards.write(
            Path(folder) / "train_000000.bin",
            generator.integers(0, params.model.vocab_size, 2**23, dtype=np.uint16),
        )
        windows = Windows(Path(folder), params.model.context, params.model.vocab_size, seed=0)
        return statistics.median(seconds_of(lambda: windows.batch(0, local), here, 5))


def kind_of(name: str) -> str:
    return next(kind for kind, words in KINDS if any(word in name.lower() for word in words))


def parts(step: Callable[[], object], here: World) -> tuple[dict[str, float], list[tuple[str, float, int]]]:
    """Seconds by kind of one step, and its costliest kernels with seconds and calls."""
    on_gpu = here.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        step()
        here.synchronize()
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

    def __init__(self, params: Params, here: World) -> None:
        self.params, self.here = params, here
        torch.compiler.reset()
        model = model_for(params.model, here)
        initialise_(model, 0)
        self.local = params.train.batch_tokens // here.size // params.model.context
        self.micro = micro_batch_size(self.local, params.train.micro_batch_tokens // params.model.context)
        self.loop = _Loop(params, model, here, Checkpoints(None, 0, here), self.micro)
        started = time.perf_counter()
        if here.device.type == "cuda":
            self.loop.warm_up()
        self.reading_seconds = reading_seconds(params, here)
        self.compile_seconds = time.perf_counter() - started
        self.batch = batch(params, here)

    def measure(self, looped: bool, rates: dict[str, float], repetitions: int, show: int) -> dict[str, Any]:
        """One row of the table."""
        now = settings(1, 1.0 if looped else 0.0, replace(self.params.train, warmdown=0.0))
        here = self.here

        def step() -> None:
            self.loop.step(now, *self.batch)

        def series() -> None:
            for _ in range(repetitions):
                step()

        def updates() -> None:
            for _ in range(repetitions):
                self.loop.optimizers.step(now, 1)

        seconds = seconds_of(series, here, SERIES)  # the device is waited for once a series
        median = statistics.median(seconds) / repetitions
        by_kind, kernels = parts(step, here)
        optimizing = seconds_of(updates, here, 1)[0] / repetitions
        if here.device.type == "cuda":
            by_kind["host gaps"] = max(0.0, median - sum(by_kind.values()))
        tokens = self.params.train.batch_tokens
        bounds = floors(self.params, here.size, self.local // self.micro, looped, here.dtype, rates)
        for name, spent, count in kernels[:show]:
            print(f"    {1e3 * spent:9.3f} ms x{count:5d}  {name}", flush=True)
        return {
            "batch_tokens": tokens,
            "micro_batch_tokens": self.micro * self.params.model.context,
            "looped": looped,
            "attention": self.params.model.attention,
            "kernels": here.kernels,
            "ranks": here.size,
            "seconds": median,
            "seconds_least_and_most": [min(seconds) / repetitions, max(seconds) / repetitions],
            "tokens_per_second": tokens / median,
            "floor_seconds": sum(bounds.values()),
            "products_floor_share": (bounds["products"] + bounds["attention"] + bounds["newton_schulz"])
            / median,
            "parts_seconds": by_kind,
            "optimizer_seconds": optimizing,  # its kernels are among the parts
            "floors_seconds": bounds,
            "compile_seconds": self.compile_seconds,
            "reading_seconds": self.reading_seconds,  # in a thread of its own, beside the step
            "peak_memory_bytes": torch.cuda.max_memory_reserved() if here.device.type == "cuda" else None,
        }


def table(rows: list[dict[str, Any]]) -> str:
    """The cases side by side, milliseconds."""
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
        ("reading, beside it", lambda row: f"{1e3 * row['reading_seconds']:.2f}"),
        ("sum of floors", lambda row: f"{1e3 * row['floor_seconds']:.2f}"),
    ]
    shown += [(kind, partial(_milliseconds, "parts_seconds", kind)) for kind in kinds]
    shown += [(f"floor: {kind}", partial(_milliseconds, "floors_seconds", kind)) for kind in bounds]
    return "\n".join(f"{label:<22}" + "".join(f"{value(row):>12}" for row in rows) for label, value in shown)


def _milliseconds(group: str, kind: str, row: dict[str, Any]) -> str:
    return f"{1e3 * row[group].get(kind, 0):.2f}"


def main() -> None:
    """Measure every case, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="smoke")
    parser.add_argument("--batch", type=int, nargs="+", help="tokens of a step; the preset's if absent")
    parser.add_argument("--attention", nargs="+", help="windows, documents or both; the preset's if absent")
    parser.add_argument("--phases", nargs="+", choices=("unlooped", "looped"), default=("unlooped", "looped"))
    parser.add_argument("--repetitions", type=int, default=5, help="steps of each of three series")
    parser.add_argument(
        "--show", type=int, default=0, help="print that many of each case's costliest kernels"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--results", type=Path, required=True, help="the JSON file to write")
    arguments = parser.parse_args()
    params = train_params(arguments.preset, arguments.set)
    with world(params.parallel, compiles=True) as here:
        rates = ceilings(here)
        rows = []
        for tokens in arguments.batch or [params.train.batch_tokens]:
            for attention in arguments.attention or [params.model.attention]:
                train = replace(params.train, batch_tokens=tokens)
                steps = Steps(
                    replace(params, train=train, model=replace(params.model, attention=attention)), here
                )
                show = arguments.show if here.is_main else 0
                for phase in arguments.phases:
                    rows.append(steps.measure(phase == "looped", rates, arguments.repetitions, show))
                    print(
                        f"{tokens:,} {attention} {phase}: {rows[-1]['tokens_per_second']:,.0f} tokens/s",
                        flush=True,
                    )
                del steps
        if here.is_main:
            result = {
                "preset": arguments.preset,
                "changes": arguments.set,
                "ceilings": rates,
                "cases": rows,
            } | environment.facts(here.device)
            arguments.results.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
            print(
                f"large product {rates['product_rate'] / 1e12:.3f} TFLOP/s, large copy {rates['copy_rate'] / 1e9:.1f} GB/s; milliseconds:"
            )
            print(table(rows))


if __name__ == "__main__":
    main()
