import numpy as np
import pytest
import torch

from stages.calibrate.hessians import collect, hessian_name, observe_
from stages.calibrate.params import CalibrateParams, Params
from stages.clock import Interval
from stages.report import Report
from stages.train.data import Windows
from stages.train.model import is_matrix
from tests.factories import PARALLEL, TINY, random_model, world, write_shards

QUIET = Report(is_main=False)


def calibrate_params(tokens: int = 64, micro: int = 32) -> Params:
    return Params(42, PARALLEL, TINY, CalibrateParams(tokens=tokens, micro_batch_tokens=micro))


def test_hessians_equal_recorded_inputs_multiplied_out(tmp_path):
    """The inputs of every matrix, recorded by hooks of our own on a second copy of the model, as X^T X in float64."""
    folder = write_shards(tmp_path)
    model = random_model(4)
    hessians = collect(model.state_dict(), calibrate_params(), folder, world(), QUIET, Interval())
    recorded: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith("attention"):  # its input is what query, key and value see
            name = f"{name}.query"
        elif not is_matrix(f"{name}.weight") or not hasattr(module, "weight"):
            continue
        if "key" not in name and "value" not in name:
            module.register_forward_pre_hook(lambda _, args, key=f"{name}.weight": recorded.setdefault(key, []).append(args[0]))
    model.head.register_forward_pre_hook(lambda _, args: recorded.setdefault("embedding.weight", []).append(args[0]))
    tokens = torch.from_numpy(Windows(folder, TINY.context, TINY.vocab_size, 42).batch(0, 4))
    with torch.no_grad():
        model(tokens[:, :-1], tokens[:, 1:], looped=True)
    assert len(recorded) == 4 * TINY.layers + 1
    for name, inputs in recorded.items():
        rows = torch.cat([x.flatten(0, -2) for x in inputs]).double()
        expected = rows.T @ rows / 64
        torch.testing.assert_close(hessians[hessian_name(name)].double(), expected, atol=1e-4, rtol=1e-4)
    visits = len(recorded["blocks.1.mlp.up.weight"])
    assert (visits, len(recorded["blocks.0.mlp.up.weight"])) == (1 + TINY.loops, 1)


def test_query_key_and_value_share_one_hessian_and_every_matrix_has_one(tmp_path):
    model = random_model(0)
    names = {hessian_name(name) for name in model.state_dict() if is_matrix(name)} | {"embedding.weight"}
    assert set(observe_(model)) == names
    assert hessian_name("blocks.3.attention.value.weight") == "blocks.3.attention.query.weight"
    assert hessian_name("blocks.3.mlp.down.weight") == "blocks.3.mlp.down.weight"


def test_micro_batches_and_ranks_do_not_change_the_sum(tmp_path):
    """D42: every rank measures its share and the shares are added."""
    folder = write_shards(tmp_path)
    state = random_model(1).state_dict()
    whole = collect(state, calibrate_params(micro=64), folder, world(), QUIET, Interval())
    parts = collect(state, calibrate_params(micro=16), folder, world(), QUIET, Interval())
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], atol=1e-5, rtol=1e-4)


def test_the_clock_covers_the_reads(tmp_path):
    clock = Interval()
    collect(random_model(1).state_dict(), calibrate_params(), write_shards(tmp_path), world(), QUIET, clock)
    assert clock.seconds > 0
    assert clock.elapsed() >= clock.seconds


def test_inputs_are_not_changed(tmp_path):
    state = random_model(1).state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    collect(state, calibrate_params(), write_shards(tmp_path), world(), QUIET, Interval())
    assert all(torch.equal(before[name], state[name]) for name in state)


def test_tokens_must_be_whole_windows_and_divide_over_ranks(tmp_path):
    with pytest.raises(ValueError, match=r"calibrate\.tokens: 60 is not a multiple of model\.context \(16\)"):
        calibrate_params(tokens=60)
    with pytest.raises(ValueError, match="4 windows do not divide over 3 ranks"):
        collect(random_model(1).state_dict(), calibrate_params(), write_shards(tmp_path), world(size=3), QUIET, Interval())


def test_hessians_are_symmetric_and_positive(tmp_path):
    for name, hessian in collect(
        random_model(2).state_dict(), calibrate_params(), write_shards(tmp_path), world(), QUIET, Interval()
    ).items():
        values = np.linalg.eigvalsh(hessian.double().numpy())
        assert torch.equal(hessian, hessian.T) or torch.allclose(hessian, hessian.T, atol=1e-6), name
        assert values.min() > -1e-6 * values.max(), name
