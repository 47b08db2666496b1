"""Normalisation and RoPE of q and k, and their split from the joint projection, fused.

One pass over the data each way, where the reference implementation (stages/train/reference.py)
takes about ten. Arithmetic is float32 in registers and is rounded once at the end. The gradients of
the gain are summed from one partial sum a program, so that results repeat bit for bit.

A program works on one head of ROWS tokens: heads 0 to H - 1 are q, the next K are k, the last K are
v.

Shapes: B batch, T tokens, N = BT, H query heads, K key-value heads, C head dimension, E = (H + 2K)
C, R half the rotated dimensions (`half` in the kernels).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stages.train.kernels.operator import operator

ROWS = 16  # tokens of one program, which works on one head
NORM_EPS = tl.constexpr(torch.finfo(torch.float32).eps)


@triton.jit
def _angles(cos, sin, starts, rows, columns, T, half: tl.constexpr, has_starts: tl.constexpr, valid):
    """cos and signed sin (rows, columns), and for each column the one that it is rotated with (columns,)."""
    position = rows % T
    if has_starts:
        position -= tl.load(starts + rows, mask=valid, other=0)

    # Columns that do not rotate get cos 1 and sin 0.
    rotates = columns < 2 * half
    angle = position[:, None] * half + (columns % max(half, 1))[None, :]
    mask = valid[:, None] & rotates[None, :]
    c = tl.load(cos + angle, mask=mask, other=1.0)
    s = tl.load(sin + angle, mask=mask, other=0.0)
    s = tl.where((columns < half)[None, :], s, -s)
    partner = tl.where(columns < half, columns + half, tl.where(rotates, columns - half, columns))
    return c, s, partner


@triton.jit
def _qk_norm_rope_forward(
    joint, gain, cos, sin, starts, q, k, v, N, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    half: tl.constexpr, has_starts: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """q and k normalised and rotated, q multiplied by its gain, v copied."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    columns = tl.arange(0, C)
    valid = rows < N
    token = rows[:, None].to(tl.int64)
    offsets = token * ((H + 2 * K) * C) + head * C
    values = tl.load(joint + offsets + columns[None, :], mask=valid[:, None], other=0.0)

    # v is copied.
    if head >= H + K:
        tl.store(v + token * (K * C) + (head - H - K) * C + columns[None, :], values, mask=valid[:, None])
    else:
        # q and k: normalise, rotate, and for q multiply by the gain.
        c, s, partner = _angles(cos, sin, starts, rows, columns, T, half, has_starts, valid)
        x = values.to(tl.float32)
        other = tl.load(joint + offsets + partner[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
        y = (x * c + other * s) * tl.rsqrt(tl.sum(x * x, 1) / C + NORM_EPS)[:, None]
        if head < H:
            out = token * (H * C) + head * C + columns[None, :]
            tl.store(q + out, (y * tl.load(gain + head)).to(q.dtype.element_ty), mask=valid[:, None])
        else:
            out = token * (K * C) + (head - H) * C + columns[None, :]
            tl.store(k + out, y.to(k.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _qk_norm_rope_backward(
    joint, gain, cos, sin, starts, dq, dk, dv, djoint, dgain, N, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    half: tl.constexpr, has_starts: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of the joint projection and of the gain.

    With x a head's input, y the normalised x, z its rotation and g the gain: dg = sum(dq z), dy is
    g dq rotated back, and dx = (dy - y mean(dy y)) / rms(x).
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    columns = tl.arange(0, C)
    valid = rows < N
    token = rows[:, None].to(tl.int64)
    offsets = token * ((H + 2 * K) * C) + head * C

    # The gradient of v is copied.
    if head >= H + K:
        values = tl.load(dv + token * (K * C) + (head - H - K) * C + columns[None, :], mask=valid[:, None])
        tl.store(djoint + offsets + columns[None, :], values, mask=valid[:, None])
    else:
        # The inputs again, and the gradient of their rotation.
        c, s, partner = _angles(cos, sin, starts, rows, columns, T, half, has_starts, valid)
        x = tl.load(joint + offsets + columns[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
        other = tl.load(joint + offsets + partner[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, 1) / C + NORM_EPS)[:, None]
        if head < H:  # noqa: SIM108  (Triton compiles the branches apart)
            source = dq + token * (H * C) + head * C
        else:
            source = dk + token * (K * C) + (head - H) * C
        dz = tl.load(source + columns[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
        dz_other = tl.load(source + partner[None, :], mask=valid[:, None], other=0.0).to(tl.float32)

        # dz . z, which is dy . y, because a rotation does not change it.
        dz_dot_z = tl.sum(dz * (x * c + other * s), 1)[:, None] * inverse
        if head < H:
            tl.store(dgain + tl.program_id(0) * H + head, tl.sum(dz_dot_z))
        g = tl.load(gain + head, mask=head < H, other=1.0)
        dx = g * inverse * (dz * c - dz_other * s - x * inverse * dz_dot_z / C)
        tl.store(djoint + offsets + columns[None, :], dx.to(djoint.dtype.element_ty), mask=valid[:, None])


@operator("qk_norm_rope")
def _qk_norm_rope_op(
    joint: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, starts: Tensor | None, K: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, T, H, C), k and v (B, T, K, C) of contiguous inputs."""
    B, T, E = joint.shape
    H = gain.shape[0]
    C = E // (H + 2 * K)
    q, k, v = (joint.new_empty(B, T, heads, C) for heads in (H, K, K))
    _qk_norm_rope_forward[(triton.cdiv(B * T, ROWS), H + 2 * K)](
        joint, gain, cos, sin, starts, q, k, v, B * T, T, H, K, C, cos.shape[1], starts is not None, ROWS
    )  # fmt: skip
    return q, k, v


@torch.library.register_fake("caddie::qk_norm_rope")
def _(
    joint: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, starts: Tensor | None, K: int
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, E = joint.shape
    C = E // (gain.shape[0] + 2 * K)
    return joint.new_empty(B, T, gain.shape[0], C), joint.new_empty(B, T, K, C), joint.new_empty(B, T, K, C)


@operator("qk_norm_rope_backward")
def _qk_norm_rope_backward_op(
    joint: Tensor,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    starts: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of the joint projection and of the gain; those of q, k and v are contiguous."""
    B, T, H, C = dq.shape
    K = dk.shape[2]
    programs = triton.cdiv(B * T, ROWS)
    djoint = torch.empty_like(joint)
    dgain = torch.empty(programs, H, device=joint.device)
    _qk_norm_rope_backward[(programs, H + 2 * K)](
        joint, gain, cos, sin, starts, dq, dk, dv, djoint, dgain,
        B * T, T, H, K, C, cos.shape[1], starts is not None, ROWS
    )  # fmt: skip
    return djoint, dgain.sum(0).to(gain.dtype)


@torch.library.register_fake("caddie::qk_norm_rope_backward")
def _(
    joint: Tensor,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    starts: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(joint), torch.empty_like(gain)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])


def _vjp(ctx, dq, dk, dv):
    joint, gain, cos, sin, starts = ctx.saved_tensors
    djoint, dgain = _qk_norm_rope_backward_op(
        joint, gain, cos, sin, starts, dq.contiguous(), dk.contiguous(), dv.contiguous()
    )
    return djoint, dgain, None, None, None, None


torch.library.register_autograd("caddie::qk_norm_rope", _vjp, setup_context=_save)


def qk_norm_rope(
    joint_BTE: Tensor, gain_H: Tensor, cos_TR: Tensor, sin_TR: Tensor, starts_BT: Tensor | None, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The fused counterpart of `reference.qk_norm_rope`."""
    return _qk_norm_rope_op(joint_BTE.contiguous(), gain_H.float(), cos_TR, sin_TR, starts_BT, kv_heads)
