"""The model read by another process: the same weights and errors, and warming up leaves no trace."""

import copy
import dataclasses
import mmap
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.common import torchrun
from stages.common.stage import Run, launch
from stages.common.torchrun import relaunch_under_torchrun
from stages.pack.artifact import pack, unpack
from stages.pack.file import container, shared_memory
from stages.pack.file.decode_process import MAX_WEIGHT_BYTES, DecodeProcess
from stages.pack.file.load import PendingModel
from stages.scoring.evaluate import warm_up_kernels
from stages.sliding_eval import stage
from stages.sliding_eval.scorer import SlidingScorer
from stages.ttt_eval.build import build_scorer
from stages.ttt_eval.lora import scorer as lora
from stages.ttt_eval.sgd import scorer
from tests.factories import PARALLEL, SLIDING, TTT, make_world, random_model, scorer_inputs
from tests.pack_inputs import (
    AT_RATE,
    CORRECTED,
    ENCODER,
    MODEL,
    SILENT,
    hessians_of,
    trained_like,
    with_budget,
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with levels on a lattice, corrections and float16 tensors, by the arithmetic coder."""
    state = trained_like()
    path = tmp_path_factory.mktemp("packed") / "model.bin"
    path.write_bytes(
        pack(
            state,
            hessians_of(state),
            MODEL,
            dataclasses.replace(with_budget(20_000, AT_RATE), **CORRECTED),
            ENCODER,
            SILENT,
        ).blob
    )
    return path


def damaged(packed: Path, folder: Path) -> Path:
    """The same file with a byte too many after the levels of every matrix, its checksum right."""
    contents = container.parse(packed.read_bytes())
    entries = []
    for entry in contents.tensors:
        levels, *others = entry.streams
        longer = dataclasses.replace(levels, payload=levels.payload + b"x")
        entries.append(
            dataclasses.replace(entry, streams=(longer, *others))
            if entry.form.header.kind == "lattice"
            else entry
        )
    path = folder / "damaged.bin"
    path.write_bytes(container.serialise(container.Contents(contents.model, tuple(entries))))
    return path


def test_the_weights_are_those_that_this_process_would_decode(packed: Path) -> None:
    params, state = unpack(packed.read_bytes())
    pending = PendingModel(packed)
    assert pending.params == params
    found = pending.wait()
    assert list(found) == list(state)
    assert all(
        torch.equal(found[name], tensor) and found[name].shape == tensor.shape
        for name, tensor in state.items()
    )


def test_a_model_without_skips_has_tensors_of_no_values(tmp_path: Path) -> None:
    empty, full, last = shared_memory.array_views(
        mmap.mmap(-1, 24), {"a": (0, 5), "b": (3,), "c": (1, 2)}
    ).values()
    full[...], last[...] = 1, 2
    assert (empty.shape, full.tolist(), last.tolist()) == ((0, 5), [1, 1, 1], [[2, 2]])


def test_all_that_a_lawful_header_declares_has_room() -> None:
    """No form takes less than a byte for a weight."""
    assert MAX_WEIGHT_BYTES == 4 * container.MAX_RAW_BYTES


def test_a_damaged_tensor_is_the_error_that_it_is_in_one_process(packed: Path, tmp_path: Path) -> None:
    path = damaged(packed, tmp_path)
    with pytest.raises(ValueError, match="damaged model file: tensor") as expected:
        unpack(path.read_bytes())
    with pytest.raises(ValueError, match="damaged") as seen:
        PendingModel(path).wait()
    assert str(seen.value) == str(expected.value)


def test_a_damaged_header_is_an_error_at_once(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(packed.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged model file: its sha256"):
        PendingModel(tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("fate", "message"),
    [
        (lambda entry: os.kill(os.getpid(), signal.SIGKILL), "was killed by SIGKILL"),
        (lambda entry: entry.nothing, "ended with exit code 1; the lines above say why"),
    ],
)
def test_the_other_process_s_end_is_one_error(
    packed: Path, monkeypatch: pytest.MonkeyPatch, fate: Any, message: str
) -> None:
    monkeypatch.setattr(container, "decode", fate)
    with pytest.raises(ChildProcessError, match=f"the process that decoded the weights {message}"):
        PendingModel(packed).wait()


def test_the_other_process_ends_with_this_one(packed: Path) -> None:
    program = f"""
        import time
        from pathlib import Path
        from stages.pack.file import container
        from stages.pack.file.decode_process import DecodeProcess
        container.decode = lambda entry: time.sleep(60)
        decoder = DecodeProcess()
        decoder.request(Path({str(packed)!r}))
        print(decoder._process.pid, flush=True)
        time.sleep(60)
    """

    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        parent.kill()

    # It is gone, or a zombie that nobody waits for.
    for _ in range(100):
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError(f"process {child} lives on")


def test_a_stage_says_in_one_line_what_is_wrong_with_its_model(
    packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = damaged(packed, tmp_path)
    with pytest.raises(ValueError, match="damaged") as expected:
        unpack(path.read_bytes())

    def load(run: Run[Any]) -> None:
        PendingModel(run.path("model")).wait()

    with pytest.raises(SystemExit) as ended:
        launch(stage.STAGE, load, ["--model", str(path), "--output", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert capfd.readouterr().err == f"error: sliding_eval: {expected.value}\n"


def test_the_command_begins_to_decode_first_and_says_in_one_line_what_is_wrong(
    packed: Path, tmp_path: Path
) -> None:
    """Not so the process that only starts others: it has nobody who decodes when they begin."""
    (tmp_path / "short.bin").write_bytes(packed.read_bytes()[:-1])
    paths = ["--val", str(tmp_path), "--tokenizer", str(packed), "--output", str(tmp_path / "out")]
    words = [sys.executable, "-m", "stages.sliding_eval", "--model", str(tmp_path / "short.bin"), *paths]
    alone, several = (
        subprocess.run([*words, *more], capture_output=True, text=True, check=False)
        for more in ([], ["--set", "parallel.nproc=2"])
    )
    assert (alone.returncode, several.returncode) == (2, 2)
    assert alone.stderr.count("\n") == 1

    # Both ranks find the damage. The line is rank 0's, or the agent's if the other rank ended first.
    cause = alone.stderr.removeprefix("error: sliding_eval: ")
    lines = several.stderr.splitlines(keepends=True)
    assert lines[-1] in (alone.stderr, f"error: sliding_eval: rank 1 failed: {cause}")
    assert set(lines) <= {lines[-1], alone.stderr}
    assert alone.stderr.startswith("error: sliding_eval: damaged model file: its sha256 does not match")


def test_a_process_that_only_starts_others_ends_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = DecodeProcess()
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torchrun, "run", lambda arguments: None)
    monkeypatch.setattr(torchrun, "die_with_parent", lambda: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(SystemExit):
        relaunch_under_torchrun(dataclasses.replace(PARALLEL, nproc=2), "stages.sliding_eval", [])
    decoder._process.join(10)
    assert decoder._process.exitcode == -signal.SIGTERM


@pytest.mark.parametrize(
    "changes", [None, {}, {"kind": "lora"}, {"tilt_rate": 0.1}], ids=["sliding", "sgd", "lora", "tilt"]
)
def test_a_rehearsal_leaves_no_trace(changes: dict[str, Any] | None) -> None:
    """Neither on the model, nor on the states of any generator, nor on the ledger."""
    tokens = (np.arange(150) * 5 % 23 + 4).astype(np.uint16)
    tokens[::40] = 1

    def make(model: Any) -> Any:
        if changes is None:
            return SlidingScorer(model, SLIDING, make_world())
        params = dataclasses.replace(TTT, **changes)
        return build_scorer("ttt_eval", SLIDING, params, scorer_inputs(model, len(tokens) - 1))

    model = random_model(6)
    before = copy.deepcopy(model.state_dict())
    drawn = (torch.get_rng_state(), random.getstate(), repr(np.random.get_state()))
    warm_up_kernels(make(model))

    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(drawn[0], torch.get_rng_state())
    assert drawn[1:] == (random.getstate(), repr(np.random.get_state()))
    np.testing.assert_array_equal(
        make(model).score_stream(tokens), make(random_model(6)).score_stream(tokens)
    )


@pytest.mark.parametrize("kind", ["sgd", "lora"])
def test_a_rehearsal_trains(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    module, name = (scorer, "sgd_") if kind == "sgd" else (lora, "adamw_")
    monkeypatch.setattr(module, name, lambda *of: steps.append(of))
    inputs = scorer_inputs(random_model(6), 150)
    warm_up_kernels(build_scorer("ttt_eval", SLIDING, dataclasses.replace(TTT, kind=kind), inputs))
    assert steps
