"""The clean room (B14): programs of a few lines, one lawful, each other one with one forbidden act."""

import json
import socket
import sys
from pathlib import Path

import pytest

from stages.audit.sandbox import clean_room, sandbox
from stages.audit.sandbox.clean_room import (
    AuditedArtifact,
    ClaimedMetric,
    check_clean_room,
    run_in_clean_room,
)
from stages.audit.sandbox.sandbox import Capabilities
from stages.audit.verdict import Verdict, failures
from tests.toy_program import CAPABILITIES, toy_artifact

ROOT = Path(__file__).resolve().parent.parent
NONE = Capabilities(network=False, mounts=False, traced=False)
CLAIM = ClaimedMetric("toy_bpb", 1.25, budget_seconds=30.0)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that an artifact has no business in, with weights and training data."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "weights.npz").write_bytes(b"better weights")
    return tmp_path / "outside"


def audited(
    artifact: AuditedArtifact,
    means: Capabilities = CAPABILITIES,
    covered: tuple[Path, ...] = (),
    late_seconds: float = 10.0,
) -> dict[str, Verdict]:
    verdicts = check_clean_room(
        "toy", run_in_clean_room(artifact, covered, means, timeout_seconds=60.0), CLAIM, late_seconds
    )
    assert all((verdict.check.number, verdict.subject) == ("B14", "toy") for verdict in verdicts)
    return {verdict.check.name: verdict for verdict in verdicts}


def failed(verdicts: dict[str, Verdict]) -> list[str]:
    return [verdict.check.name for verdict in failures(list(verdicts.values()))]


def test_a_lawful_artifact_passes_and_what_could_not_be_watched_is_not_passed(tmp_path: Path) -> None:
    artifact = toy_artifact(tmp_path)
    verdicts = audited(artifact)
    assert failed(verdicts) == []
    assert verdicts["runs from the counted files alone"].outcome == "pass"
    assert verdicts["wall clock"].outcome == "pass"
    assert (verdicts["opened files"].outcome == "pass") == CAPABILITIES.traced
    blind = audited(artifact, NONE)
    outcomes = {name: verdict.outcome for name, verdict in blind.items()}
    assert outcomes == {
        "runs from the counted files alone": "pass",
        "opened files": "cannot tell",
        "no network": "cannot tell",
        "wall clock": "pass",
    }
    assert "native code not" in blind["opened files"].evidence
    assert audited(artifact) == verdicts  # the report holds no time


@pytest.mark.parametrize("means", [CAPABILITIES, NONE], ids=["all means", "hooks alone"])
@pytest.mark.parametrize(
    "line",
    [
        f"sys.path.insert(0, {str(ROOT)!r}); import stages.common.shards",  # reads the repository
        "open('OUTSIDE/weights.npz', 'rb').read()",  # a file outside the counted set
        "os.symlink('OUTSIDE', 'mine'); open('mine/weights.npz')",
        "os.close(os.open('../' * 40 + 'OUTSIDE/weights.npz', os.O_RDONLY))",
        "import numpy; numpy.memmap('OUTSIDE/weights.npz', mode='r')",  # training shards
        "subprocess.run([sys.executable, '-c', 'open(\"OUTSIDE/weights.npz\")'])",  # another interpreter
        "open(os.path.join(sys.path[1], 'events'), 'w').close()",  # what it is watched by
    ],
    ids=["repository", "uncounted file", "link", "detour", "training shard", "child", "log"],
)
def test_a_program_that_opens_other_files_fails(
    tmp_path: Path, outside: Path, line: str, means: Capabilities
) -> None:
    verdicts = audited(toy_artifact(tmp_path, line.replace("OUTSIDE", str(outside))), means)
    assert failed(verdicts) == ["opened files"]
    assert verdicts["opened files"].expected == 0


