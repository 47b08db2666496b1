"""Matrix products on the CPU: OpenBLAS's kernels, run by torch's own OpenMP threads.

numpy's wheel brings an OpenBLAS whose kernels and block sizes depend on OPENBLAS_CORETYPE alone (instruction_set.py), not on the vendor of
the CPU or the size of its caches, so that its products have the same bits everywhere. MKL, which torch calls, does not promise that on AMD.

A product is divided into one job for each thread: parts of the batch, or of the rows or columns of the result. Jobs are run by
GOMP_parallel, the entry point that compilers use for `#pragma omp parallel`, on the threads that also run torch's elementwise loops: a
second pool of threads would compete with them for the cores (measured: training took a third longer). The function that a thread runs is
compiled by numba, so it needs no interpreter lock. If numpy or torch are of a build without these libraries, numpy multiplies the jobs one
after the other, by whatever BLAS it has.

Here a and b are the factors and c is the result, as in BLAS: (M, K) times (K, N), or batches of B of them.
"""

import ctypes
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

ONE_JOB_BELOW = 1 << 15  # multiplications; waking a thread takes longer

# A job is a row of these int64: the arguments of cblas_?gemm that differ between jobs.
JOB_FIELDS = ("transpose_a", "transpose_b", "m", "n", "k", "a", "lda", "b", "ldb", "c", "ldc")
A, B, C = (
    JOB_FIELDS.index(name) for name in "abc"
)  # the addresses; each is followed by its leading dimension
HEADER = 4  # int64 before the first job: number of jobs, 1 for float64, then alpha and beta as float64
ROW_MAJOR, AS_IT_IS, TRANSPOSED = 101, 111, 112  # CBLAS's constants

INT, INT64, SIZE = ctypes.c_int, ctypes.c_int64, ctypes.c_size_t


class Layout(NamedTuple):
    """The jobs of a product of given shapes and strides; addresses are still relative to the first element of each tensor."""

    work: np.ndarray  # int64: header and jobs
    copy_a: bool  # whether an operand must be copied first, since neither of its last two dimensions is contiguous
    copy_b: bool


class Library(NamedTuple):
    """The two functions that a product needs: the address of the compiled one, and GOMP_parallel."""

    run_jobs: int
    parallel: Callable[[int, int, int, int], None]


def multiply_into(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, beta: float = 0.0) -> None:
    """out = alpha a b + beta out, for float32 or float64 matrices (M, K) and (K, N), or batches of them; `out` is contiguous.

    With beta 0 what `out` holds is not read.
    """
    _require_fit(out, a, b)
    if out.numel() == 0:
        return
    if a.shape[-1] == 0:
        out.mul_(beta) if beta else out.zero_()
        return

    threads = torch.get_num_threads() if out.numel() * a.shape[-1] >= ONE_JOB_BELOW else 1
    layout = _layout(tuple(a.shape), a.stride(), tuple(b.shape), b.stride(), out.element_size(), threads)
    if layout.copy_a or layout.copy_b:
        a, b = (
            x.clone(memory_format=torch.contiguous_format) if copy else x
            for x, copy in ((a, layout.copy_a), (b, layout.copy_b))
        )
        layout = _layout(tuple(a.shape), a.stride(), tuple(b.shape), b.stride(), out.element_size(), threads)
    library = _library()
    if library is None:
        _multiply_by_numpy(out, a, b, alpha, beta, threads)
        return

    work = layout.work.copy()
    work[2:HEADER].view(np.float64)[:] = alpha, beta
    jobs = work[HEADER:].reshape(-1, len(JOB_FIELDS))
    jobs[:, A] += a.data_ptr()
    jobs[:, B] += b.data_ptr()
    jobs[:, C] += out.data_ptr()
    library.parallel(library.run_jobs, work.ctypes.data, min(threads, len(jobs)), 0)


