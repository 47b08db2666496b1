"""The residual stream as a weighted sum, and its RMS norm, in one pass each way.

u = sum of w_i x_i and h = c u / rms(u). The backward pass reads every tensor once, writes every
gradient once, and sums the weights' gradients over tokens in registers, one partial sum a program,
so that results repeat bit for bit. Left to torch's compiler, these sums took two thirds of the time
of the residual stream: 18 of 26.6 ms a pass, which is 10.3 ms with these kernels
(docs/log/2026-11.md, training step on an H200).

A term without a weight (a unit) has its bit set in UNITS; nothing is loaded or stored for its
weight, and its gradient is the common gradient g.

Shapes: N tokens, D width, n terms, P programs.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from stages.train.kernels.operator import operator
from stages.train.reference import Term

MAX_TERMS = 5  # a decoder visit after a parallel block: stream, attention, MLP, skip, x0
FORWARD_ROWS = 2  # tokens of one forward program
BACKWARD_ROWS = 2  # tokens that a backward program reads at a time
PROGRAMS_PER_MULTIPROCESSOR = 8  # of the backward kernel; each writes one partial sum of weight gradients
NORM_EPS = tl.constexpr(torch.finfo(torch.float32).eps)


@triton.jit
def _with_term(
    total, x, w, offsets, columns, mask, D, TERM: tl.constexpr, TERMS: tl.constexpr, UNITS: tl.constexpr
):
    """`total` plus term number TERM, if there is one."""
    if TERM < TERMS:
        value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        if (UNITS >> TERM) % 2 == 0:
            value *= tl.load(w + TERM * D + columns, mask=columns < D, other=0.0)[None, :]
        total += value
    return total


@triton.jit
def _weighted_sum_forward(
    x0, x1, x2, x3, x4, w, u, h, scale, N, D,
    TERMS: tl.constexpr, UNITS: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """u of ROWS tokens, and h if NORM."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    mask = (rows < N)[:, None] & (columns < D)[None, :]
    offsets = rows[:, None].to(tl.int64) * D + columns[None, :]

    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    total = _with_term(total, x0, w, offsets, columns, mask, D, 0, TERMS, UNITS)
    total = _with_term(total, x1, w, offsets, columns, mask, D, 1, TERMS, UNITS)
    total = _with_term(total, x2, w, offsets, columns, mask, D, 2, TERMS, UNITS)
    total = _with_term(total, x3, w, offsets, columns, mask, D, 3, TERMS, UNITS)
    total = _with_term(total, x4, w, offsets, columns, mask, D, 4, TERMS, UNITS)
    tl.store(u + offsets, total.to(u.dtype.element_ty), mask=mask)
    if NORM:
        inverse = tl.rsqrt(tl.sum(total * total, 1) / D + NORM_EPS)[:, None]
        tl.store(h + offsets, (total * inverse * scale).to(h.dtype.element_ty), mask=mask)


@triton.jit
def _term_gradient(
    sums, g, x, dx, w, offsets, columns, mask, D, TERM: tl.constexpr, TERMS: tl.constexpr, UNITS: tl.constexpr
):
    """Store dx = g w of term number TERM and add g x to `sums`, for the gradient of w; nothing for a unit."""
    if TERM < TERMS and (UNITS >> TERM) % 2 == 0:
        weight = tl.load(w + TERM * D + columns, mask=columns < D, other=0.0)[None, :]
        tl.store(dx + offsets, (g * weight).to(dx.dtype.element_ty), mask=mask)
        sums += g * tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    return sums


@triton.jit
def _store_sums(sums, dw, columns, D, TERM: tl.constexpr, TERMS: tl.constexpr, UNITS: tl.constexpr):
    """Store this program's partial sum of the gradient of weight number TERM."""
    if TERM < TERMS and (UNITS >> TERM) % 2 == 0:
        tl.store(dw + (tl.program_id(0) * TERMS + TERM) * D + columns, tl.sum(sums, 0), mask=columns < D)


