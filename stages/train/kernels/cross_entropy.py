"""Softcapped cross entropy in one pass over the logits each way (#1787); only the logits themselves are kept.

A softcap bounds every logit, so the sum of exponentials needs no running maximum: with y = c tanh(z
/ c), the sum of exp(y - c) is between V e^(-2c) and V, within float32 for c up to
ops.MAX_FUSED_SOFTCAP. tanh is computed from one exponential of |z|.

Shapes: N tokens, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stages.train.kernels.operator import operator

COLUMNS = 1024  # logits of one block of a program's loop


@triton.jit
def _tanh(x):
    """tanh from one exponential of a number that is not positive, so that nothing overflows."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _loss_forward(z, targets, losses, lse, cap, V, COLUMNS: tl.constexpr):
    """Loss and log-sum-exp of one row of logits."""
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
    """dz = g (softmax(y) - onehot(target)) (1 - (y / c)^2) of one row, with g the loss's gradient."""
    row = tl.program_id(0).to(tl.int64)
    upstream = tl.load(dlosses + row)
    log_sum = tl.load(lse + row)
    target = tl.load(targets + row)
    for first in range(0, V, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        x = tl.load(z + row * V + column, mask=column < V, other=0.0).to(tl.float32)
        t = _tanh(x / cap)
        error = tl.exp(cap * t - log_sum) - tl.where(column == target, 1.0, 0.0)
        tl.store(
            dz + row * V + column, (upstream * error * (1.0 - t * t)).to(dz.dtype.element_ty), mask=column < V
        )


@operator("softcapped_cross_entropy")
def _losses_op(z: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Losses and log-sum-exps, (N,) float32 each, of contiguous logits (N, V)."""
    N, V = z.shape
    losses = torch.empty(N, device=z.device)
    lse = torch.empty(N, device=z.device)
    _loss_forward[(N,)](z, targets, losses, lse, cap, V, COLUMNS, num_warps=4)
    return losses, lse


@torch.library.register_fake("caddie::softcapped_cross_entropy")
def _(z: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    return torch.empty(z.shape[0], device=z.device), torch.empty(z.shape[0], device=z.device)


@operator("softcapped_cross_entropy_backward")
def _losses_backward_op(dlosses: Tensor, z: Tensor, targets: Tensor, lse: Tensor, cap: float) -> Tensor:
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
    return _losses_backward_op(dlosses.contiguous(), *ctx.saved_tensors, ctx.cap), None, None


torch.library.register_autograd("caddie::softcapped_cross_entropy", _vjp, setup_context=_save)


def softcapped_cross_entropy(z_NV: Tensor, targets_N: Tensor, softcap: float) -> Tensor:
    """The fused counterpart of `reference.softcapped_cross_entropy`."""
    return _losses_op(z_NV.contiguous(), targets_N.contiguous(), softcap)[0]
