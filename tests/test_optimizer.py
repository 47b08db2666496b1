"""Muon, AdamW, clipping and the moving average, in banks and over ranks."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.common.parallel import World
from stages.train.model import is_matrix, is_table
from stages.train.muon import (
    NewtonSchulz,
    muon_update,
    newton_schulz_coefficients,
    normalise_rows,
    orthogonalise,
)
from stages.train.optimizer import ShardedOptimizer
from stages.train.schedule import StepSchedule
from tests import ranks
from tests.factories import TRAIN, make_world, random_model

UNCLIPPED = 1e9  # a clip_norm above every gradient's norm
FIXED = (3.4445, -4.7750, 2.0315)
KINDS: tuple[NewtonSchulz, ...] = ("fixed", "polar_express")
EMBEDDING, VECTOR, MATRIX = "embedding.weight", "skip_weight", "blocks.1.mlp.down.weight"


def optimizers_of(model, **changes):
    return ShardedOptimizer(model, replace(TRAIN, **changes), make_world())


def random_gradients(model, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
    }


def take_step(optimizers, gradients, step, lr_multiplier=1.0, momentum=0.9):
    optimizers.accumulate(gradients, 0)
    optimizers.step(
        StepSchedule(budget_spent=0.0, lr_multiplier=lr_multiplier, momentum=momentum, looped=True), step
    )


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def held(optimizers):
    return [tensor.clone() for bank in optimizers.state() for tensor in bank]


# Muon


def slow_muon(gradient, momentum, beta, triples):
    """One matrix in float64, by the formulas."""
    momentum = beta * momentum + gradient
    u = gradient + beta * momentum
    u = np.stack([row / max(1e-7, np.linalg.norm(row)) for row in u])
    transposed = u.shape[0] > u.shape[1]
    x = (u.T if transposed else u) / (np.linalg.norm(u) + 1e-7)
    for a, b, c in triples:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if transposed else x) * math.sqrt(max(1, u.shape[0] / u.shape[1])), momentum


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12)])
def test_muon_equals_a_slow_float64_version(shape, kind):
    generator = np.random.Generator(np.random.PCG64(0))
    gradient, momentum = generator.normal(size=shape), generator.normal(size=shape)
    triples = newton_schulz_coefficients(kind, 5)
    update, kept = muon_update(
        torch.from_numpy(gradient)[None], torch.from_numpy(momentum)[None], 0.95, triples, torch.float64
    )
    slow_update, slow_kept = slow_muon(gradient, momentum, 0.95, triples)
    np.testing.assert_allclose(update[0].numpy(), slow_update, atol=1e-12)
    np.testing.assert_allclose(kept[0].numpy(), slow_kept, atol=1e-12)


def test_coefficients_of_any_number_of_steps():
    assert newton_schulz_coefficients("fixed", 3) == (FIXED,) * 3
    five = newton_schulz_coefficients("polar_express", 5)
    assert len(set(five)) == 5
    assert newton_schulz_coefficients("polar_express", 3) == five[:3]
    assert newton_schulz_coefficients("polar_express", 7) == (*five, five[-1], five[-1])


@pytest.mark.parametrize(("kind", "low", "high"), [("fixed", 0.6, 1.3), ("polar_express", 0.85, 1.15)])
def test_newton_schulz_brings_singular_values_near_one(kind, low, high):
    matrices = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(
        orthogonalise(normalise_rows(matrices), newton_schulz_coefficients(kind, 5), torch.float32)
    )
    assert values.min() > low
    assert values.max() < high


def test_polar_express_lifts_singular_values_of_a_thousandth():
    """One triple for all iterations needs more of them for that."""
    values = torch.logspace(-3, 0, 12, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q for _ in range(2)
    )
    matrix = ((left * values) @ right)[None]
    smallest = {
        kind: torch.linalg.svdvals(
            orthogonalise(matrix, newton_schulz_coefficients(kind, 5), torch.float64)
        ).min()
        for kind in KINDS
    }
    assert smallest["polar_express"] > 0.7
    assert smallest["fixed"] < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_steps_move_every_matrix_by_the_formulas(kind):
    model = random_model(0)
    optimizers = optimizers_of(model, clip_norm=UNCLIPPED, newton_schulz=kind)
    expected = {
        name: (tensor.double().numpy(), 0.0) for name, tensor in weights_of(model).items() if is_matrix(name)
    }
    for step, (multiplier, momentum) in enumerate([(1.0, 0.5), (0.7, 0.9), (0.1, 0.95)]):
        gradients = random_gradients(model, step)
        for name, (weight, kept) in expected.items():
            update, kept = slow_muon(
                gradients[name].double().numpy(),
                kept,
                momentum,
                newton_schulz_coefficients(kind, TRAIN.newton_schulz_steps),
            )
            rate = TRAIN.matrix_lr * multiplier
            expected[name] = (weight - rate * TRAIN.matrix_weight_decay * weight - rate * update, kept)
        take_step(optimizers, gradients, step, multiplier, momentum)
    for name, (weight, _) in expected.items():
        np.testing.assert_allclose(
            model.get_parameter(name).detach().numpy(), weight, atol=2e-6, err_msg=name
        )


# AdamW, clipping, decay


@pytest.mark.parametrize("scale", [1.0, 1e-7], ids=["ordinary", "near eps"])
def test_ten_steps_of_tables_and_vectors_equal_torch_s_adamw(scale):
    model, reference = random_model(0), random_model(0)
    optimizers = optimizers_of(model, clip_norm=UNCLIPPED)
    vectors = {name: parameter for name, parameter in reference.named_parameters() if not is_matrix(name)}
    tables = {name: vectors.pop(name) for name in filter(is_table, list(vectors))}

    of_tables = {"lr": TRAIN.embedding_lr, "weight_decay": TRAIN.embedding_weight_decay}
    of_vectors = {"lr": TRAIN.scalar_lr, "weight_decay": TRAIN.scalar_weight_decay}
    groups = [{"params": list(tables.values())} | of_tables, {"params": list(vectors.values())} | of_vectors]
    torch_adamw = torch.optim.AdamW(groups, betas=(TRAIN.adam_beta1, TRAIN.adam_beta2), eps=TRAIN.adam_eps)
    warmdown = torch.optim.lr_scheduler.LambdaLR(torch_adamw, lambda step: 1 - step / 10)
    for step in range(10):
        gradients = random_gradients(model, step, scale)
        for name, parameter in reference.named_parameters():
            parameter.grad = gradients[name]
        torch_adamw.step()
        warmdown.step()
        take_step(optimizers, gradients, step, lr_multiplier=1 - step / 10)

    for name, parameter in {**tables, **vectors}.items():
        np.testing.assert_allclose(
            model.get_parameter(name).detach(), parameter.detach(), atol=2e-6, err_msg=name
        )


@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=["above", "below"])
def test_clipping_equals_torch_s_clip_grad_norm(scale):
    """Seen at the momenta: the first update of both rules is the same whatever the scale of the gradient."""
    model = random_model(0)
    by_torch, by_us = optimizers_of(random_model(0), clip_norm=UNCLIPPED), optimizers_of(model, clip_norm=0.3)
    for step in range(3):
        gradients = random_gradients(model, step, scale)
        take_step(by_us, gradients, step)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        assert (norm > 0.3) == (scale == 1.0)
        take_step(by_torch, {name: parameter.grad for name, parameter in model.named_parameters()}, step)
    for mine, theirs in zip(held(by_us), held(by_torch), strict=True):
        assert theirs.any()
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_several_passes_count_as_their_mean():
    """Clipped by the norm of the mean; the next step begins from zero, whatever its number of passes."""
    model = random_model(0)
    in_passes, at_once = optimizers_of(model), optimizers_of(random_model(0))
    for step, passes in enumerate((3, 1, 2)):
        parts = [random_gradients(model, 10 * step + number, 0.02) for number in range(passes)]
        for number, part in enumerate(parts):
            in_passes.accumulate(part, number)
        in_passes.step(StepSchedule(0.0, 1.0, 0.9, True), step)
        take_step(at_once, {name: sum(part[name] for part in parts) / passes for name in parts[0]}, step)
    for mine, theirs in zip(held(in_passes), held(at_once), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_decay_is_decoupled_and_at_the_current_rate():
    """Without gradients only the decay moves anything, so it is not part of a momentum."""
    model = random_model(0)
    before = weights_of(model)
    take_step(optimizers_of(model), random_gradients(model, 0, scale=0.0), 0, lr_multiplier=0.5)
    rates = {
        EMBEDDING: TRAIN.embedding_lr * TRAIN.embedding_weight_decay,
        VECTOR: TRAIN.scalar_lr * TRAIN.scalar_weight_decay,
        MATRIX: TRAIN.matrix_lr * TRAIN.matrix_weight_decay,
    }
    for name, rate in rates.items():
        torch.testing.assert_close(
            model.get_parameter(name).detach(), before[name] * (1 - 0.5 * rate), atol=0, rtol=1e-6
        )


# The moving average


def test_the_moving_average_follows_its_recurrence_from_the_initial_weights():
    model = random_model(0)
    optimizers = optimizers_of(model)
    expected = weights_of(model)
    for step in range(3):
        take_step(optimizers, random_gradients(model, step), step)
        expected = {
            name: TRAIN.ema_decay * expected[name] + (1 - TRAIN.ema_decay) * tensor
            for name, tensor in weights_of(model).items()
        }
    average = optimizers.averaged_weights()
    assert set(average) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(average[name], tensor, atol=1e-6, rtol=0)
        assert not torch.equal(average[name], model.get_parameter(name))


# Banks


def test_banks_cover_every_parameter_once_and_the_model_s_parameters_are_views_of_them():
    model = random_model(0)
    before = weights_of(model)
    banks = optimizers_of(model).groups
    assert sorted(name for bank in banks for name in bank.names) == sorted(before)
    assert sum(bank.weights.numel() for bank in banks) == sum(tensor.numel() for tensor in before.values())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    for number, bank in enumerate(banks, start=1):
        bank.weights.fill_(number)
    for number, bank in enumerate(banks, start=1):
        for name in bank.names:
            assert (model.get_parameter(name) == number).all(), name


def test_every_matrix_is_a_unit_of_a_bank_of_its_shape():
    banks = optimizers_of(random_model(0)).groups
    matrices = [bank for bank in banks if bank.weights.dim() == 3]
    assert sorted(name for bank in matrices for name in bank.names) == sorted(
        filter(is_matrix, weights_of(random_model(0)))
    )
    for bank in matrices:
        assert {tuple(parameter.shape) for parameter in bank.parameters} == {tuple(bank.weights.shape[1:])}
    assert [bank.names for bank in banks if EMBEDDING in bank.names] == [
        list(filter(is_table, weights_of(random_model(0))))
    ]


def test_a_parameter_without_gradient_counts_as_zero_whatever_the_step_before_left():
    """The skips of a one-layer model have a gradient when it is looped, and else none."""
    model, same = random_model(0), random_model(0)
    without, zero = optimizers_of(model), optimizers_of(same)
    for step, missing in enumerate((set(), {"skip_weight", "skip_gate"})):
        gradients = random_gradients(model, step)
        take_step(
            without,
            {name: None if name in missing else gradient for name, gradient in gradients.items()},
            step,
        )
        take_step(
            zero, {name: gradient * (name not in missing) for name, gradient in gradients.items()}, step
        )
    assert all(map(torch.equal, held(without), held(zero)))


def test_a_loaded_state_gives_the_same_next_step_bit_for_bit():
    model, other = random_model(0), random_model(1)
    optimizers, resumed = optimizers_of(model), optimizers_of(other)
    for step in range(2):
        take_step(optimizers, random_gradients(model, step), step)
    resumed.load_state([[tensor.clone() for tensor in bank] for bank in optimizers.state()])
    assert all(torch.equal(tensor, other.get_parameter(name)) for name, tensor in weights_of(model).items())
    before = weights_of(model)
    for its_optimizers in (optimizers, resumed):
        take_step(its_optimizers, random_gradients(model, 2), 2, lr_multiplier=0.5)
    assert all(map(torch.equal, held(optimizers), held(resumed)))
    for name, tensor in weights_of(model).items():
        assert torch.equal(tensor, other.get_parameter(name))
        assert not torch.equal(tensor, before[name])
    assert all(
        torch.equal(tensor, resumed.averaged_weights()[name])
        for name, tensor in optimizers.averaged_weights().items()
    )


# Ranks


def sharded(world: World) -> None:
    alone, shared = random_model(0), random_model(0)
    one, several = ShardedOptimizer(alone, TRAIN, make_world()), ShardedOptimizer(shared, TRAIN, world)
    padded = [
        bank.weights.shape[0] > sum(p.numel() for p in bank.parameters) // bank.weights[0].numel()
        for bank in several.groups
    ]
    assert any(padded)
    assert all(bank.average_shard.shape[0] * world.size == bank.weights.shape[0] for bank in several.groups)
    for step in range(3):
        of_ranks = [random_gradients(alone, 100 * step + rank, 0.01) for rank in range(world.size)]
        one.accumulate(
            {name: torch.stack([part[name] for part in of_ranks]).mean(0) for name in of_ranks[0]}, 0
        )
        several.accumulate(of_ranks[world.rank], 0)
        now = StepSchedule(0.0, 1 - step / 4, 0.9, True)
        one.step(now, step)
        several.step(now, step)
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(shared.get_parameter(name), parameter, atol=1e-6, rtol=0)
    average, expected = several.averaged_weights(), one.averaged_weights()
    assert set(average) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(average[name], tensor, atol=1e-6, rtol=0)


def test_ranks_that_share_the_banks_step_like_one() -> None:
    """Neither 5 nor 10 matrices of a shape divide over 3 ranks, nor 5 over 2."""
    ranks.agree("tests.test_optimizer:sharded", (2, 3))
