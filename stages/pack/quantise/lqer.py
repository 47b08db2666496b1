"""Low-rank corrections of quantisation errors (LQER, arXiv 2402.02446; #1797).

The matrices that gain most for the bytes get one.

With E the weights less the quantised ones, H = R R^T the Hessian of the inputs and g the importance
of the rows, the expected loss is half of

    sum over rows r of  g_r E_r H E_r^T  =  |G E R|^2        G = diag(sqrt(g)), R^-1 = U of gptq.py

so the best correction of rank K has the K largest singular components of G E R = P S Q^T, mapped
back to weights: A = G^-1 P sqrt(S) and B = sqrt(S) Q^T U. #1797 takes the components of E itself,
and stores A with two bits and one step for all components, although they differ in size. Here each
component's two sides are integers of equal spread, and its one step is the product of the steps of
the two sides.

Shapes: R rows, C columns, K components, N = R + C; M the smaller and L the larger of R and C.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from stages.common.concurrency import thread_map
from stages.pack.forms import Corrected, CorrectedForm, StoredTensor
from stages.pack.low_rank import Correction, correction_matrix
from stages.pack.params import PackParams
from stages.pack.quantise import gptq
from stages.pack.quantise.gptq import GPTQFactors
from stages.pack.quantise.methods import QuantisedMatrix, hessian_of, importance_of, threads_for

# Root mean square of a side's integers: about three bits each. Rounding loses a fortieth of what
# the correction gains.
INTEGER_RMS = 1.8
MAX_INTEGER = 127
TINY = 1e-30  # floor of divisors


class RankedCorrection(NamedTuple):
    """A matrix with its correction, and how much that is worth."""

    gain: float  # reduction of the expected loss, divided by R + C: the bytes are proportional to it
    name: str
    result: QuantisedMatrix


def add_corrections(
    results: Mapping[str, QuantisedMatrix],
    matrices: Mapping[str, Tensor],
    calibration: Mapping[str, Tensor],
    gptq_factors: Mapping[str, GPTQFactors],
    params: PackParams,
) -> dict[str, QuantisedMatrix]:
    """Correct the `lqer_tensors` matrices that gain most for their bytes; returns these only.

    `matrices` are the original weights (R, C) by name, `calibration` the Hessians and importances.
    """

    def correct(name: str) -> RankedCorrection:
        weight_RC = matrices[name].float()
        result = results[name]
        form, values, shape = result.stored

        importance = importance_of(name, weight_RC, calibration, params.row_weight)
        importance_R = torch.from_numpy(importance).to(weight_RC.device)
        error_RC = weight_RC - torch.from_numpy(result.stored.dequantise()).to(weight_RC.device)
        correction = fit_correction(error_RC, gptq_factors[name], importance_R, params.lqer_rank)
        correction_RC = torch.from_numpy(correction_matrix(correction, len(weight_RC))).to(weight_RC.device)

        hessian_CC = hessian_of(name, weight_RC, calibration).to(weight_RC.device)
        before_R = gptq.squared_output_errors(error_RC, hessian_CC)
        after_R = gptq.squared_output_errors(error_RC - correction_RC, hessian_CC)
        gain = float((importance_R * (before_R - after_R)).sum()) / sum(weight_RC.shape)

        corrected = StoredTensor(CorrectedForm(form, params.lqer_rank), Corrected(values, correction), shape)
        return RankedCorrection(gain, name, result._replace(stored=corrected))

    candidates = thread_map(
        correct, list(matrices), lambda name: matrices[name].numel(), threads_for(matrices.values())
    )
    best = sorted(candidates, key=lambda one: (-one.gain, one.name))[: params.lqer_tensors]
    return {one.name: one.result for one in best if one.gain > 0}


def fit_correction(
    error_RC: Tensor, gptq_factors: GPTQFactors, importance_R: Tensor, rank: int
) -> Correction:
    """Fit the correction of a float32 error that lowers the expected loss most, and quantise it."""
    order_C = gptq_factors.order_C
    root_importance_R1 = importance_R.float().sqrt()[:, None]

    # G E R, with columns in GPTQ's order: solve X U = G E.
    ordered_RC = error_RC.masked_fill(gptq_factors.dead_C, 0.0)[:, order_C]
    weighted_RC = torch.linalg.solve_triangular(
        gptq_factors.upper_CC, root_importance_R1 * ordered_RC, upper=True, left=False
    ).double()

    # Its largest singular components P S Q^T, from the eigenvectors of the smaller Gram matrix.
    is_wide = weighted_RC.shape[0] < weighted_RC.shape[1]
    tall_LM = weighted_RC.T if is_wide else weighted_RC
    squared_M, vectors_MM = torch.linalg.eigh(tall_LM.T @ tall_LM)  # rising
    components = min(rank, len(squared_M))
    singular_K = squared_M[-components:].flip(0).clamp_min(TINY).sqrt()
    short_MK = vectors_MM[:, -components:].flip(1)
    long_LK = tall_LM @ short_MK / singular_K
    left_RK, right_CK = (short_MK, long_LK) if is_wide else (long_LK, short_MK)

    # Back to weights. A common factor of the two sides does not matter: each is divided by a step
    # of its own.
    column_RK = left_RK * singular_K / root_importance_R1
    row_CK = gptq_factors.upper_CC.double().T @ right_CK
    row_CK = row_CK[torch.argsort(order_C)]
    column_levels_KR, column_steps_K = _quantise_rows(column_RK.T)
    row_levels_KC, row_steps_K = _quantise_rows(row_CK.T)
    levels_KN = torch.cat((column_levels_KR, row_levels_KC), dim=1)
    steps_K = (column_steps_K * row_steps_K).float()

    # A matrix with fewer rows or columns than the rank: the missing components are zero.
    missing = rank - components
    levels_KN = torch.nn.functional.pad(levels_KN, (0, 0, 0, missing))
    steps_K = torch.nn.functional.pad(steps_K, (0, missing))
    return Correction(levels_KN.cpu().numpy(), steps_K.cpu().numpy())


def _quantise_rows(sides_KN: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to int8 with a step of its own; returns integers (K, N) and steps (K,).

    Their root mean square is INTEGER_RMS, or less where the largest would not fit.
    """
    rms_step_K = sides_KN.square().mean(1).sqrt() / INTEGER_RMS
    largest_step_K = sides_KN.abs().amax(1) / MAX_INTEGER
    step_K = torch.maximum(rms_step_K, largest_step_K).clamp_min(TINY)
    return torch.round(sides_KN / step_K[:, None]).to(torch.int8), step_K
