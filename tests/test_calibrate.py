import numpy as np
import pytest
import torch

from stages.calibrate.hessians import (
    HessianObserver,
    accumulate_fisher_,
    collect_hessians,
    hessian_name,
    importance_name,
)
from stages.calibrate.params import CalibrateParams, Params
from stages.common.clock import Interval
from stages.common.progress import Logger
from stages.train.data import TrainingWindows
from stages.train.model import MLP, Extensions, is_matrix
from stages.train.reference import squared_leaky_relu
from tests.factories import PARALLEL, TINY, make_world, random_model, write_shards

QUIET = Logger(is_main=False)


def calibrate_params(tokens: int = 64, micro: int = 32, importance: int = 16, revisit: float = 1.0) -> Params:
    section = CalibrateParams(
        tokens=tokens, importance_tokens=importance, micro_batch_tokens=micro, revisit_weight=revisit
    )
    return Params(42, PARALLEL, TINY, section)


def is_hessian(name: str) -> bool:
    return not name.endswith(".importance")


@pytest.mark.parametrize("revisit", [1.0, 0.25, 0.0])
def test_hessians_equal_recorded_inputs_multiplied_out(tmp_path, revisit):
    """X^T X in float64, of the inputs that forward hooks record on a second copy of the model."""
    folder = write_shards(tmp_path)
    model = random_model(4)
    hessians = collect_hessians(
        model.state_dict(), calibrate_params(revisit=revisit), folder, make_world(), QUIET, Interval()
    )

    # Query, key and value have one input, that of the attention.
    recorded: dict[str, list[torch.Tensor]] = {}

    for name, module in model.named_modules():
        if name.endswith("attention"):
            name = f"{name}.query"
        elif not is_matrix(f"{name}.weight") or not hasattr(module, "weight"):
            continue
        if "key" not in name and "value" not in name:
            module.register_forward_pre_hook(
                lambda _, args, key=f"{name}.weight": recorded.setdefault(key, []).append(args[0])
            )

    tokens = torch.from_numpy(TrainingWindows(folder, TINY.context, TINY.vocab_size, 42).batch(0, 4))
    with torch.no_grad():
        recorded["embedding.weight"] = [model.features(tokens[:, :-1], looped=True)]
    assert len(recorded) == 4 * TINY.layers + 1

    for name, inputs in recorded.items():
        # One pass over all windows here, two there: a first visit is one of a window.
        expected = torch.zeros((), dtype=torch.float64)
        for visit, x in enumerate(inputs):
            flat = x.flatten(0, -2).double()
            expected = expected + flat.T @ flat * (revisit if visit else 1.0) / 64
        torch.testing.assert_close(hessians[hessian_name(name)].double(), expected, atol=1e-4, rtol=1e-4)
    visits = len(recorded["blocks.1.mlp.up.weight"])
    assert (visits, len(recorded["blocks.0.mlp.up.weight"])) == (1 + TINY.loops, 1)


def test_query_key_and_value_share_one_hessian_and_every_matrix_has_one(tmp_path):
    model = random_model(0)
    names = {hessian_name(name) for name in model.state_dict() if is_matrix(name)} | {"embedding.weight"}
    assert set(HessianObserver(model).hessians) == names
    assert hessian_name("blocks.3.attention.value.weight") == "blocks.3.attention.query.weight"
    assert hessian_name("blocks.3.mlp.down.weight") == "blocks.3.mlp.down.weight"


def test_micro_batches_and_ranks_do_not_change_the_sum(tmp_path):
    """D42: every rank measures its share and the shares are added."""
    folder = write_shards(tmp_path)
    state = random_model(1).state_dict()
    whole = collect_hessians(state, calibrate_params(micro=64), folder, make_world(), QUIET, Interval())
    parts = collect_hessians(state, calibrate_params(micro=16), folder, make_world(), QUIET, Interval())
    for name in filter(is_hessian, whole):
        torch.testing.assert_close(whole[name], parts[name], atol=1e-5, rtol=1e-4)


def test_importance_is_the_squared_gradient_of_single_tokens_summed(tmp_path):
    """Against one backward pass for each token.

    Over many draws of the signs, the products of two tokens' gradients average out.
    """
    model = random_model(5)
    tokens = torch.from_numpy(
        TrainingWindows(write_shards(tmp_path), TINY.context, TINY.vocab_size, 42).batch(0, 2)
    )
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    names = ["blocks.1.mlp.up.weight", "blocks.0.attention.value.weight", "embedding.weight"]
    weights = [model.get_parameter(name) for name in names]
    exact = {name: torch.zeros(len(weight)) for name, weight in zip(names, weights, strict=True)}
    for loss in model(inputs, targets, looped=True).flatten():
        for name, gradient in zip(names, torch.autograd.grad(loss, weights, retain_graph=True), strict=True):
            exact[name] += gradient.square().sum(1)
    draws, squares = 300, {name: torch.zeros_like(row) for name, row in exact.items()}
    for draw in range(draws):
        accumulate_fisher_(model, inputs, targets, draw, squares)
    for name in names:
        torch.testing.assert_close(
            squares[name] / draws, exact[name], rtol=0.3, atol=float(exact[name].mean()) / 10
        )
        assert float(squares[name].sum() / draws / exact[name].sum()) == pytest.approx(1.0, abs=0.1)


