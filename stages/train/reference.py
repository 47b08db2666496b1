"""Reference implementation of the model's operations in plain PyTorch.

Every fused kernel in kernels/ must equal its function here (tests/test_kernels.py). The CPU runs
these functions, and so does a GPU with `parallel.kernels: false`. `Ops` collects them: a model
calls its operations through one `Ops`, either `REFERENCE_OPS` or the kernels' `FUSED_OPS` (ops.py
chooses).

Shapes: B batch, T tokens, D width, H query heads, K key-value heads, C head dimension, E = (H + 2K)
C, R half the rotated dimensions, N rows, F hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.train import cpu_attention

NORM_EPS = torch.finfo(torch.float32).eps  # added to the mean square in RMS norms
NEGATIVE_SLOPE = 0.5  # of the leaky ReLU in the MLP


class DocumentBounds(NamedTuple):
    """First and last position, in its window, of the document that each token belongs to; (B, T) int32."""

    starts_BT: Tensor
    ends_BT: Tensor


class Term(NamedTuple):
    """One term of the residual stream: a tensor (..., D) and its weight (D,); a weight of None is one."""

    tensor: Tensor
    weight: Tensor | None = None


def document_bounds(tokens_BT: Tensor, bos: int) -> DocumentBounds:
    """Find the documents in windows of tokens; the tokens before the first BOS are a document too."""
    positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device, dtype=torch.int32).expand(
        tokens_BT.shape
    )
    is_first = (tokens_BT == bos).index_fill(1, positions.new_zeros(1, dtype=torch.int64), True)
    starts = torch.where(is_first, positions, 0).cummax(1).values
    is_last = F.pad(is_first[:, 1:], (0, 1), value=True)
    ends = torch.where(is_last, positions, tokens_BT.shape[1]).flip(1).cummin(1).values.flip(1)
    return DocumentBounds(starts.to(torch.int32), ends.to(torch.int32))


def whole_window_bounds(windows: int, tokens: int, device: torch.device) -> DocumentBounds:
    """The bounds that make each window one document."""
    starts = torch.zeros(windows, tokens, dtype=torch.int32, device=device)
    return DocumentBounds(starts, starts + (tokens - 1))


def rms_norm(x: Tensor) -> Tensor:
    """Divide x (..., D) by its root mean square along the last dimension; no weight."""
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)


def weighted_sum(terms: Sequence[Term]) -> Tensor:
    """The weighted sum of the terms, (..., D)."""
    (x, w), *rest = terms
    total = x if w is None else w.to(x.dtype) * x
    for x, w in rest:
        total = total + x if w is None else torch.addcmul(total, w.to(x.dtype), x)
    return total


def weighted_sum_norm(terms: Sequence[Term], scale: float) -> tuple[Tensor, Tensor]:
    """The weighted sum u of the terms, and `scale` times its RMS norm; both (..., D)."""
    u = weighted_sum(terms)
    return u, rms_norm(u) * scale


def rotate(x_BTHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to the leading 2R dimensions of each head, as two halves; the others are unchanged.

    `cos` and `sin` are (T, 1, R) or (B, T, 1, R).
    """
    half = cos.shape[-1]
    cos, sin = cos.to(x_BTHC.dtype), sin.to(x_BTHC.dtype)
    first, second, rest = x_BTHC[..., :half], x_BTHC[..., half : 2 * half], x_BTHC[..., 2 * half :]
    return torch.cat((first * cos + second * sin, second * cos - first * sin, rest), dim=-1)


