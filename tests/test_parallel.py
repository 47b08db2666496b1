"""Processes that work together: collectives, runs over several machines, and the death of a process."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from stages.common import failure_detector, rendezvous, shards
from stages.common.clock import Interval
from stages.common.failure_detector import FailureDetector, State
from stages.common.parallel import World
from stages.common.progress import Logger
from stages.common.stage import MEASURED_OUTPUTS
from stages.train.checkpoint import RESUME_MARKER, Checkpoints
from stages.train.data import TrainingWindows
from stages.train.loop import train
from stages.train.stage import STAGE
from tests import ranks
from tests.factories import TINY, assert_trained_alike, make_world, params, write_shards

ROOT = Path(__file__).resolve().parent.parent
END_SECONDS = 30.0  # from a rank's death to the end of every command of the run
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# Collectives


def collectives(world: World) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.arange(world.size * 2 * 3).reshape(world.size * 2, 3)
        mine = slice(2 * world.rank, 2 * world.rank + 2)
        ranks_mean = (world.size + 1) / 2

        mean = torch.empty(2, 3, dtype=dtype)
        world.reduce_scatter_mean(mean, (rows * (world.rank + 1)).to(dtype)).wait()
        assert torch.equal(mean, (rows[mine] * ranks_mean).to(dtype)), mean

        inside, outside = torch.zeros(2, world.size * 2, 3, dtype=dtype).unbind()
        inside[mine] = rows[mine].to(dtype)
        for handle in [
            world.all_gather(inside, inside[mine]),
            world.all_gather(outside, rows[mine].to(dtype)),
        ]:
            handle.wait()
        assert torch.equal(inside, rows.to(dtype))
        assert torch.equal(outside, inside)


def test_slices_of_a_mean_and_all_slices_on_every_rank() -> None:
    ranks.agree("tests.test_parallel:collectives", (2, 3))


def test_alone_a_process_copies_only_what_lies_elsewhere() -> None:
    alone, rows = make_world(), torch.arange(6.0).reshape(2, 3)
    for collective in (alone.reduce_scatter_mean, alone.all_gather):
        elsewhere = torch.zeros(2, 3)
        collective(elsewhere, rows).wait()
        assert torch.equal(elsewhere, rows)
        before = rows._version
        collective(rows, rows.view(2, 3)).wait()
        assert rows._version == before


# The failure detector, between processes that need no torch

RANK = """
import sys, time
from pathlib import Path
from stages.common import failure_detector

failure_detector.UNWIND_SECONDS = 0.3
rank, size, folder, role = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]

class Board:
    def set(self, key, value):
        (folder / "new").write_text(value)
        (folder / "new").rename(folder / key)
    def get(self, key):
        while not (folder / key).exists():
            time.sleep(0.01)
        return (folder / key).read_bytes()

def speak(reason):
    (folder / f"spoken-{rank}").write_text(reason)

lines = failure_detector.connect(rank, size, "localhost", Board(), 20.0)
with failure_detector.FailureDetector(rank, lines, lambda other: 0.1 * (other == 1), speak):
    (folder / f"ready-{rank}").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    if role == "well":
        time.sleep(0.1 * rank)
    elif role == "error":
        raise ValueError("a shard\\nis corrupt")
    elif role == "broken":
        raise RuntimeError("connection reset by peer")
    else:
        time.sleep(60)
