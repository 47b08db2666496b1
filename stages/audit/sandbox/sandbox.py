"""Runs a command in a Linux sandbox: no network, read-only inputs, masked folders, traced file access.

Nothing here needs root where unprivileged user namespaces are allowed (util-linux's unshare); where
they are not, the command runs all the same and `Capabilities` says what was missing. Access is traced
in two ways: by audit hooks inside every Python interpreter (audit_hook.py), which see attempts, and by
strace, where it is installed and allowed, which also sees every other process and native code.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.audit.sandbox import audit_hook

# Runs in the new namespaces: arguments in threes (verb, path, path) up to "--", then the command. The
# loopback interface is brought up because torchrun uses it; `ip` may be absent.
MOUNT_SCRIPT = """set -e
ip link set lo up 2>/dev/null || true
while [ "$1" != -- ]; do
  case "$1" in
    mask) mount -t tmpfs none "$2" ;;
    bind) mkdir -p "$3"; mount --bind "$2" "$3" ;;
    readonly) mount --bind "$2" "$2"; mount -o remount,bind,ro "$2" ;;
  esac
  shift 3
done
shift
exec "$@"
"""
TRACED_CALLS = "trace=open,openat,openat2,creat,execve,execveat,connect,sendto,sendmsg,sendmmsg"
# Lines of strace -y, in which a descriptor is followed by its path in angle brackets:
# a call with a path, after the descriptor of a folder or not;
PATH_CALL = re.compile(
    r"^\d+ +(?:open|openat|openat2|creat|execve|execveat)"
    r'\((?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"'
)
# the descriptor that it returned, links resolved;
OPENED = re.compile(r"= \d+<([^>]*)>$")
# the same in a line of its own, after another thread's line;
RESUMED = re.compile(r"^\d+ +<\.\.\. (?:open|openat|openat2|creat) resumed>.*= \d+<([^>]*)>$")
# port and address of a host, IPv4 or IPv6.
INET = re.compile(
    r"sin6?_port=htons\((\d+)\)"
    r'[^"]*?(?:inet_addr\("([^"]*)"\)|inet_pton\(AF_INET6, "([^"]*)"|sin6_addr="([^"]*)")'
)
NAME_SERVER_PORT = "53"
OUTPUT_CHARACTERS = 2000  # of the end of the command's output that are kept
EVENT_PIPE = "events"  # name of the audit hooks' pipe in the log folder


@dataclass(frozen=True)
class Capabilities:
    """Parts of the sandbox that this system allows."""

    network: bool  # a network namespace without interfaces except the loopback
    mounts: bool  # inputs mounted read-only, folders masked
    traced: bool  # every process traced by strace; otherwise only Python, by audit hooks

    def __str__(self) -> str:
        network = "no network (namespace)" if self.network else "the network was available"
        mounts = "inputs mounted read-only" if self.mounts else "inputs read-only by their mode alone"
        traced = "Python traced by audit hooks, native code not"
        if self.traced:
            traced = "every process traced (strace)"
        return f"{network}, {mounts}, {traced}"


@dataclass(frozen=True)
class Trace:
    """Record of what a command in the sandbox did."""

    returncode: int | None  # None: it was killed at the timeout
    started_at: float  # creation of its process, in seconds since the epoch, as the times of files
    seconds: float  # from then to its end
    output: str  # the end of what it printed
    files: frozenset[Path]  # opened, or tried to open
    programs: frozenset[str]
    addresses: frozenset[str]  # hosts contacted or looked up, except the loopback
    capabilities: Capabilities


class HookListener:
    """Reads the audit hooks' events from a named pipe; unlike a file, the traced process cannot empty it."""

    def __init__(self, path: Path) -> None:
        """Create the pipe and read from it in a thread."""
        os.mkfifo(path)
        self.pipe = os.open(path, os.O_RDWR)
        self.received = bytearray()
        self.end_mark = (
            f"{secrets.token_hex(16)}\n".encode()
        )  # secret, so that the process cannot end the trace
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def finish(self) -> set[audit_hook.Event]:
        """Stop, and return all events."""
        os.write(self.pipe, b"\n" + self.end_mark)
        self.thread.join()
        os.close(self.pipe)
        return {
            _parse_event(line)
            for line in bytes(self.received).removesuffix(self.end_mark).splitlines()
            if line
        }

    def _read(self) -> None:
        while not self.received.endswith(self.end_mark):
            self.received += os.read(self.pipe, 1 << 16)


