import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from stages import config
from stages.clock import Interval
from stages.report import Report
from stages.train.checkpoint import open_checkpoints
from stages.train.data import Windows, micro_batch_size
from stages.train.loop import _batch_shape, train
from stages.train.model import Model, initialise_, visit_plan
from stages.train.muon import coefficients, muon_update, normalise_rows, orthogonalise
from stages.train.optimizer import Optimizers
from stages.train.params import ModelParams, Params
from stages.train.schedule import pacing, read_fractions, settings
from tests.factories import TINY, TRAIN, params, random_model, world, write_shards
from tests.slow_model import logits as slow_logits

ROOT = Path(__file__).parents[1]
QUIET = Report(is_main=False)


def record_model_params() -> ModelParams:
    raw = config.read(ROOT / "params.yaml")
    overlay = yaml.safe_load((ROOT / "presets/record.yaml").read_text())
    return config.build({**raw["model"], **overlay["model"]}, ModelParams)


# The model


@pytest.mark.parametrize("looped", [False, True])
def test_model_equals_a_slow_float64_version(looped):
    model = random_model(3).double()
    model.dtype = torch.float64
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    tokens = np.random.Generator(np.random.PCG64(1)).integers(0, TINY.vocab_size, 9)
    with torch.no_grad():
        fast = model.logits(torch.from_numpy(tokens)[None], looped)[0].double().numpy()
    slow = slow_logits(weights, tokens, TINY, looped)
    assert np.linalg.norm(fast - slow) / np.linalg.norm(slow) < 1e-5  # angles, norms' eps and the softcap are float32


def test_losses_are_cross_entropies_of_the_logits_and_scored_from_only_selects():
    model = random_model(1)
    tokens = torch.randint(TINY.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = model(tokens[:, :-1], tokens[:, 1:])
        chosen = torch.log_softmax(model.logits(tokens[:, :-1]).double(), -1).gather(-1, tokens[:, 1:, None])[..., 0]
        torch.testing.assert_close(losses.double(), -chosen, atol=1e-5, rtol=0)
        torch.testing.assert_close(model(tokens[:, :-1], tokens[:, 1:], scored_from=8), losses[:, 8:], atol=1e-5, rtol=0)


def test_the_record_has_the_record_s_parameters():
    with torch.device("meta"):
        model = Model(record_model_params())
    assert sum(parameter.numel() for parameter in model.parameters()) == 35_944_536


def test_visits_of_the_record():
    record = record_model_params()
    assert visit_plan(record, looped=False) == ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9, 10))
    assert visit_plan(record, looped=True) == ((0, 1, 2, 3, 4, 5, 3, 4), (5, 3, 4, 5, 6, 7, 8, 9, 10))


def test_initial_values():
    model = Model(TINY)
    initialise_(model, 42)
    state = model.state_dict()
    assert 0.003 < float(state["embedding.weight"].std()) < 0.007
    query = state["blocks.0.attention.query.weight"]
    torch.testing.assert_close(query @ query.T, torch.eye(TINY.width), atol=1e-5, rtol=0)
    assert not state["blocks.0.attention.output.weight"].any()
    assert not state["blocks.0.mlp.down.weight"].any()
    assert (state["blocks.1.attention.gain"] == 5.25).all()
    assert (state["skip_weight"] == 1).all()
    assert not state["skip_gate"].any()
    assert (state["blocks.2.mix"] == torch.tensor([[1.0], [0.0]])).all()


def test_with_bfloat16_activations_matrices_start_rounded_and_every_weight_is_float32():
    model = Model(TINY, torch.bfloat16)
    initialise_(model, 42)
    for name in ("blocks.0.attention.query.weight", "embedding.weight"):
        weight = model.state_dict()[name]
        assert weight.any()
        assert torch.equal(weight, weight.bfloat16().float())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_model_is_causal():
    model = random_model(5)
    tokens = torch.randint(TINY.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % TINY.vocab_size
    with torch.no_grad():
        before, after = model.logits(tokens), model.logits(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


def test_every_parameter_gets_a_gradient_when_looped():
    """D33: a parameter that never moves is dead weight in the artifact."""
    model = random_model(2)
    tokens = torch.randint(TINY.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    model(tokens[:, :-1], tokens[:, 1:], looped=True).mean().backward()
    dead = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert dead == []


# Muon


def slow_muon(gradient, momentum, beta, steps):
    """One matrix in float64, by the formulas."""
    momentum = beta * momentum + gradient
    u = gradient + beta * momentum
    u = np.stack([row / max(1e-7, np.linalg.norm(row)) for row in u])
    transposed = u.shape[0] > u.shape[1]
    x = (u.T if transposed else u) / (np.linalg.norm(u) + 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return (x.T if transposed else x) * math.sqrt(max(1, u.shape[0] / u.shape[1])), momentum


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12)])
def test_muon_equals_a_slow_float64_version(shape):
    generator = np.random.Generator(np.random.PCG64(0))
    gradient, momentum = generator.normal(size=shape), generator.normal(size=shape)
    update, kept = muon_update(torch.from_numpy(gradient)[None], torch.from_numpy(momentum)[None], 0.95, coefficients("fixed", 5), torch.float64)
    slow_update, slow_kept = slow_muon(gradient, momentum, 0.95, 5)
    np.testing.assert_allclose(update[0].numpy(), slow_update, atol=1e-12)
    np.testing.assert_allclose(kept[0].numpy(), slow_kept, atol=1e-12)


def test_newton_schulz_brings_singular_values_near_one():
    matrices = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(normalise_rows(matrices), coefficients("fixed", 5), torch.float32))
    assert values.min() > 0.6
    assert values.max() < 1.3


