"""Causal attention within documents, without the token's own value (XSA), as Triton kernels.

Keys before a document's first token are neither read nor computed (#1530 uses FA3's varlen form).
Documents are given per token, by the first and the last position of its document in the window, and
not as a list of lengths: shapes stay fixed whatever the text, so nothing is compiled again.

Forward: a program walks the key blocks from its first token's document on; only the blocks at the
diagonal and at a document's edge are masked. Backward: two kernels, by keys and by queries,
recompute the probabilities (FlashAttention-2, arXiv 2307.08691). They use no atomics, so results
repeat bit for bit.

With o the attention's output and v the token's own value, the kernel writes y = o - share v, where
share = o . v / v . v; o itself is not kept.

Shapes: B batch, T tokens, H query heads, K key-value heads, C head dimension; lse (base 2), share
and delta are (B, H, T) float32.

Names in the kernels: m positions of queries and BM their block size, n positions of keys and BN
their block size, s scores in base 2 (BM, BN), p probabilities, d* gradients. EVEN: T is a multiple
of every block size, so that loads need no mask.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from stages.train.kernels.operator import operator

MIN_SQUARED_NORM = tl.constexpr(1e-24)  # floor of a value's squared norm, as in torch's normalize
# Score of a masked pair. It is finite, so that a row whose first block is masked whole stays a
# number.
MASKED_SCORE = tl.constexpr(-1.0e6)
# `scale` contains log2(e); scale * LN_2 is the 1 / sqrt(C) that the gradients of q and k need.
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tile(base, rows, T, stride, C: tl.constexpr, EVEN: tl.constexpr):
    """Load rows of a head, (rows, C); zeros beyond T."""
    pointers = base + rows[:, None] * stride + tl.arange(0, C)[None, :]
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=rows[:, None] < T, other=0.0)


@triton.jit
def _scores(q, k, m, n, start, scale, MASK: tl.constexpr):
    """Scores in base 2 of queries m against keys n, (BM, BN)."""
    s = tl.dot(q, tl.trans(k)) * scale
    if MASK:
        s = tl.where((n[None, :] <= m[:, None]) & (n[None, :] >= start[:, None]), s, MASKED_SCORE)
    return s


@triton.jit
def _accumulate_output(
    q, acc, row_max, row_sum, k_base, v_base, m, start, first, end, scale, T, stride,
    C: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys [first, end).

    Updates the weighted sum of values `acc` (BM, C), the maximum score and the sum of exponentials
    (BM,).
    """
    for n0 in range(first, end, BN):
        n = n0 + tl.arange(0, BN)
        k = _tile(k_base, n, T, stride, C, EVEN)
        s = _scores(q, k, m, n, start, scale, MASK)
        new_max = tl.maximum(row_max, tl.max(s, 1))
        p = tl.exp2(s - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        v = _tile(v_base, n, T, stride, C, EVEN)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None])
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def _key_ranges(starts, m0, T, BM: tl.constexpr, BN: tl.constexpr):
    """Keys of the queries from m0 on: the first one, and the range [full_start, full_end) without a mask."""
    first_key = tl.load(starts + m0) // BN * BN
    last = tl.load(starts + tl.minimum(m0 + BM, T) - 1)
    full_end = m0 // BN * BN
    full_start = tl.minimum(tl.cdiv(last, BN) * BN, full_end)
    return first_key, tl.maximum(full_start, first_key), full_end


