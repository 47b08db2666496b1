"""Calibration statistics for quantisation: Hessians of the layer-wise error, and importances of rows.

**Hessians.** Rounding the matrix W of a layer by dW adds tr(dW H dW^T) to the squared error of its
output, where H is the mean of x x^T over the layer's inputs x on calibration tokens. H is all that
GPTQ needs of the data (arXiv 2210.17323). An observer of the model's one forward pass collects it,
with looping on. The Hessian of a looped block is therefore the sum over its visits, with a
weight of its own for those after the first. The tied embedding is measured as the head: on the
normalised residual stream (#1394). A value table is only looked up, one row for each token, so that
all of its columns count equally: its Hessian is the identity.

**Importance.** The importance of a row is the mean squared gradient of the loss with respect to a
row of weights (diagonal Fisher). The squares are summed over the weights of the row; the mean is
over tokens, each with its own loss, so that it is the Fisher matrix of the data's own targets, the
empirical one. One backward pass estimates it for a whole batch: with independent random signs on
the tokens' losses, the square of the summed gradient is in expectation the sum of the squares,
since the products of two tokens' gradients cancel (Hutchinson 1990).

Shapes: B windows of a pass, T tokens, C columns of a matrix, which are its inputs, R its rows.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from stages.calibrate.params import Params
from stages.common.clock import Interval
from stages.common.parallel import World
from stages.common.progress import Logger
from stages.train.data import TrainingWindows, micro_batch_size, windows_to_device
from stages.train.model import (
    EMBEDDING,
    NO_EXTENSIONS,
    Extensions,
    Model,
    build_model,
    is_matrix,
    is_quantised,
    is_table,
    visit_plan,
)


def hessian_name(matrix_name: str) -> str:
    """The key of a quantised matrix's Hessian: query, key and value have the same input and share one."""
    for projection in (".key.", ".value."):
        matrix_name = matrix_name.replace(projection, ".query.")
    return matrix_name


def importance_name(matrix_name: str) -> str:
    """The key of the importances of a matrix's rows (R,).

    An importance is the mean squared gradient of the loss with respect to a row of weights
    (diagonal Fisher).
    """
    return f"{matrix_name}.importance"


def accumulate_hessian_(hessian_CC: Tensor, inputs: Tensor, weight: float = 1.0) -> None:
    """Add `weight` times the sum of x x^T over all leading dimensions of inputs (..., C), in float32."""
    x_NC = inputs.detach().flatten(0, -2).float()
    hessian_CC.addmm_(x_NC.T, x_NC, alpha=weight)


