"""From the joint projection to normalised and rotated q and k, fused.

One pass over the data each way, where the plain twins (stages/train/reference.py) take about ten. Arithmetic is float32 in registers,
rounded once at the end. Gradients of the gain are summed from one partial sum a program, so results repeat bit for bit.

Shapes: B batch, T tokens, H query heads, K key-value heads, C head dimension, E = (H + 2K) C, R half the rotated dimensions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stages.train.kernels.operator import operator

ROWS = 16  # tokens of one program
NORM_EPS = tl.constexpr(torch.finfo(torch.float32).eps)


@triton.jit
def _angles(cos, sin, starts, rows, columns, T, half: tl.constexpr, has_starts: tl.constexpr, valid):
    """cos and signed sin (rows, columns) of each element, and the column that each is rotated with."""
    position = rows % T
    if has_starts:
        position -= tl.load(starts + rows, mask=valid, other=0)
    rotates = columns < 2 * half
    angle = position[:, None] * half + (columns % max(half, 1))[None, :]
    mask = valid[:, None] & rotates[None, :]
    c = tl.load(cos + angle, mask=mask, other=1.0)
    s = tl.load(sin + angle, mask=mask, other=0.0)
    s = tl.where((columns < half)[None, :], s, -s)
    partner = tl.where(columns < half, columns + half, tl.where(rotates, columns - half, columns))
    return c, s, partner


@triton.jit
def _split_forward(
    joint, gain, cos, sin, starts, q, k, v, N, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, half: tl.constexpr, has_starts: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One head of ROWS tokens: q and k normalised and rotated, q times its gain, v copied."""
    rows, head, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.arange(0, C)
    valid = rows < N
    token = rows[:, None].to(tl.int64)
    place = token * ((H + 2 * K) * C) + head * C
    held = tl.load(joint + place + columns[None, :], mask=valid[:, None], other=0.0)
    if head >= H + K:
        tl.store(v + token * (K * C) + (head - H - K) * C + columns[None, :], held, mask=valid[:, None])
    else:
        c, s, partner = _angles(cos, sin, starts, rows, columns, T, half, has_starts, valid)
        x = held.to(tl.float32)
        other = tl.load(joint + place + partner[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
        y = (x * c + other * s) * tl.rsqrt(tl.sum(x * x, 1) / C + NORM_EPS)[:, None]
        if head < H:
            out = token * (H * C) + head * C + columns[None, :]
            tl.store(q + out, (y * tl.load(gain + head)).to(q.dtype.element_ty), mask=valid[:, None])
        else:
            out = token * (K * C) + (head - H) * C + columns[None, :]
            tl.store(k + out, y.to(k.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _split_backward(
    joint, gain, cos, sin, starts, dq, dk, dv, djoint, dgain, N, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, half: tl.constexpr, has_starts: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """With y the normalised x and z its rotation: dx = (dy - y mean(dy y)) / rms, dy the back-rotation of g dq, dg = sum(dq z)."""
    rows, head, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.arange(0, C)
    valid = rows < N
    token = rows[:, None].to(tl.int64)
    place = token * ((H + 2 * K) * C) + head * C
    if head >= H + K:
        copied = tl.load(dv + token * (K * C) + (head - H - K) * C + columns[None, :], mask=valid[:, None])
        tl.store(djoint + place + columns[None, :], copied, mask=valid[:, None])
    else:
        c, s, partner = _angles(cos, sin, starts, rows, columns, T, half, has_starts, valid)
        x = tl.load(joint + place + columns[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
        other = tl.load(joint + place + partner[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, 1) / C + NORM_EPS)[:, None]
        if head < H:  # noqa: SIM108  (Triton compiles the branches apart)
            source = dq + token * (H * C) + head * C
        else:
            source = dk + token * (K * C) + (head - H) * C
        dz = tl.load(source + columns[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
        dz_other = tl.load(source + partner[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
        along = (
            tl.sum(dz * (x * c + other * s), 1)[:, None] * inverse
        )  # dz . z, which is dy . y: a rotation keeps it
        if head < H:
            tl.store(dgain + tl.program_id(0) * H + head, tl.sum(along))
        g = tl.load(gain + head, mask=head < H, other=1.0)
        dx = g * inverse * (dz * c - dz_other * s - x * inverse * along / C)
        tl.store(djoint + place + columns[None, :], dx.to(djoint.dtype.element_ty), mask=valid[:, None])


@operator("split_heads")
def _split(
    joint: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, starts: Tensor | None, K: int
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, E = joint.shape
    H = gain.shape[0]
    C = E // (H + 2 * K)
    q, k, v = (joint.new_empty(B, T, heads, C) for heads in (H, K, K))
    _split_forward[(triton.cdiv(B * T, ROWS), H + 2 * K)](
        joint, gain, cos, sin, starts, q, k, v, B * T, T, H, K, C, cos.shape[1], starts is not None, ROWS
    )  # fmt: skip
    return q, k, v


@torch.library.register_fake("caddie::split_heads")
def _(
    joint: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, starts: Tensor | None, K: int
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, E = joint.shape
    C = E // (gain.shape[0] + 2 * K)
    return joint.new_empty(B, T, gain.shape[0], C), joint.new_empty(B, T, K, C), joint.new_empty(B, T, K, C)


@operator("split_heads_backward")
def _split_gradient(
    joint: Tensor,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    starts: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> tuple[Tensor, Tensor]:
    B, T, H, C = dq.shape
    K = dk.shape[2]
    programs = triton.cdiv(B * T, ROWS)
    djoint, dgain = torch.empty_like(joint), torch.empty(programs, H, device=joint.device)
    _split_backward[(programs, H + 2 * K)](
        joint, gain, cos, sin, starts, dq, dk, dv, djoint, dgain, B * T, T, H, K, C, cos.shape[1], starts is not None, ROWS
    )  # fmt: skip
    return djoint, dgain.sum(0).to(gain.dtype)


@torch.library.register_fake("caddie::split_heads_backward")
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


def _save_split(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])


def _split_vjp(ctx, dq, dk, dv):
    joint, gain, cos, sin, starts = ctx.saved_tensors
    djoint, dgain = _split_gradient(
        joint, gain, cos, sin, starts, dq.contiguous(), dk.contiguous(), dv.contiguous()
    )
    return djoint, dgain, None, None, None, None


torch.library.register_autograd("caddie::split_heads", _split_vjp, setup_context=_save_split)


def split_heads(
    joint_BTE: Tensor, gain_H: Tensor, cos_TR: Tensor, sin_TR: Tensor, starts_BT: Tensor | None, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The fused twin of `plain.split_heads`."""
    return _split(joint_BTE.contiguous(), gain_H.float(), cos_TR, sin_TR, starts_BT, kv_heads)
