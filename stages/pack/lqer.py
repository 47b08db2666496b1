"""Which matrices get a low-rank correction (LQER, correction.py): those for which the expected loss falls most for their bytes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from stages.pack import correction, gptq, tensors
from stages.pack.gptq import Feedback
from stages.pack.params import PackParams
from stages.pack.quantisers import Result, hessian_of, importance_of, threads_for
from stages.pack.tensors import Corrected
from stages.pack.workers import in_threads


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
        importance_R = torch.from_numpy(importance_of(name, weight, hessians, params.row_weight)).to(weight.device)
        error = weight - tensors.decoded(result.coded).to(weight.device)
        made = correction.correct(error, known[name], importance_R, rank)
        left = error - correction.product(made, len(weight)).to(weight.device)
        hessian = hessian_of(name, weight, hessians).to(weight.device)
        gain = float((importance_R * (gptq.costs(error, hessian) - gptq.costs(left, hessian))).sum()) / sum(weight.shape)
        assert not isinstance(result.coded, Corrected), "a quantiser corrects nothing itself"
        return gain, name, result._replace(coded=Corrected(result.coded, made), form=result.form._replace(rank=rank))

    found = in_threads(one, list(matrices), lambda name: matrices[name].numel(), threads_for(matrices.values()))
    best = sorted(found, key=lambda of: (-of[0], of[1]))[: params.lqer_tensors]
    return {name: result for gain, name, result in best if gain > 0}
