"""Low-rank corrections: parity with their definition by singular values, properties, no input changed."""

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.pack import low_rank
from stages.pack.low_rank import Correction
from stages.pack.quantise import gptq
from stages.pack.quantise.lqer import fit_correction


def case(rows: int, columns: int, seed: int = 0, dead: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    """An error, the Hessian of correlated inputs of very different size, and importances of rows."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(
        columns, columns, generator=generator
    )
    inputs *= torch.randn(columns, generator=generator).exp()
    inputs[:, list(dead)] = 0
    importance = torch.randn(rows, generator=generator).exp() * 1e-5
    return torch.randn(rows, columns, generator=generator) * 0.01, inputs.T @ inputs / len(inputs), importance


def product(made: Correction, rows: int) -> Tensor:
    return torch.from_numpy(low_rank.correction_matrix(made, rows))


def loss(error: Tensor, hessian: Tensor, importance: Tensor) -> float:
    return float((importance.double() * gptq.squared_output_errors(error, hessian)).sum())


def least_loss(error: Tensor, hessian: Tensor, importance: Tensor, rank: int) -> float:
    """The least error by definition (Eckart and Young): of the singular values beyond the rank.

    The square root of H is of another kind.
    """
    values, vectors = np.linalg.eigh(hessian.double().numpy())
    root = vectors * np.sqrt(np.maximum(values, 0))
    singular = np.linalg.svd(
        importance.double().sqrt().numpy()[:, None] * error.double().numpy() @ root, compute_uv=False
    )
    return float((singular[rank:] ** 2).sum())


@pytest.mark.parametrize("shape", [(48, 20), (20, 48), (32, 32)])
@pytest.mark.parametrize("dead", [(), (2, 5)])
@pytest.mark.parametrize("act_order", [True, False])
def test_it_leaves_hardly_more_than_the_best_of_its_rank(
    shape: tuple[int, int], dead: tuple[int, ...], act_order: bool
) -> None:
    error, hessian, importance = case(*shape, dead=dead)
    known = gptq.factorise(hessian[None], 1e-6, ["case"], act_order)[0]
    before = error.clone()
    whole, best = loss(error, hessian, importance), least_loss(error, hessian, importance, 4)
    made = fit_correction(error, known, importance, 4)
    left = loss(error - product(made, shape[0]), hessian, importance)
    assert best <= left < best + 0.06 * (whole - best)
    assert torch.equal(error, before)
    assert made.levels_KN.dtype == np.int8
    assert made.levels_KN.shape == (4, sum(shape))


def test_without_the_hessian_it_would_leave_more() -> None:
    """#1797's way, the components of the error itself, in the same measure."""
    error, hessian, importance = case(48, 32)
    known = gptq.factorise(hessian[None], 1e-6, ["case"])[0]
    plain = gptq.factorise(torch.eye(32)[None], 0.0, ["case"])[0]
    by_hessian, by_itself = (
        loss(error - product(fit_correction(error, of, g, 4), 48), hessian, importance)
        for of, g in ((known, importance), (plain, torch.ones(48)))
    )
    assert by_hessian < by_itself


def test_a_planted_error_of_low_rank_is_taken_out() -> None:
    error, hessian, importance = case(40, 24)
    generator = torch.Generator().manual_seed(3)
    planted = torch.randn(40, 2, generator=generator) @ torch.randn(2, 24, generator=generator)
    known = gptq.factorise(hessian[None], 1e-4, ["case"])[0]
    left = planted + 0.01 * error - product(fit_correction(planted + 0.01 * error, known, importance, 2), 40)
    assert loss(left, hessian, importance) < 0.06 * loss(planted, hessian, importance)


def test_more_components_than_the_matrix_has_are_zero_and_no_error_needs_none() -> None:
    error, hessian, importance = case(3, 8)
    known = gptq.factorise(hessian[None], 0.01, ["case"])[0]
    made = fit_correction(error, known, importance, 8)
    assert not made.levels_KN[3:].any()
    assert not made.steps_K[3:].any()
    assert product(made, 3).isfinite().all()
    nothing = product(fit_correction(torch.zeros(3, 8), known, importance, 2), 3)
    assert float(nothing.abs().max()) < 1e-12
