"""Causal attention on the CPU, forward and backward, one block of queries at a time.

torch's own kernel (scaled_dot_product_attention) calls MKL from the inside, where
stages/common/cpu_math.py cannot replace it, and MKL's products depend on the CPU's vendor. This one
is made of products and a softmax. For a block of N queries it leaves out the keys after the last of
them, which the causal mask hides from the whole block: 1/2 + N/2T of the work for T tokens.

The backward pass recomputes the weights P = softmax(S), S = Q K^T / sqrt(C), if they were too large
to keep. With O = P V and dO given,

    dV = P^T dO    dP = dO V^T    dS = P * (dP - rowsum(dO * O))
    dQ = dS K / sqrt(C)    dK = dS^T Q / sqrt(C)

Shapes: B batch, H query heads, K key-value heads, G = H / K query heads of a group, T tokens, C
head dimension, N queries of a block, M keys that a block may see, A = B K matrices, X = G N rows of
each.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_KEPT_WEIGHTS = 1 << 22  # of one call, kept for the backward pass (16 MB); more are computed again
BLOCK_QUERIES = 128  # a block's scores, G N T floats a key-value head, fit the L2 cache at T = 256


class QueryBlock(NamedTuple):
    """Queries [first, last) and the keys that they may see, as A matrices."""

    first: int
    last: int
    query_AXC: Tensor
    key_AMC: Tensor
    value_AMC: Tensor
    weights_AXM: Tensor  # P


def attention(q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, visible_BTT: Tensor | None) -> Tensor:
    """Causal grouped-query attention, (B, H, T, C).

    `visible_BTT` (bool) says which keys (last dimension) a query may see, none of them after it.
    None: all keys up to the query's own.
    """
    result: Tensor = _Attention.apply(q_BHTC, k_BKTC, v_BKTC, visible_BTT)  # type: ignore[no-untyped-call]
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        batch, heads, tokens, _ = q.shape
        keep = batch * heads * tokens**2 <= MAX_KEPT_WEIGHTS
        kept_blocks = []
        out_BHTC = torch.empty_like(q, memory_format=torch.contiguous_format)
        for block in _blocks(q, k, v, visible):
            out_AXC = torch.bmm(block.weights_AXM, block.value_AMC)
            out_BHTC[:, :, block.first : block.last] = _split_groups(out_AXC, batch, heads)
            if keep:
                kept_blocks.append(block)

        context.kept_blocks = kept_blocks
        context.save_for_backward(q, k, v, visible, out_BHTC)
        return out_BHTC

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, visible, out_BHTC = context.saved_tensors
        grad_out_BHTC = gradients[0]
        batch, heads = q.shape[:2]
        kv_heads = k.shape[1]
        scale = 1 / math.sqrt(q.shape[-1])
        grad_q_BHTC = torch.empty_like(q, memory_format=torch.contiguous_format)
        grad_k_ATC = torch.zeros_like(k, memory_format=torch.contiguous_format).flatten(0, 1)
        grad_v_ATC = torch.zeros_like(v, memory_format=torch.contiguous_format).flatten(0, 1)

        # They are freed like saved tensors; a second backward pass computes them again.
        blocks = context.kept_blocks or _blocks(q, k, v, visible)
        context.kept_blocks = []
        for block in blocks:
            queries = slice(block.first, block.last)
            keys = slice(0, block.key_AMC.shape[1])
            grad_out_AXC = _join_groups(grad_out_BHTC[:, :, queries], kv_heads)
            out_AXC = _join_groups(out_BHTC[:, :, queries], kv_heads)

            # dS = P * (dO V^T - rowsum(dO * O))
            row_sums_AX1 = (grad_out_AXC * out_AXC).sum(-1, keepdim=True)
            grad_scores_AXM = torch.baddbmm(-row_sums_AX1, grad_out_AXC, block.value_AMC.mT)
            grad_scores_AXM *= block.weights_AXM

            grad_q_AXC = _scaled_product(grad_scores_AXM, block.key_AMC, scale)
            grad_q_BHTC[:, :, queries] = _split_groups(grad_q_AXC, batch, heads)
            grad_k_ATC[:, keys] += _scaled_product(grad_scores_AXM.mT, block.query_AXC, scale)
            grad_v_ATC[:, keys] += torch.bmm(block.weights_AXM.mT, grad_out_AXC)

        return grad_q_BHTC, grad_k_ATC.view(k.shape), grad_v_ATC.view(v.shape), None


def _blocks(q: Tensor, k: Tensor, v: Tensor, visible_BTT: Tensor | None) -> Iterator[QueryBlock]:
    """Yield every block of queries with its weights."""
    _, heads, tokens, width = q.shape
    kv_heads = k.shape[1]
    key_ATC = k.flatten(0, 1)
    value_ATC = v.flatten(0, 1)
    for first in range(0, tokens, BLOCK_QUERIES):
        last = min(first + BLOCK_QUERIES, tokens)
        query_AXC = _join_groups(q[:, :, first:last], kv_heads)
        key_AMC = key_ATC[:, :last]

        scores_AXM = _scaled_product(query_AXC, key_AMC.mT, 1 / math.sqrt(width))
        scores_BKGNM = scores_AXM.view(-1, kv_heads, heads // kv_heads, last - first, last)
        if visible_BTT is None:
            # Of the keys up to `last` only those of the block itself can come after one of its queries.
            scores_BKGNM[..., first:] += _causal_mask(last - first, q.dtype, q.device)
        else:
            hidden_BNM = ~visible_BTT[:, first:last, :last]
            mask_BNM = q.new_zeros(hidden_BNM.shape).masked_fill_(hidden_BNM, -math.inf)
            scores_BKGNM += mask_BNM[:, None, None]

        yield QueryBlock(
            first, last, query_AXC, key_AMC, value_ATC[:, :last], torch.softmax(scores_AXM, dim=-1)
        )


@functools.lru_cache(maxsize=4)
def _causal_mask(queries: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Minus infinity for keys (last dimension) after a query, both counted from the block's first: (N, N)."""
    return torch.full((queries, queries), -math.inf, dtype=dtype, device=device).triu(1)


def _scaled_product(a_AXY: Tensor, b_AYZ: Tensor, scale: float) -> Tensor:
    """scale * a b; the factor costs nothing inside a product."""
    return torch.baddbmm(a_AXY.new_zeros(1, 1, 1), a_AXY, b_AYZ, beta=0, alpha=scale)


def _join_groups(x_BHNC: Tensor, kv_heads: int) -> Tensor:
    """Put the query heads of a group below one another: (B, H, N, C) to (A, X, C)."""
    batch, heads, queries, width = x_BHNC.shape
    return x_BHNC.reshape(batch * kv_heads, heads // kv_heads * queries, width)


def _split_groups(x_AXC: Tensor, batch: int, heads: int) -> Tensor:
    """Undo `_join_groups`: (A, X, C) to (B, H, N, C)."""
    return x_AXC.view(batch, heads, -1, x_AXC.shape[-1])
