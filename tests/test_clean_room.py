"""The clean room (B14): programs of a few lines, one lawful, each other one with one forbidden act."""

import ctypes
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.audit.sandbox import clean_room, room, trace
from stages.audit.sandbox.clean_room import (
    AuditedArtifact,
    ClaimedMetric,
    CleanRoomRun,
    check_clean_room,
    run_in_clean_room,
)
from stages.audit.sandbox.room import Isolation
from stages.audit.verdict import Verdict, failures
from tests.toy_program import toy_artifact

ROOT = Path(__file__).resolve().parent.parent
SYSTEM = room.detect_isolation()
NONE = Isolation(complete=False, reason="not tried")
CLAIM = ClaimedMetric("toy_bpb", 1.25, budget_seconds=30.0)
FILES = "opened files"
LINKS = "links, mounts and sockets"
RESULT = "runs from the counted files alone"

needs_sandbox = pytest.mark.skipif(not SYSTEM.complete, reason=str(SYSTEM))
needs_strace = pytest.mark.skipif(
    not trace.strace_works(), reason="strace is not installed, or may not trace"
)
each_means = pytest.mark.parametrize(
    ("isolation", "strace"),
    [(None, None), (None, False), (NONE, False)],
    ids=["all means", "no strace", "hooks alone"],
)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that an artifact has no business in, with weights and training data."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "weights.npz").write_bytes(b"better weights")
    return tmp_path / "outside"


def run(
    artifact: AuditedArtifact, isolation: Isolation | None = None, strace: bool | None = None
) -> CleanRoomRun:
    return run_in_clean_room(artifact, timeout_seconds=60.0, isolation=isolation, strace=strace)


def checked(seen: CleanRoomRun, late_seconds: float = 10.0) -> dict[str, Verdict]:
    verdicts = check_clean_room("toy", seen, CLAIM, late_seconds)
    assert all((verdict.check.number, verdict.subject) == ("B14", "toy") for verdict in verdicts)
    return {verdict.check.name: verdict for verdict in verdicts}


def failed(verdicts: dict[str, Verdict]) -> list[str]:
    return [verdict.check.name for verdict in failures(list(verdicts.values()))]


def test_a_lawful_artifact_passes_and_what_could_not_be_prevented_is_not_passed(tmp_path: Path) -> None:
    artifact = toy_artifact(tmp_path)
    verdicts = checked(run(artifact))
    assert failed(verdicts) == []
    for name in (RESULT, "wall clock"):
        assert verdicts[name].outcome == "pass"
    for name in (FILES, LINKS, "no network"):
        assert (verdicts[name].outcome == "pass") == SYSTEM.complete

    # Without a sandbox a trace alone proves nothing.
    for strace in (False, None):
        blind = checked(run(artifact, NONE, strace))
        outcomes = {name: verdict.outcome for name, verdict in blind.items()}
        assert outcomes == {
            RESULT: "pass",
            FILES: "cannot tell",
            LINKS: "cannot tell",
            "no network": "cannot tell",
            "wall clock": "pass",
        }
    assert "no sandbox (not tried)" in blind[FILES].evidence
    assert checked(run(artifact)) == verdicts  # the report holds no time


@each_means
@pytest.mark.parametrize(
    "line",
    [
        "open('OUTSIDE/weights.npz', 'rb').read()",  # a file outside the counted set
        f"open({str(ROOT / 'params.yaml')!r})",  # the repository
        "os.close(os.open('../' * 40 + 'OUTSIDE/weights.npz', os.O_RDONLY))",
        "import numpy; numpy.memmap('OUTSIDE/weights.npz', mode='r')",  # training shards
        "subprocess.run([sys.executable, '-c', 'open(\"OUTSIDE/weights.npz\")'])",  # another interpreter
        "open(os.path.join(sys.path[1], 'events'), 'w').close()",  # what it is watched by
    ],
    ids=["uncounted file", "repository", "detour", "training shard", "child", "log"],
)
def test_a_program_that_opens_other_files_fails(
    tmp_path: Path, outside: Path, line: str, isolation: Isolation | None, strace: bool | None
) -> None:
    attempt = f"try: {line.replace('OUTSIDE', str(outside))}\nexcept OSError: pass"
    verdicts = checked(run(toy_artifact(tmp_path, attempt), isolation, strace))
    assert failed(verdicts) == [FILES]
    assert verdicts[FILES].expected == 0


