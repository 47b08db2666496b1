"""The model's operations as kernels for NVIDIA GPUs, each the twin of a function in stages/train/plain.py."""

import functools

import torch
from torch import Tensor

from stages.train.kernels import documents, windows
from stages.train.kernels.cross_entropy import softcapped_cross_entropy
from stages.train.kernels.heads import exclude_own_value, split_heads
from stages.train.kernels.mlp import squared_leaky_mlp
from stages.train.kernels.stream import combine, combine_norm
from stages.train.operations import Operations
from stages.train.plain import Documents, whole_windows


def attend(q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, within: Documents | None) -> Tensor:
    """The fused twin of `plain.attend`."""
    if within is None and not torch.are_deterministic_algorithms_enabled():
        return exclude_own_value(windows.attend(q_BTHC, k_BTKC, v_BTKC), v_BTKC)
    if within is None:  # cuDNN's backward pass adds in any order
        within = whole_windows(q_BTHC.shape[0], q_BTHC.shape[1], q_BTHC.device)
    return documents.attend(q_BTHC, k_BTKC, v_BTKC, *within)


FUSED = Operations(combine, combine_norm, split_heads, attend, squared_leaky_mlp, softcapped_cross_entropy)


@functools.cache
def declare_to_compiler() -> None:
    """Tell torch's compiler that these operators are called as they are, with the strides that they were traced with.

    It finds out by itself too, but torch 2.11 then formats the operator's arguments for a log line, each with the arguments that it came
    from: exponential work in a model whose every layer is such operators.
    """
    from torch._inductor.lowering import constrain_to_fake_tensors, lowerings, make_fallback  # takes seconds to import

    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("caddie::"):
            operator = getattr(torch.ops.caddie, name.removeprefix("caddie::")).default
            if operator not in lowerings:
                make_fallback(operator, layout_constraint=constrain_to_fake_tensors, warn=False)
