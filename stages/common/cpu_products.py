"""Matrix products on the CPU: OpenBLAS's kernels, run by torch's own OpenMP threads.

numpy's wheel brings an OpenBLAS whose kernels and block sizes depend on OPENBLAS_CORETYPE alone
(instruction_set.py), not on the vendor of the CPU or the size of its caches, so that its products
have the same bits everywhere. MKL, which torch calls, does not promise that on AMD.

A product is divided into jobs, one or more for each thread: parts of the batch, or of the rows or
columns of the result. GOMP_parallel, the entry point that compilers use for `#pragma omp parallel`,
runs them on the threads that also run torch's elementwise loops: a second pool of threads would
compete with them for the cores (measured: training took a third longer). The function that a thread
runs is built with LLVM, so it needs no interpreter lock. If numpy or torch are of a build without
these libraries, numpy multiplies the jobs one after the other, by whatever BLAS it has.

Here a and b are the factors and c is the result, as in BLAS: (M, K) times (K, N), or batches of B of them.
"""

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import binding, ir
from torch import Tensor

ONE_JOB_BELOW = 1 << 15  # multiplications; waking a thread takes longer

# A job is a row of these int64: the arguments of cblas_?gemm that differ between jobs; a, b and c
# are offsets in bytes.
JOB_FIELDS = ("transpose_a", "transpose_b", "m", "n", "k", "a", "lda", "b", "ldb", "c", "ldc")
ROW_MAJOR, AS_IT_IS, TRANSPOSED = 101, 111, 112  # CBLAS's constants

INT32, INT64, DOUBLE = ir.IntType(32), ir.IntType(64), ir.DoubleType()


class Call(ctypes.Structure):
    """Argument of the compiled function: jobs of a product, addresses of its tensors, alpha and beta."""

    _fields_ = (
        ("jobs", ctypes.c_int64),  # address of an int64 array (count, len(JOB_FIELDS))
        ("count", ctypes.c_int64),
        ("is_double", ctypes.c_int64),
        ("a", ctypes.c_int64),
        ("b", ctypes.c_int64),
        ("c", ctypes.c_int64),
        ("alpha", ctypes.c_double),
        ("beta", ctypes.c_double),
    )


CALL_FIELDS = [name for name, _ in Call._fields_]  # each takes eight bytes


class Part(NamedTuple):
    """Rows (columns, if there are more of them) [first, last) of one matrix of the result: one job's work."""

    matrix: int
    first: int
    last: int


class Plan(NamedTuple):
    """The jobs of a product of given shapes and strides."""

    jobs: np.ndarray  # int64 (count, len(JOB_FIELDS))
    address: int  # of the jobs
    threads: int  # that run them
    copy_a: bool  # True: a must be copied first, because neither of its last two dimensions is contiguous
    copy_b: bool  # the same for b


class ProductFunctions(NamedTuple):
    """The two functions that a product needs: the address of the compiled one, and GOMP_parallel."""

    run_jobs: int
    parallel: Callable[[int, Any, int, int], None]


def multiply_into(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, beta: float = 0.0) -> None:
    """Compute out = alpha a b + beta out for float32 or float64 matrices (M, K) and (K, N), or batches.

    `out` is contiguous. With beta 0 the old contents of `out` are not read. Raises RuntimeError, as
    torch's own kernels do, unless the shapes of a and b fit.
    """
    assert a.dtype == b.dtype == out.dtype
    assert out.is_contiguous()
    functions = _product_functions()
    threads = torch.get_num_threads()
    plan = _plan(a.shape, a.stride(), b.shape, b.stride(), out.shape, out.element_size(), threads)
    if plan.copy_a or plan.copy_b:
        a = a.clone(memory_format=torch.contiguous_format) if plan.copy_a else a
        b = b.clone(memory_format=torch.contiguous_format) if plan.copy_b else b
        plan = _plan(a.shape, a.stride(), b.shape, b.stride(), out.shape, out.element_size(), threads)

    if a.shape[-1] == 0:
        out.mul_(beta) if beta else out.zero_()
    elif functions is None:
        _multiply_by_numpy(out, a, b, alpha, beta, threads)
    elif plan.threads > 0:
        is_double = out.element_size() == 8
        tensors = (a.data_ptr(), b.data_ptr(), out.data_ptr())
        call = Call(plan.address, len(plan.jobs), is_double, *tensors, alpha, beta)
        functions.parallel(functions.run_jobs, ctypes.byref(call), plan.threads, 0)


