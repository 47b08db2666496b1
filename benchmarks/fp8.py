"""What FP8 products could give at the model's own shapes: bfloat16 against float8 with a scale for each tensor, casts included and not.

    python -m benchmarks.fp8 --results FILE [--tokens 98304]

For each of a block's products, and the head's: seconds of the forward product, of the gradient of its input, and of that of its weight, as
bfloat16 and as float8 (e4m3 values and weights, e5m2 gradients); and seconds of the casts that float8 needs, reading bfloat16 and writing
float8 as it is and transposed (the gradient of a weight sums over tokens, and Hopper's FP8 products want the summed dimension contiguous
in both factors). Casts are compiled, with scales known beforehand (delayed scaling), so they are bound by memory. Needs a GPU with FP8.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from stages.common import environment

SHAPES = {
    "query, key, value": (512, 1024),
    "output": (512, 512),
    "up": (512, 2048),
    "down": (2048, 512),
    "head": (512, 8192),
}
REPETITIONS = 20
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def seconds(work: Callable[[], object]) -> float:
    """Of one call, the mean over repetitions on the device."""
    for _ in range(3):
        work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPETITIONS):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / REPETITIONS


def product8(a_MK: Tensor, b_NK: Tensor, one: Tensor) -> Tensor:
    """a b^T of float8 factors whose summed dimension is contiguous, as bfloat16."""
    return torch._scaled_mm(
        a_MK, b_NK.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


@torch.compile(dynamic=False)
def cast(x_MK: Tensor, scale: Tensor, kind: torch.dtype) -> Tensor:
    return (x_MK * scale).to(kind)


@torch.compile(dynamic=False)
def cast_transposed(x_MK: Tensor, scale: Tensor, kind: torch.dtype) -> Tensor:
    return (x_MK.t().contiguous() * scale).to(kind)


def measure(tokens: int, inputs: int, outputs: int) -> dict[str, float]:
    """Seconds of one layer of `inputs` to `outputs` over `tokens` rows."""
    torch.compiler.reset()  # it keeps only so many shapes of one function
    x, w, g = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    )
    one = torch.ones((), device="cuda")
    x8, w8, g8 = cast(x, one, E4M3), cast(w, one, E4M3), cast(g, one, E5M2)
    xt8, wt8, gt8 = (
        cast_transposed(x, one, E4M3),
        cast_transposed(w, one, E4M3),
        cast_transposed(g, one, E5M2),
    )
    return {
        "forward, bfloat16": seconds(lambda: x @ w.t()),
        "input's gradient, bfloat16": seconds(lambda: g @ w),
        "weight's gradient, bfloat16": seconds(lambda: g.t() @ x),
        "forward, float8": seconds(lambda: product8(x8, w8, one)),
        "input's gradient, float8": seconds(lambda: product8(g8, wt8, one)),
        "weight's gradient, float8": seconds(lambda: product8(gt8, xt8, one)),
        "cast of the input": seconds(lambda: cast(x, one, E4M3)),
        "cast of the input, transposed": seconds(lambda: cast_transposed(x, one, E4M3)),
        "cast of the gradient": seconds(lambda: cast(g, one, E5M2)),
        "cast of the gradient, transposed": seconds(lambda: cast_transposed(g, one, E5M2)),
    }


def main() -> None:
    """One line for each product, and the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=98304)
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()
    rows = {}
    for name, (inputs, outputs) in SHAPES.items():
        rows[name] = measure(arguments.tokens, inputs, outputs)
        print(name, {key: f"{1e3 * value:.3f} ms" for key, value in rows[name].items()}, flush=True)
    result = {"tokens": arguments.tokens, "products": rows} | environment.facts(torch.device("cuda"))
    arguments.results.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
