"""The operations that have a fused form: one set of signatures, two implementations.

`PLAIN` runs everywhere and is what tests compare with. `fused()` is for CUDA and bfloat16: it needs Triton, and cuDNN for attention over
whole windows. A model is given one of them when it is made.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.parallel import World
from stages.train import plain
from stages.train.plain import Documents, Term


class Operations(NamedTuple):
    """The functions of plain.py by name; `mlp` is None where there is nothing to gain over the modules' own products."""

    combine: Callable[[Sequence[Term]], Tensor]
    combine_norm: Callable[[Sequence[Term], float], tuple[Tensor, Tensor]]
    split_heads: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, int], tuple[Tensor, Tensor, Tensor]]
    attend: Callable[[Tensor, Tensor, Tensor, Documents | None], Tensor]
    mlp: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    cross_entropy: Callable[[Tensor, Tensor, float], Tensor]


PLAIN = Operations(plain.combine, plain.combine_norm, plain.split_heads, plain.attend, None, plain.softcapped_cross_entropy)


def operations(kernels: bool) -> Operations:
    """The fused operations, or the plain ones."""
    if not kernels:
        return PLAIN
    from stages.train.kernels import FUSED  # Triton is not installed where there is no GPU

    return FUSED


def compiled(work: Callable[..., Any], world: World) -> Callable[..., Any]:
    """`work`, compiled as a whole for fixed shapes where the world compiles."""
    if not world.compile:
        return work
    if world.kernels:
        from stages.train.kernels import declare_to_compiler

        declare_to_compiler()
    return torch.compile(work, dynamic=False, fullgraph=True)