@functools.lru_cache(maxsize=512)
def _plan(
    shape_a: tuple[int, ...],
    stride_a: tuple[int, ...],
    shape_b: tuple[int, ...],
    stride_b: tuple[int, ...],
    shape_out: tuple[int, ...],
    size: int,
    threads: int,
) -> Plan:
    """Divide a product into jobs; `size` is the bytes of a number.

    Raises RuntimeError unless the shapes fit, because BLAS would read outside of the tensors.
    """
    fits = len(shape_a) == len(shape_b) and len(shape_a) in (2, 3)
    fits = fits and shape_a[-1] == shape_b[-2] and shape_a[:-2] == shape_b[:-2]
    if not fits:
        raise RuntimeError(
            f"cannot multiply {tuple(shape_a)} and {tuple(shape_b)}:"
            " expected (M, K) and (K, N), or equal batches of them"
        )
    assert tuple(shape_out) == (*shape_a[:-1], shape_b[-1])

    # BLAS reads a matrix by rows or by columns; any other one has to be copied.
    transpose_a, leading_a = _blas_layout(shape_a, stride_a)
    transpose_b, leading_b = _blas_layout(shape_b, stride_b)
    if leading_a is None or leading_b is None:
        return Plan(np.empty((0, len(JOB_FIELDS)), np.int64), 0, 0, leading_a is None, leading_b is None)

    rows, columns = shape_out[-2:]
    depth = shape_a[-1]
    by_rows = _divides_rows(shape_out)
    if math.prod(shape_out) * depth < ONE_JOB_BELOW:
        threads = 1

    # One job for each part: its offsets in bytes, its sizes and the leading dimensions.
    batch_stride_a = stride_a[0] if len(stride_a) == 3 else 0
    batch_stride_b = stride_b[0] if len(stride_b) == 3 else 0
    jobs = []
    for matrix, first, last in _parts(shape_out, threads):
        offset_a = matrix * batch_stride_a + (first * stride_a[-2] if by_rows else 0)
        offset_b = matrix * batch_stride_b + (0 if by_rows else first * stride_b[-1])
        offset_c = matrix * rows * columns + first * (columns if by_rows else 1)

        job_rows, job_columns = (last - first, columns) if by_rows else (rows, last - first)
        sizes = (job_rows, job_columns, depth)
        factors = (size * offset_a, leading_a, size * offset_b, leading_b)
        jobs.append((transpose_a, transpose_b, *sizes, *factors, size * offset_c, columns))

    array = np.array(jobs, np.int64).reshape(-1, len(JOB_FIELDS))
    return Plan(array, array.ctypes.data, min(threads, len(jobs)), False, False)


