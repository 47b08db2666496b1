"""Primitives of the byte mixer's compiled loops: a 12-wide dot product and update, and prefetch.

numba offers neither, so they are written in LLVM's intermediate representation. A row is WIDTH
consecutive float32 of a C-contiguous two-dimensional array: the inputs of one decision, or one set
of weights.

Shapes: D decisions, S sets of weights, I = WIDTH inputs.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

WIDTH = 12  # float32 in a row: a vector register of 8 and one of 4
FLOAT32 = ir.FloatType()
INT32 = ir.IntType(32)
INT64 = ir.IntType(64)
ROW = ir.VectorType(FLOAT32, WIDTH)
FAST = ("fast",)  # LLVM may reorder the sum


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, pointee: Any) -> Any:
    """A pointer to element `index` of the array's data, as a pointer to `pointee`."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), pointee.as_pointer())


def _row_pointer(context: Any, builder: Any, array_type: Any, array: Any, row: Any) -> Any:
    return _pointer(context, builder, array_type, array, builder.mul(row, INT64(WIDTH)), ROW)


def _prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Start loading the cache line of a one-dimensional array's element, without waiting for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _pointer(context, builder, signature.args[0], arguments[0], arguments[1], ir.IntType(8))
        function_type = ir.FunctionType(ir.VoidType(), [address.type, INT32, INT32, INT32])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")  # type: ignore[no-untyped-call]
        # Operands: for writing, kept in all cache levels, data cache.
        builder.call(function, [address, INT32(1), INT32(3), INT32(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


def _dot(typing_context: Any, a_SI: Any, a: Any, b_SI: Any, b: Any, inputs_DI: Any, i: Any) -> Any:
    """Return (a_SI[a] + b_SI[b]) @ inputs_DI[i], float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_types = signature.args[0::2]
        rows = zip(array_types, arguments[0::2], arguments[1::2], strict=True)
        pointers = [_row_pointer(context, builder, *row) for row in rows]
        a_I, b_I, x_I = (builder.load(pointer, align=4) for pointer in pointers)
        products_I = builder.fmul(builder.fadd(a_I, b_I, flags=FAST), x_I, flags=FAST)
        function_type = ir.FunctionType(FLOAT32, [FLOAT32, ROW])
        name = f"llvm.vector.reduce.fadd.v{WIDTH}f32"
        function = cgutils.get_or_insert_function(builder.module, function_type, name)  # type: ignore[no-untyped-call]
        return builder.call(function, [FLOAT32(0.0), products_I], fastmath=FAST)

    return types.float32(a_SI, types.int64, b_SI, types.int64, inputs_DI, types.int64), generate


def _add_scaled(typing_context: Any, weights_SI: Any, s: Any, inputs_DI: Any, i: Any, factor: Any) -> Any:
    """Add factor * inputs_DI[i] to weights_SI[s], and 1 to its last column, the count of updates."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, row, inputs, inputs_row, factor = arguments
        address = _row_pointer(context, builder, signature.args[0], weights, row)
        x_I = builder.load(_row_pointer(context, builder, signature.args[2], inputs, inputs_row), align=4)

        # Broadcast the factor to a vector.
        undefined_I = ir.Constant(ROW, ir.Undefined)
        lane_zero_I = ir.Constant(ir.VectorType(INT32, WIDTH), [0] * WIDTH)
        first_lane_I = builder.insert_element(undefined_I, factor, INT32(0))
        factors_I = builder.shuffle_vector(first_lane_I, undefined_I, lane_zero_I)

        one_update_I = ir.Constant(ROW, [0.0] * (WIDTH - 1) + [1.0])
        counted_I = builder.fadd(builder.load(address, align=4), one_update_I, flags=FAST)
        scaled_I = builder.fmul(x_I, factors_I, flags=FAST)
        builder.store(builder.fadd(counted_I, scaled_I, flags=FAST), address, align=4)
        return context.get_dummy_value()

    return types.void(weights_SI, types.int64, inputs_DI, types.int64, types.float32), generate


prefetch: Any = intrinsic(_prefetch)
dot: Any = intrinsic(_dot)
add_scaled: Any = intrinsic(_add_scaled)
