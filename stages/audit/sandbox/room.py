"""Starts a command in a sandbox of Linux namespaces, in which nothing exists but what is listed.

The process has user, mount, PID, network, IPC, UTS and control group namespaces of its own. Its root
is a file system in memory, with

- the system's programs and libraries, the interpreter and its packages, and the files and folders of
  the room, all read-only. The machine's own root is detached;
- /proc of its own PID namespace, read-only; a /dev of five files; empty /tmp and /dev/shm in memory;
- a network of the loopback interface alone.

It has no capabilities, not even those of a user namespace, and cannot get any. A filter of system
calls refuses new user namespaces, keyrings, io_uring, ptrace, what shows or changes which pages of a
file are in memory, and sockets of other families than files, IPv4, IPv6 and netlink. Only the three
standard streams are open, and the environment is the room's. When the command ends, when the caller
ends it, or when the caller itself ends, the kernel kills all processes of the namespace, whatever group
or session they are in.

Only the kernel is needed (Linux 5.12 or later, user namespaces allowed), no program such as bubblewrap,
and no privileges. What two sandboxes on one machine can still exchange: locks on files that both can
read, and the time that an access takes, which depends on what others read before. So scorers that must
not know of each other do not run at the same time, and the one that must know least runs first.

Where namespaces are not allowed, `Isolation.complete` is False: the command then runs with the room's
environment and closed descriptors in the working folder, or a new empty one; it sees the machine, and
the room's other paths do not exist for it. A caller must then report "cannot tell".
"""

import contextlib
import functools
import os
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from stages.audit.sandbox import enter

WORKING_FOLDER = Path("/room")  # the sandbox's current folder
MEMORY_BYTES = 1 << 30  # limit of each of /tmp, /dev/shm and a working folder in memory
SYSTEM_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
# What the loader, the time zone and links of installed libraries need.
SYSTEM_FILES = (
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/localtime",
    "/etc/alternatives",
)
MADE_FILES = {
    "/etc/passwd": f"sandbox:x:{enter.USER}:{enter.USER}::/tmp:/bin/sh\n",
    "/etc/group": f"sandbox:x:{enter.USER}:\n",
    "/etc/hosts": f"127.0.0.1 localhost {enter.HOST_NAME}\n::1 localhost\n",
    "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}
GPU_FOLDERS = ("/sys",)  # which a GPU's driver reads
KILL_SECONDS = 10.0  # after which a sandbox that does not end is an error


@dataclass(frozen=True)
class Room:
    """All that a process in a sandbox sees besides the system's programs and the interpreter."""

    # Absolute path in the sandbox -> file or folder of this machine. An entry inside another one, or
    # inside the system or the interpreter, must exist there; inside the working folder it need not.
    read_only: Mapping[str, Path] = field(default_factory=dict)
    # Folder that the process may write, seen as /room; None: an empty one in memory. Files at which
    # entries are mounted are created in it, so it must be one that no other sandbox wrote to.
    working_folder: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)  # besides PATH, HOME, TMPDIR, LANG
    devices: tuple[Path, ...] = ()  # of an accelerator, as gpu_devices() lists them


@dataclass(frozen=True)
class Isolation:
    """Parts of the sandbox that this system allows."""

    complete: bool  # all namespaces, mounts and the filter
    reason: str = ""  # the first step that the system refused

    def __str__(self) -> str:
        if self.complete:
            return "sandbox of namespaces"
        return f"no sandbox ({self.reason})"


class SandboxProcess(subprocess.Popen[bytes]):
    """A command in a sandbox, which ends with this object at the latest.

    `wait` returns after every process of the sandbox has ended. The return code is the command's own,
    negative for a signal.
    """

    ending: Callable[[], None] | None = None  # ends the sandbox; called once
    owner = -1  # process that started it, whose forked children have a copy of this object

    def kill(self) -> None:
        """End the command and every other process of the sandbox."""
        ending, self.ending = self.ending, None
        if ending is not None and os.getpid() == self.owner:
            ending()

    def __del__(self, *arguments: Any, **keywords: Any) -> None:
        self.kill()
        super().__del__(*arguments, **keywords)

    def terminate(self) -> None:
        """End the sandbox, as `kill`."""
        self.kill()


@functools.cache
def detect_isolation() -> Isolation:
    """Find out by trying what this system allows."""
    if sys.platform != "linux":
        return Isolation(False, "not Linux")
    streams: Mapping[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
    }
    try:
        with start(Room(), [sys.executable, "-I", "-S", "-c", ""], Isolation(True), **streams) as process:
            returncode = process.wait()
    except OSError as error:
        return Isolation(False, str(error))
    return Isolation(returncode == 0, f"python ended with {returncode} in it" if returncode else "")


