"""The train stage: schedule, order of the data, the loop, the command, and resuming."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from stages.common import config
from stages.common.clock import Interval
from stages.common.progress import Logger
from stages.common.stage import launch
from stages.train.checkpoint import Checkpoints, open_checkpoints
from stages.train.data import PrefetchedBatches, TrainingWindows, micro_batch_size
from stages.train.loop import TrainingLoop, _batch_shape, train
from stages.train.model import Model, initialise_
from stages.train.params import Params
from stages.train.schedule import budget_tracker, read_replay, step_schedule
from stages.train.stage import STAGE, main
from tests.factories import TINY, TRAIN, assert_trained_alike, make_world, params, write_shards

ROOT = Path(__file__).parents[1]
QUIET = Logger(is_main=False)


# Schedule


def test_schedule_of_the_record():
    record = replace(TRAIN, steps=1000, warmdown=0.72, loop_from=0.35)
    assert step_schedule(0, 0.0, record)[1:] == (1.0, 0.92, False)
    assert step_schedule(280, 0.28, record).lr_multiplier == pytest.approx(1.0)
    assert step_schedule(640, 0.64, record).lr_multiplier == pytest.approx(0.5)
    assert step_schedule(750, 0.349999, record).looped is False
    assert step_schedule(750, 0.35, record).looped is True
    assert step_schedule(750, 0.5, record).momentum == pytest.approx(0.955)
    assert step_schedule(3000, 0.5, record).momentum == 0.99
    assert step_schedule(999, 0.999, replace(record, min_lr=0.1)).lr_multiplier == 0.1
    rising = replace(record, warmup_steps=10)
    assert [
        step_schedule(step, step / 1000, rising).lr_multiplier for step in (0, 4, 9, 10)
    ] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert step_schedule(0, 0.64, rising).lr_multiplier == pytest.approx(0.05)


def test_a_budget_of_seconds_ends_with_the_first_step_after_it():
    clock = iter([0.0, 20.0, 40.0, 59.0])
    fraction = budget_tracker(
        replace(TRAIN, budget="seconds", seconds=60.0, reserve_seconds=2.0), None, lambda: next(clock)
    )
    assert [fraction(step) for step in range(4)] == [0.0, 20 / 58, 40 / 58, None]


def test_a_run_of_seconds_replayed_gives_the_same_weights(tmp_path):
    folder = write_shards(tmp_path / "train")
    run = params(budget="seconds", seconds=1.5, reserve_seconds=0.5)
    by_clock = train(run, folder, make_world(), QUIET, Interval())
    fractions = [now.budget_spent for now in by_clock.schedule]
    (tmp_path / "schedule.json").write_text(json.dumps({"budget": "seconds", "fractions": fractions}))
    replayed = train(run, folder, make_world(), QUIET, Interval(), read_replay(tmp_path / "schedule.json"))
    assert len(by_clock.losses) > 3
    assert replayed.losses == by_clock.losses
    assert all(torch.equal(replayed.state[name], tensor) for name, tensor in by_clock.state.items())


@pytest.mark.parametrize("text", ["{", "[]", '{"fractions": []}', '{"fractions": [2.0]}', '{"steps": 3}'])
def test_a_file_that_is_no_schedule_is_refused(tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ValueError, match=r"s\.json"):
        read_replay(tmp_path / "s.json")


# Data order


def test_an_epoch_visits_every_window_once_and_the_seed_decides_the_order(tmp_path):
    folder = write_shards(tmp_path, lengths=(200, 5, 333))
    windows = TrainingWindows(folder, 16, TINY.vocab_size, seed=1)
    count = len(windows._order)
    rows = windows.batch(0, count)
    assert rows.shape == (count, 17)
    assert len({row.tobytes() for row in rows}) == count
    assert not np.array_equal(rows, TrainingWindows(folder, 16, TINY.vocab_size, seed=2).batch(0, count))
    np.testing.assert_array_equal(rows[5:9], TrainingWindows(folder, 16, TINY.vocab_size, seed=1).batch(5, 4))
    beyond = windows.batch(count, 3)
    np.testing.assert_array_equal(windows.batch(0, count), rows)  # back into the first epoch
    np.testing.assert_array_equal(windows.batch(count, 3), beyond)


def test_too_little_text_for_one_window(tmp_path):
    with pytest.raises(ValueError, match="too few for one window"):
        TrainingWindows(write_shards(tmp_path, lengths=(10,)), 16, TINY.vocab_size, 0)


def test_a_token_outside_the_vocabulary(tmp_path):
    with pytest.raises(ValueError, match="vocab_size is 10"):
        TrainingWindows(write_shards(tmp_path), 16, 10, 0).batch(0, 20)


def prefetched(windows, first=lambda step: 4 * step, step=0):
    return PrefetchedBatches(windows, first, 4, step, torch.device("cpu"))


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_batches_read_ahead_are_those_of_the_windows_in_order(tmp_path):
    """Also from a later step on, with other ranks' windows between, and over the end of an epoch."""
    folder = write_shards(tmp_path)
    read, ahead = (TrainingWindows(folder, TINY.context, TINY.vocab_size, 3) for _ in range(2))
    count = len(read._order)
    with prefetched(ahead, lambda step: 8 * step + 4, step=5) as batches:
        for step in range(5, 5 + count // 8):
            rows = torch.from_numpy(read.batch(8 * step + 4, 4))
            inputs, targets = batches.next()
            assert torch.equal(inputs, rows[:, :-1])
            assert torch.equal(targets, rows[:, 1:])
            assert inputs.dtype == targets.dtype == torch.int64
    assert read._epoch == 1


def test_an_error_of_the_reading_thread_is_the_caller_s(tmp_path):
    windows = TrainingWindows(write_shards(tmp_path), TINY.context, 10, 0)
    with pytest.raises(ValueError, match="vocab_size is 10"), prefetched(windows) as batches:
        batches.next()
    assert readers() == []


def test_the_reading_thread_ends_with_its_context(tmp_path):
    windows = TrainingWindows(write_shards(tmp_path), TINY.context, TINY.vocab_size, 0)
    with prefetched(windows) as batches:
        batches.next()
        assert len(readers()) == 1
    assert readers() == []
    with pytest.raises(KeyboardInterrupt), prefetched(windows):
        raise KeyboardInterrupt
    assert readers() == []


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
    command = [
        sys.executable,
        *launcher,
        "-m",
        "stages.train",
        "--params",
        str(file),
        "--train",
        str(tmp_path / "train"),
    ]
    command += ["--output", str(output), "--scratch", str(tmp_path / "scratch"), *options]
    return command, output, {**os.environ, **(environment or {})}


def launch_here(command):
    """The same command in this process."""
    launch(STAGE, main, command[command.index("stages.train") + 1 :])


def finish(command, environment):
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def test_training_learns_and_repeats_bit_for_bit(tmp_path):
    folder = write_shards(tmp_path)
    first = train(params(steps=30), folder, make_world(), QUIET, Interval())
    again = train(params(steps=30), folder, make_world(), QUIET, Interval())
    assert first.losses == again.losses
    assert first.losses[0] == pytest.approx(math.log(TINY.vocab_size), abs=0.01)
    assert first.losses[-1] < first.losses[0] - 0.3
    assert all(torch.equal(first.state[name], again.state[name]) for name in first.state)
    assert train(params(seed=7, steps=3), folder, make_world(), QUIET, Interval()).losses != first.losses[:3]


def test_the_scale_of_the_logits_is_that_of_the_finished_weights_and_of_nothing_before(tmp_path):
    folder = write_shards(tmp_path)
    whole, half = (
        train(params(logit_scale=scale), folder, make_world(), QUIET, Interval()) for scale in (1.0, 0.5)
    )
    assert whole.losses == half.losses
    assert torch.equal(half.state["embedding.weight"], 0.5 * whole.state["embedding.weight"])
    assert torch.equal(half.state["smear.gate"], 2 * whole.state["smear.gate"])
    changed = {name for name in whole.state if not torch.equal(whole.state[name], half.state[name])}
    assert changed <= {"embedding.weight", "smear.gate"}


def test_accumulating_micro_batches_equals_one_large_batch(tmp_path):
    folder = write_shards(tmp_path)
    whole = train(params(micro_batch_tokens=64), folder, make_world(), QUIET, Interval())
    parts = train(params(micro_batch_tokens=16), folder, make_world(), QUIET, Interval())
    np.testing.assert_allclose(whole.losses, parts.losses, atol=2e-5)


def a_loop(model_params=TINY, steps=0):
    """A loop that has done some steps, straight and looped, on random tokens."""
    run = replace(params(), model=model_params)
    model = Model(run.model)
    initialise_(model, run.seed)
    loop = TrainingLoop(run, model, make_world(), Checkpoints(None, 0, make_world()), windows_per_pass=2)
    for step in range(steps):
        go_on(loop, looped=step % 2 == 1)
    return loop


def go_on(loop, looped):
    tokens = torch.randint(
        TINY.vocab_size, (2, 4, TINY.context), generator=torch.Generator().manual_seed(loop.steps_done)
    )
    now = step_schedule(loop.steps_done, 0.0, loop.params.train)
    loop.step(now._replace(looped=looped), *tokens.unbind())


def everything(loop):
    """Weights, averages and momenta, and what else the model holds."""
    return [
        tensor.clone()
        for tensors in (*loop.optimizer.state(), loop.model.state_dict().values())
        for tensor in tensors
    ]


def test_warm_up_takes_back_all_that_it_changed():
    """D41: bit for bit, from momenta that are not zero, after all that a step runs, straight and looped."""
    loop = a_loop(steps=2)
    before, losses, random_state = everything(loop), list(loop.local_losses), torch.get_rng_state()
    moved, ran = [], []

    def watched(looped, work, inputs, targets):
        moved.append(not all(map(torch.equal, everything(loop), before)))
        ran.append(looped)
        return work(inputs, targets)

    loop.passes = {looped: partial(watched, looped, work) for looped, work in loop.passes.items()}
    loop.warm_up()
    assert set(ran) == {False, True}
    assert any(moved)
    assert all(map(torch.equal, everything(loop), before))
    assert all(parameter.grad is None for parameter in loop.model.parameters())
    assert (loop.steps_done, loop.local_losses) == (2, losses)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("layers", [TINY.layers, 1])
def test_steps_after_warm_up_are_those_without(layers):
    """The skips of a single layer have no gradient before it is looped: they keep none of the warm-up's."""
    model_params = TINY if layers > 1 else replace(TINY, layers=1, loop_first=0, loop_last=0, value_tables=0)
    cold, warm = a_loop(model_params), a_loop(model_params)
    warm.warm_up()
    for looped in (False, True):
        for loop in (cold, warm):
            go_on(loop, looped)
        assert all(map(torch.equal, everything(cold), everything(warm)))


def test_four_gloo_ranks_give_one_rank_s_loss(tmp_path):
    """Two: tests/test_parallel.py, on two machines."""
    command, several, environment = run_train(tmp_path, "several", "--set", "parallel.nproc=4")
    alone = train(params(), tmp_path / "train", make_world(), QUIET, Interval())
    result = finish(command, environment)
    assert result.returncode == 0, result.stderr
    assert_trained_alike(several, alone, 4)


def test_killed_then_resumed_ends_with_the_same_bytes(tmp_path):
    options = ("--set", "train.steps=80", "--set", "train.checkpoint_every=5")
    command, straight, _ = run_train(tmp_path, "straight", *options)
    launch_here(command)
    assert not any((tmp_path / "scratch").iterdir())
    command, killed, environment = run_train(tmp_path, "killed", *options)
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
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
        open_checkpoints(run, folder, tmp_path / "scratch", make_world()).folder
        for run in (
            params(seed=1, checkpoint_every=2),
            params(seed=2, checkpoint_every=2),
            params(seed=1, checkpoint_every=2, matrix_lr=0.1),
        )
    }
    assert len(names) == 3
    write_shards(tmp_path / "train", seed=5)
    names.add(
        open_checkpoints(
            params(seed=1, checkpoint_every=2), folder, tmp_path / "scratch", make_world()
        ).folder
    )
    assert len(names) == 4


