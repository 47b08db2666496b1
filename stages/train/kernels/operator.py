"""Functions as operators of torch's dispatcher: what its compiler takes as they are, and runs that are not compiled just call.

`torch.library.custom_op` makes the same operators, but imports the compiler when one is first called, which takes every process that
evaluates or calibrates several seconds, and looks for aliases among the outputs at every call.
"""

from collections.abc import Callable
from typing import Any

import torch


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Make a function of tensors, none of which it changes, the operator caddie::`name` on every device; its annotations are the schema."""

    def register(function: Callable[..., Any]) -> Any:
        qualified = f"caddie::{name}"
        torch.library.define(
            qualified,
            torch.library.infer_schema(function, mutates_args=()),
            tags=(torch.Tag.pt2_compliant_tag,),
        )
        torch.library.impl(qualified, "default", function)
        return getattr(torch.ops.caddie, name).default

    return register