def interpreter_folders() -> list[Path]:
    """List the folders of this interpreter, its library and its packages."""
    places = [
        sys.prefix,
        sys.base_prefix,
        *site.getsitepackages(),
        *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
    ]
    return sorted({Path(place).absolute() for place in places} | {Path(place).resolve() for place in places})


def detect_capabilities(strace: bool = True) -> Capabilities:
    """Find out by trying what this system allows; without strace if `strace` is False."""
    network = _works("unshare", "-rn", "true")
    mounts = network and _works("unshare", "-rnm", "sh", "-c", "mount -t tmpfs none /mnt")
    traced = strace and _works(*_strace_command(Path(os.devnull)), "true")
    return Capabilities(network, mounts, traced)


def run_sandboxed(
    command: Sequence[str],
    room: Path,
    log: Path,
    capabilities: Capabilities,
    read_only: Sequence[Path],
    masked: Sequence[Path],
    environment: Mapping[str, str],
    timeout_seconds: float,
) -> Trace:
    """Run a Python command in the folder `room`, and trace it.

    log: an empty folder outside the room, for the traces; read_only: inputs in the room; masked:
    folders that are empty for the command, except for the interpreter. Of the caller's environment
    nothing is passed on, only `environment`; HOME and TMPDIR are in the room. No process of the command
    outlives this call.
    """
    # Install the audit hooks: sitecustomize.py is imported by every interpreter that finds it on PYTHONPATH.
    hook_source = Path(audit_hook.__file__).read_text(encoding="utf-8")
    (log / audit_hook.MODULE).write_text(hook_source, encoding="utf-8")
    sitecustomize = audit_hook.SITECUSTOMIZE.format(pipe=str(log / EVENT_PIPE))
    (log / "sitecustomize.py").write_text(sitecustomize, encoding="utf-8")
    listener = HookListener(log / EVENT_PIPE)

    # The command with its wrappers, as far as the system allows them.
    variables = _environment(room, log) | dict(environment)
    sandboxed = _sandboxed_command(command, log, capabilities, read_only, masked)

    # Start it in a process group of its own. Times of files have the epoch's clock; the duration is
    # measured with one that is never set back.
    with (log / "output").open("wb") as output:
        started_at = time.time()
        started = time.monotonic()
        process = subprocess.Popen(
            sandboxed,
            cwd=room,
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

        # Wait for it; at its end, at the timeout and after an error, what is left of the group is killed.
        returncode = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                returncode = process.wait(timeout_seconds)
        finally:
            seconds = time.monotonic() - started
            _kill_group(process)

    # Collect the events of both traces; strace also saw the hooks' own files in the log folder.
    events = listener.finish()
    for kind, name in _strace_events(log / "trace"):
        if not name.startswith(str(log)):
            events.add((kind, name))

    printed = (log / "output").read_text(encoding="utf-8", errors="replace")
    return Trace(
        returncode,
        started_at,
        seconds,
        printed[-OUTPUT_CHARACTERS:],
        files=frozenset(Path(os.path.normpath(name)) for kind, name in events if kind == "file"),
        programs=frozenset(name for kind, name in events if kind == "program"),
        addresses=frozenset(name for kind, name in events if kind == "address" and not _is_loopback(name)),
        capabilities=capabilities,
    )


def _environment(room: Path, log: Path) -> dict[str, str]:
    """Build the whole environment of the command, and the folders that it names in the room."""
    for name in ("home", "tmp"):
        (room / name).mkdir()
    folders = [str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"]
    return {
        "PATH": os.pathsep.join(folders),
        "HOME": str(room / "home"),
        "TMPDIR": str(room / "tmp"),
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(log),  # sitecustomize.py
        "PYTHONNOUSERSITE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Kill what is left of the process and of its children, which are in its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _strace_command(trace: Path) -> list[str]:
    options = ["-f", "-qq", "-y", "-s", "4096", "--seccomp-bpf", "-e", TRACED_CALLS, "-o", str(trace)]
    return ["strace", *options]


def _sandboxed_command(
    command: Sequence[str],
    log: Path,
    capabilities: Capabilities,
    read_only: Sequence[Path],
    masked: Sequence[Path],
) -> list[str]:
    """Wrap a command in strace and unshare, as far as the system allows."""
    wrapped = list(command)
    if capabilities.traced:
        wrapped = [*_strace_command(log / "trace"), *wrapped]
    if not capabilities.network:
        return wrapped

    mounts: list[str] = []
    if capabilities.mounts:
        for number, path in enumerate(masked):
            mounts += _mask_arguments(path, log, log / f"saved{number}")
        for path in read_only:
            mounts += ["readonly", str(path), "-"]
    namespaces = "-rnm" if capabilities.mounts else "-rn"
    return ["unshare", namespaces, "sh", "-c", MOUNT_SCRIPT, "sh", *mounts, "--", *wrapped]


def _mask_arguments(path: Path, log: Path, saved: Path) -> list[str]:
    """Build MOUNT_SCRIPT's arguments that put an empty folder in the place of a folder.

    If the interpreter is inside, as in a repository with its `.venv`, it is mounted back from `saved`.
    A folder that holds the log, or belongs to the interpreter, is not masked.
    """
    path = path.resolve()
    homes = interpreter_folders()
    if not path.is_dir() or log.is_relative_to(path) or any(path.is_relative_to(home) for home in homes):
        return []

    # The interpreter's folders inside; of nested ones the outermost.
    inside = [home for home in homes if home.is_relative_to(path)]
    outermost = [
        home for home in inside if not any(home != other and home.is_relative_to(other) for other in inside)
    ]
    save: list[str] = []
    restore: list[str] = []
    for number, home in enumerate(outermost):
        place = str(saved / str(number))
        save += ["bind", str(home), place]
        restore += ["bind", place, str(home)]
    return [*save, "mask", str(path), "-", *restore]


def _parse_event(line: bytes) -> audit_hook.Event:
    """Parse a line of the pipe.

    A line that no hook wrote was written by the traced process; it counts as a file of that name.
    """
    text = line.decode("utf-8", errors="surrogateescape")
    try:
        event = json.loads(text)
    except ValueError:
        return "file", text
    if isinstance(event, list) and len(event) == 2:
        return str(event[0]), str(event[1])
    return "file", text


def _strace_events(trace: Path) -> set[audit_hook.Event]:
    """Parse what strace wrote, if it ran: files opened or run, and addresses.

    Addresses of name servers are left out: torchrun looks up its own host.
    """
    if not trace.exists():
        return set()
    events: set[audit_hook.Event] = set()
    for line in trace.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        path = _path_in(line)
        if path is not None:
            events.add(("file", path))
        for port, *hosts in INET.findall(line):
            if port != NAME_SERVER_PORT:
                events.update(("address", host) for host in hosts if host)
    return events


def _path_in(line: str) -> str | None:
    """Find the path that a line of strace is about, links resolved if the call succeeded.

    None for the listing of a folder, and for other calls.
    """
    if resumed := RESUMED.match(line):
        return resumed.group(1)
    match = PATH_CALL.match(line)
    if match is None or "O_DIRECTORY" in line[match.end() :].partition(")")[0]:
        return None
    if opened := OPENED.search(line, match.end()):
        return opened.group(1)

    # The call failed, or another thread's line follows: the path as it was given.
    folder, name = match.groups()
    if "\\" in name:
        name = name.encode("latin-1", errors="replace").decode("unicode_escape")
    return name if name.startswith("/") or folder is None else f"{folder}/{name}"


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1", "", "None") or host.removeprefix("::ffff:").startswith("127.")


def _works(*command: str) -> bool:
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
