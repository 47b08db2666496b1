"""Attention on the CPU against torch's own, in float64, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from stages.train import cpu_attention


def inputs(tokens: int, heads: int, kv_heads: int) -> list[torch.Tensor]:
    """q, k and v as the model has them: heads are the second dimension, and their memory is by tokens."""
    torch.manual_seed(tokens)
    return [
        torch.randn(2, tokens, h, 16, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]


def documents_mask(tokens: int) -> torch.Tensor:
    """Two windows, each of two documents."""
    document = torch.stack([torch.arange(tokens) >= first for first in (tokens // 3, tokens // 2)])
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return causal & (document[:, :, None] == document[:, None, :])


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads"), [(1, 2, 1), (128, 4, 4), (300, 4, 2)])
def test_equals_torch(
    tokens: int, heads: int, kv_heads: int, masked: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kept:
        monkeypatch.setattr(cpu_attention, "MAX_KEPT_WEIGHTS", 0)
    (q, k, v), theirs = inputs(tokens, heads, kv_heads), inputs(tokens, heads, kv_heads)
    visible = documents_mask(tokens) if masked else None
    out = cpu_attention.attention(q, k, v, visible)
    mask = None if visible is None else visible[:, None]
    expected = F.scaled_dot_product_attention(
        theirs[0], theirs[1], theirs[2], attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    torch.testing.assert_close(out, expected)

    weight = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weight).sum(), (q, k, v))
    for gradient, other in zip(
        gradients, torch.autograd.grad((expected * weight).sum(), theirs), strict=True
    ):
        torch.testing.assert_close(gradient, other)