def collect_hessians(
    state: dict[str, Tensor],
    params: Params,
    shard_folder: Path,
    world: World,
    logger: Logger,
    clock: Interval,
) -> dict[str, Tensor]:
    """Hessians (C, C) and importances (R,) by name, float32, on the CPU.

    An importance is the mean squared gradient of the loss with respect to a row of weights
    (diagonal Fisher). `state` holds the model's weights by name. `clock` runs from the first read
    of training data to the last.
    """
    model = build_model(params.model, world)
    model.load_state_dict(state)
    observer = HessianObserver(model, params.calibrate.revisit_weight)
    extensions = Extensions(observer=observer)
    squares = {
        name: torch.zeros(len(weight), device=world.device)
        for name, weight in model.named_parameters()
        if is_quantised(name)
    }

    # Each rank measures the next `local` windows of the training order, `per_pass` at a time. The
    # first passes, until `differentiated` windows are covered, also run backward.
    local = windows_per_rank(params, world)
    differentiated = max(1, params.calibrate.importance_tokens // params.model.context // world.size)
    per_pass = micro_batch_size(local, params.calibrate.micro_batch_tokens // params.model.context)
    start = world.rank * local

    # The clock covers all reads of training data.
    clock.start()
    windows = TrainingWindows(shard_folder, params.model.context, params.model.vocab_size, params.seed)
    with logger.progress("calibrate", local) as progress:
        for first in range(start, start + local, per_pass):
            inputs_BT, targets_BT = windows_to_device(windows.batch(first, per_pass), world.device)
            clock.mark()
            if first - start < differentiated:
                accumulate_fisher_(model, inputs_BT, targets_BT, first, squares, extensions)
            else:
                with torch.no_grad():
                    model(inputs_BT, targets_BT, looped=True, extensions=extensions)
            progress.advance(per_pass)

    # Sums to means over all ranks. Backward passes are whole ones, so the last may go beyond the
    # limit.
    hessians = observer.hessians
    for hessian in hessians.values():
        world.sum_(hessian).div_(params.calibrate.tokens)
    backward_passes = -(-min(differentiated, local) // per_pass)
    backward_tokens = backward_passes * per_pass * params.model.context * world.size
    for square in squares.values():
        world.sum_(square).div_(backward_tokens)

    for name, weight in state.items():
        if is_table(name) and name != EMBEDDING:
            hessians[name] = torch.eye(weight.shape[1])
    importances = {importance_name(name): square for name, square in squares.items()}
    return {name: tensor.cpu() for name, tensor in (hessians | importances).items()}


def windows_per_rank(params: Params, world: World) -> int:
    """Windows that each rank measures; a ValueError when they do not divide over the ranks."""
    windows = params.calibrate.tokens // params.model.context
    if windows % world.size:
        raise ValueError(f"calibrate.tokens: {windows} windows do not divide over {world.size} ranks")
    return windows // world.size


class HessianObserver:
    """Sums weight x x^T over the inputs x of every quantised matrix, in the passes that it observes.

    The passes must be looped. `revisit_weight` is the weight of a block's visits after the first.
    """

    def __init__(self, model: Model, revisit_weight: float = 1.0) -> None:
        self.revisit_weight = revisit_weight
        order = visit_plan(model.params, looped=True).order
        self.revisits = {visit for visit, block in enumerate(order) if block in order[:visit]}

        # Query, key and value share one Hessian, and so have one sum.
        device = model.embedding.weight.device
        self.hessians: dict[str, Tensor] = {}
        self.hessian_of: dict[nn.Parameter, Tensor] = {}
        for name, weight in model.named_parameters():
            if (is_matrix(name) and hessian_name(name) == name) or name == EMBEDDING:
                columns = weight.shape[1]
                self.hessians[name] = torch.zeros(columns, columns, device=device)
                self.hessian_of[weight] = self.hessians[name]

    def __call__(self, weight: nn.Parameter, visit: int | None, x: Tensor) -> None:
        """Add the inputs of one product, (..., C)."""
        scale = self.revisit_weight if visit in self.revisits else 1.0
        accumulate_hessian_(self.hessian_of[weight], x, scale)


def accumulate_fisher_(
    model: Model,
    inputs_BT: Tensor,
    targets_BT: Tensor,
    seed: int,
    squares: dict[str, Tensor],
    extensions: Extensions = NO_EXTENSIONS,
) -> None:
    """Add to `squares` (R,) the squared gradients of a batch, summed over tokens and over each row.

    Divided by the tokens they are the importances: the mean squared gradient of the loss with
    respect to a row of weights (diagonal Fisher). `seed` is the seed of the random signs of the
    tokens' losses.
    """
    losses_BT = model(inputs_BT, targets_BT, looped=True, extensions=extensions)
    generator = torch.Generator().manual_seed(seed)
    signs_BT = torch.randint(0, 2, losses_BT.shape, generator=generator).to(losses_BT) * 2 - 1
    weights = {name: weight for name, weight in model.named_parameters() if name in squares}
    gradients = torch.autograd.grad((losses_BT * signs_BT).sum(), list(weights.values()))
    for name, gradient in zip(weights, gradients, strict=True):
        squares[name] += gradient.float().square().sum(1)
