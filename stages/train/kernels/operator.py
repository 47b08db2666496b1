"""Registration of functions as operators of torch's dispatcher.

torch.compile takes such an operator as a black box; without torch.compile it is an ordinary call.
`torch.library.custom_op` makes the same operators, but it imports the compiler when one is first
called, which takes every process that evaluates or calibrates several seconds, and it looks for
aliases among the outputs at every call.
"""

from collections.abc import Callable
from typing import Any

import torch


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: register a function of tensors as the operator caddie::`name` on every device.

    The function must not change its arguments; its annotations are the schema.
    """

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
