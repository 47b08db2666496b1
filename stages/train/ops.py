"""Choice of the implementation of the model's operations, and torch.compile.

`REFERENCE_OPS` (reference.py) runs everywhere. `FUSED_OPS` (kernels/) are Triton kernels for CUDA
in bfloat16. A model gets one of the two when it is made.
"""

from collections.abc import Callable
from typing import Any

import torch

from stages.common.parallel import World
from stages.train.params import ModelParams
from stages.train.reference import REFERENCE_OPS, Ops

# kernels/cross_entropy.py sums exponentials of at least e^(-2 softcap) without a running maximum:
# e^(-80) is above the smallest normal float32.
MAX_FUSED_SOFTCAP = 40.0


def select_ops(kernels: bool, model: ModelParams) -> Ops:
    """The fused or the reference operations; a ValueError if the kernels cannot take the model's shapes."""
    if not kernels:
        return REFERENCE_OPS

    alternative = "parallel.kernels: false runs it with the reference operations"
    if model.head_dim < 16 or model.head_dim & (model.head_dim - 1):
        raise ValueError(
            "model.heads: the fused kernels need a head dimension of 16, 32, 64 ...,"
            f" this is {model.head_dim}; {alternative}"
        )
    if model.hidden % 8:
        raise ValueError(
            f"model.hidden: the fused kernels need a multiple of 8, this is {model.hidden}; {alternative}"
        )
    if model.logit_softcap > MAX_FUSED_SOFTCAP:
        raise ValueError(
            f"model.logit_softcap: the fused loss needs {MAX_FUSED_SOFTCAP} at most,"
            f" this is {model.logit_softcap}; {alternative}"
        )
    from stages.train.kernels import FUSED_OPS  # here, because Triton is installed for GPUs only

    return FUSED_OPS


def attention_backend(world: World) -> str:
    """The implementation of attention that a model runs, for timing.json."""
    if world.kernels:
        return "stages/train/kernels/attention.py (Triton)"
    if world.device.type == "cpu":
        return "stages/train/cpu_attention.py"
    return "torch.nn.functional.scaled_dot_product_attention"


def maybe_compile(function: Callable[..., Any], world: World) -> Callable[..., Any]:
    """`function`, compiled as one graph for fixed shapes if the world compiles."""
    if not world.compile:
        return function
    if world.kernels:
        from stages.train.kernels.compiler import register_fallbacks

        register_fallbacks()
    return torch.compile(function, dynamic=False, fullgraph=True)


def compiled_graph_count(world: World) -> int:
    """The number of graphs that torch.compile has made in this process so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"]) if world.compile else 0
