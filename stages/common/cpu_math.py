"""Linear algebra and functions on the CPU that give the same bits on every x86-64 machine with AVX2.

torch's CPU build hands products, factorisations, square roots and logarithms to MKL, which chooses
its code by the vendor of the CPU, or uses approximate instructions (rsqrtps, rcpps) that Intel and
AMD define differently. `install` replaces these kernels below autograd, so that forward passes,
backward passes and optimizers use the replacements without a change in their own code:

* products: OpenBLAS's (cpu_products.py). Every thread multiplies a part, so the number of threads
  is part of a result's identity;
* square roots: numpy's, which are correctly rounded; logarithms: numpy's.

Attention has a module of its own (train/cpu_attention.py). Factorisations are explicit functions
below, because only Hessians and initial weights need them. Everything else that the pipeline uses
is torch's own vectorised code, which depends on nothing but ATEN_CPU_CAPABILITY. torch's exp, tanh
and other functions of MKL's vector library are not used; where one slips in, MKL_CBWR=COMPATIBLE
makes it the same everywhere, at half the speed. tests/identity.py hashes every operation.

Shapes: B batch, M rows, N columns, K the dimension that is summed over, C rows and columns of a
square matrix.
"""

import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.common.cpu_products import multiply_into

BLAS_TYPES = (torch.float32, torch.float64)
HALF_TYPES = (torch.bfloat16, torch.float16)  # which numpy cannot multiply: they go through float32

_libraries: list[torch.library.Library] = []  # kernels are registered for as long as this object lives


def require_avx2() -> None:
    """Raise ValueError unless torch runs its AVX2 kernels: other instruction sets give other last digits."""
    # This asks the CPU; the capability below is what ATEN_CPU_CAPABILITY says, true or not.
    if not torch.cpu._is_avx2_supported():
        raise ValueError(
            f"this CPU ({processor()}) has no AVX2 with FMA, and every result depends on them;"
            " expected an x86-64 CPU of 2015 or later (Intel Haswell, AMD Excavator)"
        )
    capability = torch.backends.cpu.get_cpu_capability()
    if capability != "AVX2":
        raise ValueError(
            f"torch runs its {capability} kernels, expected AVX2: it was imported before `stages`;"
            " import `stages` first"
        )


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def install() -> None:
    """Register the kernels of this module for torch's CPU tensors, once a process."""
    if _libraries:
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Warning only once for all operators"
        )  # that a kernel is replaced
        for name, kernel in _kernels().items():
            library.impl(name, kernel, "CPU")
    _libraries.append(library)


def cholesky(matrices_BCC: Tensor) -> list[Tensor | None]:
    """The lower factor L of each positive definite matrix, A = L L^T, float64; None for one that is not."""
    factors: list[Tensor | None] = []
    for matrix_CC in matrices_BCC.double().numpy():
        try:
            factors.append(torch.from_numpy(np.linalg.cholesky(matrix_CC)))
        except np.linalg.LinAlgError:
            factors.append(None)
    return factors


def invert(matrices_BCC: Tensor) -> Tensor:
    """The inverse of each matrix, in its own precision."""
    return torch.from_numpy(np.linalg.inv(matrices_BCC.numpy()))


def orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Draw a (rows, columns) float32 matrix with orthonormal rows, or columns if there are fewer.

    The distribution is uniform (Haar measure).

    The Q of a normal matrix A = QR, its columns multiplied by the signs of R's diagonal, which
    makes the factorisation unique (Mezzadri 2007, "How to generate random matrices from the
    classical compact groups").
    """
    normal = torch.empty(rows, columns).normal_(generator=generator)
    tall = normal.double().numpy() if rows >= columns else normal.double().numpy().T
    q, r = np.linalg.qr(tall)
    q *= np.sign(np.diagonal(r))
    return torch.from_numpy(np.ascontiguousarray(q if rows >= columns else q.T)).float()


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """The product of matrices (M, K) and (K, N), or of batches of them, in their dtype."""
    _require_one_dtype(a, b)
    if a.dtype in HALF_TYPES:
        return multiply(a.float(), b.float()).to(a.dtype)
    if a.dtype not in BLAS_TYPES:
        product = np.matmul(a.detach().resolve_conj().numpy(), b.detach().resolve_conj().numpy())
        return torch.from_numpy(np.asarray(product))
    out = a.new_empty((*a.shape[:-1], b.shape[-1]))
    multiply_into(out, a, b)
    return out


def add_product(addend: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta * addend + alpha * a b; the addend is broadcast, and not read if beta is 0."""
    _require_one_dtype(addend, a, b)
    if a.dtype not in BLAS_TYPES:
        product = multiply(a, b) * alpha
        return product + addend * beta if beta else product
    shape = (*a.shape[:-1], b.shape[-1])
    out = addend.expand(shape).clone(memory_format=torch.contiguous_format) if beta else a.new_empty(shape)
    multiply_into(out, a, b, alpha, beta)
    return out


def _require_one_dtype(*operands: Tensor) -> None:
    """Raise RuntimeError, as torch's own kernels do, unless all operands have one dtype."""
    dtypes = [operand.dtype for operand in operands]
    if len(set(dtypes)) > 1:
        raise RuntimeError(f"expected operands of one dtype, got {' and '.join(map(str, dtypes))}")


def _of_dimensions(dimensions: int, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a product that raises RuntimeError unless its last factor has `dimensions` dimensions."""

    def checked(*operands: Tensor, **options: Any) -> Tensor:
        if operands[-1].ndim != dimensions:
            raise RuntimeError(f"expected factors of {dimensions} dimensions, got {operands[-1].ndim}")
        return function(*operands, **options)

    return checked


def _function(compute: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensor], Tensor]:
    """Turn an elementwise numpy function into one of tensors; integers become torch's default dtype first."""

    def function(x: Tensor) -> Tensor:
        if not x.is_floating_point() and not x.is_complex():
            return function(x.to(torch.get_default_dtype()))
        if x.dtype in HALF_TYPES:
            return function(x.float()).to(x.dtype)
        with np.errstate(all="ignore"):
            return torch.from_numpy(np.asarray(compute(x.detach().numpy())))

    return function


def _kernels() -> dict[str, Callable[..., Tensor]]:
    """The functional, in-place and out= form of each operator, by name and overload."""

    def addmv(addend: Tensor, a: Tensor, vector: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        return add_product(addend[..., None], a, vector[:, None], beta=beta, alpha=alpha)[..., 0]

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return multiply(a[None], b[:, None])[0, 0]

    functional: dict[str, Callable[..., Tensor]] = {
        "mm": _of_dimensions(2, multiply),
        "bmm": _of_dimensions(3, multiply),
        "addmm": _of_dimensions(2, add_product),
        "baddbmm": _of_dimensions(3, add_product),
        "addmv": addmv,
        "dot": dot,
        "sqrt": _function(np.sqrt),
        "log": _function(np.log),
    }

    # Their other forms.
    kernels = dict(functional)
    for name in functional:
        kernels[f"{name}.out"] = _out_form(functional[name])
    for name in ("addmm", "baddbmm", "addmv", "sqrt", "log"):
        kernels[f"{name}_"] = _in_place_form(functional[name])
    return kernels


def _castable(result: Tensor, target: Tensor) -> Tensor:
    """The result, unless it would lose its kind of number in the target."""
    if not torch.can_cast(result.dtype, target.dtype):
        raise RuntimeError(f"result type {result.dtype} cannot be cast to {target.dtype}")
    return result


def _out_form(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def into(*arguments: Any, out: Tensor, **options: Any) -> Tensor:
        result = _castable(function(*arguments, **options), out)
        if out.shape != result.shape:
            out.resize_(result.shape)
        return out.copy_(result)

    return into


def _in_place_form(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def in_place(first: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return first.copy_(_castable(function(first, *arguments, **options), first))

    return in_place