@triton.jit
def _weighted_sum_backward(
    du, dh, u, x0, x1, x2, x3, x4, w, g, dx0, dx1, dx2, dx3, dx4, dw, scale, N, D,
    TERMS: tl.constexpr, UNITS: tl.constexpr, HAS_DU: tl.constexpr, NORM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """g = du + dh's part through the norm, dx_i = g w_i, and dw_i = sum over tokens of g x_i.

    Through the norm: scale / rms(u) (dh - u (dh . u) / (D rms(u)^2)).
    """
    columns = tl.arange(0, COLUMNS)
    sums0 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    sums1 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    sums2 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    sums3 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    sums4 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)

    for first in range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < N)[:, None] & (columns < D)[None, :]
        offsets = rows[:, None].to(tl.int64) * D + columns[None, :]

        # The gradient of u.
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        if HAS_DU:
            total += tl.load(du + offsets, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            value = tl.load(u + offsets, mask=mask, other=0.0).to(tl.float32)
            upstream = tl.load(dh + offsets, mask=mask, other=0.0).to(tl.float32)
            inverse = tl.rsqrt(tl.sum(value * value, 1) / D + NORM_EPS)[:, None]
            along = tl.sum(upstream * value, 1)[:, None] / D
            total += scale * inverse * (upstream - value * inverse * inverse * along)
        if UNITS != 0 and NORM:
            tl.store(g + offsets, total.to(g.dtype.element_ty), mask=mask)

        # The gradients of the terms and of their weights.
        sums0 = _term_gradient(sums0, total, x0, dx0, w, offsets, columns, mask, D, 0, TERMS, UNITS)
        sums1 = _term_gradient(sums1, total, x1, dx1, w, offsets, columns, mask, D, 1, TERMS, UNITS)
        sums2 = _term_gradient(sums2, total, x2, dx2, w, offsets, columns, mask, D, 2, TERMS, UNITS)
        sums3 = _term_gradient(sums3, total, x3, dx3, w, offsets, columns, mask, D, 3, TERMS, UNITS)
        sums4 = _term_gradient(sums4, total, x4, dx4, w, offsets, columns, mask, D, 4, TERMS, UNITS)

    _store_sums(sums0, dw, columns, D, 0, TERMS, UNITS)
    _store_sums(sums1, dw, columns, D, 1, TERMS, UNITS)
    _store_sums(sums2, dw, columns, D, 2, TERMS, UNITS)
    _store_sums(sums3, dw, columns, D, 3, TERMS, UNITS)
    _store_sums(sums4, dw, columns, D, 4, TERMS, UNITS)


def _padded(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors padded to MAX_TERMS, as many as the kernels take; the padding is not read."""
    return [*tensors, *([tensors[0]] * (MAX_TERMS - len(tensors)))]


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """N, D and the power of two that is at least D."""
    D = x.shape[-1]
    return x.numel() // D, D, triton.next_power_of_2(D)


@operator("weighted_sum")
def _weighted_sum_op(
    xs: Sequence[Tensor], w: Tensor, units: int, norm: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """u and h of terms `xs` (..., D) and weights `w` (n, D); h is empty without `norm`."""
    N, D, columns = _sizes(xs[0])
    u = torch.empty_like(xs[0])
    h = torch.empty_like(u) if norm else u.new_empty(0)
    _weighted_sum_forward[(triton.cdiv(N, FORWARD_ROWS),)](
        *_padded(xs), w, u, h, scale, N, D, len(xs), units, norm, FORWARD_ROWS, columns, num_warps=4
    )  # fmt: skip
    return u, h


@torch.library.register_fake("caddie::weighted_sum")
def _(xs: Sequence[Tensor], w: Tensor, units: int, norm: bool, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(xs[0]), torch.empty_like(xs[0]) if norm else xs[0].new_empty(0)


@operator("weighted_sum_backward")
def _weighted_sum_backward_op(
    du: Tensor | None, dh: Tensor | None, u: Tensor, xs: Sequence[Tensor], w: Tensor, units: int, scale: float
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The gradient g of the sum, the gradients of the weighted terms, and that of the weights (n, D).

    g is empty where no term is a unit, which alone needs it, and where it is `du` itself.
    """
    N, D, columns = _sizes(u)
    g = torch.empty_like(u) if units and dh is not None else u.new_empty(0)

    # A place for the gradient of each weighted term; the kernel does not write the places of units.
    gradients = []
    places = [u] * len(xs)
    for i in range(len(xs)):
        if not units >> i & 1:
            gradients.append(torch.empty_like(u))
            places[i] = gradients[-1]

    # One partial sum of the weights' gradients for each program. Those of units are not written.
    processors = torch.cuda.get_device_properties(u.device).multi_processor_count if u.is_cuda else 1
    programs = min(triton.cdiv(N, BACKWARD_ROWS), processors * PROGRAMS_PER_MULTIPROCESSOR)
    allocate = torch.zeros if units else torch.empty
    dw = allocate(programs, len(xs), D, device=u.device)

    _weighted_sum_backward[(programs,)](
        u if du is None else du, u if dh is None else dh, u, *_padded(xs), w, g, *_padded(places), dw, scale,
        N, D, len(xs), units, du is not None, dh is not None, BACKWARD_ROWS, columns, num_warps=4,
    )  # fmt: skip
    return g, gradients, dw.sum(0)


@torch.library.register_fake("caddie::weighted_sum_backward")
def _(
    du: Tensor | None, dh: Tensor | None, u: Tensor, xs: Sequence[Tensor], w: Tensor, units: int, scale: float
) -> tuple[Tensor, list[Tensor], Tensor]:
    gradients = [torch.empty_like(u) for i in range(len(xs)) if not units >> i & 1]
    return torch.empty_like(u) if units and dh is not None else u.new_empty(0), gradients, torch.empty_like(w)


def _save(ctx, inputs, output):
    xs, w, ctx.units, ctx.norm, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    if not ctx.norm:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*xs, w, output[0])


def _vjp(ctx, du, dh):
    *xs, w, u = ctx.saved_tensors
    dh = dh.contiguous() if ctx.norm and dh is not None else None
    du = du.contiguous() if du is not None else None
    g, gradients, dw = _weighted_sum_backward_op(du, dh, u, xs, w, ctx.units, ctx.scale)
    unit_gradient = du if dh is None else g
    weighted = iter(gradients)
    dxs = [unit_gradient if ctx.units >> i & 1 else next(weighted) for i in range(len(xs))]
    return dxs, dw, None, None, None


torch.library.register_autograd("caddie::weighted_sum", _vjp, setup_context=_save)


def _call(terms: Sequence[Term], norm: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Call the operator on terms; a weight of None becomes a unit."""
    xs = [term.tensor.contiguous() for term in terms]
    one = torch.ones(xs[0].shape[-1], device=xs[0].device)
    w = torch.stack([one if term.weight is None else term.weight.float() for term in terms])
    units = sum(1 << i for i, term in enumerate(terms) if term.weight is None)
    return _weighted_sum_op(xs, w, units, norm, scale)


def weighted_sum(terms: Sequence[Term]) -> Tensor:
    """The fused counterpart of `reference.weighted_sum`."""
    return _call(terms, False, 1.0)[0]


def weighted_sum_norm(terms: Sequence[Term], scale: float) -> tuple[Tensor, Tensor]:
    """The fused counterpart of `reference.weighted_sum_norm`."""
    return _call(terms, True, scale)
