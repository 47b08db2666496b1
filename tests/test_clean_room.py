"""The clean room (B14): artifacts of a few lines, one lawful, each other with one thing that it must not do."""

import json
import socket
import sys
from pathlib import Path

import pytest

from stages.audit.sandbox import clean_room, sandbox
from stages.audit.sandbox.clean_room import Artifact, Claim, check_clean_room, visit
from stages.audit.sandbox.sandbox import Means
from stages.audit.verdict import Verdict, convicted

ROOT = Path(__file__).resolve().parent.parent
MEANS = sandbox.available()
NONE = Means(network=False, mounts=False, traced=False)
CLAIM = Claim("toy_bpb", 1.25, budget_seconds=30.0)
TOY = """
import json, os, pathlib, socket, subprocess, sys, time
started = time.monotonic()
HERE
assert pathlib.Path("model.bin").read_bytes() == b"weights"
val = pathlib.Path("data/val/val_0.bin").read_bytes()
pathlib.Path("eval").mkdir()
pathlib.Path("eval/metrics.json").write_text(json.dumps({"toy_bpb": len(val) / 4}))
pathlib.Path("eval/timing.json").write_text(json.dumps({"evaluation_seconds": time.monotonic() - started}))
"""


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that an artifact has no business in, with weights and training data."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "weights.npz").write_bytes(b"better weights")
    return tmp_path / "outside"


def made(tmp_path: Path, line: str = "") -> Artifact:
    """The toy artifact with one more line."""
    folder = tmp_path / "artifact"
    (folder / "val").mkdir(parents=True)
    (folder / "train_gpt.py").write_text(TOY.replace("HERE", line))
    (folder / "model.bin").write_bytes(b"weights")
    (folder / "val" / "val_0.bin").write_bytes(b"text.")
    return Artifact(
        {name: folder / name for name in ("train_gpt.py", "model.bin")}, {"data/val": folder / "val"}
    )


def audited(
    artifact: Artifact, means: Means = MEANS, covered: tuple[Path, ...] = (), late_seconds: float = 10.0
) -> dict[str, Verdict]:
    verdicts = check_clean_room(visit(artifact, covered, means, patience_seconds=60.0), CLAIM, late_seconds)
    assert all(verdict.check == "B14" for verdict in verdicts)
    return {verdict.name: verdict for verdict in verdicts}


def failed(verdicts: dict[str, Verdict]) -> list[str]:
    return [verdict.name for verdict in convicted(list(verdicts.values()))]


def test_a_lawful_artifact_passes_and_what_could_not_be_watched_is_not_passed(tmp_path: Path) -> None:
    artifact = made(tmp_path)
    verdicts = audited(artifact)
    assert failed(verdicts) == []
    assert verdicts["runs from the counted files alone"].outcome == "pass"
    assert verdicts["wall clock"].outcome == "pass"
    assert (verdicts["opened files"].outcome == "pass") == MEANS.traced
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


@pytest.mark.parametrize("means", [MEANS, NONE], ids=["all means", "hooks alone"])
@pytest.mark.parametrize(
    "line",
    [
        f"sys.path.insert(0, {str(ROOT)!r}); import stages.common.shards",  # a wrapper that reads the repository
        "open('OUTSIDE/weights.npz', 'rb').read()",  # a file outside the counted set
        "os.symlink('OUTSIDE', 'mine'); open('mine/weights.npz')",
        "os.close(os.open('../' * 40 + 'OUTSIDE/weights.npz', os.O_RDONLY))",
        "import numpy; numpy.memmap('OUTSIDE/weights.npz', mode='r')",  # training shards
        "subprocess.run([sys.executable, '-c', 'open(\"OUTSIDE/weights.npz\")'])",  # another interpreter
        "open(os.path.join(sys.path[1], 'told'), 'w').close()",  # what it is watched by
    ],
    ids=["repository", "uncounted file", "link", "detour", "training shard", "child", "log"],
)
def test_what_it_opens_elsewhere_convicts_it(tmp_path: Path, outside: Path, line: str, means: Means) -> None:
    verdicts = audited(made(tmp_path, line.replace("OUTSIDE", str(outside))), means)
    assert failed(verdicts) == ["opened files"]
    assert verdicts["opened files"].expected == 0