@needs_sandbox
def test_a_program_that_reads_the_repository_does_not_run(tmp_path: Path) -> None:
    line = f"sys.path.insert(0, {str(ROOT)!r}); import stages.common.shards"
    assert failed(checked(run(toy_artifact(tmp_path, line)))) == [RESULT]


# What a program tries, and prints if it got it; HOST is a folder of this machine.
WAYS_OUT = {
    "a link into the room": "os.link('HOST/weights.npz', 'mine'); print(open('mine').read())",
    "a renaming into the room": "os.rename('HOST/weights.npz', 'mine'); print(open('mine').read())",
    "a link that leads outside": "os.symlink('HOST', 'mine'); print(open('mine/weights.npz').read())",
    "a relative link": "os.symlink('../' * 40 + 'HOST', 'mine'); print(open('mine/weights.npz').read())",
    "a renaming out of the room": "os.rename('/room/model.bin', 'HOST/stolen'); print('better')",
    "a bind mount": "ctypes.CDLL(None).mount(b'HOST', b'/tmp', None, 4096, None); "
    "print(open('/tmp/weights.npz').read())",
    "a socket in a file": "s = socket.socket(socket.AF_UNIX); s.connect('HOST/socket'); print('better')",
    "an abstract socket": "s = socket.socket(socket.AF_UNIX); s.connect('\\0caddie-NUMBER'); print('better')",
    "SysV shared memory": "print('better' if ctypes.CDLL(None).shmget(NUMBER, 100, 0) >= 0 else '')",
    "a message queue": "print('better' if ctypes.CDLL(None).msgget(NUMBER, 0) >= 0 else '')",
}