print("left the context")
"""


@contextlib.contextmanager
def running(*commands: Sequence[object]) -> Iterator[list[subprocess.Popen[str]]]:
    """The commands side by side; what still runs at the end is killed."""
    with contextlib.ExitStack() as stack:
        started = []
        for command in commands:
            process = stack.enter_context(
                subprocess.Popen(
                    [*map(str, command)],
                    cwd=ROOT,
                    env=ENVIRONMENT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            started.append(process)
        yield started


def rank_command(folder: Path, rank: int, size: int, role: str) -> list[object]:
    folder.mkdir(exist_ok=True)
    (folder / "rank.py").write_text(RANK, encoding="utf-8")
    return [sys.executable, folder / "rank.py", rank, size, folder, role]


def in_company(folder: Path, *roles: str) -> contextlib.AbstractContextManager[list[subprocess.Popen[str]]]:
    return running(*(rank_command(folder, rank, len(roles), role) for rank, role in enumerate(roles)))


def begin(folder: Path, processes: Sequence[subprocess.Popen[str]]) -> None:
    """Wait until every rank is in its context, then let them go on."""
    wait_for(lambda: len(list(folder.glob("ready-*"))) == len(processes), processes)
    (folder / "go").touch()


def wait_for(condition, processes: Sequence[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), [
            process.communicate() for process in processes
        ]
        time.sleep(0.02)


def spoken(folder: Path) -> dict[int, str]:
    return {int(path.name.partition("-")[2]): path.read_text() for path in folder.glob("spoken-*")}


def test_ranks_that_end_well_one_after_the_other_say_nothing(tmp_path: Path) -> None:
    with in_company(tmp_path, "well", "well", "well") as processes:
        begin(tmp_path, processes)
        assert [(process.communicate(timeout=20), process.returncode) for process in processes] == [
            (("left the context\n", ""), 0)
        ] * 3
    assert spoken(tmp_path) == {}


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_ends_those_that_hang(tmp_path: Path, victim: int) -> None:
    with in_company(tmp_path, "hang", "hang", "hang") as processes:
        begin(tmp_path, processes)
        processes[victim].kill()
        codes = [process.wait(timeout=20) for process in processes]
    assert codes == [-signal.SIGKILL if rank == victim else 1 for rank in range(3)]
    reason = f"rank {victim} is gone without a message; the output on its machine may say why"
    assert spoken(tmp_path) == {rank: reason for rank in range(3) if rank != victim}


def test_the_reason_of_a_failed_rank_reaches_all(tmp_path: Path) -> None:
    with in_company(tmp_path, "hang", "error", "broken") as processes:
        begin(tmp_path, processes)
        errors = [process.communicate(timeout=20)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1, 1]
    assert spoken(tmp_path) == dict.fromkeys((0, 2), "rank 1 failed: a shard is corrupt")
    assert "ValueError: a shard" in errors[1]
    assert "Traceback" not in errors[2], "an error that only follows from another rank's end"


def test_an_error_of_a_collective_that_no_death_explains_is_the_rank_s_own(tmp_path: Path) -> None:
    with in_company(tmp_path, "broken", "hang") as processes:
        begin(tmp_path, processes)
        error = processes[0].communicate(timeout=20)[1]
        processes[1].wait(timeout=20)
    assert "RuntimeError: connection reset by peer" in error
    assert spoken(tmp_path) == {1: "rank 0 failed: RuntimeError('connection reset by peer')"}


def test_a_connection_from_another_program_is_not_a_rank(tmp_path: Path) -> None:
    with running(rank_command(tmp_path, 0, 2, "well")) as first:
        wait_for((tmp_path / "failure_detector").exists, first)
        port = int((tmp_path / "failure_detector").read_text().split()[0])
        with socket.create_connection(("localhost", port), timeout=20) as connection:
            connection.sendall(b"GET 1\n")
            assert connection.recv(1) == b""
            with running(rank_command(tmp_path, 1, 2, "well")) as second:
                begin(tmp_path, [*first, *second])
                assert [process.wait(timeout=20) for process in (*first, *second)] == [0, 0]
    assert spoken(tmp_path) == {}


STATE_ROW = re.compile(r"^    ([A-Z_]+) +\S.*  (\S+)$", re.MULTILINE)  # state, ..., next state
DELAY_ROW = re.compile(r"^    ([A-Z_]+) = (\d+) ", re.MULTILINE)


def test_the_docstrings_name_every_delay_with_its_value() -> None:
    documented = {name: float(value) for name, value in DELAY_ROW.findall(failure_detector.__doc__ or "")}
    assert documented == {
        name: value for name, value in vars(failure_detector).items() if isinstance(value, (int, float))
    }
    waits = rendezvous.__doc__ or ""
    assert f"CONNECT_TIMEOUT_SECONDS = {rendezvous.CONNECT_TIMEOUT_SECONDS:.0f}\n" in waits
    minutes = rendezvous.RENDEZVOUS_TIMEOUT.total_seconds() / 60
    assert f"RENDEZVOUS_TIMEOUT = {minutes:.0f} minutes\n" in waits


@pytest.mark.parametrize(
    ("rank", "failed", "constants"),
    [
        (0, 1, ["LOCAL_REPORT_DELAY_SECONDS"]),
        (1, 0, ["LOCAL_REPORT_DELAY_SECONDS", "PRINT_FIRST_SECONDS"]),
        (2, 1, []),
        (3, 0, ["PRINT_FIRST_SECONDS"]),
        (1, 2, ["PRINT_FIRST_SECONDS"]),
        (2, 3, ["LOCAL_REPORT_DELAY_SECONDS"]),
    ],
)
def test_the_machine_of_the_failed_rank_decides_the_delay_of_the_report(
    rank: int, failed: int, constants: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines with two ranks each."""
    for name, value in {"RANK": rank, "LOCAL_RANK": rank % 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    delay = sum(getattr(failure_detector, name) for name in constants)
    assert failure_detector.report_delay(failed) == delay


class Recorder(FailureDetector):
    """A detector of rank 0 with rank 1 at the other end of `peer`; keeps the transitions of its states."""

    def __init__(self, report_delay_seconds: float) -> None:
        self.transitions: list[tuple[str, str]] = []
        self.reports: list[str] = []
        ours, self.peer = socket.socketpair()
        super().__init__(0, {1: ours}, lambda rank: report_delay_seconds, self.reports.append)

    def _move_to(self, state: State) -> None:
        before = self._state
        super()._move_to(state)
        self.transitions.append((before.name, state.name))

    def peer_fails(self) -> None:
        self.peer.sendall(b"1 failed: a shard is corrupt\n")
        self._wait_for(State.PEER_FAILED)


def work_until_a_peer_fails(detector: Recorder, error: Exception | None) -> None:
    """Leave the context with `error`; without one, only after the detector's thread has ended."""
    with detector:
        detector.peer_fails()
        if error is not None:
            raise error
        detector._thread.join(20)


def test_the_state_table_lists_the_transitions_that_occur(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Recorder(0.0)
    with alone:
        pass

    with_own_error = Recorder(60.0)
    with pytest.raises(ValueError, match="its own"):
        work_until_a_peer_fails(with_own_error, ValueError("its own"))
    assert with_own_error.reports == []

    with_its_peer = Recorder(0.0)
    with pytest.raises(SystemExit) as stop:
        work_until_a_peer_fails(with_its_peer, RuntimeError("connection reset by peer"))
    assert stop.value.code == 1
    assert with_its_peer.reports == ["rank 1 failed: a shard is corrupt"]

    exits: list[int] = []
    monkeypatch.setattr(failure_detector, "UNWIND_SECONDS", 0.0)
    monkeypatch.setattr(os, "_exit", exits.append)
    hanging = Recorder(0.0)
    with pytest.raises(SystemExit):
        work_until_a_peer_fails(hanging, None)
    assert exits == [1]

    seen = {("REPORTED", "(none)")}
    for detector in (alone, with_own_error, with_its_peer, hanging):
        detector.peer.close()
        seen |= set(detector.transitions)
    documented = STATE_ROW.findall(failure_detector.__doc__ or "")
    assert len(documented) == len(set(documented)) == 6
    assert set(documented) == seen
    assert {state for row in documented for state in row} == {*State.__members__, "(none)"}


# Training


def stage(folder: Path, output: str, *options: str, train: str = "train") -> list[object]:
    """The arguments of the train stage on small parameters, its shards and files below `folder`."""
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(asdict(params())), encoding="utf-8")
    arguments = [
        "--params",
        file,
        "--train",
        folder / train,
        "--output",
        folder / output,
        "--scratch",
        folder / "scratch",
        *options,
    ]
    return ["-m", "stages.train", *arguments]


def two_machines(*arguments: Sequence[object]) -> list[list[object]]:
    """torchrun's command of each of two machines: here two agents of one rank each, on the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        [
            *TORCHRUN,
            "--nnodes=2",
            "--nproc-per-node=1",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={endpoint}",
            *own,
        ]
        for own in arguments
    ]


def ranks_below(agent: subprocess.Popen[str]) -> dict[int, int]:
    """The process of each rank that a torchrun started."""
    found = {}
    for child in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        environment = dict(
            item.partition("=")[::2] for item in Path(f"/proc/{child}/environ").read_text().split("\0")
        )
        found[int(environment["RANK"])] = int(child)
    return found


def in_training(folder: Path, processes: Sequence[subprocess.Popen[str]]) -> dict[int, int]:
    """Wait for a checkpoint; the process of each rank."""
    wait_for(lambda: list((folder / "scratch").glob(f"*/{RESUME_MARKER}")), processes)
    return {rank: process for agent in processes for rank, process in ranks_below(agent).items()}


def ends(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and standard error of each, which must come in time."""
    deadline = time.monotonic() + END_SECONDS
    errors = [process.communicate(timeout=deadline - time.monotonic())[1] for process in processes]
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


LONG = ("--set", "train.steps=1000000", "--set", "train.checkpoint_every=20")


def test_two_machines_train_like_one_process_and_one_of_them_writes(tmp_path: Path) -> None:
    alone = train(params(), write_shards(tmp_path / "train"), make_world(), Logger(is_main=False), Interval())
    with running(*two_machines(stage(tmp_path, "first"), stage(tmp_path, "second"))) as agents:
        for agent in agents:
            _, error = agent.communicate(timeout=120)
            assert agent.returncode == 0, error
    (written,) = [tmp_path / name for name in ("first", "second") if (tmp_path / name).exists()]
    assert {path.name for path in written.iterdir()} == {*STAGE.writes, *MEASURED_OUTPUTS}
    assert_trained_alike(written, alone, 2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_killed_rank_ends_the_command_with_its_name_and_the_signal(tmp_path: Path, device: str) -> None:
    write_shards(tmp_path / "train")
    options = ("--set", "parallel.nproc=2", "--set", f"parallel.device={device}", *LONG)
    with running([sys.executable, *stage(tmp_path, "out", *options)]) as processes:
        victim = in_training(tmp_path, processes)[0]
        os.kill(victim, signal.SIGKILL)
        ((code, error),) = ends(processes)
    assert code == 1
    assert error.splitlines()[-1] == f"error: train: rank 0 (process {victim}) was killed by SIGKILL"
    assert "Traceback" not in error
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_killed_rank_ends_both_machines(tmp_path: Path, device: str) -> None:
    write_shards(tmp_path / "train")
    commands = two_machines(
        *(stage(tmp_path, "out", "--set", f"parallel.device={device}", *LONG) for _ in range(2))
    )
    if device == "cuda":
        commands = [
            ["env", f"CUDA_VISIBLE_DEVICES={number}", *command] for number, command in enumerate(commands)
        ]
    with running(*commands) as agents:
        in_training(tmp_path, agents)
        ((rank, victim),) = ranks_below(agents[1]).items()
        os.kill(victim, signal.SIGKILL)
        (first_code, first_error), (second_code, second_error) = ends(agents)
    assert (first_code, second_code) == (1, 1)
    assert (
        first_error.splitlines()[0]
        == f"error: rank {rank} is gone without a message; the output on its machine may say why"
    )
    assert f"Signal 9 (SIGKILL) received by PID {victim}" in second_error
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_error_of_one_rank_is_the_command_s(tmp_path: Path) -> None:
    """The last window of step 11 belongs to rank 1, and no other step before the data is over has it."""
    folder = write_shards(tmp_path / "train")
    windows = TrainingWindows(folder, TINY.context, TINY.vocab_size, params().seed)
    tokens_of_window = windows.batch(43, 1)[0, 1:-1].astype("<u2").tobytes()
    for path in shards.find(folder):
        path.write_bytes(path.read_bytes().replace(tokens_of_window, b"\xff\x00" * (TINY.context - 1)))
    with running([sys.executable, *stage(tmp_path, "out", "--set", "parallel.nproc=2", *LONG)]) as processes:
        ((code, error),) = ends(processes)
    assert code == 2
    assert (
        error.splitlines()[-1]
        == f"error: train: rank 1 failed: {folder}: token id 255, but model.vocab_size is {TINY.vocab_size}"
    )
    assert "Traceback" not in error
    assert not any((tmp_path / "out").iterdir())


def test_a_machine_without_shards_ends_both(tmp_path: Path) -> None:
    write_shards(tmp_path / "train")
    with running(
        *two_machines(stage(tmp_path, "out", *LONG), stage(tmp_path, "out", *LONG, train="nowhere"))
    ) as agents:
        (first_code, _), (second_code, second_error) = ends(agents)
    assert (first_code, second_code) == (1, 1)
    assert f"{tmp_path / 'nowhere'} does not exist" in second_error
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_checkpoint_of_which_this_rank_lacks_its_part_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run", 2, make_world())
    checkpoints.save(2, {"step": torch.tensor(2)})
    assert checkpoints.load() == {"step": torch.tensor(2)}
    (tmp_path / "run" / "step000002-rank0.pt").unlink()
    with pytest.raises(
        ValueError,
        match=r"--scratch: the run has a checkpoint of step 2, but not .*step000002-rank0\.pt of rank 0",
    ):
        checkpoints.load()
