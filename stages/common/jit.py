"""How functions are compiled: without the entrances, checks and counts of references that they do not need, which halves the time of it.

No integer here is divided by what may be zero. No array is made here: all are the caller's, who keeps them, so that nothing need be
counted when a slice is taken (a tenth of the coder's time, a fifth of the search's).
"""

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])
OUTER: Any = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True, "_nrt": False}
INNER: Any = OUTER | {"no_cpython_wrapper": True}


def outer(function: F) -> F:
    """A compiled function that the interpreter calls."""
    compiled: F = njit(**OUTER)(function)
    return compiled


def inner(function: F) -> F:
    """One that only compiled functions call."""
    compiled: F = njit(**INNER)(function)
    return compiled


def inlined(function: F) -> F:
    """One that becomes part of those that call it: where it is called often, for handing over arrays costs as much as it does."""
    compiled: F = njit(**INNER, inline="always")(function)
    return compiled