def test_a_trace_is_read_with_its_links_threads_and_quotes(tmp_path: Path) -> None:
    inet = "9 connect(3<socket:[1]>, {sa_family=AF_INET, sin_port=htons"
    inet6 = "9 connect(3, {sin6_port=htons(443), sin6_flowinfo=htonl(0), inet_pton"
    data = '9 sendto(3, "_port=htons(53), inet_addr(", 9, 0, {sin_port=htons'
    lines = [
        '7 openat(AT_FDCWD</room>, "a/b", O_RDONLY|O_CLOEXEC) = 3</real/b>',
        '7 openat(AT_FDCWD</room>, "c \\"O_DIRECTORY\\n", O_RDONLY) = -1 ENOENT (No such file or directory)',
        '7 openat(AT_FDCWD</room>, "list", O_RDONLY|O_DIRECTORY) = 3</elsewhere>',
        '7 openat(5</dir>, "d", O_RDONLY <unfinished ...>',
        "8 <... openat resumed>) = 4</real/d>",
        '9 execve("/usr/bin/cat", ["cat"], 0x7ffd /* 3 vars */) = 0',
        inet + '(80), sin_addr=inet_addr("192.0.2.1")}, 16) = 0',
        inet + '(53), sin_addr=inet_addr("192.0.2.53")}, 16) = 0',
        data + '(9), sin_addr=inet_addr("192.0.2.9")}, 16) = 9',
        inet6 + '(AF_INET6, "2001:db8::1", &sin6_addr)}, 28) = 0',
        '9 connect(3, {sa_family=AF_UNIX, sun_path="/run/socket"}, 110) = 0',
    ]
    (tmp_path / "trace").write_text("\n".join(lines))
    files = {"/real/b", '/room/c "O_DIRECTORY\n', "/dir/d", "/real/d", "/usr/bin/cat"}
    hosts = {"192.0.2.1", "192.0.2.9", "2001:db8::1"}
    assert sandbox._strace_events(tmp_path / "trace") == {("file", name) for name in files} | {
        ("address", name) for name in hosts
    }


@pytest.mark.skipif(not CAPABILITIES.traced, reason="strace is not installed, or may not trace")
def test_native_code_is_traced(tmp_path: Path, outside: Path) -> None:
    verdicts = audited(toy_artifact(tmp_path, f"subprocess.run(['cat', '{outside}/weights.npz'])"))
    assert failed(verdicts) == ["opened files"]
    assert "weights.npz" in verdicts["opened files"].evidence


@pytest.mark.skipif(not CAPABILITIES.mounts, reason="namespaces for mounts are not allowed")
def test_masked_folders_are_empty_and_opening_files_there_fails(tmp_path: Path, outside: Path) -> None:
    line = f"assert os.listdir('{outside}') == []\n"
    line += f"try: open('{outside}/weights.npz')\nexcept FileNotFoundError: pass"
    verdicts = audited(toy_artifact(tmp_path, line), covered=(outside, ROOT.parent / "nowhere"))
    assert failed(verdicts) == ["opened files"]


@pytest.mark.skipif(
    not CAPABILITIES.mounts or sys.prefix == sys.base_prefix,
    reason="no mounts, or no environment of the project's own",
)
def test_a_repository_is_covered_around_the_environment_in_it(tmp_path: Path) -> None:
    environment = Path(sys.prefix)
    line = f"import numpy; assert os.listdir({str(environment.parent)!r}) == [{environment.name!r}]"
    assert failed(audited(toy_artifact(tmp_path, line), covered=(environment.parent, environment))) == []