def start(
    room: Room,
    command: Sequence[str],
    isolation: Isolation | None = None,
    *,
    stdin: int | IO[bytes],
    stdout: int | IO[bytes],
    stderr: int | IO[bytes],
    prefix: Sequence[str] = (),
) -> SandboxProcess:
    """Start a command in a sandbox, and return once it is about to run.

    command: an absolute path in the sandbox, and arguments; isolation: that of the system by default;
    prefix: a command that runs the sandbox outside of it, such as strace. ValueError for entries of the
    room that do not exist, OSError if the sandbox could not be set up. The caller keeps the object.
    """
    isolation = detect_isolation() if isolation is None else isolation
    if not isolation.complete:
        return _start_without_sandbox(room, command, stdin, stdout, stderr, prefix)
    config = _encode_fields(_configuration(room, command))

    # Three descriptors for enter.py: its configuration, a pipe for its answer, the lifeline.
    config_file = os.memfd_create("sandbox")
    ready, answer = os.pipe()
    lifeline, holder = os.pipe()
    given = (config_file, answer, lifeline)

    # It starts with those alone; this process keeps the other ends.
    try:
        with os.fdopen(os.dup(config_file), "wb") as file:
            file.write(config)
        os.lseek(config_file, 0, os.SEEK_SET)
        program = [sys.executable, "-I", "-S", "-B", enter.__file__, *map(str, given)]

        process = SandboxProcess(
            [*prefix, *program],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=given,
            start_new_session=True,
            cwd="/",
            env=_environment(),
        )

    except BaseException:
        os.close(ready)
        os.close(holder)
        raise
    finally:
        for descriptor in given:
            os.close(descriptor)
    process.ending, process.owner = functools.partial(_let_go, holder), os.getpid()

    # The answer, or the end of a program that could not give one.
    with os.fdopen(ready, "rb") as pipe:
        line = pipe.readline().decode("utf-8", errors="replace").strip()
    if line != "ready":
        process.kill()
        process.wait(KILL_SECONDS)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        raise OSError(f"the sandbox was not set up: {line or 'no answer'}")
    return process


def interpreter_folders() -> list[Path]:
    """List the folders of this interpreter, its library and its packages."""
    places = [
        sys.prefix,
        sys.base_prefix,
        *site.getsitepackages(),
        *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
    ]
    return sorted({Path(place).absolute() for place in places} | {Path(place).resolve() for place in places})


def gpu_devices() -> tuple[Path, ...]:
    """List the device files of this machine's NVIDIA GPUs; empty without one."""
    return tuple(sorted(path for path in Path("/dev").glob("nvidia*") if not path.is_dir()))


def _environment() -> dict[str, str]:
    """Build the whole environment of a process in a sandbox, except for the room's own variables."""
    folders = [str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"]
    return {"PATH": os.pathsep.join(folders), "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}


def _configuration(room: Room, command: Sequence[str]) -> dict[str, list[str]]:
    """Build what enter.py reads: all mounts, their sources without links, parents first."""
    # A folder of the system may be a link to one below /usr.
    links = {path: str(Path(path).readlink()) for path in SYSTEM_FOLDERS if Path(path).is_symlink()}
    folders = [Path(path) for path in (*SYSTEM_FOLDERS, *SYSTEM_FILES) if path not in links]
    if room.devices:
        folders += map(Path, GPU_FOLDERS)

    # Of the system's folders and the interpreter's inside each other the outermost, then the room's own.
    sources = {path: path.resolve() for path in [*folders, *interpreter_folders()] if path.exists()}
    inside = {path for path in sources if any(parent in sources for parent in path.parents)}
    entries = {path: source for path, source in sources.items() if path not in inside}
    entries |= _own_entries(room)
    by_depth = sorted(entries.items(), key=lambda entry: len(entry[0].parts))

    working = room.working_folder
    return {
        "links": _flat(links.items()),
        "files": _flat(MADE_FILES.items()),
        "devices": [str(path) for path in room.devices],
        "read_only": _flat((str(source), str(path)) for path, source in by_depth),
        "memory_bytes": [str(MEMORY_BYTES)],
        "working_source": [] if working is None else [str(working.resolve())],
        "working_folder": [str(WORKING_FOLDER)],
        "command": list(command),
        "environment": _flat((_environment() | dict(room.environment)).items()),
    }


def _own_entries(room: Room) -> dict[Path, Path]:
    """List the room's entries, path in the sandbox -> source without links; ValueError if one is missing."""
    entries = {}
    for name, source in room.read_only.items():
        path = PurePosixPath(name)
        if not path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{name!r} is not an absolute path in a sandbox")
        if not source.exists():
            raise ValueError(f"{source}, which is {name} in a sandbox, does not exist")
        entries[Path(path)] = source.resolve()
    if room.working_folder is not None and not room.working_folder.is_dir():
        raise ValueError(f"the working folder {room.working_folder} does not exist")
    return entries


def _flat(pairs: Iterable[tuple[str, str]]) -> list[str]:
    return [text for pair in pairs for text in pair]


def _encode_fields(fields: Mapping[str, Sequence[str]]) -> bytes:
    """Encode lists of strings by name for enter.py's `read_fields`."""
    words = []
    for name, values in fields.items():
        words += [name, str(len(values)), *values]
    if any("\0" in word for word in words):
        raise ValueError("a NUL in a path, an argument or a variable")
    return os.fsencode("".join(f"{word}\0" for word in words))


def _let_go(holder: int) -> None:
    """End a sandbox by a byte on its lifeline: a forked child of this process may hold that open."""
    with contextlib.suppress(BrokenPipeError):
        os.write(holder, b".")
    os.close(holder)


def _start_without_sandbox(
    room: Room,
    command: Sequence[str],
    stdin: int | IO[bytes],
    stdout: int | IO[bytes],
    stderr: int | IO[bytes],
    prefix: Sequence[str],
) -> SandboxProcess:
    """Start a command in its working folder or a new one, where namespaces are not allowed."""
    own = tempfile.mkdtemp()
    process = SandboxProcess(
        [*prefix, *command],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        cwd=room.working_folder or own,
        env=_environment() | {"HOME": own, "TMPDIR": own} | dict(room.environment),
        start_new_session=True,
    )
    process.ending, process.owner = functools.partial(_end_group, process.pid, own), os.getpid()
    return process


def _end_group(group: int, folder: str) -> None:
    """Kill what is left of a process group, and remove its folder."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