# Schedule


def test_schedule_of_the_record():
    record = replace(TRAIN, steps=1000, warmdown=0.72, loop_from=0.35)
    assert settings(0, 0.0, record)[1:] == (1.0, 0.92, False)
    assert settings(280, 0.28, record).lr_multiplier == pytest.approx(1.0)
    assert settings(640, 0.64, record).lr_multiplier == pytest.approx(0.5)
    assert settings(750, 0.349999, record).looped is False
    assert settings(750, 0.35, record).looped is True
    assert settings(750, 0.5, record).momentum == pytest.approx(0.955)
    assert settings(3000, 0.5, record).momentum == 0.99
    assert settings(999, 0.999, replace(record, min_lr=0.1)).lr_multiplier == 0.1


def test_a_budget_of_seconds_ends_with_the_first_step_after_it():
    clock = iter([0.0, 20.0, 40.0, 59.0])
    fraction = pacing(replace(TRAIN, budget="seconds", seconds=60.0, reserve_seconds=2.0), None, lambda: next(clock))
    assert [fraction(step) for step in range(4)] == [0.0, 20 / 58, 40 / 58, None]


def test_a_run_of_seconds_replayed_gives_the_same_weights(tmp_path):
    folder = write_shards(tmp_path / "train")
    run = params(budget="seconds", seconds=1.5, reserve_seconds=0.5)
    by_clock = train(run, folder, world(), QUIET, Interval())
    fractions = [now.fraction for now in by_clock.schedule]
    (tmp_path / "schedule.json").write_text(json.dumps({"budget": "seconds", "fractions": fractions}))
    replayed = train(run, folder, world(), QUIET, Interval(), read_fractions(tmp_path / "schedule.json"))
    assert len(by_clock.losses) > 3
    assert replayed.losses == by_clock.losses
    assert all(torch.equal(replayed.state[name], tensor) for name, tensor in by_clock.state.items())


@pytest.mark.parametrize("text", ["{", "[]", '{"fractions": []}', '{"fractions": [2.0]}', '{"steps": 3}'])
def test_a_file_that_is_no_schedule_is_refused(tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ValueError, match=r"s\.json"):
        read_fractions(tmp_path / "s.json")


# Data order


def test_an_epoch_visits_every_window_once_and_the_seed_decides_the_order(tmp_path):
    folder = write_shards(tmp_path, lengths=(200, 5, 333))
    windows = Windows(folder, 16, TINY.vocab_size, seed=1)
    count = len(windows._order)
    rows = windows.batch(0, count)
    assert rows.shape == (count, 17)
    assert len({row.tobytes() for row in rows}) == count
    assert not np.array_equal(rows, Windows(folder, 16, TINY.vocab_size, seed=2).batch(0, count))
    np.testing.assert_array_equal(rows[5:9], Windows(folder, 16, TINY.vocab_size, seed=1).batch(5, 4))
    beyond = windows.batch(count, 3)
    np.testing.assert_array_equal(windows.batch(0, count), rows)  # back into the first epoch
    np.testing.assert_array_equal(windows.batch(count, 3), beyond)


def test_too_little_text_for_one_window(tmp_path):
    with pytest.raises(ValueError, match="too few for one window"):
        Windows(write_shards(tmp_path, lengths=(10,)), 16, TINY.vocab_size, 0)


def test_a_token_outside_the_vocabulary(tmp_path):
    with pytest.raises(ValueError, match="vocab_size is 10"):
        Windows(write_shards(tmp_path), 16, 10, 0).batch(0, 20)


def test_micro_batches_have_one_shape():
    assert [micro_batch_size(48, most) for most in (1, 5, 32, 48, 100)] == [1, 4, 24, 48, 48]


# The loop


def run_train(tmp_path, name, *options, environment=None, launcher=()):
    """The stage as a command, on small parameters; returns the output folder."""
    write_shards(tmp_path / "train")
    run = params()
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(asdict(run)))
    output = tmp_path / name
    command = [sys.executable, *launcher, "-m", "stages.train", "--params", str(file), "--train", str(tmp_path / "train")]
    command += ["--output", str(output), "--scratch", str(tmp_path / "scratch"), *options]
    return command, output, {**os.environ, **(environment or {})}