@pytest.mark.parametrize("means", [CAPABILITIES, NONE], ids=["all means", "hooks alone"])
@pytest.mark.parametrize(
    "call",
    ["socket.create_connection(('127.0.0.2', PORT), 2).close()", "socket.getaddrinfo('nobody.invalid', 80)"],
)
def test_a_program_that_connects_to_a_host_fails(
    tmp_path: Path, call: str, means: Capabilities, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 127.0.0.2 takes the part of another host that answers.
    monkeypatch.setattr(sandbox, "_is_loopback", lambda host: host == "127.0.0.1")
    with socket.create_server(("127.0.0.2", 0)) as server:
        line = f"try: {call.replace('PORT', str(server.getsockname()[1]))}\nexcept OSError: pass"
        verdicts = audited(toy_artifact(tmp_path, line), means)
    assert failed(verdicts) == ["no network"]


@pytest.mark.skipif(not CAPABILITIES.network, reason="network namespaces are not allowed")
def test_there_is_no_network_but_the_loopback(tmp_path: Path) -> None:
    """A server outside cannot be reached; one inside can, which torchrun needs."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        line = f"try: socket.create_connection(('127.0.0.1', {port}), 2); time.sleep(99)\n"
        line += "except ConnectionRefusedError: pass\n"
        line += "with socket.create_server(('127.0.0.1', 0)) as own:\n"
        line += "    socket.create_connection(own.getsockname(), 2).close()"
        assert failed(audited(toy_artifact(tmp_path, line))) == []


def test_a_timer_started_late_fails_and_so_does_a_run_over_budget(tmp_path: Path) -> None:
    late = toy_artifact(tmp_path / "late", "time.sleep(1.5); started = time.monotonic()")
    verdicts = audited(late, late_seconds=1.2)
    assert failed(verdicts) == ["wall clock"]
    assert "timer was started late" in verdicts["wall clock"].evidence
    early = "pathlib.Path('eval').mkdir()\n"
    early += "pathlib.Path('eval/timing.json').write_text('{\"evaluation_seconds\": 0.1}')\n"
    early += "time.sleep(1.5)\n"
    early += "pathlib.Path('eval/metrics.json').write_text('{\"toy_bpb\": 1.25}'); sys.exit(0)"
    assert (
        "stopped early"
        in audited(toy_artifact(tmp_path / "early", early), late_seconds=1.2)["wall clock"].evidence
    )
    seen = run_in_clean_room(toy_artifact(tmp_path / "slow"), capabilities=NONE)
    over = failures(check_clean_room("toy", seen, ClaimedMetric("toy_bpb", 1.25, budget_seconds=1e-3)))
    assert [verdict.check.name for verdict in over] == ["wall clock"]
    assert over[0].saw == seen.trace.seconds
    hidden = run_in_clean_room(
        toy_artifact(
            tmp_path / "untimed", "json.dumps = lambda value, real=json.dumps: real({'toy_bpb': 1.25})"
        ),
        capabilities=NONE,
    )
    assert check_clean_room("toy", hidden, CLAIM)[3].outcome == "cannot tell"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            "pathlib.Path('model.bin').exists() or 1 / 0; open('features.npz')",
            "No such file",
        ),  # needs what was not handed in
        (
            "os.chmod('data/val/val_0.bin', 0o644); open('data/val/val_0.bin', 'wb').write(b'easy.')",
            "EITHER",
        ),  # writes over its data
        ("time.sleep(0); pathlib.Path('model.bin'); sys.exit(0)", "left no metrics.json"),
        ("len = lambda value: 4", "toy_bpb is 1.0"),  # another number than was claimed
    ],
)
def test_a_run_that_does_not_come_out_as_claimed_fails(tmp_path: Path, line: str, reason: str) -> None:
    for name, means in (("a", CAPABILITIES), ("b", NONE)):
        verdict = audited(toy_artifact(tmp_path / name, line), means)["runs from the counted files alone"]
        assert verdict.outcome == "fail"
        wanted = (
            ("Read-only file system" if means.mounts else "changed its inputs")
            if reason == "EITHER"
            else reason
        )
        assert wanted in verdict.evidence


def test_a_run_that_does_not_end_is_ended_with_all_its_processes(tmp_path: Path) -> None:
    artifact = toy_artifact(
        tmp_path, "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"
    )
    seen = run_in_clean_room(artifact, capabilities=CAPABILITIES, timeout_seconds=1.5)
    assert seen.trace.returncode is None
    assert seen.trace.seconds < 10
    assert "timeout" in check_clean_room("toy", seen, CLAIM)[0].evidence


def test_nothing_of_the_callers_environment_is_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CADDIE_SECRET", "1")
    line = "assert 'CADDIE_SECRET' not in os.environ\nassert os.environ['GIVEN'] == '7'"
    line += "\nassert os.path.realpath(os.environ['HOME']).startswith(os.getcwd())"
    seen = run_in_clean_room(toy_artifact(tmp_path, line), capabilities=NONE, environment={"GIVEN": "7"})
    assert (seen.trace.returncode, seen.trace.output) == (0, "")
    assert json.dumps(seen.metrics) == '{"toy_bpb": 1.25}'
    assert not seen.room.exists()
    assert clean_room.unexpected_files(seen) == []