@pytest.fixture
def ways(outside: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The ways out, each with something at its end."""
    number = os.getpid()
    libc = ctypes.CDLL(None)
    memory, queue = libc.shmget(number, 100, 0o1666), libc.msgget(number, 0o1666)
    with socket.socket(socket.AF_UNIX) as in_file, socket.socket(socket.AF_UNIX) as abstract:
        monkeypatch.chdir(outside)  # whose path may be too long for a socket
        in_file.bind("socket")
        in_file.listen()
        abstract.bind(f"\0caddie-{number}")
        abstract.listen()
        yield {
            name: line.replace("HOST", str(outside)).replace("NUMBER", str(number))
            for name, line in WAYS_OUT.items()
        }
    libc.shmctl(memory, 0, None)
    libc.msgctl(queue, 0, None)


@needs_sandbox
@needs_strace
@pytest.mark.parametrize("strace", [None, False], ids=["strace", "hooks alone"])
@pytest.mark.parametrize("way", list(WAYS_OUT))
def test_no_link_mount_socket_or_shared_memory_leads_out(
    tmp_path: Path,
    ways: dict[str, str],
    way: str,
    strace: bool | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = f"import ctypes\ntry: {ways[way]}\nexcept OSError: pass"
    seen = run(toy_artifact(tmp_path, line), strace=strace)
    assert "better" not in seen.trace.output
    assert LINKS in failed(checked(seen))


@needs_sandbox
@needs_strace
def test_links_sockets_and_memory_inside_the_room_are_lawful(tmp_path: Path) -> None:
    """Libraries rename what they cache, and processes of one run share semaphores and sockets."""
    line = """
from multiprocessing import Lock, shared_memory
Lock(); shared_memory.SharedMemory(create=True, size=10).unlink()
import tempfile; place = tempfile.mkdtemp(); os.chdir(place)
open("a", "w").close(); os.rename("a", "b"); os.symlink("b", "c"); os.link("b", place + "/d")
for name in (place + "/socket", "\\0name"):
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(name); server.listen(); client.connect(name)
try: socket.getaddrinfo(socket.gethostname(), 80)
except OSError: pass
import getpass; assert getpass.getuser() == "sandbox"
os.chdir("/room")
"""
    verdicts = checked(run(toy_artifact(tmp_path, line)))
    assert verdicts[RESULT].outcome == "pass", verdicts[RESULT].evidence
    assert verdicts[LINKS].outcome == "pass", verdicts[LINKS].evidence
    assert verdicts[FILES].outcome == "pass", verdicts[FILES].evidence


@needs_sandbox
def test_shared_memory_of_one_run_is_not_there_for_the_next(tmp_path: Path) -> None:
    line = "n = '/dev/shm/caddie'; print('left') if os.path.exists(n) else open(n, 'w').close()"
    line += "\nn = '/tmp/caddie'; print('left') if os.path.exists(n) else open(n, 'w').close()"
    artifact = toy_artifact(tmp_path, line)
    for _ in range(2):
        assert run(artifact).trace.output == ""
    assert not Path("/dev/shm/caddie").exists()


@needs_sandbox
@needs_strace
@pytest.mark.parametrize("strace", [None, False], ids=["strace", "no strace"])
def test_a_grandchild_in_a_session_of_its_own_ends_with_the_run(tmp_path: Path, strace: bool | None) -> None:
    """Its late write does not happen: not in the room, and not after the clock was stopped."""
    late = "import os, time; time.sleep(1.5); open('/room/eval/late', 'w').write('late'); time.sleep(60)"
    line = f"subprocess.Popen([sys.executable, '-c', {late!r}], start_new_session=True)"
    # The end of the program is reached at once, and with it that of the grandchild.
    started = time.monotonic()
    seen = run(toy_artifact(tmp_path, line), strace=strace)
    assert seen.trace.returncode == 0
    assert time.monotonic() - started < 30
    assert seen.written < 1.5
    time.sleep(2.0)
    processes = [path.read_bytes() for path in _command_lines()]
    assert not any(b"/room/eval/late" in line for line in processes)


def _command_lines() -> Iterator[Path]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            path.read_bytes()
        except OSError:
            continue
        yield path


@needs_sandbox
@pytest.mark.parametrize("place", ["eval", "eval/metrics.json"])
def test_an_output_that_is_a_link_is_not_read(tmp_path: Path, outside: Path, place: str) -> None:
    (outside / "metrics.json").write_text('{"toy_bpb": 1.25}')
    target = outside if place == "eval" else outside / "metrics.json"
    line = "" if place == "eval" else "os.mkdir('eval'); "
    line += f"os.symlink({str(target)!r}, {place!r}); sys.exit(0)"
    verdicts = checked(run(toy_artifact(tmp_path, line)))
    assert "left no metrics.json" in verdicts[RESULT].evidence


@pytest.mark.parametrize(
    "text",
    [
        '"[" * 100000',
        '\'{"toy_bpb": 1\' + "0" * 400 + "}"',
        "'{\"toy_bpb\": true}'",
        '\'{"toy_bpb": 1.25, "x": "\' + "x" * 2000000 + \'"}\'',
    ],
    ids=["nested", "huge number", "true", "large"],
)
def test_an_odd_metrics_file_is_no_result(tmp_path: Path, text: str) -> None:
    line = f"os.mkdir('eval'); open('eval/metrics.json', 'w').write({text}); sys.exit(0)"
    assert "left no metrics.json" in checked(run(toy_artifact(tmp_path, line)))[RESULT].evidence


def test_a_flood_of_output_is_cut(tmp_path: Path) -> None:
    line = "for _ in range(400): sys.stdout.write('x' * 100_000)\nprint('end')"
    seen = run(toy_artifact(tmp_path, line))
    assert seen.trace.returncode == 0
    assert len(seen.trace.output) == trace.OUTPUT_CHARACTERS
    assert seen.trace.output.endswith("xend\n")


@needs_strace
@pytest.mark.parametrize("isolation", [None, NONE])
def test_native_code_is_traced(tmp_path: Path, outside: Path, isolation: Isolation | None) -> None:
    seen = run(toy_artifact(tmp_path, f"subprocess.run(['cat', '{outside}/weights.npz'])"), isolation)
    verdicts = checked(seen)
    assert failed(verdicts) == [FILES]
    assert "weights.npz" in verdicts[FILES].evidence
    assert ("better" in seen.trace.output) == (isolation is NONE or not SYSTEM.complete)


INET = "9 connect(3<socket:[1]>, {sa_family=AF_INET, sin_port=htons"
INET6 = "9 connect(3, {sin6_port=htons(443), sin6_flowinfo=htonl(0), inet_pton"
DATA = '9 sendto(3, "_port=htons(53), inet_addr(", 9, 0, {sin_port=htons'
STRACE_LINES = [
    '6 execve("/enter", ["enter"], 0x7ffd /* 3 vars */) = 0',
    '6 mount("/old/usr", "/new/usr", NULL, MS_BIND|MS_REC, NULL) = 0',
    '6 openat(AT_FDCWD</>, "/set-up", O_RDONLY) = 3</set-up>',
    '7 execve("/usr/bin/python", ["python"], 0x7ffd /* 3 vars */) = 0',
    '7 openat(AT_FDCWD</room>, "a/b", O_RDONLY|O_CLOEXEC) = 3</real/b>',
    '7 openat(AT_FDCWD</room>, "c \\"O_DIRECTORY\\n", O_RDONLY) = -1 ENOENT (No such file or directory)',
    '7 openat(AT_FDCWD</room>, "list", O_RDONLY|O_DIRECTORY) = 3</elsewhere>',
    '7 openat(AT_FDCWD</room>, "list", O_RDONLY|O_DIRECTORY <unfinished ...>',
    '8 openat(5</dir>, "d", O_RDONLY <unfinished ...>',
    "7 <... openat resumed>) = 4</elsewhere>",
    "8 <... openat resumed>) = 4</real/d>",
    '7 openat(AT_FDCWD</room>, "O_DIRECTORY", O_RDONLY <unfinished ...>',
    "7 <... openat resumed>) = 4</real/e>",
    '9 execve("/usr/bin/cat", ["cat"], 0x7ffd /* 3 vars */) = 0',
    '9 chdir("/elsewhere") = -1 ENOENT (No such file or directory)',
    "9 fchdir(3</etc>) = 0",
    '9 rename("x", "../y") = 0',
    '9 symlink("up/../../../z", "/room/sub/l") = 0',
    '9 linkat(AT_FDCWD</room>, "p", 4</q>, "r", 0) = 0',
    '9 mount("/a b", "/c", NULL, MS_BIND, NULL) = -1 EPERM (Operation not permitted)',
    "9 unshare(CLONE_FILES) = 0",
    "9 unshare(CLONE_NEWNS) = -1 EPERM (Operation not permitted)",
    "9 shmget(0x4d2, 100, IPC_CREAT|0666) = 0",
    "9 semget(IPC_PRIVATE, 1, 0600) = 0",
    INET + '(80), sin_addr=inet_addr("192.0.2.1")}, 16) = 0',
    INET + '(53), sin_addr=inet_addr("192.0.2.53")}, 16) = 0',
    DATA + '(9), sin_addr=inet_addr("192.0.2.9")}, 16) = 9',
    INET6 + '(AF_INET6, "2001:db8::1", &sin6_addr)}, 28) = 0',
    '9 connect(3, {sa_family=AF_UNIX, sun_path="/run/socket"}, 110) = 0',
    '9 connect(3, {sa_family=AF_UNIX, sun_path=@"name"}, 110) = 0',
    '9 bind(3, {sa_family=AF_UNIX, sun_path="own"}, 110) = 0',
]


def test_a_trace_is_read_with_its_links_threads_and_quotes() -> None:
    parse = trace.StraceParser(Path("/room"), programs=2)
    found: dict[str, set[str]] = {}
    for line in STRACE_LINES:
        for kind, name in parse(line.encode()):
            found.setdefault(kind, set()).add(name)

    assert found == {
        "file": {
            "/real/b",
            '/room/c "O_DIRECTORY\n',
            "/dir/d",
            "/real/d",
            "/room/O_DIRECTORY",
            "/real/e",
            "/usr/bin/python",
            "/usr/bin/cat",
            "/elsewhere",
            "/etc",
        },
        "link": {"/room/x", "/y", "/z", "/room/sub/l", "/room/p", "/q/r"},
        "mount": {"mount /a b /c", "unshare"},
        "ipc": {"shmget 0x4d2"},
        "address": {"192.0.2.1", "192.0.2.9", "2001:db8::1"},
        "socket": {"/run/socket", "@name"},
        "bound": {"/room/own"},
    }


def test_the_hooks_pipe_can_only_be_added_to(tmp_path: Path) -> None:
    """A line that no hook wrote is a file of that name, and an endless line or list is cut."""
    reader = trace.PipeReader(tmp_path / "pipe", trace._parse_event)
    with (tmp_path / "pipe").open("wb") as pipe:
        pipe.write(b'["file", "/a"]\nnonsense\n["file"]\n' + b"[" * 200_000 + b"\n")
    events = reader.finish()
    assert {("file", "/a"), ("file", "nonsense"), ("file", '["file"]')} <= events
    assert all(len(name) <= 2 * trace.MAX_LINE for _, name in events)

    many = trace.PipeReader(tmp_path / "many", lambda line: [("file", str(i)) for i in range(200_000)])
    with (tmp_path / "many").open("wb") as pipe:
        pipe.write(b"1\n2\n")
    assert trace.OVERFLOW in many.finish()


@pytest.mark.parametrize("isolation", [None, NONE], ids=["all means", "hooks alone"])
@pytest.mark.parametrize(
    "call",
    ["socket.create_connection(('127.0.0.2', PORT), 2).close()", "socket.getaddrinfo('nobody.invalid', 80)"],
)
def test_a_program_that_connects_to_a_host_fails(
    tmp_path: Path, call: str, isolation: Isolation | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 127.0.0.2 takes the part of another host that answers.
    monkeypatch.setattr(trace, "_is_loopback", lambda host: host == "127.0.0.1")
    with socket.create_server(("127.0.0.2", 0)) as server:
        line = f"try: {call.replace('PORT', str(server.getsockname()[1]))}\nexcept OSError: pass"
        verdicts = checked(run(toy_artifact(tmp_path, line), isolation))
    assert failed(verdicts) == ["no network"]


@needs_sandbox
def test_there_is_no_network_but_the_loopback(tmp_path: Path) -> None:
    """A server outside cannot be reached; one inside can, which torchrun needs."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        line = f"try: socket.create_connection(('127.0.0.1', {port}), 2); time.sleep(99)\n"
        line += "except ConnectionRefusedError: pass\n"
        line += "with socket.create_server(('127.0.0.1', 0)) as own:\n"
        line += "    socket.create_connection(own.getsockname(), 2).close()"
        assert failed(checked(run(toy_artifact(tmp_path, line)))) == []


def test_a_timer_started_late_fails_and_so_does_a_run_over_budget(tmp_path: Path) -> None:
    late = toy_artifact(tmp_path / "late", "time.sleep(1.5); started = time.monotonic()")
    verdicts = checked(run(late), late_seconds=1.2)
    assert failed(verdicts) == ["wall clock"]
    assert "timer was started late" in verdicts["wall clock"].evidence

    # A timer that is stopped before the last output.
    early = "pathlib.Path('eval').mkdir()\n"
    early += "pathlib.Path('eval/timing.json').write_text('{\"evaluation_seconds\": 0.1}')\n"
    early += "time.sleep(1.5)\n"
    early += "pathlib.Path('eval/metrics.json').write_text('{\"toy_bpb\": 1.25}'); sys.exit(0)"
    verdicts = checked(run(toy_artifact(tmp_path / "early", early)), late_seconds=1.2)
    assert "stopped early" in verdicts["wall clock"].evidence

    # Over the budget, and without a timer.
    seen = run(toy_artifact(tmp_path / "slow"))
    over = failures(check_clean_room("toy", seen, ClaimedMetric("toy_bpb", 1.25, budget_seconds=1e-3)))
    assert [verdict.check.name for verdict in over] == ["wall clock"]
    assert over[0].saw == seen.trace.seconds
    line = "json.dumps = lambda value, real=json.dumps: real({'toy_bpb': 1.25})"
    hidden = checked(run(toy_artifact(tmp_path / "untimed", line)))
    assert hidden["wall clock"].outcome == "cannot tell"


@needs_sandbox
@needs_strace
def test_the_set_up_of_the_sandbox_does_not_count(tmp_path: Path) -> None:
    """The audit's clock starts with the command, a little before the program's own: Python starts between."""
    shortest = 9.0
    for number in range(3):
        seen = run(toy_artifact(tmp_path / str(number), "print(time.time())"))
        shortest = min(shortest, float(seen.trace.output) - seen.trace.started_at)
    assert -0.01 < shortest < 1.0


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
        ("os.unlink('data/val/val_0.bin'); open('data/val/val_0.bin', 'wb').write(b'easy.')", "EITHER"),
        ("os.rename('data', 'd'); os.makedirs('data/val'); open('data/val/val_0.bin', 'wb')", "EITHER"),
        ("time.sleep(0); pathlib.Path('model.bin'); sys.exit(0)", "left no metrics.json"),
        ("len = lambda value: 4", "toy_bpb is 1.0"),  # another number than was claimed
    ],
)
def test_a_run_that_does_not_come_out_as_claimed_fails(tmp_path: Path, line: str, reason: str) -> None:
    for name, isolation in (("a", SYSTEM), ("b", NONE)):
        seen = run(toy_artifact(tmp_path / name, line), isolation)
        verdict = checked(seen)[RESULT]
        assert verdict.outcome == "fail"
        wanted: tuple[str, ...] = (reason,)
        if reason == "EITHER":
            wanted = (
                ("exit code 1", "toy_bpb") if isolation.complete else ("changed its inputs", "exit code 1")
            )
        assert any(text in verdict.evidence for text in wanted), verdict.evidence


