"""External scorers audited by the command: cheats are convicted or cannot be audited, odd ones pass."""

import dataclasses
import itertools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.audit.remote.process import ScorerProcess, ScorerSource
from stages.audit.sandbox.room import detect_isolation
from stages.common import shards
from tests import external_audit
from tests.zoo.external import channels, selective
from tests.zoo.external.registry import CHEATS, LAWFUL, ExternalScorer

# One process for all: the port of a server and the files of channels have fixed names.
pytestmark = [
    pytest.mark.skipif(not detect_isolation().complete, reason=str(detect_isolation())),
    pytest.mark.xdist_group("external zoo"),
]


@pytest.fixture(autouse=True)
def package_of_scorers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is found as a user's is: in a folder of the path."""
    monkeypatch.syspath_prepend(str(external_audit.PACKAGE.parent))


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return external_audit.write_stream(tmp_path_factory.mktemp("external_zoo"))


@pytest.fixture
def server(stream: Path) -> Iterator[list[str]]:
    """A server in this process that sends the stream to everybody who asks; the addresses that asked."""
    asked = []
    with socket.create_server(("127.0.0.1", channels.PORT)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, address = listening.accept()
                except OSError:
                    return
                asked.append(str(address))
                connection.sendall(np.array(shards.view(stream / "val.bin")).tobytes())
                connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield asked
        listening.shutdown(socket.SHUT_RDWR)
    thread.join()


def check(scorer: ExternalScorer, stream: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = external_audit.audit(scorer, stream, folder / "audit")
    errors = capsys.readouterr().err.splitlines()
    if scorer.exit_code == 2:
        assert (ended.code, len(errors), ended.report) == (2, 1, {}), (errors, ended.failed)
        assert errors[0].startswith(f"error: audit_scorer: external.{scorer.factory.partition(':')[0]}")
        assert scorer.message in errors[0]
        assert errors[0].isprintable()
        return
    assert (ended.code, errors) == (scorer.exit_code, []), ended.failed
    assert any(label.startswith(scorer.failed) for label in ended.failed) == bool(scorer.failed), ended.failed


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.name)
@pytest.mark.usefixtures("server")
def test_a_cheat_is_convicted_or_cannot_be_audited(
    cheat: ExternalScorer, stream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(cheat, stream, tmp_path, capsys)


@pytest.mark.parametrize("scorer", LAWFUL, ids=lambda scorer: scorer.name)
def test_an_odd_but_lawful_scorer_passes(
    scorer: ExternalScorer, stream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(scorer, stream, tmp_path, capsys)


@pytest.mark.parametrize("factory", ["changes_interface", "changes_precision"])
def test_a_scorer_that_describes_itself_otherwise_where_that_helps_does_not_pass(
    factory: str, stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes are told their numbers, as if the scorer had guessed them."""
    numbers = itertools.count()
    start = ScorerProcess.__init__

    def start_with_number(process: ScorerProcess, source: ScorerSource, *arguments: Any) -> None:
        source = dataclasses.replace(source, environment={"PROCESS": str(next(numbers))})
        start(process, source, *arguments)

    monkeypatch.setattr(ScorerProcess, "__init__", start_with_number)
    ended = external_audit.audit(ExternalScorer("", f"selective:{factory}"), stream, tmp_path / "audit")
    assert ended.code != 0, ended.report["declared"]


def test_nobody_reaches_a_server_outside(stream: Path, tmp_path: Path, server: list[str]) -> None:
    external_audit.audit(ExternalScorer("", "channels:network"), stream, tmp_path / "audit")
    assert server == []
    assert len(channels.Network().load()) == 2 * len(shards.view(stream / "val.bin"))
    assert len(server) == 1


@pytest.mark.parametrize("name", ["files", "sockets", "shared_memory", "queues"])
def test_answers_reach_another_process_without_a_sandbox(name: str, tmp_path: Path) -> None:
    """A cheat with a channel that works nowhere would prove nothing."""
    channel = channels.CHANNELS[name]
    program = f"import sys; from external import channels; channels.CHANNELS[{name!r}]"
    command = [sys.executable, "-c", f"{program}.store(sys.stdin.buffer.read())"]
    data = bytes(range(256)) * 4
    try:
        environment = os.environ | {"PYTHONPATH": str(external_audit.PACKAGE.parent)}
        subprocess.run(command, input=data, cwd=tmp_path, env=environment, check=True, timeout=20)
        assert channel.load() == data
    finally:
        channel.remove()
    assert channel.load() == b""


def test_the_stream_is_found_without_a_sandbox(stream: Path) -> None:
    tokens = np.array(shards.view(stream / "val.bin")).tobytes()
    command = [sys.executable, "-c", "input()", "--tokens", str(stream / "val.bin")]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        found = channels.CHANNELS["environment"].load()
        process.communicate(b"\n")
    assert found == tokens
    assert channels.CHANNELS["environment"].load() == b""


def test_locks_are_seen_by_another_process_without_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selective, "LOCK_SECONDS", 0.0)
    is_even = np.arange(100) % 3 == 0
    scorer = selective.LocksBetweenProcesses(99)
    with selective.LOCKED_FILE.open("rb") as file:
        scorer.lock(file.fileno(), is_even)
        program = "from external import selective as s; f = s.LOCKED_FILE.open('rb'); "
        program += "print(s.LocksBetweenProcesses(99).read_locks(f.fileno()).tolist())"
        seen = subprocess.run(
            [sys.executable, "-c", program],
            cwd=external_audit.PACKAGE.parent,
            capture_output=True,
            text=True,
            check=True,
        )
    assert seen.stdout == f"{is_even.tolist()}\n"


def test_a_forged_message_adds_no_line_to_the_report(stream: Path, tmp_path: Path) -> None:
    scorer = ExternalScorer("", "tampering:forges_a_failure")
    ended = external_audit.audit(scorer, stream, tmp_path / "audit")
    assert "B6 protocol" in ended.failed
    report = (tmp_path / "audit" / "report.md").read_text()
    assert "\x1b" not in report
    assert "## C1: passed" not in report.splitlines()
    assert not [line for line in report.splitlines() if line.startswith("| C1 | **pass**")]
