"""Registration of the kernels with torch's compiler (Inductor).

A module of its own, because importing the compiler takes seconds.
"""

import functools

import torch
from torch._inductor.lowering import constrain_to_fake_tensors, lowerings, make_fallback

import stages.train.kernels  # registers the operators  # noqa: F401


@functools.cache
def register_fallbacks() -> None:
    """Let Inductor call our operators as they are, with the strides that they were traced with.

    Inductor finds that out by itself too, but in torch 2.11 it then formats the operator's
    arguments for a log line, each with the arguments that it came from: exponential work in a model
    whose layers are made of such operators.
    """
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("caddie::"):
            operator = getattr(torch.ops.caddie, name.removeprefix("caddie::")).default
            if operator not in lowerings:
                make_fallback(operator, layout_constraint=constrain_to_fake_tensors, warn=False)
