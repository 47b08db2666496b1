"""MLP with the squared leaky ReLU in the epilogues of its products (#1530).

The hidden layer is not read again to be squared. Forward: h = x W_up^T is written together with a =
leaky_relu(h)^2. Backward: dh = (dy W_down) a'(h), where the factor a', 2h above zero and h / 2
below, is applied to the accumulator. Both are persistent kernels over tensor descriptors (TMA on
Hopper); the other products are cuBLAS's.

Shapes: N tokens, D width, F hidden; blocks of a product are BM x BN with BK columns of the inner
dimension.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stages.train.kernels.operator import operator

# Row blocks that are computed together before the next columns, so that these columns' weights stay
# in L2.
GROUP = tl.constexpr(8)


@triton.jit
def _tile_origin(tile, rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    """First row and column of an output tile, of rows x columns tiles in groups of GROUP rows."""
    group_size = GROUP * columns
    first = tile // group_size * GROUP
    height = tl.minimum(rows - first, GROUP)
    return (first + tile % group_size % height) * BM, tile % group_size // height * BN


@triton.jit
def _up_forward(
    x, up, h, a, N, F, D, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr
):
    """h = x up^T and a = leaky_relu(h)^2; a is computed from the rounded h, as without fusion."""
    rows, columns = tl.cdiv(N, BM), tl.cdiv(F, BN)
    for tile in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=True):
        m0, n0 = _tile_origin(tile, rows, columns, BM, BN)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k0 in range(0, D, BK):
            acc = tl.dot(x.load([m0, k0]), up.load([n0, k0]).T, acc)

        # Epilogue.
        rounded = acc.to(h.dtype)
        h.store([m0, n0], rounded)
        z = rounded.to(tl.float32)
        a.store([m0, n0], (z * tl.where(z > 0, z, 0.25 * z)).to(a.dtype))


@triton.jit
def _down_backward(
    dy, down, h, dh, N, F, D, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr
):
    """dh = (dy down) times the derivative of the squared leaky ReLU at h."""
    rows, columns = tl.cdiv(N, BM), tl.cdiv(F, BN)
    for tile in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=True):
        m0, n0 = _tile_origin(tile, rows, columns, BM, BN)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k0 in range(0, D, BK):
            acc = tl.dot(dy.load([m0, k0]), down.load([k0, n0]), acc)

        # Epilogue.
        z = h.load([m0, n0]).to(tl.float32)
        dh.store([m0, n0], (acc * tl.where(z > 0, 2.0 * z, 0.5 * z)).to(dh.dtype))


# Block sizes, warps and pipeline stages of each kernel, for an H200.
FORWARD = {"BM": 128, "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 3}
BACKWARD = {"BM": 128, "BN": 256, "BK": 32, "num_warps": 8, "num_stages": 4}


def _programs(x: Tensor) -> int:
    """Programs of a persistent kernel: one for each multiprocessor."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def _descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A TMA descriptor that loads and stores blocks of rows x columns."""
    return TensorDescriptor.from_tensor(tensor, [rows, columns])


def _hidden(x: Tensor, up: Tensor, blocks: dict[str, int]) -> tuple[Tensor, Tensor]:
    """h and a, (N, F) each."""
    N, D = x.shape
    F = up.shape[0]
    h = x.new_empty(N, F)
    a = x.new_empty(N, F)
    BM, BN, BK = blocks["BM"], blocks["BN"], blocks["BK"]
    programs = _programs(x)
    _up_forward[(programs,)](
        _descriptor(x, BM, BK), _descriptor(up, BN, BK), _descriptor(h, BM, BN), _descriptor(a, BM, BN),
        N, F, D, PROGRAMS=programs, **blocks
    )  # fmt: skip
    return h, a


def _hidden_gradient(dy: Tensor, down: Tensor, h: Tensor, blocks: dict[str, int]) -> Tensor:
    """dh, (N, F)."""
    N, D = dy.shape
    F = h.shape[1]
    dh = torch.empty_like(h)
    BM, BN, BK = blocks["BM"], blocks["BN"], blocks["BK"]
    programs = _programs(dy)
    _down_backward[(programs,)](
        _descriptor(dy, BM, BK), _descriptor(down, BK, BN), _descriptor(h, BM, BN), _descriptor(dh, BM, BN),
        N, F, D, PROGRAMS=programs, **blocks
    )  # fmt: skip
    return dh


@operator("squared_leaky_relu_mlp")
def _mlp_op(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output (N, D), h and a (N, F)."""
    h, a = _hidden(x, up, FORWARD)
    return a @ down.T, h, a


@torch.library.register_fake("caddie::squared_leaky_relu_mlp")
def _(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    N, F = x.shape[0], up.shape[0]
    return x.new_empty(N, down.shape[0]), x.new_empty(N, F), x.new_empty(N, F)


@operator("squared_leaky_relu_mlp_backward")
def _mlp_backward_op(
    dy: Tensor, x: Tensor, up: Tensor, down: Tensor, h: Tensor, a: Tensor, frozen: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, up and down; those of frozen weights are empty."""
    dh = _hidden_gradient(dy, down, h, BACKWARD)
    if frozen:
        return dh @ up, up.new_empty(0), down.new_empty(0)
    return dh @ up, dh.T @ x, dy.T @ a


@torch.library.register_fake("caddie::squared_leaky_relu_mlp_backward")
def _(
    dy: Tensor, x: Tensor, up: Tensor, down: Tensor, h: Tensor, a: Tensor, frozen: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if frozen:
        return torch.empty_like(x), up.new_empty(0), down.new_empty(0)
    return torch.empty_like(x), torch.empty_like(up), torch.empty_like(down)


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs, *output[1:])


def _vjp(ctx, dy, *_):
    frozen = not any(ctx.needs_input_grad[1:])
    dx, dup, ddown = _mlp_backward_op(dy.contiguous(), *ctx.saved_tensors, frozen)
    if frozen:
        return dx, None, None
    return dx, dup, ddown


torch.library.register_autograd("caddie::squared_leaky_relu_mlp", _vjp, setup_context=_save)


def squared_leaky_relu_mlp(x: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """The fused counterpart of `reference.squared_leaky_relu_mlp`, for x (..., D)."""
    y_ND = _mlp_op(x.flatten(0, -2).contiguous(), up_FD.contiguous(), down_DF.contiguous())[0]
    return y_ND.view(*x.shape[:-1], down_DF.shape[0])
