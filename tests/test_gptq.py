"""GPTQ: parity with a slow float64 version, the worked case, properties, errors."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from stages.pack.forms import RowQuantised
from stages.pack.quantise import gptq

SHAPES = [(24, 16), (16, 48), (5, 130), (40, 300)]  # the last two are wider than a block of 128


class Made(NamedTuple):
    """RowQuantised on the device that made it."""

    values_RC: Tensor
    steps_R: Tensor
    extra_bits_C: Tensor


def dequantised(made: Made) -> Tensor:
    """The weights that a reader gets."""
    weights = RowQuantised(*(of.cpu().numpy() for of in made)).weights()
    return torch.from_numpy(weights).to(made.values_RC.device)


def layer(rows: int, columns: int, seed: int = 0, dead: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Weights, and the Hessian of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(
        columns, columns, generator=generator
    )
    inputs *= torch.rand(columns, generator=generator) + 0.05
    for column in dead:
        inputs[:, column] = 0
    return weight, inputs.T @ inputs / len(inputs)


def slow_gptq(
    weight: Tensor, hessian: Tensor, qmax: int, clip: float, damping: float
) -> tuple[Tensor, Tensor]:
    """GPTQ by its definition: one column at a time, H^-1 of the free columns computed each time, in float64.

    Fixing column j at q moves the free columns k by -(w_j - q) [H_F^-1]_jk / [H_F^-1]_jj, where F are the
    columns that are not fixed yet.
    """
    steps = (clip * weight.double().std(dim=1).float() / qmax).half().double()
    left, hessian = weight.double().clone(), hessian.double().clone()
    for column in range(left.shape[1]):
        if hessian[column, column] == 0:
            hessian[column, column] = 1
            left[:, column] = 0
    order = sorted(range(left.shape[1]), key=lambda column: -float(hessian[column, column]))
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    values = torch.zeros_like(left)
    for position, column in enumerate(order):
        free = order[position:]
        inverse = torch.linalg.inv(hessian[free][:, free])
        values[:, column] = torch.round(left[:, column] / steps).clamp(-qmax, qmax)
        error = left[:, column] - values[:, column] * steps
        left[:, free] -= error[:, None] * inverse[0] / inverse[0, 0]
    return values, steps


def pack(
    weight: Tensor, hessian: Tensor, block_columns: int = 128, qmax: int = 31, clip: float = 12.85
) -> Made:
    return quantised([weight], [hessian], block_columns, qmax, clip)[0]


def quantised(
    weights: list[Tensor],
    hessians: list[Tensor],
    block_columns: int = 128,
    qmax: int = 31,
    clip: float = 12.85,
    finer: int = 0,
) -> list[Made]:
    """Matrices of one shape, quantised together; the first 64 columns finer by `finer` powers of two."""
    known = gptq.factorise(torch.stack(hessians), 0.01, [f"matrix {i}" for i in range(len(hessians))])
    steps = torch.stack([gptq.row_steps(weight, clip, qmax, "matrix") for weight in weights])
    extra_bits_BC = torch.zeros(len(weights), weights[0].shape[1], dtype=torch.uint8, device=steps.device)
    extra_bits_BC[:, :64] = finer
    values, _ = gptq.quantise(torch.stack(weights), known, steps, extra_bits_BC, qmax, block_columns)
    return [Made(*of) for of in zip(values, steps, extra_bits_BC, strict=True)]


@pytest.mark.parametrize("shape", [(24, 16), (5, 130), (33, 67), (512, 96)])
def test_company_changes_no_bit(shape: tuple[int, int]) -> None:
    """Matrices quantised together are what each is alone, and so are their factors."""
    weights, hessians = zip(
        *(layer(*shape, seed=seed, dead=(3,) if seed == 1 else ()) for seed in range(5)), strict=True
    )
    torch.set_num_threads(1)  # as single_threaded_exact_float32() lets it be
    together = quantised(list(weights), list(hessians))
    for i, (weight, hessian) in enumerate(zip(weights, hessians, strict=True)):
        assert all(
            torch.equal(a, b) for a, b in zip(together[i], quantised([weight], [hessian])[0], strict=True)
        )


def test_finer_columns_are_closer() -> None:
    weight, hessian = layer(16, 130)
    coarse, fine = pack(weight, hessian), quantised([weight], [hessian], finer=2)[0]
    assert int(fine.values_RC[:, :64].abs().max()) > 31 >= int(fine.values_RC[:, 64:].abs().max())
    errors = [((dequantised(of) - weight)[:, :64] ** 2).mean() for of in (coarse, fine)]
    steps = fine.steps_R.float()[:, None] / 4
    assert torch.equal(dequantised(fine)[:, :64], fine.values_RC[:, :64] * steps)
    assert errors[1] < errors[0] / 2
    assert (
        gptq.squared_output_errors(dequantised(fine) - weight, hessian).sum()
        < gptq.squared_output_errors(dequantised(coarse) - weight, hessian).sum()
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dead", [(), (3, 7)])
def test_equals_the_slow_version(shape: tuple[int, int], dead: tuple[int, ...]) -> None:
    weight, hessian = layer(*shape, dead=dead)
    expected, steps = slow_gptq(weight, hessian, 31, 12.85, 0.01)
    got = pack(weight, hessian)
    assert torch.equal(got.steps_R.double(), steps)
    # A value within float32 rounding of a half may go either way, and its row then takes another path; that
    # is rare.
    rows_that_differ = (got.values_RC.double() != expected).any(dim=1).sum()
    assert rows_that_differ <= shape[0] // 10, f"{rows_that_differ} of {shape[0]} rows differ"


@pytest.mark.parametrize("block_columns", [1, 7, 128])
def test_block_size_does_not_matter(block_columns: int) -> None:
    weight, hessian = layer(16, 48)
    whole = dequantised(pack(weight, hessian, block_columns=48))
    blocks = dequantised(pack(weight, hessian, block_columns=block_columns))
    assert (whole != blocks).any(dim=1).sum() <= 1


def test_the_worked_case_of_the_docstring() -> None:
    weight, hessian = torch.tensor([[0.4, 0.4]]), torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    known = gptq.factorise(hessian[None], 0.0, ["case"])[0]
    torch.testing.assert_close(
        known.upper_CC, torch.tensor([[2.2942, -2.0647], [0.0, 1.0]]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(known.upper_CC.T @ known.upper_CC, torch.linalg.inv(hessian))
    values = gptq.quantise(
        weight[None], [known], torch.ones(1, 1).half(), torch.zeros(1, 2, dtype=torch.uint8), 31, 128
    )[0][0]
    assert values.tolist() == [[0, 1]]
    assert float(gptq.squared_output_errors(weight, hessian).sum()) == pytest.approx(0.608)
    assert float(gptq.squared_output_errors(weight - values, hessian).sum()) == pytest.approx(0.088)


@pytest.mark.parametrize("shape", SHAPES)
def test_better_than_rounding_to_nearest(shape: tuple[int, int]) -> None:
    weight, hessian = layer(*shape)
    got = pack(weight, hessian)
    steps = got.steps_R.float()[:, None]
    nearest = torch.round(weight / steps).clamp(-31, 31) * steps
    assert (
        gptq.squared_output_errors(dequantised(got) - weight, hessian).sum()
        < 0.8 * gptq.squared_output_errors(nearest - weight, hessian).sum()
    )


def test_is_nearest_rounding_when_inputs_are_independent() -> None:
    weight, _ = layer(8, 32)
    got = pack(weight, torch.eye(32))
    assert torch.equal(
        got.values_RC.float(), torch.round(weight / got.steps_R.float()[:, None]).clamp(-31, 31)
    )


def test_same_input_same_bits_and_inputs_untouched() -> None:
    weight, hessian = layer(40, 300, dead=(0,))
    before = weight.clone(), hessian.clone()
    first, second = pack(weight, hessian), pack(weight, hessian)
    assert torch.equal(first.values_RC, second.values_RC)
    assert torch.equal(first.steps_R, second.steps_R)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_dead_columns_and_zero_rows_become_zero() -> None:
    weight, hessian = layer(12, 20, dead=(4, 19))
    weight[5] = 0
    got = dequantised(pack(weight, hessian))
    assert not got[:, [4, 19]].any()
    assert not got[5].any()
    assert got.isfinite().all()
    assert not dequantised(pack(weight, torch.zeros(20, 20))).any()


def test_values_stay_on_the_grid() -> None:
    weight, hessian = layer(12, 20)
    weight[0, 0] = 100 * weight.abs().max()
    for qmax, clip in ((1, 2.0), (31, 2.0), (127, 20.0)):
        values = pack(weight, hessian, qmax=qmax, clip=clip).values_RC
        assert values.dtype == torch.int8
        assert int(values.abs().max()) <= qmax


def test_steps_are_sdclip() -> None:
    weight, hessian = layer(6, 20)
    expected = (12.85 * weight.numpy().std(axis=1, ddof=1) / 31).astype("float16")
    assert torch.equal(pack(weight, hessian).steps_R, torch.from_numpy(expected))


def indefinite() -> Tensor:
    hessian = torch.eye(20)
    hessian[0, 1] = hessian[1, 0] = 3
    return hessian


@pytest.mark.parametrize("hessian", [indefinite(), torch.full((20, 20), float("nan")), -torch.eye(20)])
def test_a_hessian_that_is_not_positive_definite_names_the_layer(hessian: Tensor) -> None:
    with pytest.raises(ValueError, match=r"blocks\.3\.mlp\.up\.weight: its Hessian is not positive definite"):
        gptq.factorise(
            torch.stack([torch.eye(20), hessian]), 0.01, ["blocks.2.mlp.up.weight", "blocks.3.mlp.up.weight"]
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_weights_beyond_float16_steps_name_the_layer(bad: float) -> None:
    weight, hessian = layer(6, 20)
    weight[2, 3] = bad
    with pytest.raises(ValueError, match="matrix: the step of a row is not a finite float16"):
        pack(weight, hessian)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_is_as_good_as_the_cpu() -> None:
    weight, hessian = layer(64, 300)
    on_cpu = dequantised(pack(weight, hessian)) - weight
    first, second = (dequantised(pack(weight.cuda(), hessian.cuda())) for _ in range(2))
    assert torch.equal(first, second)
    assert float(gptq.squared_output_errors(first.cpu() - weight, hessian).sum()) == pytest.approx(
        float(gptq.squared_output_errors(on_cpu, hessian).sum()), rel=0.02
    )
