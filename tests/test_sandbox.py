"""The sandbox of namespaces (room.py): what a process in it sees, may do, and cannot leave."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from stages.audit.sandbox import room
from stages.audit.sandbox.room import Isolation, Room, SandboxProcess

SYSTEM = room.detect_isolation()
NONE = Isolation(complete=False, reason="not tried")
pytestmark = pytest.mark.skipif(not SYSTEM.complete, reason=str(SYSTEM))
ROOT = Path(__file__).resolve().parent.parent


def start(program: str, contents: Room | None = None, **keywords: Any) -> SandboxProcess:
    """Start a Python program in a sandbox, its output in a pipe."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    return room.start(contents or Room(), command, **streams, stderr=subprocess.STDOUT, **keywords)


def output(program: str, contents: Room | None = None, **keywords: Any) -> str:
    with start(program, contents, **keywords) as process:
        printed, _ = process.communicate(timeout=60)
    return printed.decode()


def test_nothing_is_there_but_the_system_and_the_interpreter(tmp_path: Path) -> None:
    seen = output(f"""
        import os
        print(sorted(os.listdir("/")))
        print([name for name in ({str(ROOT / "params.yaml")!r}, {str(tmp_path)!r}, "/sys", "/var", "/home",
               "/etc/shadow", "/old", "/new") if os.path.lexists(name)])
        print(os.listdir("/tmp"), os.listdir("/dev/shm"), os.listdir("."))
        print(sorted(os.environ), os.listdir("/proc/self/fd")[:-1], os.getpid(), os.getuid())
    """).splitlines()
    known = {"bin", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "room", "sbin", "tmp", "usr"}
    above = {folder.parts[1] for folder in room.interpreter_folders()}
    assert set(eval(seen[0])) <= known | above
    # An interpreter below /tmp is the only thing there.
    in_tmp = [folder.parts[2] for folder in room.interpreter_folders() if folder.parts[1] == "tmp"]
    assert seen[1:3] == ["[]", f"{sorted(set(in_tmp))} [] []"]
    assert seen[3] == "['HOME', 'LANG', 'PATH', 'TMPDIR'] ['0', '1', '2'] 2 1000"


ATTEMPTS = """
import ctypes, os
print([line.split()[1] for line in open("/proc/self/status")
       if line.startswith(("Cap", "NoNewPrivs", "Seccomp:"))])
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, *arguments):
    result = getattr(libc, name)(*arguments)
    print(name, result, ctypes.get_errno())
attempt("unshare", 0x10000000)  # a user namespace
attempt("unshare", 0x00020000)  # a mount namespace
attempt("mount", b"tmpfs", b"/tmp", b"tmpfs", 0, None)
attempt("umount2", b"/usr", 2)
attempt("chroot", b"/usr")
attempt("syscall", 435, bytes(88), 88)  # clone3
attempt("syscall", 425, 8, bytes(120))  # io_uring_setup
attempt("socket", 40, 1, 0)  # vsock
attempt("ptrace", 0, 0, 0, 0)
"""


def test_no_capability_is_left_and_none_can_be_had() -> None:
    seen = output(ATTEMPTS).splitlines()
    assert seen[0] == str([*["0000000000000000"] * 5, "1", "2"])
    assert seen[1:] == [
        "unshare -1 1",
        "unshare -1 1",
        "mount -1 1",
        "umount2 -1 1",
        "chroot -1 1",
        "syscall -1 38",
        "syscall -1 38",
        "socket -1 97",
        "ptrace -1 1",
    ]


def test_keyrings_cannot_carry_anything() -> None:
    program = "import ctypes; libc = ctypes.CDLL(None, use_errno=True); "
    number = 250 if os.uname().machine == "x86_64" else 219
    program += f"print(libc.syscall({number}, 0, -3, 0), ctypes.get_errno())"  # of the session
    assert output(program) == "-1 38\n"


def test_a_nested_user_namespace_is_refused_so_that_nothing_is_unmasked() -> None:
    seen = output("""
        import subprocess
        print(subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode)
    """)
    assert seen == "1\n"