def _require_fit(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Raise RuntimeError, as torch's own kernels do, unless the factors fit each other: BLAS would read outside of them."""
    if a.dtype != b.dtype or out.dtype != a.dtype:
        raise RuntimeError(
            f"expected factors of one dtype, got {a.dtype} and {b.dtype} for a result of {out.dtype}"
        )
    fits = (
        a.ndim == b.ndim == out.ndim
        and a.ndim in (2, 3)
        and a.shape[-1] == b.shape[-2]
        and a.shape[:-2] == b.shape[:-2]
    )
    if not fits:
        raise RuntimeError(
            f"cannot multiply {tuple(a.shape)} and {tuple(b.shape)}: expected (M, K) and (K, N), or equal batches of them"
        )
    assert out.is_contiguous()
    assert out.shape == (*a.shape[:-1], b.shape[-1])


@functools.lru_cache(maxsize=512)
def _layout(
    shape_a: tuple[int, ...],
    stride_a: tuple[int, ...],
    shape_b: tuple[int, ...],
    stride_b: tuple[int, ...],
    size: int,
    threads: int,
) -> Layout:
    """One job for each part of the product: whole matrices of a large batch, else equal parts of each matrix. `size` is bytes a number."""
    batch = shape_a[0] if len(shape_a) == 3 else 1
    rows, columns, depth = shape_a[-2], shape_b[-1], shape_a[-1]
    transpose_a, leading_a = _blas_layout(shape_a, stride_a)
    transpose_b, leading_b = _blas_layout(shape_b, stride_b)
    if leading_a is None or leading_b is None:
        return Layout(np.empty(0, np.int64), leading_a is None, leading_b is None)

    # Parts of the longer side of the result, unless there is a matrix for every thread.
    parts = 1 if batch >= threads else threads
    by_rows = rows >= columns
    edges = (rows if by_rows else columns) * np.arange(parts + 1) // parts
    first, length = np.tile(edges[:-1], batch), np.tile(np.diff(edges), batch)
    matrix = np.repeat(np.arange(batch), parts)

    jobs = np.empty((batch * parts, len(JOB_FIELDS)), np.int64)
    jobs[:, 0], jobs[:, 1] = transpose_a, transpose_b
    jobs[:, 2], jobs[:, 3], jobs[:, 4] = (length, columns, depth) if by_rows else (rows, length, depth)
    jobs[:, A] = size * (
        matrix * (stride_a[0] if len(shape_a) == 3 else 0) + (first * stride_a[-2] if by_rows else 0)
    )
    jobs[:, B] = size * (
        matrix * (stride_b[0] if len(shape_b) == 3 else 0) + (0 if by_rows else first * stride_b[-1])
    )
    jobs[:, C] = size * (matrix * rows * columns + first * (columns if by_rows else 1))
    jobs[:, A + 1], jobs[:, B + 1], jobs[:, C + 1] = leading_a, leading_b, columns
    jobs = jobs[length > 0]

    work = np.zeros(HEADER + jobs.size, np.int64)
    work[0], work[1] = len(jobs), size == 8
    work[HEADER:] = jobs.ravel()
    return Layout(work, False, False)


def _blas_layout(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, int | None]:
    """How BLAS reads a matrix: as it is or transposed, and the elements from one row (column) to the next; None if it cannot."""
    rows, columns = shape[-2:]
    by_row, by_column = stride[-2:]
    if by_column == 1 and (by_row >= columns or rows == 1):
        return AS_IT_IS, max(by_row, columns)
    if by_row == 1 and (by_column >= rows or columns == 1):
        return TRANSPOSED, max(by_column, rows)
    return AS_IT_IS, None


def _multiply_by_numpy(out: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float, threads: int) -> None:
    """The same parts one after the other, in numpy; where its BLAS is the same, so are the bits of a product that is not added."""
    rows, columns = out.shape[-2:]
    parts = 1 if out.ndim == 3 and len(out) >= threads else threads
    edges = [max(rows, columns) * i // parts for i in range(parts + 1)]
    a_np, b_np, out_np = a.detach().numpy(), b.detach().numpy(), out.detach().numpy()
    for first, last in itertools.pairwise(edges):
        by_rows = rows >= columns
        part = out_np[..., first:last, :] if by_rows else out_np[..., first:last]
        with np.errstate(all="ignore"):
            product = (
                np.matmul(a_np[..., first:last, :], b_np)
                if by_rows
                else np.matmul(a_np, b_np[..., first:last])
            )
        part[...] = alpha * product + (beta * part if beta else 0)


@functools.cache
def _library() -> Library | None:
    """The compiled function and GOMP_parallel; None where numpy or torch do not bring what it needs."""
    blas = _load(
        Path(np.__file__).parent.with_name("numpy.libs"), "libscipy_openblas64_*.so", "scipy_cblas_sgemm64_"
    )
    openmp = _load(Path(torch.__file__).parent / "lib", "libgomp*.so*", "GOMP_parallel")
    if blas is None or openmp is None:
        return None
    parallel = openmp.GOMP_parallel
    parallel.restype, parallel.argtypes = None, (SIZE, SIZE, ctypes.c_uint, ctypes.c_uint)
    return Library(_compile(blas, openmp), parallel)


def _load(folder: Path, pattern: str, symbol: str) -> ctypes.CDLL | None:
    """A library of a wheel, if it is there and has the symbol."""
    for path in sorted(folder.glob(pattern)):
        library = ctypes.CDLL(str(path))
        if hasattr(library, symbol):
            return library
    return None


def _compile(blas: ctypes.CDLL, openmp: ctypes.CDLL) -> int:
    """The address of a function that runs a thread's share of the jobs: number i of n threads runs jobs i, i + n, i + 2n ..."""
    from numba import carray, cfunc  # type: ignore[attr-defined]  # a second, which only those who multiply need to wait for

    single = _gemm(blas.scipy_cblas_sgemm64_, ctypes.c_float)
    double = _gemm(blas.scipy_cblas_dgemm64_, ctypes.c_double)
    thread_number, thread_count = openmp.omp_get_thread_num, openmp.omp_get_num_threads
    for function in (thread_number, thread_count):
        function.restype, function.argtypes = INT, ()
    width = len(JOB_FIELDS)

    def run_jobs(address: Any) -> None:
        count = carray(address, (HEADER,), np.int64)[0]
        work = carray(address, (HEADER + width * count,), np.int64)
        alpha, beta = carray(address, (HEADER,), np.float64)[2], carray(address, (HEADER,), np.float64)[3]
        for job in range(thread_number(), count, thread_count()):
            at = HEADER + width * job
            trans_a, trans_b, m, n, k = work[at], work[at + 1], work[at + 2], work[at + 3], work[at + 4]
            a, lda, b, ldb, c, ldc = (
                work[at + 5],
                work[at + 6],
                work[at + 7],
                work[at + 8],
                work[at + 9],
                work[at + 10],
            )
            if work[1]:
                double(ROW_MAJOR, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc)
            else:
                single(
                    ROW_MAJOR,
                    trans_a,
                    trans_b,
                    m,
                    n,
                    k,
                    np.float32(alpha),
                    a,
                    lda,
                    b,
                    ldb,
                    np.float32(beta),
                    c,
                    ldc,
                )

    compiled: Any = cfunc("void(voidptr)")(run_jobs)
    _compiled.append(compiled)
    address: int = compiled.address
    return address


_compiled: list[Any] = []  # kept, or its code would be freed


def _gemm(function: Any, real: type) -> Any:
    """cblas_?gemm with 64-bit integers; addresses are integers too."""
    function.restype = None
    function.argtypes = (
        INT,
        INT,
        INT,
        INT64,
        INT64,
        INT64,
        real,
        SIZE,
        INT64,
        SIZE,
        INT64,
        real,
        SIZE,
        INT64,
    )
    return function
