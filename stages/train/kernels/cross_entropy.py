"""Softcapped cross entropy in one pass over the logits each way (#1787), with nothing of their size kept but themselves.

A softcap bounds every logit by itself, so the sum of exponentials needs no running maximum: with y = c tanh(z / c), sum exp(y - c) lies
between V e^(-2c) and V, inside float32 for c up to operations.LARGEST_SOFTCAP. tanh is computed from one exponential of |z|.

Shapes: N tokens, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stages.train.kernels.operator import operator

COLUMNS = 1024  # logits that a program holds at once


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _loss_forward(z, targets, losses, lse, cap, V, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in range(0, V, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        x = tl.load(z + row * V + column, mask=column < V, other=0.0).to(tl.float32)
        total += tl.where(column < V, tl.exp(cap * _tanh(x / cap) - cap), 0.0)
    log_sum = cap + tl.log(tl.sum(total))
    target = tl.load(z + row * V + tl.load(targets + row)).to(tl.float32)
    tl.store(lse + row, log_sum)
    tl.store(losses + row, log_sum - cap * _tanh(target / cap))


@triton.jit
def _loss_backward(dlosses, z, targets, lse, dz, cap, V, COLUMNS: tl.constexpr):
    """dz = g (softmax(y) - [target]) (1 - (y / c)^2)."""
    row = tl.program_id(0).to(tl.int64)
    upstream, log_sum, target = tl.load(dlosses + row), tl.load(lse + row), tl.load(targets + row)
    for first in range(0, V, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        x = tl.load(z + row * V + column, mask=column < V, other=0.0).to(tl.float32)
        t = _tanh(x / cap)
        share = tl.exp(cap * t - log_sum) - tl.where(column == target, 1.0, 0.0)
        tl.store(
            dz + row * V + column, (upstream * share * (1.0 - t * t)).to(dz.dtype.element_ty), mask=column < V
        )


@operator("softcapped_cross_entropy")
def _losses(z: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    N, V = z.shape
    losses, lse = torch.empty(N, device=z.device), torch.empty(N, device=z.device)
    _loss_forward[(N,)](z, targets, losses, lse, cap, V, COLUMNS, num_warps=4)
    return losses, lse


@torch.library.register_fake("caddie::softcapped_cross_entropy")
def _(z: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    return torch.empty(z.shape[0], device=z.device), torch.empty(z.shape[0], device=z.device)


@operator("softcapped_cross_entropy_backward")
def _losses_gradient(dlosses: Tensor, z: Tensor, targets: Tensor, lse: Tensor, cap: float) -> Tensor:
    dz = torch.empty_like(z)
    _loss_backward[(z.shape[0],)](dlosses, z, targets, lse, dz, cap, z.shape[1], COLUMNS, num_warps=4)
    return dz


@torch.library.register_fake("caddie::softcapped_cross_entropy_backward")
def _(dlosses: Tensor, z: Tensor, targets: Tensor, lse: Tensor, cap: float) -> Tensor:
    return torch.empty_like(z)


def _save(ctx, inputs, output):
    z, targets, ctx.cap = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(z, targets, output[1])


def _vjp(ctx, dlosses, _):
    return _losses_gradient(dlosses.contiguous(), *ctx.saved_tensors, ctx.cap), None, None


torch.library.register_autograd("caddie::softcapped_cross_entropy", _vjp, setup_context=_save)


def softcapped_cross_entropy(z_NV: Tensor, targets_N: Tensor, softcap: float) -> Tensor:
    """The fused twin of `plain.softcapped_cross_entropy`."""
    return _losses(z_NV.contiguous(), targets_N.contiguous(), softcap)[0]
