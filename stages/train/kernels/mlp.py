"""The squared leaky ReLU inside the epilogue of the product beside it (#1530): the hidden layer is not read again to be squared.

Forward: h = x W_up^T is written together with a = leaky_relu(h)^2. Backward: dh = (dy W_down) a'(h), with a' = 2h above zero and h / 2
below, applied to the accumulator. Both are persistent kernels over tensor descriptors (TMA on Hopper); the other products are cuBLAS's.

Shapes: N tokens, D width, F hidden.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stages.train.kernels.operator import operator

GROUP = tl.constexpr(8)  # row blocks that share a sweep over columns, so that their weights stay in L2


@triton.jit
def _tile_origin(tile, rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    group_size = GROUP * columns
    first = tile // group_size * GROUP
    height = tl.minimum(rows - first, GROUP)
    return (first + tile % group_size % height) * BM, tile % group_size // height * BN


@triton.jit
def _up_forward(
    x, up, h, a, N, F, D, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr
):
    rows, columns = tl.cdiv(N, BM), tl.cdiv(F, BN)
    for tile in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=True):
        m0, n0 = _tile_origin(tile, rows, columns, BM, BN)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k0 in range(0, D, BK):
            acc = tl.dot(x.load([m0, k0]), up.load([n0, k0]).T, acc)
        rounded = acc.to(h.dtype)
        h.store([m0, n0], rounded)
        z = rounded.to(tl.float32)
        a.store([m0, n0], (z * tl.where(z > 0, z, 0.25 * z)).to(a.dtype))


@triton.jit
def _down_backward(
    dy, down, h, dh, N, F, D, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr
):
    rows, columns = tl.cdiv(N, BM), tl.cdiv(F, BN)
    for tile in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=True):
        m0, n0 = _tile_origin(tile, rows, columns, BM, BN)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k0 in range(0, D, BK):
            acc = tl.dot(dy.load([m0, k0]), down.load([k0, n0]), acc)
        z = h.load([m0, n0]).to(tl.float32)
        dh.store([m0, n0], (acc * tl.where(z > 0, 2.0 * z, 0.5 * z)).to(dh.dtype))


FORWARD = {"BM": 128, "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 3}
BACKWARD = {"BM": 128, "BN": 256, "BK": 32, "num_warps": 8, "num_stages": 4}


def _programs(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def _blocks(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, [rows, columns])


def _hidden(x: Tensor, up: Tensor, blocks: dict[str, int]) -> tuple[Tensor, Tensor]:
    (N, D), F = x.shape, up.shape[0]
    h, a = x.new_empty(N, F), x.new_empty(N, F)
    BM, BN, BK = blocks["BM"], blocks["BN"], blocks["BK"]
    programs = _programs(x)
    _up_forward[(programs,)](
        _blocks(x, BM, BK), _blocks(up, BN, BK), _blocks(h, BM, BN), _blocks(a, BM, BN), N, F, D, PROGRAMS=programs, **blocks
    )  # fmt: skip
    return h, a


def _hidden_gradient(dy: Tensor, down: Tensor, h: Tensor, blocks: dict[str, int]) -> Tensor:
    (N, D), F = dy.shape, h.shape[1]
    dh = torch.empty_like(h)
    BM, BN, BK = blocks["BM"], blocks["BN"], blocks["BK"]
    programs = _programs(dy)
    _down_backward[(programs,)](
        _blocks(dy, BM, BK), _blocks(down, BK, BN), _blocks(h, BM, BN), _blocks(dh, BM, BN), N, F, D, PROGRAMS=programs, **blocks
    )  # fmt: skip
    return dh


@operator("squared_leaky_mlp")
def _mlp(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h, a = _hidden(x, up, FORWARD)
    return a @ down.T, h, a


@torch.library.register_fake("caddie::squared_leaky_mlp")
def _(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    N, F = x.shape[0], up.shape[0]
    return x.new_empty(N, down.shape[0]), x.new_empty(N, F), x.new_empty(N, F)


@operator("squared_leaky_mlp_backward")
def _mlp_gradient(
    dy: Tensor, x: Tensor, up: Tensor, down: Tensor, h: Tensor, a: Tensor, frozen: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, up and down; those of frozen weights are empty."""
    dh = _hidden_gradient(dy, down, h, BACKWARD)
    return (dh @ up, up.new_empty(0), down.new_empty(0)) if frozen else (dh @ up, dh.T @ x, dy.T @ a)


@torch.library.register_fake("caddie::squared_leaky_mlp_backward")
def _(
    dy: Tensor, x: Tensor, up: Tensor, down: Tensor, h: Tensor, a: Tensor, frozen: bool
) -> tuple[Tensor, Tensor, Tensor]:
    weights = (
        (up.new_empty(0), down.new_empty(0)) if frozen else (torch.empty_like(up), torch.empty_like(down))
    )
    return torch.empty_like(x), *weights


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs, *output[1:])


def _vjp(ctx, dy, *_):
    frozen = not any(ctx.needs_input_grad[1:])
    dx, *weights = _mlp_gradient(dy.contiguous(), *ctx.saved_tensors, frozen)
    return dx, *((None, None) if frozen else weights)


torch.library.register_autograd("caddie::squared_leaky_mlp", _vjp, setup_context=_save)


def squared_leaky_mlp(x: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """The fused twin of `plain.squared_leaky_mlp`."""
    return _mlp(x.flatten(0, -2).contiguous(), up_FD.contiguous(), down_DF.contiguous())[0].view(
        *x.shape[:-1], down_DF.shape[0]
    )
