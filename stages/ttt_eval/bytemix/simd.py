"""What compiled loops need and numba has no words for: functions without overhead, sums of a dozen floats at once, and asking the memory.

An array of inputs, or of weights, is flat, one row of WIDTH behind the other; `at` is where a row begins.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])

WIDTH = 12  # of a row: a vector of 8 and one of 4
FLOAT, NUMBER = ir.FloatType(), ir.IntType(32)
ROW = ir.VectorType(FLOAT, WIDTH)
FAST = ("fast",)


def inlined(fastmath: bool = False) -> Callable[[F], F]:
    """Compile a function into its callers, without counts of references, which took a seventh of the time: it makes no arrays."""
    options: dict[str, Any] = {
        "nogil": True,
        "fastmath": fastmath,
        "forceinline": True,
        "_nrt": False,
        "error_model": "numpy",
    }
    made: Callable[[F], F] = njit(**options)
    return made


def _pointer(context: Any, builder: Any, kind: Any, array: Any, at: Any, to: Any) -> Any:
    return builder.bitcast(
        builder.gep(context.make_array(kind)(context, builder, array).data, [at]), to.as_pointer()
    )


def _prefetch(typing_context: Any, array: Any, at: Any) -> Any:
    """Ask the memory for what an array holds at an index, and go on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _pointer(context, builder, signature.args[0], arguments[0], arguments[1], ir.IntType(8))
        kind = ir.FunctionType(ir.VoidType(), [place.type, NUMBER, NUMBER, NUMBER])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")  # type: ignore[no-untyped-call]
        builder.call(function, [place, NUMBER(1), NUMBER(3), NUMBER(1)])  # to be written, to stay, data
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


def _dot(typing_context: Any, weights: Any, first: Any, second: Any, inputs: Any, at: Any) -> Any:
    """The sum of a row of inputs times the sum of two rows of weights."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds, (weights, first, second, inputs, at) = signature.args, arguments
        rows = [(kinds[0], weights, first), (kinds[0], weights, second), (kinds[3], inputs, at)]
        one, other, x = (builder.load(_pointer(context, builder, *row, ROW), align=4) for row in rows)
        products = builder.fmul(builder.fadd(one, other, flags=FAST), x, flags=FAST)
        kind, name = ir.FunctionType(FLOAT, [FLOAT, ROW]), f"llvm.vector.reduce.fadd.v{WIDTH}f32"
        function = cgutils.get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]
        return builder.call(function, [FLOAT(0.0), products], fastmath=FAST)

    return types.float32(weights, types.int64, types.int64, inputs, types.int64), generate


def _step(typing_context: Any, weights: Any, first: Any, inputs: Any, at: Any, size: Any) -> Any:
    """Add a row of inputs, times a size, to a row of weights, and one to its last place."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds, (weights, first, inputs, at, size) = signature.args, arguments
        place = _pointer(context, builder, kinds[0], weights, first, ROW)
        x = builder.load(_pointer(context, builder, kinds[2], inputs, at, ROW), align=4)
        nothing, everywhere = (
            ir.Constant(ROW, ir.Undefined),
            ir.Constant(ir.VectorType(NUMBER, WIDTH), [0] * WIDTH),
        )
        sizes = builder.shuffle_vector(builder.insert_element(nothing, size, NUMBER(0)), nothing, everywhere)
        counted = builder.fadd(
            builder.load(place, align=4), ir.Constant(ROW, [0.0] * (WIDTH - 1) + [1.0]), flags=FAST
        )
        builder.store(builder.fadd(counted, builder.fmul(x, sizes, flags=FAST), flags=FAST), place, align=4)
        return context.get_dummy_value()

    return types.void(weights, types.int64, inputs, types.int64, types.float32), generate


prefetch: Any = intrinsic(_prefetch)
dot: Any = intrinsic(_dot)
step: Any = intrinsic(_step)