def _parts(shape_out: tuple[int, ...], threads: int) -> list[Part]:
    """Divide a result: whole matrices of a large batch, else parts of the longer side of each matrix."""
    batch = shape_out[0] if len(shape_out) == 3 else 1
    rows, columns = shape_out[-2:]
    length = rows if _divides_rows(shape_out) else columns
    parts = 1 if batch >= threads else threads
    edges = [length * part // parts for part in range(parts + 1)]
    return [
        Part(matrix, edges[part], edges[part + 1])
        for matrix in range(batch)
        for part in range(parts)
        if edges[part] < edges[part + 1]  # not an empty part, as with fewer rows than threads
    ]


def _divides_rows(shape_out: Sequence[int]) -> bool:
    """True if the parts of a matrix (M, N) are rows of it, False if they are columns."""
    rows, columns = shape_out[-2:]
    return rows >= columns


def _blas_layout(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, int | None]:
    """Return BLAS's transposition flag and leading dimension of a matrix; None if BLAS cannot read it."""
    rows, columns = shape[-2:]
    by_row, by_column = stride[-2:]
    if by_column == 1 and (by_row >= columns or rows == 1):
        return AS_IT_IS, max(by_row, columns)
    if by_row == 1 and (by_column >= rows or columns == 1):
        return TRANSPOSED, max(by_column, rows)
    return AS_IT_IS, None


def _multiply_by_numpy(out: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float, threads: int) -> None:
    """Multiply the same parts one after the other, in numpy.

    With the same BLAS the bits are the same too, unless beta is not 0: there the sum is rounded once more.
    """
    a_BMK, b_BKN, out_BMN = (
        x.detach().numpy() if x.ndim == 3 else x.detach().numpy()[None] for x in (a, b, out)
    )
    by_rows = _divides_rows(out.shape)
    for matrix, first, last in _parts(out.shape, threads):
        rows, columns = (slice(first, last), slice(None)) if by_rows else (slice(None), slice(first, last))
        with np.errstate(all="ignore"):
            product = alpha * np.matmul(a_BMK[matrix, rows], b_BKN[matrix, :, columns])
            if beta:
                product += beta * out_BMN[matrix, rows, columns]
        out_BMN[matrix, rows, columns] = product


@functools.cache
def _product_functions() -> ProductFunctions | None:
    """The compiled function and GOMP_parallel; None if numpy or torch do not bring what it needs."""
    blas = _load(
        Path(np.__file__).parent.with_name("numpy.libs"), "libscipy_openblas64_*.so", "scipy_cblas_sgemm64_"
    )
    openmp = _load(Path(torch.__file__).parent / "lib", "libgomp*.so*", "GOMP_parallel")
    if blas is None or openmp is None:
        return None
    parallel = openmp.GOMP_parallel
    parallel.restype = None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    return ProductFunctions(_compile(blas, openmp), parallel)


def _load(folder: Path, pattern: str, symbol: str) -> ctypes.CDLL | None:
    """Load a library of a wheel, if it is there and has the symbol."""
    for path in sorted(folder.glob(pattern)):
        library = ctypes.CDLL(str(path))
        if hasattr(library, symbol):
            return library
    return None


def _compile(blas: ctypes.CDLL, openmp: ctypes.CDLL) -> int:
    """Compile the function that each thread runs; returns its address. In C it would be

        void run_jobs(struct Call *call) {
            for (job = omp_get_thread_num(); job < call->count; job += omp_get_num_threads())
                cblas_?gemm(ROW_MAJOR, fields of call->jobs[job], its offsets a, b, c added to call->a, b, c);
        }

    It is built from LLVM's instructions: numba would take 0.6 s of every process for it.
    """
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), (INT64.as_pointer(),)), "run_jobs")
    builder = ir.IRBuilder(function.append_basic_block("entry"))

    def read_field(pointer: ir.Value, index: int) -> ir.Value:
        return builder.load(builder.gep(pointer, (INT64(index),)))

    def call_routine(routine: Any, result: ir.Type, arguments: Sequence[ir.Value]) -> ir.Value:
        address = INT64(ctypes.cast(routine, ctypes.c_void_p).value)
        routine_type = ir.FunctionType(result, [argument.type for argument in arguments])
        return builder.call(builder.inttoptr(address, routine_type.as_pointer()), arguments)

    # Read the call, and choose this thread's jobs.
    fields = {name: read_field(function.args[0], index) for index, name in enumerate(CALL_FIELDS)}
    alpha, beta = (builder.bitcast(fields[name], DOUBLE) for name in ("alpha", "beta"))
    first_job = builder.zext(call_routine(openmp.omp_get_thread_num, INT32, ()), INT64)
    step = builder.zext(call_routine(openmp.omp_get_num_threads, INT32, ()), INT64)

    entry = builder.block
    check, body, end = (function.append_basic_block(name) for name in ("check", "body", "end"))
    builder.branch(check)

    # The head of the loop.
    builder.position_at_end(check)
    job_index = builder.phi(INT64)
    job_index.add_incoming(first_job, entry)
    builder.cbranch(builder.icmp_signed("<", job_index, fields["count"]), body, end)

    # One job: its fields, with addresses instead of offsets.
    builder.position_at_end(body)
    job_bytes = builder.mul(job_index, INT64(8 * len(JOB_FIELDS)))
    job_pointer = builder.inttoptr(builder.add(fields["jobs"], job_bytes), INT64.as_pointer())
    job = {name: read_field(job_pointer, index) for index, name in enumerate(JOB_FIELDS)}

    for name in ("transpose_a", "transpose_b"):
        job[name] = builder.trunc(job[name], INT32)
    for name in ("a", "b", "c"):
        job[name] = builder.add(job[name], fields[name])

    # The arguments in CBLAS's order, for the routine of the dtype.
    before_alpha = [INT32(ROW_MAJOR), *(job[name] for name in ("transpose_a", "transpose_b", "m", "n", "k"))]
    factors = [job[name] for name in ("a", "lda", "b", "ldb")]
    result = [job[name] for name in ("c", "ldc")]

    with builder.if_else(builder.icmp_signed("!=", fields["is_double"], INT64(0))) as (then, otherwise):
        with then:
            call_routine(
                blas.scipy_cblas_dgemm64_, ir.VoidType(), [*before_alpha, alpha, *factors, beta, *result]
            )
        with otherwise:
            alpha_32, beta_32 = (builder.fptrunc(value, ir.FloatType()) for value in (alpha, beta))
            call_routine(
                blas.scipy_cblas_sgemm64_,
                ir.VoidType(),
                [*before_alpha, alpha_32, *factors, beta_32, *result],
            )

    # The next job of this thread.
    job_index.add_incoming(builder.add(job_index, step), builder.block)
    builder.branch(check)

    builder.position_at_end(end)
    builder.ret_void()
    return _machine_code(module, "run_jobs")


def _machine_code(module: ir.Module, name: str) -> int:
    """Compile a module; returns the address of its function `name`."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), machine)
    engine.finalize_object()
    _engines.append(engine)
    address: int = engine.get_function_address(name)
    return address


_engines: list[Any] = []  # keep the machine code alive
