"""How functions are compiled: without the entrances and checks that they do not need, which takes a third off the time of compiling.

No integer here is divided by what may be zero.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])
OUTER: Any = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
INNER: Any = OUTER | {"no_cpython_wrapper": True}


def outer(function: F) -> F:
    """A compiled function that the interpreter calls."""
    compiled: F = njit(**OUTER)(function)
    return compiled


def inner(function: F) -> F:
    """One that only compiled functions call."""
    compiled: F = njit(**INNER)(function)
    return compiled