def qk_norm_rope(
    joint_BTE: Tensor, gain_H: Tensor, cos_TR: Tensor, sin_TR: Tensor, starts_BT: Tensor | None, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the joint projection into q (B, T, H, C), k and v (B, T, K, C); normalise and rotate q and k.

    q is multiplied by its gain. With `starts_BT` positions count from the start of each document.
    """
    heads = gain_H.shape[0]
    joint = joint_BTE.unflatten(-1, (heads + 2 * kv_heads, -1))
    q, k, v = joint.split((heads, kv_heads, kv_heads), dim=2)
    if starts_BT is not None:
        positions = torch.arange(joint.shape[1], device=joint.device) - starts_BT
        cos_TR, sin_TR = cos_TR[positions], sin_TR[positions]
    cos, sin = cos_TR.unsqueeze(-2), sin_TR.unsqueeze(-2)
    return rotate(rms_norm(q), cos, sin) * gain_H.to(q.dtype)[:, None], rotate(rms_norm(k), cos, sin), v


def attend(q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, documents: DocumentBounds | None) -> Tensor:
    """Causal grouped-query attention without the self value, (B, T, H, C); within `documents` if given.

    Query head h reads key-value head h // (H / K).
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BTHC, k_BTKC, v_BTKC))
    visible_BTT = None if documents is None else _visible(documents)
    if q.device.type == "cpu":
        y = cpu_attention.attention(q, k, v, visible_BTT)
    elif visible_BTT is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_BTT[:, None], enable_gqa=True)
    return remove_self_value(y.transpose(1, 2), v_BTKC)


def _visible(documents: DocumentBounds) -> Tensor:
    """Attention mask (B, T, T) bool: a query (dimension 1) sees its own document up to itself."""
    positions = torch.arange(documents.starts_BT.shape[1], device=documents.starts_BT.device)
    return (positions <= positions[:, None]) & (positions >= documents.starts_BT[:, :, None])


def remove_self_value(y_BTHC: Tensor, v_BTKC: Tensor) -> Tensor:
    """Exclusive self-attention (XSA): remove from y its component along the token's own value.

    Head h of y belongs to key-value head h // (H / K).
    """
    direction = F.normalize(v_BTKC, dim=-1).unsqueeze(3)
    y = y_BTHC.unflatten(2, (v_BTKC.shape[2], -1))
    return (y - (y * direction).sum(-1, keepdim=True) * direction).flatten(2, 3)


def squared_leaky_relu(z: Tensor) -> Tensor:
    """leaky_relu(z)^2 elementwise: z^2 above zero, z^2 / 4 below."""
    return F.leaky_relu(z, NEGATIVE_SLOPE).square()


def squared_leaky_relu_mlp(x: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """down leaky_relu(up x)^2 for x (..., D)."""
    return F.linear(squared_leaky_relu(F.linear(x, up_FD)), down_DF)


def softcapped(z: Tensor, softcap: float) -> Tensor:
    """Logits z of any shape squeezed into (-softcap, softcap): softcap * tanh(z / softcap), float32.

    Computed as tanh(x) = 2 sigmoid(2x) - 1: on the CPU torch's tanh is MKL's, whose bits depend on
    the CPU's vendor.
    """
    return torch.sigmoid(z.float() * (2 / softcap)) * (2 * softcap) - softcap


def softcapped_cross_entropy(z_NV: Tensor, targets_N: Tensor, softcap: float) -> Tensor:
    """Negative log-likelihoods in nats, (N,) float32, of the targets under softcapped logits."""
    return F.cross_entropy(softcapped(z_NV, softcap), targets_N, reduction="none")


class Ops(NamedTuple):
    """The operations with a fused form, named and called like the functions of this module."""

    weighted_sum: Callable[[Sequence[Term]], Tensor]
    weighted_sum_norm: Callable[[Sequence[Term], float], tuple[Tensor, Tensor]]
    qk_norm_rope: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor | None, int], tuple[Tensor, Tensor, Tensor]
    ]
    attend: Callable[[Tensor, Tensor, Tensor, DocumentBounds | None], Tensor]
    mlp: Callable[[Tensor, Tensor, Tensor], Tensor] | None  # None: the MLP calls its own two linear layers
    cross_entropy: Callable[[Tensor, Tensor, float], Tensor]


REFERENCE_OPS = Ops(
    weighted_sum,
    weighted_sum_norm,
    qk_norm_rope,
    attend,
    mlp=None,
    cross_entropy=softcapped_cross_entropy,
)