def test_a_trace_is_read_with_its_links_threads_and_quotes(tmp_path: Path) -> None:
    lines = [
        '7 openat(AT_FDCWD</room>, "a/b", O_RDONLY|O_CLOEXEC) = 3</real/b>',
        '7 openat(AT_FDCWD</room>, "c \\"O_DIRECTORY\\n", O_RDONLY) = -1 ENOENT (No such file or directory)',
        '7 openat(AT_FDCWD</room>, "list", O_RDONLY|O_DIRECTORY) = 3</elsewhere>',
        '7 openat(5</dir>, "d", O_RDONLY <unfinished ...>',
        "8 <... openat resumed>) = 4</real/d>",
        '9 execve("/usr/bin/cat", ["cat"], 0x7ffd /* 3 vars */) = 0',
        '9 connect(3<socket:[1]>, {sa_family=AF_INET, sin_port=htons(80), sin_addr=inet_addr("192.0.2.1")}, 16) = 0',
        '9 connect(3<socket:[1]>, {sa_family=AF_INET, sin_port=htons(53), sin_addr=inet_addr("192.0.2.53")}, 16) = 0',
        '9 sendto(3, "_port=htons(53), inet_addr(", 9, 0, {sin_port=htons(9), sin_addr=inet_addr("192.0.2.9")}, 16) = 9',
        '9 connect(3, {sin6_port=htons(443), sin6_flowinfo=htonl(0), inet_pton(AF_INET6, "2001:db8::1", &sin6_addr)}, 28) = 0',
        '9 connect(3, {sa_family=AF_UNIX, sun_path="/run/socket"}, 110) = 0',
    ]
    (tmp_path / "trace").write_text("\n".join(lines))
    files = {"/real/b", '/room/c "O_DIRECTORY\n', "/dir/d", "/real/d", "/usr/bin/cat"}
    hosts = {"192.0.2.1", "192.0.2.9", "2001:db8::1"}
    assert sandbox._traced(tmp_path / "trace") == {("file", name) for name in files} | {
        ("address", name) for name in hosts
    }


@pytest.mark.skipif(not MEANS.traced, reason="strace is not installed, or may not trace")
def test_native_code_is_traced(tmp_path: Path, outside: Path) -> None:
    verdicts = audited(made(tmp_path, f"subprocess.run(['cat', '{outside}/weights.npz'])"))
    assert failed(verdicts) == ["opened files"]
    assert "weights.npz" in verdicts["opened files"].evidence


@pytest.mark.skipif(not MEANS.mounts, reason="namespaces for mounts are not allowed")
def test_covered_folders_are_empty_and_looking_for_them_convicts(tmp_path: Path, outside: Path) -> None:
    line = f"assert os.listdir('{outside}') == []\ntry: open('{outside}/weights.npz')\nexcept FileNotFoundError: pass"
    assert failed(audited(made(tmp_path, line), covered=(outside, ROOT.parent / "nowhere"))) == [
        "opened files"
    ]


@pytest.mark.skipif(
    not MEANS.mounts or sys.prefix == sys.base_prefix,
    reason="no mounts, or no environment of the project's own",
)
def test_a_repository_is_covered_around_the_environment_in_it(tmp_path: Path) -> None:
    environment = Path(sys.prefix)
    line = f"import numpy; assert os.listdir({str(environment.parent)!r}) == [{environment.name!r}]"
    assert failed(audited(made(tmp_path, line), covered=(environment.parent, environment))) == []


