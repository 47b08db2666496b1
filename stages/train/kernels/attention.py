"""Causal attention within documents, less the token's own value: keys before a document's first token are neither read nor computed
(#1530 uses FA3's varlen form).

Documents are given per token, by the first and the last position of its document in the window, and not as a list of lengths: shapes stay
fixed whatever the text, so nothing is compiled again. A program walks the key blocks from its first token's document on; only blocks at
the diagonal and at a document's edge are masked. The backward pass recomputes probabilities (FlashAttention-2, arXiv 2307.08691) in two
kernels, by keys and by queries, without atomics: it repeats bit for bit.

With o the attention's output and v the token's own value, y = o - share v is written, where share = o . v / v . v; o itself is not kept.

Shapes: B batch, T tokens, H query heads, K key-value heads, C head dimension; lse (base 2), share and delta are (B, H, T) float32.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from stages.train.kernels.operator import operator

SMALLEST_SQUARE = tl.constexpr(1e-24)  # of a value's norm, as in torch's normalize
HIDDEN = tl.constexpr(
    -1.0e6
)  # score of a masked pair: finite, so that a row whose first block is all masked stays a number


@triton.jit
def _tile(base, rows, T, stride, C: tl.constexpr, EVEN: tl.constexpr):
    """Rows (n, C) of a head; zeros beyond T."""
    pointers = base + rows[:, None] * stride + tl.arange(0, C)[None, :]
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=rows[:, None] < T, other=0.0)


@triton.jit
def _scores(q, k, m, n, start, scale, MASK: tl.constexpr):
    """Scores in base 2 of queries m against keys n."""
    s = tl.dot(q, tl.trans(k)) * scale
    if MASK:
        s = tl.where((n[None, :] <= m[:, None]) & (n[None, :] >= start[:, None]), s, HIDDEN)
    return s


@triton.jit
def _forward_range(q, acc, top, total, k_base, v_base, m, start, first, end, scale, T, stride,
                   C: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    for n0 in range(first, end, BN):
        n = n0 + tl.arange(0, BN)
        k = _tile(k_base, n, T, stride, C, EVEN)
        s = _scores(q, k, m, n, start, scale, MASK)
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        keep = tl.exp2(top - new_top)
        total = total * keep + tl.sum(p, 1)
        v = _tile(v_base, n, T, stride, C, EVEN)
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None])
        top = new_top
    return acc, top, total


@triton.jit
def _bounds(starts, m0, T, BM: tl.constexpr, BN: tl.constexpr):
    """Key blocks of queries m0 ...: where they begin, and the range that needs no mask."""
    lo = tl.load(starts + m0) // BN * BN
    last = tl.load(starts + tl.minimum(m0 + BM, T) - 1)
    full_end = m0 // BN * BN
    full = tl.minimum(tl.cdiv(last, BN) * BN, full_end)
    return lo, tl.maximum(full, lo), full_end


@triton.jit
def _attend_forward(q, k, v, starts, y, lse, share, scale, T, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # the longest rows first
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    starts += b * T
    m = m0 + tl.arange(0, BM)
    q_base = (b * T).to(tl.int64) * H * C + h * C
    kv_base = (b * T).to(tl.int64) * K * C + h // (H // K) * C
    start = tl.load(starts + m) if EVEN else tl.load(starts + m, mask=m < T, other=0)
    tile = _tile(q + q_base, m, T, H * C, C, EVEN)
    acc = tl.zeros((BM, C), dtype=tl.float32)
    top, total = tl.full((BM,), -float("inf"), dtype=tl.float32), tl.zeros((BM,), dtype=tl.float32)
    lo, full, full_end = _bounds(starts, m0, T, BM, BN)
    acc, top, total = _forward_range(
        tile, acc, top, total, k + kv_base, v + kv_base, m, start, lo, full, scale, T, K * C, C, BN, True, EVEN
    )  # fmt: skip
    acc, top, total = _forward_range(
        tile, acc, top, total, k + kv_base, v + kv_base, m, start, full, full_end, scale, T, K * C, C, BN, False, EVEN
    )  # fmt: skip
    end = tl.minimum(m0 + BM, T)
    acc, top, total = _forward_range(
        tile, acc, top, total, k + kv_base, v + kv_base, m, start, tl.maximum(full_end, lo), end, scale, T, K * C, C, BN, True, EVEN
    )  # fmt: skip
    out = acc / total[:, None]
    own = _tile(v + kv_base, m, T, K * C, C, EVEN).to(tl.float32)
    along = tl.sum(out * own, 1) / tl.maximum(tl.sum(own * own, 1), SMALLEST_SQUARE)
    pointers = y + q_base + m[:, None] * (H * C) + tl.arange(0, C)[None, :]
    tl.store(pointers, (out - along[:, None] * own).to(y.dtype.element_ty), mask=m[:, None] < T)
    row = tl.program_id(1).to(tl.int64) * T + m
    tl.store(lse + row, top + tl.log2(total), mask=m < T)
    tl.store(share + row, along, mask=m < T)


@triton.jit
def _own_value_backward(
    dy, y, v, share, do, delta, dv, T, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BM: tl.constexpr
):
    """do = dy - b v and delta = do . o for each head of a group, and dv = sum of (a b v - a dy - b y): a the share, b = dy . v / v . v."""
    b, group = tl.program_id(1) // K, tl.program_id(1) % K
    m, c = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, C)
    mask = m[:, None] < T
    value_place = (b * T).to(tl.int64) * K * C + group * C + m[:, None] * (K * C) + c[None, :]
    own = tl.load(v + value_place, mask=mask, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.maximum(tl.sum(own * own, 1), SMALLEST_SQUARE)
    total = tl.zeros((BM, C), dtype=tl.float32)
    for member in range(H // K):
        h = group * (H // K) + member
        place = (b * T).to(tl.int64) * H * C + h * C + m[:, None] * (H * C) + c[None, :]
        row = (b * H + h).to(tl.int64) * T + m
        upstream = tl.load(dy + place, mask=mask, other=0.0).to(tl.float32)
        kept = tl.load(y + place, mask=mask, other=0.0).to(tl.float32)
        a = tl.load(share + row, mask=m < T, other=0.0)
        along = tl.sum(upstream * own, 1) * inverse
        gradient = upstream - along[:, None] * own
        tl.store(do + place, gradient.to(do.dtype.element_ty), mask=mask)
        tl.store(delta + row, tl.sum(gradient * (kept + a[:, None] * own), 1), mask=m < T)
        total += (a * along)[:, None] * own - a[:, None] * upstream - along[:, None] * kept
    tl.store(dv + value_place, total.to(dv.dtype.element_ty), mask=mask)


@triton.jit
def _keys_range(dk, dv, k, v, n, q_base, do_base, lse, delta, starts, first, end, scale, T, stride,
                C: tl.constexpr, BM: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    for m0 in range(first, end, BM):
        m = m0 + tl.arange(0, BM)
        q = _tile(q_base, m, T, stride, C, EVEN)
        row_lse = tl.load(lse + m) if EVEN else tl.load(lse + m, mask=m < T, other=float("inf"))
        s = tl.dot(k, tl.trans(q)) * scale
        p = tl.exp2(s - row_lse[None, :])
        if MASK:
            start = tl.load(starts + m) if EVEN else tl.load(starts + m, mask=m < T, other=0)
            p = tl.where((n[:, None] <= m[None, :]) & (n[:, None] >= start[None, :]), p, 0.0)
        do = _tile(do_base, m, T, stride, C, EVEN)
        dv = tl.dot(p.to(do.dtype), do, dv)
        row_delta = tl.load(delta + m) if EVEN else tl.load(delta + m, mask=m < T, other=0.0)
        ds = p * (tl.dot(v, tl.trans(do)) - row_delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit
def _attend_backward_keys(q, k, v, do, lse, delta, starts, ends, dk, dv, scale, T, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
                          BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """dk and dv of one block of keys: every query of the group's heads that may look at it; dv comes with the own values' part in it."""
    n0 = tl.program_id(0) * BN  # the first keys have the longest columns
    b, group = tl.program_id(1) // K, tl.program_id(1) % K
    starts += b * T
    ends += b * T
    n = n0 + tl.arange(0, BN)
    kv_base = (b * T).to(tl.int64) * K * C + group * C
    key, value = _tile(k + kv_base, n, T, K * C, C, EVEN), _tile(v + kv_base, n, T, K * C, C, EVEN)
    end = tl.load(ends + tl.minimum(n0 + BN, T) - 1) + 1
    diagonal_end = tl.minimum(tl.cdiv(n0 + BN, BM) * BM, end)
    full_end = tl.maximum((tl.load(ends + n0) + 1) // BM * BM, diagonal_end)
    dk_acc, dv_acc = (
        tl.zeros((BN, C), dtype=tl.float32),
        _tile(dv + kv_base, n, T, K * C, C, EVEN).to(tl.float32),
    )
    for member in range(H // K):
        h = group * (H // K) + member
        q_base = (b * T).to(tl.int64) * H * C + h * C
        row = (b * H + h).to(tl.int64) * T
        dk_acc, dv_acc = _keys_range(
            dk_acc, dv_acc, key, value, n, q + q_base, do + q_base, lse + row, delta + row, starts,
            n0 // BM * BM, diagonal_end, scale, T, H * C, C, BM, True, EVEN,
        )  # fmt: skip
        dk_acc, dv_acc = _keys_range(
            dk_acc, dv_acc, key, value, n, q + q_base, do + q_base, lse + row, delta + row, starts,
            diagonal_end, full_end, scale, T, H * C, C, BM, False, EVEN,
        )  # fmt: skip
        dk_acc, dv_acc = _keys_range(
            dk_acc, dv_acc, key, value, n, q + q_base, do + q_base, lse + row, delta + row, starts,
            full_end, end, scale, T, H * C, C, BM, True, EVEN,
        )  # fmt: skip
    place = kv_base + n[:, None] * (K * C) + tl.arange(0, C)[None, :]
    tl.store(dk + place, (dk_acc * (scale * 0.6931471805599453)).to(dk.dtype.element_ty), mask=n[:, None] < T)
    tl.store(dv + place, dv_acc.to(dv.dtype.element_ty), mask=n[:, None] < T)


@triton.jit
def _queries_range(dq, q, do, row_lse, row_delta, k_base, v_base, m, start, first, end, scale, T, stride,
                   C: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    for n0 in range(first, end, BN):
        n = n0 + tl.arange(0, BN)
        k = _tile(k_base, n, T, stride, C, EVEN)
        v = _tile(v_base, n, T, stride, C, EVEN)
        p = tl.exp2(_scores(q, k, m, n, start, scale, MASK) - row_lse[:, None])
        ds = p * (tl.dot(do, tl.trans(v)) - row_delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    return dq


@triton.jit
def _attend_backward_queries(q, k, v, do, lse, delta, starts, dq, scale, T, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
                             BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """dq of one block of queries."""
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    starts += b * T
    m = m0 + tl.arange(0, BM)
    q_base = (b * T).to(tl.int64) * H * C + h * C
    kv_base = (b * T).to(tl.int64) * K * C + h // (H // K) * C
    row = tl.program_id(1).to(tl.int64) * T
    start = tl.load(starts + m) if EVEN else tl.load(starts + m, mask=m < T, other=0)
    tile, upstream = _tile(q + q_base, m, T, H * C, C, EVEN), _tile(do + q_base, m, T, H * C, C, EVEN)
    row_lse = tl.load(lse + row + m, mask=m < T, other=float("inf"))
    row_delta = tl.load(delta + row + m, mask=m < T, other=0.0)
    acc = tl.zeros((BM, C), dtype=tl.float32)
    lo, full, full_end = _bounds(starts, m0, T, BM, BN)
    end = tl.minimum(m0 + BM, T)
    acc = _queries_range(
        acc, tile, upstream, row_lse, row_delta, k + kv_base, v + kv_base, m, start, lo, full, scale, T, K * C, C, BN, True, EVEN
    )  # fmt: skip
    acc = _queries_range(
        acc, tile, upstream, row_lse, row_delta, k + kv_base, v + kv_base, m, start, full, full_end, scale, T, K * C, C, BN, False, EVEN
    )  # fmt: skip
    acc = _queries_range(
        acc, tile, upstream, row_lse, row_delta, k + kv_base, v + kv_base, m, start, tl.maximum(full_end, lo), end, scale, T, K * C, C, BN,
        True, EVEN,
    )  # fmt: skip
    place = q_base + m[:, None] * (H * C) + tl.arange(0, C)[None, :]
    tl.store(dq + place, (acc * (scale * 0.6931471805599453)).to(dq.dtype.element_ty), mask=m[:, None] < T)


# Block sizes, warps and stages of each kernel, the fastest of benchmarks/attention_blocks.py on an H200 at head dimension 64.
FORWARD = {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3}
KEYS = {"BM": 128, "BN": 64, "num_warps": 4, "num_stages": 2}
QUERIES = {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3}
LARGEST_BLOCK = 128
OWN_VALUE_ROWS = 16


def _scale(C: int) -> float:
    return math.log2(math.e) / math.sqrt(C)


@operator("document_attention")
def _attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, C = q.shape
    y, lse, share = (
        torch.empty_like(q),
        torch.empty(B, H, T, device=q.device),
        torch.empty(B, H, T, device=q.device),
    )
    _attend_forward[(triton.cdiv(T, FORWARD["BM"]), B * H)](
        q, k, v, starts, y, lse, share, _scale(C), T, H, k.shape[2], C, EVEN=T % LARGEST_BLOCK == 0, **FORWARD
    )  # fmt: skip
    return y, lse, share


@torch.library.register_fake("caddie::document_attention")
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, _ = q.shape
    return torch.empty_like(q), torch.empty(B, H, T, device=q.device), torch.empty(B, H, T, device=q.device)


@operator("document_attention_backward")
def _attend_gradient(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    ends: Tensor,
    y: Tensor,
    lse: Tensor,
    share: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, C = q.shape
    K, even = k.shape[2], T % LARGEST_BLOCK == 0
    dq, dk, dv, do, delta = (torch.empty_like(tensor) for tensor in (q, k, v, q, lse))
    _own_value_backward[(triton.cdiv(T, OWN_VALUE_ROWS), B * K)](
        dy, y, v, share, do, delta, dv, T, H, K, C, OWN_VALUE_ROWS
    )
    _attend_backward_keys[(triton.cdiv(T, KEYS["BN"]), B * K)](
        q, k, v, do, lse, delta, starts, ends, dk, dv, _scale(C), T, H, K, C, EVEN=even, **KEYS
    )  # fmt: skip
    _attend_backward_queries[(triton.cdiv(T, QUERIES["BM"]), B * H)](
        q, k, v, do, lse, delta, starts, dq, _scale(C), T, H, K, C, EVEN=even, **QUERIES
    )  # fmt: skip
    return dq, dk, dv


@torch.library.register_fake("caddie::document_attention_backward")
def _(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    ends: Tensor,
    y: Tensor,
    lse: Tensor,
    share: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs, *output)


def _vjp(ctx, dy, *_):
    return *_attend_gradient(dy.contiguous(), *ctx.saved_tensors), None, None


torch.library.register_autograd("caddie::document_attention", _vjp, setup_context=_save)


def attend(q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, starts_BT: Tensor, ends_BT: Tensor) -> Tensor:
    """The fused twin of `plain.attend` within documents."""
    return _attend(q_BTHC.contiguous(), k_BTKC.contiguous(), v_BTKC.contiguous(), starts_BT, ends_BT)[0]