def test_a_run_that_does_not_end_is_ended_with_all_its_processes(tmp_path: Path) -> None:
    artifact = toy_artifact(
        tmp_path, "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"
    )
    seen = run_in_clean_room(artifact, timeout_seconds=1.5)
    assert seen.trace.returncode is None
    assert seen.trace.seconds < 10
    assert "timeout" in check_clean_room("toy", seen, CLAIM)[0].evidence


@pytest.mark.parametrize("isolation", [None, NONE])
def test_nothing_of_the_callers_environment_is_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isolation: Isolation | None
) -> None:
    monkeypatch.setenv("CADDIE_SECRET", "1")
    line = "assert 'CADDIE_SECRET' not in os.environ\nassert os.environ['GIVEN'] == '7'"
    line += "\nassert os.path.realpath(os.environ['HOME']).startswith(os.getcwd())"
    artifact = toy_artifact(tmp_path, line)
    seen = run_in_clean_room(artifact, environment={"GIVEN": "7"}, isolation=isolation, strace=False)
    assert (seen.trace.returncode, seen.trace.output) == (0, "")
    assert json.dumps(seen.metrics) == '{"toy_bpb": 1.25}'
    assert not seen.folder.exists()
    assert clean_room.unexpected_files(seen) == []


@needs_sandbox
def test_the_counted_files_come_without_their_times_and_modes(tmp_path: Path) -> None:
    artifact = toy_artifact(tmp_path, "s = os.stat('model.bin'); print(s.st_mtime_ns, oct(s.st_mode))")
    os.utime(artifact.counted["model.bin"], ns=(123456789, 987654321))
    artifact.counted["model.bin"].chmod(0o751)
    assert run(artifact).trace.output == "0 0o100444\n"


@needs_sandbox
@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="no environment of the project's own")
def test_of_the_repository_only_the_environment_in_it_is_there(tmp_path: Path) -> None:
    environment = Path(sys.prefix)
    line = f"import numpy; assert os.listdir({str(environment.parent)!r}) == [{environment.name!r}]"
    assert failed(checked(run(toy_artifact(tmp_path, line)))) == []
