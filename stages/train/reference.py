"""The model's operations in plain torch: what every fused kernel must equal, what the CPU runs, and what tests compare with.

Shapes: B batch, T tokens, H query heads, K key-value heads, C head dimension, E = (H + 2K) C, R half the rotated dimensions, N rows,
D width, F hidden, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.train import cpu_attention

NORM_EPS = torch.finfo(torch.float32).eps
NEGATIVE_SLOPE = 0.5


class Documents(NamedTuple):
    """Where the document of each token of a window begins and ends: positions in the window, both inclusive, (B, T) int32."""

    starts_BT: Tensor
    ends_BT: Tensor


class Term(NamedTuple):
    """A part of the residual stream, (..., D), and the vector (D,) that weighs it; None is one."""

    tensor: Tensor
    weight: Tensor | None = None


def documents_of(tokens_BT: Tensor, bos: int) -> Documents:
    """The documents of windows of tokens; what stands before a window's first BOS is a document too."""
    positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device, dtype=torch.int32).expand(
        tokens_BT.shape
    )
    first = (tokens_BT == bos).index_fill(1, positions.new_zeros(1, dtype=torch.int64), True)
    starts = torch.where(first, positions, 0).cummax(1).values
    last = F.pad(first[:, 1:], (0, 1), value=True)
    ends = torch.where(last, positions, tokens_BT.shape[1]).flip(1).cummin(1).values.flip(1)
    return Documents(starts.to(torch.int32), ends.to(torch.int32))


def whole_windows(windows: int, tokens: int, device: torch.device) -> Documents:
    """Every window as one document."""
    starts = torch.zeros(windows, tokens, dtype=torch.int32, device=device)
    return Documents(starts, starts + (tokens - 1))


def rms_norm(x: Tensor) -> Tensor:
    """x over its root mean square along the last dimension; no weight."""
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)


def combine(terms: Sequence[Term]) -> Tensor:
    """The weighted sum of the terms."""
    (x, w), *rest = terms
    total = x if w is None else w.to(x.dtype) * x
    for x, w in rest:
        total = total + x if w is None else torch.addcmul(total, w.to(x.dtype), x)
    return total


def combine_norm(terms: Sequence[Term], scale: float) -> tuple[Tensor, Tensor]:
    """u, the weighted sum of the terms, and `scale` times its rms_norm."""
    u = combine(terms)
    return u, rms_norm(u) * scale


def rotate(x_BTHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading 2R dimensions of each head by the angles (T, 1, R) or (B, T, 1, R), as two halves; the rest is untouched."""
    half = cos.shape[-1]
    cos, sin = cos.to(x_BTHC.dtype), sin.to(x_BTHC.dtype)
    first, second, rest = x_BTHC[..., :half], x_BTHC[..., half : 2 * half], x_BTHC[..., 2 * half :]
    return torch.cat((first * cos + second * sin, second * cos - first * sin, rest), dim=-1)


def split_heads(
    joint_BTE: Tensor, gain_H: Tensor, cos_TR: Tensor, sin_TR: Tensor, starts_BT: Tensor | None, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The joint projection as q (B, T, H, C), k and v (B, T, K, C): q and k normalised and rotated, q times its gain.

    With `starts_BT` positions are counted from the start of each document.
    """
    heads = gain_H.shape[0]
    joint = joint_BTE.unflatten(-1, (heads + 2 * kv_heads, -1))
    q, k, v = joint.split((heads, kv_heads, kv_heads), dim=2)
    if starts_BT is not None:
        positions = torch.arange(joint.shape[1], device=joint.device) - starts_BT
        cos_TR, sin_TR = cos_TR[positions], sin_TR[positions]
    cos, sin = cos_TR.unsqueeze(-2), sin_TR.unsqueeze(-2)
    return rotate(rms_norm(q), cos, sin) * gain_H.to(q.dtype)[:, None], rotate(rms_norm(k), cos, sin), v


def attend(q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, documents: Documents | None) -> Tensor:
    """Causal grouped-query attention without the token's own value, (B, T, H, C); within documents, if they are given.

    Query head h looks at group h // (H / K).
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BTHC, k_BTKC, v_BTKC))
    visible_BTT = None if documents is None else _visible(documents)
    if q.device.type == "cpu":
        y = cpu_attention.attention(q, k, v, visible_BTT)
    elif visible_BTT is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_BTT[:, None], enable_gqa=True)
    return exclude_own_value(y.transpose(1, 2), v_BTKC)


def _visible(documents: Documents) -> Tensor:
    """Which tokens (last dimension) each token of a window may look at, (B, T, T) bool: those of its document up to itself."""
    positions = torch.arange(documents.starts_BT.shape[1], device=documents.starts_BT.device)
    return (positions <= positions[:, None]) & (positions >= documents.starts_BT[:, :, None])


def exclude_own_value(y_BTHC: Tensor, v_BTKC: Tensor) -> Tensor:
    """y without its component along the token's own value; head h belongs to group h // (H / K)."""
    direction = F.normalize(v_BTKC, dim=-1).unsqueeze(3)
    y = y_BTHC.unflatten(2, (v_BTKC.shape[2], -1))
    return (y - (y * direction).sum(-1, keepdim=True) * direction).flatten(2, 3)


def squared_leaky(z: Tensor) -> Tensor:
    """leaky_relu(z)^2: z^2 above zero, z^2 / 4 below."""
    return F.leaky_relu(z, NEGATIVE_SLOPE).square()


def squared_leaky_mlp(x: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """down leaky_relu(up x)^2 for x (..., D)."""
    return F.linear(squared_leaky(F.linear(x, up_FD)), down_DF)


def softcapped(z: Tensor, softcap: float) -> Tensor:
    """Logits within +-softcap, float32."""
    # tanh(x) = 2 sigmoid(2x) - 1: torch's tanh on the CPU is MKL's, whose bits depend on the CPU and which takes twice the time.
    return torch.sigmoid(z.float() * (2 / softcap)) * (2 * softcap) - softcap


def softcapped_cross_entropy(z_NV: Tensor, targets_N: Tensor, softcap: float) -> Tensor:
    """Negative log-likelihoods in nats, (N,) float32, of softcapped logits."""
    return F.cross_entropy(softcapped(z_NV, softcap), targets_N, reduction="none")