def test_resuming_a_budget_of_seconds_is_refused(tmp_path, capsys):
    command, _, _ = run_train(
        tmp_path, "out", "--set", "train.budget=seconds", "--set", "train.checkpoint_every=5"
    )
    with pytest.raises(SystemExit) as stopped:
        launch_here(command)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "train.checkpoint_every" in line


def test_a_stage_ends_when_its_parent_dies(tmp_path):
    command, _, environment = run_train(
        tmp_path, "out", "--set", "train.steps=100000", "--set", "train.checkpoint_every=5"
    )
    script = "import subprocess, sys, time; child = subprocess.Popen(sys.argv[1:]);"
    script += " print(child.pid, flush=True); time.sleep(600)"
    parent = subprocess.Popen(
        [sys.executable, "-c", script, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    deadline = time.monotonic() + 60
    while not list((tmp_path / "scratch").glob("*/resume-from")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.communicate()
    while (
        Path(f"/proc/{child}").exists()
        and "Z" not in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2][:3]
    ):
        assert time.monotonic() < deadline, "the training outlived its parent"
        time.sleep(0.05)


def test_batches_that_do_not_divide_over_ranks():
    with pytest.raises(ValueError, match=r"train\.batch_tokens: 4 windows a step do not divide over 3 ranks"):
        _batch_shape(params(), make_world(size=3))


def test_missing_shards_are_one_clear_line(tmp_path):
    command, output, environment = run_train(tmp_path, "out")
    command[command.index("--train") + 1] = str(tmp_path / "nowhere")
    result = finish(command, environment)
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert "nowhere does not exist" in result.stderr
    assert not output.exists() or not any(output.iterdir())


def test_params_of_small_runs_are_valid():
    assert config.build(asdict(params()), Params) == params()
