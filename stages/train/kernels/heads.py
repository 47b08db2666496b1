"""What surrounds attention, fused: from the joint projection to rotated q and k, and the exclusion of a token's own value afterwards.

One pass over the data each way, where the plain twins (stages/train/plain.py) take about ten. Arithmetic is float32 in registers, rounded
once at the end. Gradients of the gain are summed from one partial sum a program, so results repeat bit for bit.

Shapes: B batch, T tokens, H query heads, K key-value heads, C head dimension, E = (H + 2K) C, R half the rotated dimensions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # tokens of one program
NORM_EPS = tl.constexpr(torch.finfo(torch.float32).eps)


@triton.jit
def _angles(cos, sin, starts, rows, columns, T, half: tl.constexpr, has_starts: tl.constexpr, valid):
    """cos and signed sin (rows, columns) of each element, and the column that each is rotated with."""
    position = rows % T
    if has_starts:
        position -= tl.load(starts + rows, mask=valid, other=0)
    rotates = columns < 2 * half
    angle = position[:, None] * half + (columns % half)[None, :]
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
        if head < H:
            source = dq + token * (H * C) + head * C
        else:
            source = dk + token * (K * C) + (head - H) * C
        dz = tl.load(source + columns[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
        dz_other = tl.load(source + partner[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
        along = tl.sum(dz * (x * c + other * s), 1)[:, None] * inverse  # dz . z, which is dy . y: a rotation keeps it
        if head < H:
            tl.store(dgain + tl.program_id(0) * H + head, tl.sum(along))
        g = tl.load(gain + head, mask=head < H, other=1.0)
        dx = g * inverse * (dz * c - dz_other * s - x * inverse * along / C)
        tl.store(djoint + place + columns[None, :], dx.to(djoint.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _exclude_forward(o, v, y, N, K: tl.constexpr, G: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr):
    """y = o - (o . v / v . v) v for the G heads of one group."""
    rows, group, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.arange(0, C)
    valid = rows[:, None] < N
    own = tl.load(v + (rows[:, None].to(tl.int64) * K + group) * C + columns[None, :], mask=valid, other=0.0).to(tl.float32)
    scale = 1.0 / tl.maximum(tl.sum(own * own, 1), 1e-24)
    for head in range(G):
        place = (rows[:, None].to(tl.int64) * K * G + group * G + head) * C + columns[None, :]
        out = tl.load(o + place, mask=valid, other=0.0).to(tl.float32)
        share = tl.sum(out * own, 1) * scale
        tl.store(y + place, (out - share[:, None] * own).to(y.dtype.element_ty), mask=valid)


@triton.jit
def _exclude_backward(dy, o, v, do, dv, N, K: tl.constexpr, G: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr):
    """do = dy - (dy . v / n) v; dv = -sum over heads of (a dy + b o - 2 a b v), with n = v . v, a = o . v / n, b = dy . v / n."""
    rows, group, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.arange(0, C)
    valid = rows[:, None] < N
    value_place = (rows[:, None].to(tl.int64) * K + group) * C + columns[None, :]
    own = tl.load(v + value_place, mask=valid, other=0.0).to(tl.float32)
    scale = 1.0 / tl.maximum(tl.sum(own * own, 1), 1e-24)
    total = tl.zeros((ROWS, C), dtype=tl.float32)
    for head in range(G):
        place = (rows[:, None].to(tl.int64) * K * G + group * G + head) * C + columns[None, :]
        out = tl.load(o + place, mask=valid, other=0.0).to(tl.float32)
        upstream = tl.load(dy + place, mask=valid, other=0.0).to(tl.float32)
        a = (tl.sum(out * own, 1) * scale)[:, None]
        b = (tl.sum(upstream * own, 1) * scale)[:, None]
        tl.store(do + place, (upstream - b * own).to(do.dtype.element_ty), mask=valid)
        total += 2 * a * b * own - a * upstream - b * out
    tl.store(dv + value_place, total.to(dv.dtype.element_ty), mask=valid)


@torch.library.custom_op("caddie::split_heads", mutates_args=())
def _split(joint: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, starts: Tensor | None, K: int) -> tuple[Tensor, Tensor, Tensor]:
    B, T, E = joint.shape
    H = gain.shape[0]
    C = E // (H + 2 * K)
    q, k, v = (joint.new_empty(B, T, heads, C) for heads in (H, K, K))
    _split_forward[(triton.cdiv(B * T, ROWS), H + 2 * K)](
        joint, gain, cos, sin, starts, q, k, v, B * T, T, H, K, C, cos.shape[1], starts is not None, ROWS
    )  # fmt: skip
    return q, k, v


@_split.register_fake
def _(joint: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, starts: Tensor | None, K: int) -> tuple[Tensor, Tensor, Tensor]:
    B, T, E = joint.shape
    C = E // (gain.shape[0] + 2 * K)
    return joint.new_empty(B, T, gain.shape[0], C), joint.new_empty(B, T, K, C), joint.new_empty(B, T, K, C)


@torch.library.custom_op("caddie::split_heads_backward", mutates_args=())
def _split_gradient(
    joint: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, starts: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor
) -> tuple[Tensor, Tensor]:
    B, T, H, C = dq.shape
    K = dk.shape[2]
    programs = triton.cdiv(B * T, ROWS)
    djoint, dgain = torch.empty_like(joint), torch.empty(programs, H, device=joint.device)
    _split_backward[(programs, H + 2 * K)](
        joint, gain, cos, sin, starts, dq, dk, dv, djoint, dgain, B * T, T, H, K, C, cos.shape[1], starts is not None, ROWS
    )  # fmt: skip
    return djoint, dgain.sum(0).to(gain.dtype)


@_split_gradient.register_fake
def _(
    joint: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, starts: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(joint), torch.empty_like(gain)


def _save_split(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])


def _split_vjp(ctx, dq, dk, dv):
    joint, gain, cos, sin, starts = ctx.saved_tensors
    djoint, dgain = _split_gradient(joint, gain, cos, sin, starts, dq.contiguous(), dk.contiguous(), dv.contiguous())
    return djoint, dgain, None, None, None, None


_split.register_autograd(_split_vjp, setup_context=_save_split)


@torch.library.custom_op("caddie::exclude_own_value", mutates_args=())
def _exclude(o: Tensor, v: Tensor) -> Tensor:
    B, T, H, C = o.shape
    K = v.shape[2]
    y = torch.empty_like(o)
    _exclude_forward[(triton.cdiv(B * T, ROWS), K)](o, v, y, B * T, K, H // K, C, ROWS)
    return y


@_exclude.register_fake
def _(o: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(o)


@torch.library.custom_op("caddie::exclude_own_value_backward", mutates_args=())
def _exclude_gradient(dy: Tensor, o: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, C = o.shape
    K = v.shape[2]
    do, dv = torch.empty_like(o), torch.empty_like(v)
    _exclude_backward[(triton.cdiv(B * T, ROWS), K)](dy, o, v, do, dv, B * T, K, H // K, C, ROWS)
    return do, dv


@_exclude_gradient.register_fake
def _(dy: Tensor, o: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(o), torch.empty_like(v)


def _save_exclude(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _exclude_vjp(ctx, dy):
    return _exclude_gradient(dy.contiguous(), *ctx.saved_tensors)


_exclude.register_autograd(_exclude_vjp, setup_context=_save_exclude)


def split_heads(
    joint_BTE: Tensor, gain_H: Tensor, cos_TR: Tensor, sin_TR: Tensor, starts_BT: Tensor | None, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The fused twin of `plain.split_heads`."""
    return _split(joint_BTE.contiguous(), gain_H.float(), cos_TR, sin_TR, starts_BT, kv_heads)


def exclude_own_value(o_BTHC: Tensor, v_BTKC: Tensor) -> Tensor:
    """The fused twin of `plain.exclude_own_value`."""
    return _exclude(o_BTHC.contiguous(), v_BTKC.contiguous())