@triton.jit
def _attend_forward(
    q, k, v, starts, y, lse, share, scale, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """y, lse and share of one block of queries."""
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # the longest rows first
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    starts += b * T
    m = m0 + tl.arange(0, BM)
    q_base = (b * T).to(tl.int64) * H * C + h * C
    kv_base = (b * T).to(tl.int64) * K * C + h // (H // K) * C

    # The queries, and the state of the online softmax.
    start = tl.load(starts + m) if EVEN else tl.load(starts + m, mask=m < T, other=0)
    q_tile = _tile(q + q_base, m, T, H * C, C, EVEN)
    acc = tl.zeros((BM, C), dtype=tl.float32)
    row_max = tl.full((BM,), -float("inf"), dtype=tl.float32)
    row_sum = tl.zeros((BM,), dtype=tl.float32)

    # Keys in three ranges: the edge of the first document, masked ...
    first_key, full_start, full_end = _key_ranges(starts, m0, T, BM, BN)
    acc, row_max, row_sum = _accumulate_output(
        q_tile, acc, row_max, row_sum, k + kv_base, v + kv_base, m, start,
        first_key, full_start, scale, T, K * C, C, BN, True, EVEN
    )  # fmt: skip

    # ... whole blocks without a mask ...
    acc, row_max, row_sum = _accumulate_output(
        q_tile, acc, row_max, row_sum, k + kv_base, v + kv_base, m, start,
        full_start, full_end, scale, T, K * C, C, BN, False, EVEN
    )  # fmt: skip

    # ... and the diagonal, masked.
    end = tl.minimum(m0 + BM, T)
    acc, row_max, row_sum = _accumulate_output(
        q_tile, acc, row_max, row_sum, k + kv_base, v + kv_base, m, start,
        tl.maximum(full_end, first_key), end, scale, T, K * C, C, BN, True, EVEN
    )  # fmt: skip

    # Remove the component along the token's own value.
    out = acc / row_sum[:, None]
    self_value = _tile(v + kv_base, m, T, K * C, C, EVEN).to(tl.float32)
    share_m = tl.sum(out * self_value, 1) / tl.maximum(tl.sum(self_value * self_value, 1), MIN_SQUARED_NORM)
    y_pointers = y + q_base + m[:, None] * (H * C) + tl.arange(0, C)[None, :]
    tl.store(y_pointers, (out - share_m[:, None] * self_value).to(y.dtype.element_ty), mask=m[:, None] < T)

    # Kept for the backward pass.
    row = tl.program_id(1).to(tl.int64) * T + m
    tl.store(lse + row, row_max + tl.log2(row_sum), mask=m < T)
    tl.store(share + row, share_m, mask=m < T)


@triton.jit
def _self_value_backward(
    dy, y, v, share, do, delta, dv, T, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BM: tl.constexpr
):
    """Backward pass of y = o - share v, for the query heads of one group.

    With a = share and b = dy . v / v . v it computes do = dy - b v and delta = do . o for each
    head, and the self values' part of dv, the sum over the heads of a b v - a dy - b y.
    """
    b, group = tl.program_id(1) // K, tl.program_id(1) % K
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, C)
    mask = m[:, None] < T
    v_offsets = (b * T).to(tl.int64) * K * C + group * C + m[:, None] * (K * C) + c[None, :]
    self_value = tl.load(v + v_offsets, mask=mask, other=0.0).to(tl.float32)
    inverse_square = 1.0 / tl.maximum(tl.sum(self_value * self_value, 1), MIN_SQUARED_NORM)

    dv_total = tl.zeros((BM, C), dtype=tl.float32)
    for member in range(H // K):
        h = group * (H // K) + member
        offsets = (b * T).to(tl.int64) * H * C + h * C + m[:, None] * (H * C) + c[None, :]
        row = (b * H + h).to(tl.int64) * T + m
        dy_tile = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
        y_tile = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
        share_m = tl.load(share + row, mask=m < T, other=0.0)  # a

        dy_share = tl.sum(dy_tile * self_value, 1) * inverse_square  # b of the docstring
        do_tile = dy_tile - dy_share[:, None] * self_value
        tl.store(do + offsets, do_tile.to(do.dtype.element_ty), mask=mask)
        tl.store(delta + row, tl.sum(do_tile * (y_tile + share_m[:, None] * self_value), 1), mask=m < T)
        dv_total += (
            (share_m * dy_share)[:, None] * self_value
            - share_m[:, None] * dy_tile
            - dy_share[:, None] * y_tile
        )
    tl.store(dv + v_offsets, dv_total.to(dv.dtype.element_ty), mask=mask)


@triton.jit
def _accumulate_dk_dv(
    dk, dv, k, v, n, q_base, do_base, lse, delta, starts, first, end, scale, T, stride,
    C: tl.constexpr, BM: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Add the contribution of the queries [first, end) of one head to dk and dv (BN, C) of the keys n."""
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
def _attend_backward_keys(
    q, k, v, do, lse, delta, starts, ends, dk, dv, scale, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys, over all queries of the group's heads that see it.

    dv already holds the self values' part (_self_value_backward).
    """
    n0 = tl.program_id(0) * BN  # the first keys have the longest columns
    b, group = tl.program_id(1) // K, tl.program_id(1) % K
    starts += b * T
    ends += b * T
    n = n0 + tl.arange(0, BN)
    kv_base = (b * T).to(tl.int64) * K * C + group * C
    key = _tile(k + kv_base, n, T, K * C, C, EVEN)
    value = _tile(v + kv_base, n, T, K * C, C, EVEN)

    # Queries in three ranges: the diagonal, whole blocks, the edge of the last document.
    end = tl.load(ends + tl.minimum(n0 + BN, T) - 1) + 1
    diagonal_end = tl.minimum(tl.cdiv(n0 + BN, BM) * BM, end)
    full_end = tl.maximum((tl.load(ends + n0) + 1) // BM * BM, diagonal_end)
    dk_acc = tl.zeros((BN, C), dtype=tl.float32)
    dv_acc = _tile(dv + kv_base, n, T, K * C, C, EVEN).to(tl.float32)
    for member in range(H // K):
        h = group * (H // K) + member
        q_base = (b * T).to(tl.int64) * H * C + h * C
        row = (b * H + h).to(tl.int64) * T

        # The first and the last range are masked.
        dk_acc, dv_acc = _accumulate_dk_dv(
            dk_acc, dv_acc, key, value, n, q + q_base, do + q_base, lse + row, delta + row, starts,
            n0 // BM * BM, diagonal_end, scale, T, H * C, C, BM, True, EVEN,
        )  # fmt: skip
        dk_acc, dv_acc = _accumulate_dk_dv(
            dk_acc, dv_acc, key, value, n, q + q_base, do + q_base, lse + row, delta + row, starts,
            diagonal_end, full_end, scale, T, H * C, C, BM, False, EVEN,
        )  # fmt: skip
        dk_acc, dv_acc = _accumulate_dk_dv(
            dk_acc, dv_acc, key, value, n, q + q_base, do + q_base, lse + row, delta + row, starts,
            full_end, end, scale, T, H * C, C, BM, True, EVEN,
        )  # fmt: skip

    offsets = kv_base + n[:, None] * (K * C) + tl.arange(0, C)[None, :]
    tl.store(dk + offsets, (dk_acc * (scale * LN_2)).to(dk.dtype.element_ty), mask=n[:, None] < T)
    tl.store(dv + offsets, dv_acc.to(dv.dtype.element_ty), mask=n[:, None] < T)


@triton.jit
def _accumulate_dq(
    dq, q, do, row_lse, row_delta, k_base, v_base, m, start, first, end, scale, T, stride,
    C: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Add the contribution of the keys [first, end) to dq (BM, C) of the queries m."""
    for n0 in range(first, end, BN):
        n = n0 + tl.arange(0, BN)
        k = _tile(k_base, n, T, stride, C, EVEN)
        v = _tile(v_base, n, T, stride, C, EVEN)
        p = tl.exp2(_scores(q, k, m, n, start, scale, MASK) - row_lse[:, None])
        ds = p * (tl.dot(do, tl.trans(v)) - row_delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    return dq


@triton.jit
def _attend_backward_queries(
    q, k, v, do, lse, delta, starts, dq, scale, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries."""
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    starts += b * T
    m = m0 + tl.arange(0, BM)
    q_base = (b * T).to(tl.int64) * H * C + h * C
    kv_base = (b * T).to(tl.int64) * K * C + h // (H // K) * C
    row = tl.program_id(1).to(tl.int64) * T

    # The queries with their gradients and the statistics of the forward pass.
    start = tl.load(starts + m) if EVEN else tl.load(starts + m, mask=m < T, other=0)
    q_tile = _tile(q + q_base, m, T, H * C, C, EVEN)
    do_tile = _tile(do + q_base, m, T, H * C, C, EVEN)
    row_lse = tl.load(lse + row + m, mask=m < T, other=float("inf"))
    row_delta = tl.load(delta + row + m, mask=m < T, other=0.0)
    acc = tl.zeros((BM, C), dtype=tl.float32)

    # Keys in three ranges as in the forward pass: masked ...
    first_key, full_start, full_end = _key_ranges(starts, m0, T, BM, BN)
    end = tl.minimum(m0 + BM, T)
    acc = _accumulate_dq(
        acc, q_tile, do_tile, row_lse, row_delta, k + kv_base, v + kv_base, m, start,
        first_key, full_start, scale, T, K * C, C, BN, True, EVEN
    )  # fmt: skip

    # ... without a mask ...
    acc = _accumulate_dq(
        acc, q_tile, do_tile, row_lse, row_delta, k + kv_base, v + kv_base, m, start,
        full_start, full_end, scale, T, K * C, C, BN, False, EVEN
    )  # fmt: skip

    # ... and masked.
    acc = _accumulate_dq(
        acc, q_tile, do_tile, row_lse, row_delta, k + kv_base, v + kv_base, m, start,
        tl.maximum(full_end, first_key), end, scale, T, K * C, C, BN, True, EVEN
    )  # fmt: skip

    offsets = q_base + m[:, None] * (H * C) + tl.arange(0, C)[None, :]
    tl.store(dq + offsets, (acc * (scale * LN_2)).to(dq.dtype.element_ty), mask=m[:, None] < T)


# Block sizes, warps and pipeline stages of each kernel: the fastest on an H200 at head dimension
# 64.
FORWARD = {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3}
KEYS = {"BM": 128, "BN": 64, "num_warps": 4, "num_stages": 2}
QUERIES = {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3}
MAX_BLOCK = 128  # the largest block above, a multiple of all others
SELF_VALUE_ROWS = 16  # tokens of one program of _self_value_backward


def _scale(C: int) -> float:
    """The factor on q . k: 1 / sqrt(C), and log2(e) because exponentials are in base 2."""
    return math.log2(math.e) / math.sqrt(C)


@operator("document_attention")
def _attend_op(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, H, C), lse and share (B, H, T), of contiguous inputs."""
    B, T, H, C = q.shape
    y = torch.empty_like(q)
    lse = torch.empty(B, H, T, device=q.device)
    share = torch.empty(B, H, T, device=q.device)
    _attend_forward[(triton.cdiv(T, FORWARD["BM"]), B * H)](
        q, k, v, starts, y, lse, share, _scale(C), T, H, k.shape[2], C, EVEN=T % MAX_BLOCK == 0, **FORWARD
    )  # fmt: skip
    return y, lse, share


@torch.library.register_fake("caddie::document_attention")
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, _ = q.shape
    return torch.empty_like(q), torch.empty(B, H, T, device=q.device), torch.empty(B, H, T, device=q.device)


@operator("document_attention_backward")
def _attend_backward_op(
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
    """dq, dk and dv of contiguous inputs."""
    B, T, H, C = q.shape
    K = k.shape[2]
    even = T % MAX_BLOCK == 0
    dq, dk, dv, do, delta = (torch.empty_like(tensor) for tensor in (q, k, v, q, lse))

    # The gradient of the removal of the self value, which gives do and delta to the other two
    # kernels.
    _self_value_backward[(triton.cdiv(T, SELF_VALUE_ROWS), B * K)](
        dy, y, v, share, do, delta, dv, T, H, K, C, SELF_VALUE_ROWS
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
    return *_attend_backward_op(dy.contiguous(), *ctx.saved_tensors), None, None


torch.library.register_autograd("caddie::document_attention", _vjp, setup_context=_save)


def attend(q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, starts_BT: Tensor, ends_BT: Tensor) -> Tensor:
    """The fused counterpart of `reference.attend`, within documents."""
    return _attend_op(q_BTHC.contiguous(), k_BTKC.contiguous(), v_BTKC.contiguous(), starts_BT, ends_BT)[0]