def test_the_systems_settings_cannot_be_written(tmp_path: Path) -> None:
    """A process of root's user owns them, even without capabilities."""
    (tmp_path / "input").write_text("as it was")
    seen = output(
        """
        import os
        for name in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/1/oom_score_adj",
                     "/proc/1/mem", "/etc/passwd", "/usr/x", "/x", "/dev/x", "/input"):
            try:
                open(name, "w").close()
                print("opened", name)
            except OSError as error:
                pass
        try:
            os.chmod("/input", 0o777)
            print("changed its mode")
        except OSError:
            pass
        """,
        Room({"/input": tmp_path / "input"}),
    )
    assert seen == ""
    assert (tmp_path / "input").read_text() == "as it was"


def test_entries_are_seen_at_their_paths_and_the_working_folder_is_kept(tmp_path: Path) -> None:
    """Files, folders, links to files, and files inside the working folder."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("A")
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "a")
    (tmp_path / "work").mkdir()
    entries = {
        "/some/where/folder": tmp_path / "folder",
        "/one": tmp_path / "link",
        "/room/deep/two": tmp_path / "folder" / "a",
    }

    program = """
        import os
        print(open("/some/where/folder/a").read(), open("/one").read(), open("deep/two").read(), os.getcwd())
        open("mine", "w").write("kept")
        for path in ("deep/two", "/some/where/folder/b"):
            try: open(path, "w")
            except OSError as error: print(error.errno)
    """

    contents = Room(entries, tmp_path / "work", {"GIVEN": "7"})
    assert output(program, contents).splitlines() == ["A A A /room", "30", "30"]
    assert (tmp_path / "work" / "mine").read_text() == "kept"
    assert output("import os; print(os.environ['GIVEN'])", contents) == "7\n"

    # A folder in memory is gone with its sandbox.
    for _ in range(2):
        assert output("import os; print(os.listdir('.')); open('mine', 'w').close()") == "[]\n"


def test_entries_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    for contents, reason in (
        (Room({"/x": tmp_path / "nothing"}), "does not exist"),
        (Room({"x": tmp_path}), "not an absolute path"),
        (Room({"/x/../y": tmp_path}), "not an absolute path"),
        (Room(working_folder=tmp_path / "nothing"), "working folder"),
    ):
        with pytest.raises(ValueError, match=reason):
            start("pass", contents)

    # A sandbox that cannot be set up.
    with pytest.raises(OSError, match="Read-only file system"):
        start("pass", Room({"/usr/no/such/folder": tmp_path}))
    with pytest.raises(OSError, match="/bin/nothing is not a program"):
        room.start(Room(), ["/bin/nothing"], stdin=0, stdout=1, stderr=2)


@pytest.mark.parametrize(
    ("program", "returncode"),
    [
        ("", 0),
        ("raise SystemExit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import os; os.kill(os.getpid(), 15)", -15),
        ("import os; os.abort()", -6),
        ("import os; os.kill(1, 9)", 0),
    ],
)
def test_the_return_code_is_the_commands(program: str, returncode: int) -> None:
    with start(program) as process:
        assert process.wait(30) == returncode


GRANDCHILD = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(SECONDS)
        open("/room/late", "w").close()
    os._exit(0)
"""


def test_a_grandchild_in_a_session_of_its_own_ends_with_the_command(tmp_path: Path) -> None:
    program = GRANDCHILD.replace("SECONDS", "1.0")
    started = time.monotonic()
    with start(program, Room(working_folder=tmp_path)) as process:
        assert process.wait(30) == 0
    assert time.monotonic() - started < 1.0
    time.sleep(1.5)
    assert not (tmp_path / "late").exists()

    # It would have written: here the command waits for it.
    output(f"{program}\ntime.sleep(2.0)", Room(working_folder=tmp_path))
    assert (tmp_path / "late").exists()


@pytest.mark.parametrize("prefix", [(), ("nice",)], ids=["alone", "in another program"])
def test_kill_ends_every_process(tmp_path: Path, prefix: tuple[str, ...]) -> None:
    program = GRANDCHILD.replace("SECONDS", "1.0") + "\nprint('started', flush=True); time.sleep(60)"
    process = start(program, Room(working_folder=tmp_path), prefix=prefix)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        process.kill()
        assert process.wait(10) == -signal.SIGKILL
    time.sleep(1.5)
    assert not (tmp_path / "late").exists()


