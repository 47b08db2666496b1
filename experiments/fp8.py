"""Speed of FP8 products at the model's own shapes, compared with bfloat16, with and without casts.

    python -m experiments.fp8 --results FILE [--tokens 98304]

For each product of a block, and for the head's: seconds of the forward product, of the gradient of its
input and of the gradient of its weight, in bfloat16 and in float8 with a scale for each tensor (e4m3 for
values and weights, e5m2 for gradients).

Casts are timed apart. They read bfloat16 and write float8, as it is and transposed: the gradient of a
weight sums over tokens, and Hopper's FP8 products need the summed dimension contiguous in both factors.
They are compiled, with scales known before (delayed scaling), so that memory bounds them. Needs a GPU
with FP8.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._command import command_line, write_results
from stages.common import environment

SHAPES = {
    "query, key, value": (512, 1024),
    "output": (512, 512),
    "up": (512, 2048),
    "down": (2048, 512),
    "head": (512, 8192),
}
REPETITIONS = 20  # calls that are timed together
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def seconds(work: Callable[[], object]) -> float:
    """Mean seconds of a call on the device."""
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
    """Scale a bfloat16 tensor, (M, K), and round it to a float8 type."""
    return (x_MK * scale).to(kind)


@torch.compile(dynamic=False)
def cast_transposed(x_MK: Tensor, scale: Tensor, kind: torch.dtype) -> Tensor:
    """The same, transposed to (K, M)."""
    return (x_MK.t().contiguous() * scale).to(kind)


def measure(tokens: int, inputs: int, outputs: int) -> dict[str, float]:
    """Seconds of one layer of `inputs` to `outputs` features over `tokens` rows."""
    torch.compiler.reset()  # it bounds the number of shapes that it keeps of one function
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
    g = torch.randn(tokens, outputs, device="cuda", dtype=torch.bfloat16)

    # Factors of the float8 products: t is for transposed.
    one = torch.ones((), device="cuda")
    x8, xt8 = cast(x, one, E4M3), cast_transposed(x, one, E4M3)
    w8, wt8 = cast(w, one, E4M3), cast_transposed(w, one, E4M3)
    g8, gt8 = cast(g, one, E5M2), cast_transposed(g, one, E5M2)

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
    """Print one line for each product, and write the JSON file."""
    parser = command_line(__doc__)
    parser.add_argument("--tokens", type=int, default=98304)
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()

    rows = {}
    for name, (inputs, outputs) in SHAPES.items():
        rows[name] = measure(arguments.tokens, inputs, outputs)
        print(name, {key: f"{1e3 * value:.3f} ms" for key, value in rows[name].items()}, flush=True)
    result = {"tokens": arguments.tokens, "products": rows}
    write_results(arguments.results, result | environment.run_environment(torch.device("cuda")))


if __name__ == "__main__":
    main()
