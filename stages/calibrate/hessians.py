"""What quantisation must know of the data: Hessians of the layer-wise error, and the importance of rows.

The Hessian of a matrix W with inputs x is the mean of x x^T over calibration tokens (GPTQ, arXiv 2210.17323).

The error that rounding adds to a layer's output is tr(dW H dW^T), so H is all that GPTQ needs to know of the data. Observers hang on the
one forward definition, with looping on, so that a looped block's Hessian is the sum over its visits, of which those after the first have a
weight of their own. The tied embedding is measured where it is the head: on the normalised residual stream (#1394). A value table is only
looked up, one row for a token: all of its columns count alike, and its rows by their importance.

The importance of a row is the mean over tokens of the squared gradient of the token's loss in the row's weights, summed over the row: the
diagonal of the empirical Fisher matrix. One backward pass gives it for a whole batch: with independent random signs on the tokens' losses,
the square of the summed gradient is in the mean the sum of the squares, since products of two tokens' gradients cancel (Hutchinson 1990).

Shapes: N tokens, C columns of a matrix, which are its inputs.
"""

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from stages.calibrate.params import Params
from stages.common.clock import Interval
from stages.common.parallel import World
from stages.common.progress import Report
from stages.train.data import Windows, micro_batch_size, to_device
from stages.train.model import EMBEDDING, MLP, Model, is_matrix, is_quantised, is_table, model_for, visit_plan


def hessian_name(matrix_name: str) -> str:
    """Under which name the Hessian of a quantised matrix is kept: query, key and value see the same input, so they share one."""
    for projection in (".key.", ".value."):
        matrix_name = matrix_name.replace(projection, ".query.")
    return matrix_name


def importance_name(matrix_name: str) -> str:
    """Under which name the importance of a matrix's rows is kept."""
    return f"{matrix_name}.importance"


def accumulate_(hessian_CC: Tensor, inputs: Tensor, weight: float = 1.0) -> None:
    """Add `weight` times the sum of x x^T over all leading dimensions of inputs (..., C), in float32."""
    x_NC = inputs.detach().flatten(0, -2).float()
    hessian_CC.addmm_(x_NC.T, x_NC, alpha=weight)


def collect(
    state: dict[str, Tensor],
    params: Params,
    shard_folder: Path,
    world: World,
    report: Report,
    clock: Interval,
) -> dict[str, Tensor]:
    """Hessians and importances by name, float32 on the CPU; the clock runs from the first read of training data to the last."""
    model = model_for(params.model, world)
    model.load_state_dict(state)
    sums = observe_(model, params.calibrate.revisit_weight)
    squares = {
        name: torch.zeros(len(weight), device=world.device)
        for name, weight in model.named_parameters()
        if is_quantised(name)
    }
    local = local_windows(params, world)
    differentiated = max(1, params.calibrate.importance_tokens // params.model.context // world.size)
    micro = micro_batch_size(local, params.calibrate.micro_batch_tokens // params.model.context)
    clock.start()
    windows = Windows(shard_folder, params.model.context, params.model.vocab_size, params.seed)
    with report.progress("calibrate", local) as progress:
        for first in range(world.rank * local, (world.rank + 1) * local, micro):
            inputs, targets = to_device(windows.batch(first, micro), world.device)
            clock.mark()
            if first - world.rank * local < differentiated:
                differentiate_(model, inputs, targets, first, squares)
            else:
                with torch.no_grad():
                    model(inputs, targets, looped=True)
            progress.advance(micro)
    passes = -(-min(differentiated, local) // micro)  # whole ones: the last may go beyond
    for hessian in sums.values():
        world.sum_(hessian).div_(params.calibrate.tokens)
    sums |= {
        name: torch.eye(weight.shape[1])
        for name, weight in state.items()
        if is_table(name) and name != EMBEDDING
    }
    for square in squares.values():
        world.sum_(square).div_(passes * micro * params.model.context * world.size)
    found = sums | {importance_name(name): square for name, square in squares.items()}
    return {name: tensor.cpu() for name, tensor in found.items()}


def local_windows(params: Params, world: World) -> int:
    """Windows that each rank measures; a ValueError when they do not divide."""
    sequences = params.calibrate.tokens // params.model.context
    if sequences % world.size:
        raise ValueError(f"calibrate.tokens: {sequences} windows do not divide over {world.size} ranks")
    return sequences // world.size


def observe_(model: Model, revisit_weight: float = 1.0) -> dict[str, Tensor]:
    """Hang an observer on every distinct input of a quantised matrix; the returned sums fill as the model runs, looped.

    The fused MLP calls no module that could be observed, so the modules' own products take its place, with gradients too.
    """
    device = model.embedding.weight.device
    plan = visit_plan(model.params, looped=True)
    visits = {
        f"blocks.{index}": (plan.encoder + plan.decoder).count(index) for index in range(model.params.layers)
    }
    for mlp in (module for module in model.modules() if isinstance(module, MLP)):
        mlp.operations = mlp.operations._replace(mlp=None)
    sums: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if is_matrix(weight) and hasattr(module, "weight") and hessian_name(weight) == weight:
            columns = module.weight.shape[1]
            sums[weight] = torch.zeros(columns, columns, device=device)
            seen_by = model.get_submodule(
                name.removesuffix(".query")
            )  # query, key and value are one product of the attention's input
            of_block = visits[".".join(name.split(".")[:2])]
            seen_by.register_forward_pre_hook(_observer(sums[weight], of_block, revisit_weight))
    sums[EMBEDDING] = torch.zeros(model.params.width, model.params.width, device=device)
    model.head.register_forward_pre_hook(_observer(sums[EMBEDDING], 1, revisit_weight))
    return sums


def differentiate_(
    model: Model, inputs: Tensor, targets: Tensor, first: int, squares: dict[str, Tensor]
) -> None:
    """Add the squared gradients of the windows, summed over tokens and over each row; `first` seeds the signs."""
    losses = model(inputs, targets, looped=True)
    signs = (
        torch.randint(0, 2, losses.shape, generator=torch.Generator().manual_seed(first)).to(losses) * 2 - 1
    )
    named = {name: weight for name, weight in model.named_parameters() if name in squares}
    gradients = torch.autograd.grad((losses * signs).sum(), list(named.values()))
    for name, gradient in zip(named, gradients, strict=True):
        squares[name] += gradient.float().square().sum(1)


def _observer(
    hessian: Tensor, visits: int, revisit_weight: float
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """An observer of a module that one forward pass visits so often."""
    visit = itertools.cycle(range(visits))

    def observe(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        accumulate_(hessian, arguments[0], 1.0 if next(visit) == 0 else revisit_weight)

    return observe