def finish(command, environment):
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def test_training_learns_and_repeats_bit_for_bit(tmp_path):
    folder = write_shards(tmp_path)
    first = train(params(steps=30), folder, world(), QUIET, Interval())
    again = train(params(steps=30), folder, world(), QUIET, Interval())
    assert first.losses == again.losses
    assert first.losses[0] == pytest.approx(math.log(TINY.vocab_size), abs=0.01)
    assert first.losses[-1] < first.losses[0] - 0.3
    assert all(torch.equal(first.state[name], again.state[name]) for name in first.state)
    assert train(params(seed=7, steps=3), folder, world(), QUIET, Interval()).losses != first.losses[:3]


def test_accumulating_micro_batches_equals_one_large_batch(tmp_path):
    folder = write_shards(tmp_path)
    whole = train(params(micro_batch_tokens=64), folder, world(), QUIET, Interval())
    parts = train(params(micro_batch_tokens=16), folder, world(), QUIET, Interval())
    np.testing.assert_allclose(whole.losses, parts.losses, atol=2e-5)


def test_two_gloo_ranks_give_one_rank_s_loss(tmp_path):
    command, one, environment = run_train(tmp_path, "one")
    assert finish(command, environment).returncode == 0
    command, two, environment = run_train(tmp_path, "two", "--set", "parallel.nproc=2")
    result = finish(command, environment)
    assert result.returncode == 0, result.stderr
    losses = [np.loadtxt(folder / "loss.tsv", skiprows=1)[:, 1] for folder in (one, two)]
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-4)
    states = [load_file(folder / "model.safetensors") for folder in (one, two)]
    for name in states[0]:
        torch.testing.assert_close(states[1][name], states[0][name], atol=2e-3, rtol=0)
    assert json.loads((two / "timing.json").read_text())["ranks"] == 2


def test_killed_then_resumed_ends_with_the_same_bytes(tmp_path):
    options = ("--set", "train.steps=120", "--set", "train.checkpoint_every=5")
    command, straight, environment = run_train(tmp_path, "straight", *options)
    assert finish(command, environment).returncode == 0
    assert not any((tmp_path / "scratch").iterdir())
    command, killed, environment = run_train(tmp_path, "killed", *options)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "scratch").glob("*/resume-from")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "model.safetensors").exists()
    result = finish(command, environment)
    assert "resumed after step" in result.stdout
    for name in ("model.safetensors", "loss.tsv", "schedule.json", "metrics.json"):
        assert (killed / name).read_bytes() == (straight / name).read_bytes(), name
    assert not any((tmp_path / "scratch").iterdir())


def test_a_checkpoint_of_another_seed_is_not_continued(tmp_path):
    folder = write_shards(tmp_path / "train")
    names = {
        open_checkpoints(run, folder, tmp_path / "scratch", world()).folder
        for run in (
            params(seed=1, checkpoint_every=2),
            params(seed=2, checkpoint_every=2),
            params(seed=1, checkpoint_every=2, matrix_lr=0.1),
        )
    }
    assert len(names) == 3
    write_shards(tmp_path / "train", seed=5)
    names.add(open_checkpoints(params(seed=1, checkpoint_every=2), folder, tmp_path / "scratch", world()).folder)
    assert len(names) == 4


def test_resuming_a_budget_of_seconds_is_refused(tmp_path):
    command, _, environment = run_train(tmp_path, "out", "--set", "train.budget=seconds", "--set", "train.checkpoint_every=5")
    result = finish(command, environment)
    assert result.returncode == 2
    assert "train.checkpoint_every" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_stage_ends_when_its_parent_dies(tmp_path):
    command, _, environment = run_train(tmp_path, "out", "--set", "train.steps=100000", "--set", "train.checkpoint_every=5")
    script = "import subprocess, sys, time; p = subprocess.Popen(sys.argv[1:]); print(p.pid, flush=True); time.sleep(600)"
    parent = subprocess.Popen([sys.executable, "-c", script, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    deadline = time.monotonic() + 60
    while not list((tmp_path / "scratch").glob("*/resume-from")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.communicate()
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2][:3]:
        assert time.monotonic() < deadline, "the training outlived its parent"
        time.sleep(0.05)


def test_batches_that_do_not_divide_over_ranks():
    with pytest.raises(ValueError, match=r"train\.batch_tokens: 4 windows a step do not divide over 3 ranks"):
        _batch_shape(params(), world(size=3))


def test_missing_shards_are_one_clear_line(tmp_path):
    command, output, environment = run_train(tmp_path, "out")
    command[command.index("--train") + 1] = str(tmp_path / "nowhere")
    result = finish(command, environment)
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert "nowhere does not exist" in result.stderr
    assert not output.exists() or not any(output.iterdir())


def test_params_of_small_runs_are_valid():
    assert config.build(asdict(params()), Params) == params()