@pytest.mark.parametrize("means", [MEANS, NONE], ids=["all means", "hooks alone"])
@pytest.mark.parametrize(
    "call",
    ["socket.create_connection(('127.0.0.2', PORT), 2).close()", "socket.getaddrinfo('nobody.invalid', 80)"],
)
def test_speaking_to_a_host_convicts_it(
    tmp_path: Path, call: str, means: Means, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sandbox, "_is_loopback", lambda host: host == "127.0.0.1"
    )  # 127.0.0.2 stands for a host that answers
    with socket.create_server(("127.0.0.2", 0)) as server:
        line = f"try: {call.replace('PORT', str(server.getsockname()[1]))}\nexcept OSError: pass"
        verdicts = audited(made(tmp_path, line), means)
    assert failed(verdicts) == ["no network"]


@pytest.mark.skipif(not MEANS.network, reason="network namespaces are not allowed")
def test_there_is_no_network_but_the_loopback(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        line = f"try: socket.create_connection(('127.0.0.1', {port}), 2); time.sleep(99)\nexcept ConnectionRefusedError: pass"
        line += "\nwith socket.create_server(('127.0.0.1', 0)) as own: socket.create_connection(own.getsockname(), 2).close()"
        assert (
            failed(audited(made(tmp_path, line))) == []
        )  # what torchrun needs is there, what listens outside is not


def test_a_timer_started_late_is_convicted_and_so_is_a_run_over_budget(tmp_path: Path) -> None:
    late = made(tmp_path / "late", "time.sleep(1.5); started = time.monotonic()")
    verdicts = audited(late, late_seconds=1.2)
    assert failed(verdicts) == ["wall clock"]
    assert "timer was started late" in verdicts["wall clock"].evidence
    early = "pathlib.Path('eval').mkdir(); pathlib.Path('eval/timing.json').write_text('{\"evaluation_seconds\": 0.1}'); time.sleep(1.5)"
    early += "; pathlib.Path('eval/metrics.json').write_text('{\"toy_bpb\": 1.25}'); sys.exit(0)"
    assert (
        "stopped early" in audited(made(tmp_path / "early", early), late_seconds=1.2)["wall clock"].evidence
    )
    seen = visit(made(tmp_path / "slow"), means=NONE)
    over = check_clean_room(seen, Claim("toy_bpb", 1.25, budget_seconds=1e-3))
    assert [verdict.name for verdict in convicted(over)] == ["wall clock"]
    hidden = visit(
        made(tmp_path / "untimed", "json.dumps = lambda value, real=json.dumps: real({'toy_bpb': 1.25})"),
        means=NONE,
    )
    assert check_clean_room(hidden, CLAIM)[3].outcome == "cannot tell"


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
def test_a_run_that_does_not_come_out_as_claimed_is_convicted(tmp_path: Path, line: str, reason: str) -> None:
    for name, means in (("a", MEANS), ("b", NONE)):
        verdict = audited(made(tmp_path / name, line), means)["runs from the counted files alone"]
        assert verdict.outcome == "fail"
        wanted = (
            ("Read-only file system" if means.mounts else "changed its inputs")
            if reason == "EITHER"
            else reason
        )
        assert wanted in verdict.evidence


def test_a_run_that_does_not_end_is_ended_with_all_its_processes(tmp_path: Path) -> None:
    artifact = made(
        tmp_path, "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"
    )
    seen = visit(artifact, means=MEANS, patience_seconds=1.5)
    assert seen.seen.returncode is None
    assert seen.seen.seconds < 10
    assert "patience" in check_clean_room(seen, CLAIM)[0].evidence


def test_nothing_of_the_callers_environment_is_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CADDIE_SECRET", "1")
    line = "assert 'CADDIE_SECRET' not in os.environ\nassert os.environ['GIVEN'] == '7'"
    line += "\nassert os.path.realpath(os.environ['HOME']).startswith(os.getcwd())"
    seen = visit(made(tmp_path, line), means=NONE, environment={"GIVEN": "7"})
    assert (seen.seen.returncode, seen.seen.output) == (0, "")
    assert json.dumps(seen.metrics) == '{"toy_bpb": 1.25}'
    assert not seen.room.exists()
    assert clean_room.outsiders(seen) == []
