"""The operations that have a fused form: one set of signatures, two implementations.

`PLAIN` runs everywhere and is what tests compare with; the fused ones are Triton's, for CUDA and bfloat16. A model is given either when it
is made.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.common.parallel import World
from stages.train import reference
from stages.train.params import ModelParams
from stages.train.reference import Documents, Term


class Operations(NamedTuple):
    """The functions of reference.py by name; `mlp` is None where there is nothing to gain over the modules' own products."""

    combine: Callable[[Sequence[Term]], Tensor]
    combine_norm: Callable[[Sequence[Term], float], tuple[Tensor, Tensor]]
    split_heads: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, int], tuple[Tensor, Tensor, Tensor]]
    attend: Callable[[Tensor, Tensor, Tensor, Documents | None], Tensor]
    mlp: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    cross_entropy: Callable[[Tensor, Tensor, float], Tensor]


LARGEST_SOFTCAP = 40.0  # e^(-80) is above the smallest normal float32 (kernels/cross_entropy.py sums without a running maximum)
PLAIN = Operations(
    reference.combine,
    reference.combine_norm,
    reference.split_heads,
    reference.attend,
    None,
    reference.softcapped_cross_entropy,
)


def operations(kernels: bool, model: ModelParams) -> Operations:
    """The fused operations, or the plain ones; a ValueError where the fused ones cannot take the model's shapes."""
    if not kernels:
        return PLAIN
    instead = "; parallel.kernels: false runs it with plain operations"
    if model.head_dim < 16 or model.head_dim & (model.head_dim - 1):
        raise ValueError(
            f"model.heads: the fused kernels need a head dimension of 16, 32, 64 ..., this is {model.head_dim}{instead}"
        )
    if model.hidden % 8:
        raise ValueError(
            f"model.hidden: the fused kernels need a multiple of 8, this is {model.hidden}{instead}"
        )
    if model.logit_softcap > LARGEST_SOFTCAP:
        raise ValueError(
            f"model.logit_softcap: the fused loss needs {LARGEST_SOFTCAP} at most, this is {model.logit_softcap}{instead}"
        )
    from stages.train.kernels import FUSED  # Triton is not installed where there is no GPU

    return FUSED


def attention_backend(world: World) -> str:
    """Whose attention a model runs."""
    if world.kernels:
        return "stages/train/kernels/attention.py (Triton)"
    return (
        "stages/train/cpu_attention.py"
        if world.device.type == "cpu"
        else "torch.nn.functional.scaled_dot_product_attention"
    )


def compiled(work: Callable[..., Any], world: World) -> Callable[..., Any]:
    """`work`, compiled as a whole for fixed shapes where the world compiles."""
    if not world.compile:
        return work
    if world.kernels:
        from stages.train.kernels.compiler import declare_operators

        declare_operators()
    return torch.compile(work, dynamic=False, fullgraph=True)


def graphs_compiled(world: World) -> int:
    """How many graphs torch.compile has made in this process so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"]) if world.compile else 0