def test_a_sandbox_ends_with_its_caller(tmp_path: Path) -> None:
    """Although a forked child of the caller, which has a copy of its descriptors, lives on."""
    caller = f"""
import os, subprocess, sys, time
sys.path.insert(0, {str(ROOT)!r})
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stages.audit.sandbox import room
program = {GRANDCHILD.replace("SECONDS", "2.0")!r} + "\\ntime.sleep(60)"
process = room.start(room.Room(working_folder=Path({str(tmp_path)!r})), [sys.executable, "-c", program],
                     stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", caller], check=False).returncode == -9
    time.sleep(3.0)
    assert not (tmp_path / "late").exists()


def test_kill_works_although_a_forked_child_holds_the_callers_descriptors() -> None:
    process = start("import time; time.sleep(60)")
    child = os.fork()
    if child == 0:
        process.kill()  # has no effect in a copy
        time.sleep(20)
        os._exit(0)
    try:
        time.sleep(0.5)
        assert process.poll() is None
        process.kill()
        assert process.wait(10) == -signal.SIGKILL
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        process.communicate()


@pytest.mark.filterwarnings("ignore")  # Python's own, of a process that was not waited for
def test_a_sandbox_ends_with_its_object() -> None:
    pipe, writer = os.pipe()
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    process = room.start(Room(), command, stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.STDOUT)
    os.close(writer)
    del process
    assert os.read(pipe, 1) == b""  # nobody has the other end any more
    os.close(pipe)


def test_the_streams_pass_data_both_ways() -> None:
    command = [sys.executable, "-c", "import sys; print(sys.stdin.read()[::-1], end='')"]
    pipe = subprocess.PIPE
    with room.start(Room(), command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        printed, errors = process.communicate(b"abc", timeout=30)
    assert (printed, errors) == (b"cba", b"")


def test_memory_runs_out_in_the_sandbox_first_and_files_there_are_limited() -> None:
    seen = output("""
        import os
        print(open("/proc/self/oom_score_adj").read().strip())
        for path in ("/tmp", "/dev/shm", "/room"):
            print(os.statvfs(path).f_blocks * os.statvfs(path).f_frsize)
        print(os.statvfs("/").f_flag & os.ST_RDONLY)
    """)
    assert seen.splitlines() == ["1000", *[str(room.MEMORY_BYTES)] * 3, "1"]


def test_descriptors_of_the_caller_are_not_handed_on() -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    try:
        assert output("import os; print(len(os.listdir('/proc/self/fd')) - 1)") == "3\n"
    finally:
        os.close(reader)
        os.close(writer)


def test_starting_takes_little_time() -> None:
    """The measured times are in the log; the bound is loose, for a machine with other work."""
    plain = room_time = 9.0
    for _ in range(5):
        started = time.monotonic()
        subprocess.run([sys.executable, "-I", "-c", ""], check=True)
        plain = min(plain, time.monotonic() - started)
        started = time.monotonic()
        with start("") as process:
            process.communicate()
        room_time = min(room_time, time.monotonic() - started)
    assert room_time - plain < 0.15


def test_without_namespaces_the_environment_and_the_folder_are_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CADDIE_SECRET", "1")
    program = "import os; print(sorted(os.environ), os.listdir('.'), os.getcwd() == os.environ['HOME'])"
    seen = output(program, isolation=NONE)
    assert seen == "['HOME', 'LANG', 'PATH', 'TMPDIR'] [] True\n"
    assert "no sandbox (not tried)" in str(NONE)

    # What is left of its process group ends with `kill`; the working folder is the given one.
    program = GRANDCHILD.replace("os.setsid()", "").replace("SECONDS", "1.0").replace("/room", str(tmp_path))
    with start(program, Room(working_folder=tmp_path), isolation=NONE) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.wait(30)
        process.kill()
    time.sleep(1.5)
    assert not (tmp_path / "late").exists()


def test_a_system_without_namespaces_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise OSError("unshare: Operation not permitted")

    monkeypatch.setattr(room, "start", refuse)
    found = room.detect_isolation.__wrapped__()
    assert (found.complete, str(found)) == (False, "no sandbox (unshare: Operation not permitted)")


def test_many_sandboxes_start_side_by_side() -> None:
    """The process outside shares its root with the one that exchanges it, and must not need files by then."""

    def start_one(number: int) -> tuple[int, bytes]:
        with room.start(
            Room(),
            [sys.executable, "-I", "-S", "-c", ""],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        ) as process:
            _, printed = process.communicate()
        return process.returncode, printed

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(start_one, range(60))) == {(0, b"")}
