"""Attention on the CPU, forward and backward, in blocks of queries: products, a softmax, and nothing that depends on the CPU's vendor.

torch's own kernel (scaled_dot_product_attention) calls MKL from the inside, where stages/common/cpu_math.py cannot reach. This one also
leaves out the keys after a block's last query, which the causal mask hides from all of it: for T tokens in blocks of N, 1/2 + N/2T of the
work.

The backward pass recomputes the weights P = softmax(S), S = Q K^T / sqrt(C), where T^2 of them would be too many to keep. With O = P V and
dO given,

    dV = P^T dO    dP = dO V^T    dS = P * (dP - rowsum(dO * O))    dQ = dS K / sqrt(C)    dK = dS^T Q / sqrt(C)

Shapes: B batch, H query heads, K key-value heads, G = H / K query heads of a group, T tokens, C head dimension, N queries of a block,
M = keys that a block may see.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

KEPT_FLOATS = (
    1 << 22
)  # weights of one call that are kept for the backward pass (16 MB); more are computed again
BLOCK_QUERIES = 128  # a block's scores, G N T floats a key-value head, fit the L2 cache at T = 256; larger blocks skip fewer keys


class Block(NamedTuple):
    """The queries [first, last) of a batch with the keys that they may see, as batches of matrices; heads of a group are rows of one."""

    first: int
    last: int
    query_AXC: Tensor  # A = B K, X = G N
    key_AMC: Tensor
    value_AMC: Tensor
    weights_AXM: Tensor  # P


def attention(q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, visible_BTT: Tensor | None) -> Tensor:
    """Causal grouped-query attention, (B, H, T, C); `visible_BTT` says which keys (last dimension) a query may see, none after it."""
    result: Tensor = _Attention.apply(q_BHTC, k_BKTC, v_BKTC, visible_BTT)  # type: ignore[no-untyped-call]
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        out_BHTC = torch.empty_like(q, memory_format=torch.contiguous_format)
        keep = q.shape[0] * q.shape[1] * q.shape[2] ** 2 <= KEPT_FLOATS
        kept = []
        for block in _blocks(q, k, v, visible):
            out_BHTC[:, :, block.first : block.last] = _ungrouped(
                torch.bmm(block.weights_AXM, block.value_AMC), q, block
            )
            if keep:
                kept.append(block)
        context.kept_blocks = kept
        context.save_for_backward(q, k, v, visible, out_BHTC)
        return out_BHTC

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, visible, out_BHTC = context.saved_tensors
        grad_out_BHTC = gradients[0]
        scale = 1 / math.sqrt(q.shape[-1])
        grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        grad_k_ATC, grad_v_ATC = (
            torch.zeros_like(x, memory_format=torch.contiguous_format).flatten(0, 1) for x in (k, v)
        )

        for block in context.kept_blocks or _blocks(q, k, v, visible):
            seen, queries = block.key_AMC.shape[1], slice(block.first, block.last)
            grad_out_AXC = _grouped(grad_out_BHTC[:, :, queries], k.shape[1])
            row_sums_AX1 = (grad_out_AXC * _grouped(out_BHTC[:, :, queries], k.shape[1])).sum(
                -1, keepdim=True
            )

            grad_scores_AXM = torch.baddbmm(-row_sums_AX1, grad_out_AXC, block.value_AMC.mT).mul_(
                block.weights_AXM
            )
            grad_q[:, :, queries] = _ungrouped(
                _scaled_product(grad_scores_AXM, block.key_AMC, scale), q, block
            )
            grad_k_ATC[:, :seen] += _scaled_product(grad_scores_AXM.mT, block.query_AXC, scale)
            grad_v_ATC[:, :seen] += torch.bmm(block.weights_AXM.mT, grad_out_AXC)

        return grad_q, grad_k_ATC.view(k.shape), grad_v_ATC.view(v.shape), None


def _blocks(q: Tensor, k: Tensor, v: Tensor, visible_BTT: Tensor | None) -> Iterator[Block]:
    """Every block of queries, with its weights."""
    _, heads, tokens, width = q.shape
    kv_heads = k.shape[1]
    key_ATC, value_ATC = k.flatten(0, 1), v.flatten(0, 1)
    for first in range(0, tokens, BLOCK_QUERIES):
        last = min(first + BLOCK_QUERIES, tokens)
        query_AXC = _grouped(q[:, :, first:last], kv_heads)
        key_AMC, value_AMC = key_ATC[:, :last], value_ATC[:, :last]

        # The mask is what the product is added to: minus infinity for a hidden key.
        hidden_BNM = (
            _later(first, last, q.device) if visible_BTT is None else ~visible_BTT[:, first:last, :last]
        )
        mask_BNM = torch.zeros(hidden_BNM.shape, dtype=q.dtype, device=q.device).masked_fill_(
            hidden_BNM, -math.inf
        )
        mask_BXM = mask_BNM.repeat(1, heads // kv_heads, 1)
        mask_AXM = mask_BXM if visible_BTT is None else mask_BXM.repeat_interleave(kv_heads, dim=0)
        scores_AXM = torch.baddbmm(mask_AXM, query_AXC, key_AMC.mT, alpha=1 / math.sqrt(width))

        yield Block(first, last, query_AXC, key_AMC, value_AMC, torch.softmax(scores_AXM, dim=-1))


def _later(first: int, last: int, device: torch.device) -> Tensor:
    """Which keys, up to the block's last query, come after each query of the block: (1, N, M) bool."""
    positions = torch.arange(last, device=device)
    return (positions > positions[first:, None])[None]


def _scaled_product(a_AXY: Tensor, b_AYZ: Tensor, scale: float) -> Tensor:
    """scale * a b; the factor costs nothing inside a product."""
    return torch.baddbmm(a_AXY.new_zeros(1, 1, 1), a_AXY, b_AYZ, beta=0, alpha=scale)


def _grouped(x_BHNC: Tensor, kv_heads: int) -> Tensor:
    """The heads of each group beneath one another: (B, H, N, C) to (A, X, C)."""
    batch, heads, queries, width = x_BHNC.shape
    return x_BHNC.reshape(batch * kv_heads, heads // kv_heads * queries, width)


def _ungrouped(x_AXC: Tensor, q_BHTC: Tensor, block: Block) -> Tensor:
    """And back: (A, X, C) to (B, H, N, C)."""
    batch, heads, _, width = q_BHTC.shape
    return x_AXC.view(batch, heads, block.last - block.first, width)
