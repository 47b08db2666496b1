"""Decorators for functions that numba compiles: the project's one convention.

    @jit_entry                        called by the interpreter
    @jit_internal                     called only by compiled functions
    @jit_inline                       the same, compiled into every caller
    @jit_entry(makes_arrays=True)     for a function that makes arrays itself
    @jit_inline(fastmath=True)        where sums of floats may be reordered

All release the interpreter's lock. What they leave out halves the time of compilation: wrappers
that nobody calls, checks for division by zero (no integer here is divided by what may be zero), and
reference counts. Reference counts are needed only where arrays are made. Elsewhere all arrays
belong to the caller, who keeps them, so taking a slice need not count anything; that is a tenth of
the coder's time and a fifth of the trellis search's.
"""

from collections.abc import Callable
from typing import Any, TypeVar, overload

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
_NO_ARRAYS: dict[str, Any] = _OPTIONS | {"_nrt": False}
_INTERNAL: dict[str, Any] = _NO_ARRAYS | {"no_cpython_wrapper": True}


@overload
def jit_entry(function: F) -> F: ...
@overload
def jit_entry(*, makes_arrays: bool) -> Callable[[F], F]: ...
def jit_entry(function: Any = None, *, makes_arrays: bool = False) -> Any:
    """Compile a function that the interpreter calls."""
    decorator = njit(**(_OPTIONS if makes_arrays else _NO_ARRAYS))
    return decorator if function is None else decorator(function)


def jit_internal(function: F) -> F:
    """Compile a function that only compiled functions call."""
    compiled: F = njit(**_INTERNAL)(function)
    return compiled


@overload
def jit_inline(function: F) -> F: ...
@overload
def jit_inline(*, fastmath: bool) -> Callable[[F], F]: ...
def jit_inline(function: Any = None, *, fastmath: bool = False) -> Any:
    """Compile a function into its callers.

    For one that is called so often that passing its arrays costs as much as its work.
    """
    decorator = njit(**_INTERNAL, forceinline=True, fastmath=fastmath)
    return decorator if function is None else decorator(function)