def test_importance_tokens_are_rounded_up_to_passes_and_bounded_by_the_tokens(tmp_path):
    folder, state = write_shards(tmp_path), random_model(1).state_dict()
    one = collect_hessians(state, calibrate_params(importance=16), folder, make_world(), QUIET, Interval())
    pass_ = collect_hessians(state, calibrate_params(importance=32), folder, make_world(), QUIET, Interval())
    more = collect_hessians(state, calibrate_params(importance=48), folder, make_world(), QUIET, Interval())
    name = importance_name("blocks.0.mlp.down.weight")
    assert torch.equal(one[name], pass_[name])
    assert not torch.equal(one[name], more[name])
    with pytest.raises(ValueError, match=r"importance_tokens: 80 is above calibrate\.tokens \(64\)"):
        calibrate_params(importance=80)


def test_the_fused_mlp_is_not_used_where_it_would_hide_its_hidden_layer(tmp_path):
    """With gradients a fused MLP would go past the observers of its two matrices."""
    model = random_model(3)
    for mlp in (module for module in model.modules() if isinstance(module, MLP)):
        mlp.ops = mlp.ops._replace(mlp=lambda x, up, down: squared_leaky_relu(x @ up.T) @ down.T)
    observer = HessianObserver(model)
    tokens = torch.from_numpy(
        TrainingWindows(write_shards(tmp_path), TINY.context, TINY.vocab_size, 42).batch(0, 2)
    )
    model(tokens[:, :-1], tokens[:, 1:], looped=True, extensions=Extensions(observer=observer))
    assert all(float(hessian.diagonal().sum()) > 0 for hessian in observer.hessians.values())


@pytest.mark.parametrize("visits", range(1, 5))
def test_a_pass_that_raised_does_not_shift_the_visits_of_the_next_one(visits):
    """A revisit weight of zero: a looped block's Hessian is that of its first visit alone."""
    model = random_model(4)
    tokens = torch.from_numpy(np.random.Generator(np.random.PCG64(0)).integers(4, TINY.vocab_size, (2, 16)))
    undisturbed = HessianObserver(model, revisit_weight=0.0)
    observer = HessianObserver(model, revisit_weight=0.0)
    remaining = iter(range(visits))

    def fail_later(_module, _arguments):
        if next(remaining, None) is None:
            raise MemoryError

    with torch.no_grad():
        model.features(tokens, True, Extensions(observer=undisturbed))
        failing = [block.register_forward_pre_hook(fail_later) for block in model.blocks]
        with pytest.raises(MemoryError):
            model.features(tokens, True, Extensions(observer=observer))
        for hook in failing:
            hook.remove()

        # Only what the next pass adds is compared.
        assert any(hessian.any() for hessian in observer.hessians.values())
        for hessian in observer.hessians.values():
            hessian.zero_()
        model.features(tokens, True, Extensions(observer=observer))
    for name, hessian in undisturbed.hessians.items():
        assert torch.equal(observer.hessians[name], hessian), name


def test_the_clock_covers_the_reads(tmp_path):
    clock = Interval()
    collect_hessians(
        random_model(1).state_dict(), calibrate_params(), write_shards(tmp_path), make_world(), QUIET, clock
    )
    assert clock.seconds > 0
    assert clock.elapsed() >= clock.seconds


def test_inputs_are_not_changed(tmp_path):
    state = random_model(1).state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    collect_hessians(state, calibrate_params(), write_shards(tmp_path), make_world(), QUIET, Interval())
    assert all(torch.equal(before[name], state[name]) for name in state)


def test_tokens_must_be_whole_windows_and_divide_over_ranks(tmp_path):
    with pytest.raises(ValueError, match=r"calibrate\.tokens: 60 is not a multiple of model\.context \(16\)"):
        calibrate_params(tokens=60)
    with pytest.raises(ValueError, match="4 windows do not divide over 3 ranks"):
        collect_hessians(
            random_model(1).state_dict(),
            calibrate_params(),
            write_shards(tmp_path),
            make_world(size=3),
            QUIET,
            Interval(),
        )


def test_hessians_are_symmetric_and_positive(tmp_path):
    found = collect_hessians(
        random_model(2).state_dict(),
        calibrate_params(),
        write_shards(tmp_path),
        make_world(),
        QUIET,
        Interval(),
    )
    for name in filter(is_hessian, found):
        hessian = found[name]
        values = np.linalg.eigvalsh(hessian.double().numpy())
        assert torch.equal(hessian, hessian.T) or torch.allclose(hessian, hessian.T, atol=1e-6), name
        assert values.min() > -1e-6 * values.max(), name
