"""Low-rank corrections of what rounding left (LQER, arXiv 2402.02446; #1797), of the matrices whose expected loss falls most for the bytes.

With E the weights less the quantised ones, H = R R^T the Hessian of the inputs and g the importance of the rows, the loss to expect is
half of

    sum over rows r of  g_r E_r H E_r^T  =  |G E R|^2        G = diag(sqrt(g)), R^-1 = U of gptq.py

so the best correction of rank K is made of the K largest singular components of G E R = P S Q^T, brought back to weights:
A = G^-1 P sqrt(S) and B = sqrt(S) Q^T U. #1797 takes the components of E as it is, and keeps A with two bits and one step for all
components, although they differ in size. Here each component's two sides are integers of equal spread, and its one step is the product of
the sides' steps.

Shapes: R rows, C columns, K components.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from stages.common.concurrency import in_threads
from stages.pack.file import tensors
from stages.pack.file.tensors import Corrected
from stages.pack.low_rank import Correction, product
from stages.pack.params import PackParams
from stages.pack.quantise import gptq
from stages.pack.quantise.gptq import Feedback
from stages.pack.quantise.methods import Result, hessian_of, importance_of, threads_for

SPREAD = 1.8  # root mean square of the integers: about three bits each, and a fortieth of what is corrected lost by rounding
LARGEST = 127
TINY = 1e-30


def corrected(
    results: Mapping[str, Result],
    matrices: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    known: Mapping[str, Feedback],
    params: PackParams,
) -> dict[str, Result]:
    """The results, with corrections, of at most `lqer_tensors` matrices; `known` is GPTQ's feedback of each."""

    def one(name: str) -> tuple[float, str, Result]:
        weight, result, rank = matrices[name].float(), results[name], params.lqer_rank
        importance_R = torch.from_numpy(importance_of(name, weight, hessians, params.row_weight)).to(
            weight.device
        )
        error = weight - torch.from_numpy(tensors.decoded(result.coded)).to(weight.device)
        made = correct(error, known[name], importance_R, rank)
        left = error - torch.from_numpy(product(made, len(weight))).to(weight.device)
        hessian = hessian_of(name, weight, hessians).to(weight.device)
        gain = float((importance_R * (gptq.costs(error, hessian) - gptq.costs(left, hessian))).sum()) / sum(
            weight.shape
        )
        assert not isinstance(result.coded, Corrected), "a quantiser corrects nothing itself"
        return (
            gain,
            name,
            result._replace(coded=Corrected(result.coded, made), form=result.form._replace(rank=rank)),
        )

    found = in_threads(
        one, list(matrices), lambda name: matrices[name].numel(), threads_for(matrices.values())
    )
    best = sorted(found, key=lambda of: (-of[0], of[1]))[: params.lqer_tensors]
    return {name: result for gain, name, result in best if gain > 0}


def correct(error_RC: Tensor, known: Feedback, importance_R: Tensor, rank: int) -> Correction:
    """The correction of an error, float32, in the measure of the Hessian and of the rows' importance."""
    order_C, root_R1 = known.order_C, importance_R.float().sqrt()[:, None]
    error_RC = error_RC.masked_fill(known.dead_C, 0.0)[:, order_C]
    weighed_RC = torch.linalg.solve_triangular(
        known.upper_CC, root_R1 * error_RC, upper=True, left=False
    ).double()
    wide = weighed_RC.shape[0] < weighed_RC.shape[1]
    short = weighed_RC.T if wide else weighed_RC  # its Gram matrix is the smaller one
    squares, vectors = torch.linalg.eigh(short.T @ short)
    few = min(rank, len(squares))
    size_K = squares[-few:].flip(0).clamp_min(TINY).sqrt()  # falling
    small = vectors[:, -few:].flip(1)
    long = short @ small / size_K
    rows_RK, columns_CK = (small, long) if wide else (long, small)
    left_RK = rows_RK * size_K / root_R1
    right_CK = known.upper_CC.double().T @ columns_CK
    right_CK = right_CK[torch.argsort(order_C)]
    left, left_step = _rounded(left_RK.T)
    right, right_step = _rounded(right_CK.T)
    levels_KN, steps_K = torch.cat((left, right), dim=1), (left_step * right_step).float()
    missing = rank - few  # a matrix with fewer rows or columns than the rank
    padded = (
        torch.nn.functional.pad(levels_KN, (0, 0, 0, missing)),
        torch.nn.functional.pad(steps_K, (0, missing)),
    )
    return Correction(*(of.cpu().numpy() for of in padded))


def _rounded(sides_KN: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as int8 of root mean square SPREAD, or smaller where its largest would not fit, and its step (K,)."""
    spread_K, largest_K = sides_KN.square().mean(1).sqrt() / SPREAD, sides_KN.abs().amax(1) / LARGEST
    step_K = torch.maximum(spread_K, largest_K).clamp_min(TINY)
    return torch.round(sides_KN / step_K[:, None]).to(torch.int8), step_K
