"""Runs a command in a sandbox (room.py), and records what it opens, links, mounts and connects.

There are two traces. strace, where it is installed and allowed, runs outside the sandbox and sees every
process and native code. Audit hooks inside every Python interpreter (audit_hook.py) see attempts that
strace does not name, such as a host that is looked up. Both write to named pipes, so that nothing can
be taken back, and no trace fills the disk. A program can add events to that of the hooks, which only
harms itself.

A process that escapes strace (CLONE_UNTRACED) cannot make the traced calls: strace's filter of system
calls stays with it, and without a tracer the kernel refuses them.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from stages.audit.sandbox import audit_hook, room
from stages.audit.sandbox.audit_hook import Event
from stages.audit.sandbox.room import Isolation, Room

HOOK_FOLDER = "/trace"  # in the sandbox: sitecustomize.py, the hooks and their pipe
EVENT_PIPE = "events"
OUTPUT_CHARACTERS = 2000  # of the end of the command's output that are kept
MAX_EVENTS = 100_000  # different ones that are kept; more are an event of their own
MAX_LINE = 1 << 16  # bytes
OVERFLOW: Event = ("file", "more events than can be recorded")
DRAIN_SECONDS = 2.0  # wait for the rest of the output of a command that has ended

# The question mark: strace does not mind if a machine lacks the call.
FILE_CALLS = ("open", "openat", "openat2", "creat", "execve", "execveat", "chdir", "fchdir")
LINK_CALLS = ("link", "linkat", "rename", "renameat", "renameat2", "mknod", "mknodat", "symlink", "symlinkat")
MOUNT_CALLS = (
    "mount",
    "umount2",
    "pivot_root",
    "chroot",
    "move_mount",
    "open_tree",
    "fsopen",
    "fsmount",
    "fspick",
    "mount_setattr",
    "setns",
    "unshare",
    "open_by_handle_at",
    "io_uring_setup",
)
IPC_CALLS = ("shmget", "msgget", "semget", "mq_open")
SOCKET_CALLS = ("connect", "bind", "sendto", "sendmsg", "sendmmsg")
ALL_CALLS = (*FILE_CALLS, *LINK_CALLS, *MOUNT_CALLS, *IPC_CALLS, *SOCKET_CALLS)
TRACED_CALLS = "trace=" + ",".join(f"?{name}" for name in ALL_CALLS)

# Lines of strace -y, in which a descriptor is followed by its path in angle brackets: a call,
CALL = re.compile(r"^(\d+) +(\w+)\((.*)$", re.DOTALL)
# a path in it, after the descriptor of a folder or not,
PATH = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')
# the descriptor that it returned, links resolved,
OPENED = re.compile(r"= \d+<([^>]*)>$")
# the same in a line of its own, after another thread's line,
RESUMED = re.compile(r"^(\d+) +<\.\.\. (?:open|openat|openat2|creat) resumed>.*= \d+<([^>]*)>$")
# a descriptor alone (fchdir),
DESCRIPTOR = re.compile(r"^\d+<([^>]*)>")
# port and address of a host, IPv4 or IPv6,
INET = re.compile(
    r"sin6?_port=htons\((\d+)\)"
    r'[^"]*?(?:inet_addr\("([^"]*)"\)|inet_pton\(AF_INET6, "([^"]*)"|sin6_addr="([^"]*)")'
)
# the name of a socket of this machine, a path or not,
SOCKET_NAME = re.compile(r'sun_path=(@?)"((?:[^"\\]|\\.)*)"')
# and the end of a line after which another thread's follows.
UNFINISHED = "<unfinished ...>"
NAME_SERVER_PORT = "53"


@dataclass(frozen=True)
class Trace:
    """Record of what a command in the sandbox did."""

    returncode: int | None  # None: it was killed at the timeout
    started_at: float  # start of the command, in seconds since the epoch, as the times of files
    seconds: float  # from then to the end of its last process
    output: str  # the end of what it printed
    files: frozenset[Path]  # opened, or tried to open
    links: frozenset[Path]  # made, renamed or led to by a link
    sockets: frozenset[str]  # of this machine, offered or connected: a path, or @ and a name
    calls: frozenset[str]  # that mount, change the namespace or share memory, with their arguments
    addresses: frozenset[str]  # hosts contacted or looked up, except the loopback
    isolation: Isolation
    is_traced: bool  # every process, by strace; otherwise only Python, by audit hooks

    @property
    def means(self) -> str:
        """Name what the evidence rests on."""
        traced = "Python traced by audit hooks, native code not"
        if self.is_traced:
            traced = "every process traced (strace)"
        return f"{self.isolation}, {traced}"


class PipeReader:
    """Reads lines from a named pipe in a thread and keeps the events that are parsed from them."""

    def __init__(self, path: Path, parse: Callable[[bytes], Iterable[Event]]) -> None:
        """Create the pipe and read from it; from then on it can only be written to."""
        os.mkfifo(path, 0o600)
        self.pipe = os.open(path, os.O_RDWR)
        path.chmod(0o200)
        self.parse = parse
        self.events: set[Event] = set()
        self.end_mark = secrets.token_hex(16).encode()  # secret, so that no program can end the trace
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def finish(self) -> set[Event]:
        """Stop, and return all events."""
        os.write(self.pipe, b"\n" + self.end_mark + b"\n")
        self.thread.join()
        os.close(self.pipe)
        return self.events

    def _read(self) -> None:
        rest = b""
        while True:
            *lines, rest = (rest + os.read(self.pipe, 1 << 16)).split(b"\n")
            # A line that does not end is cut.
            if len(rest) > MAX_LINE:
                lines.append(rest)
                rest = b""
            for line in lines:
                if line == self.end_mark:
                    return
                if line and len(self.events) < MAX_EVENTS:
                    self.events.update(self.parse(line))
                elif line:
                    self.events.add(OVERFLOW)


class StraceParser:
    """Parses the lines of strace, of which those of the sandbox's own set-up are left out."""

    def __init__(self, folder: Path, programs: int) -> None:
        """folder: that relative paths start from; programs: the command is the how-manieth that is run."""
        self.folder = folder
        self.programs = programs
        self.listing: set[str] = set()  # threads that are in the middle of listing a folder

    def __call__(self, line: bytes) -> list[Event]:
        """Return the events of one line."""
        text = line.decode("utf-8", errors="surrogateescape")
        match = CALL.match(text)
        if match is not None and match[2] == "execve":
            self.programs -= 1
        if self.programs > 0:
            return []
        if match is None:
            resumed = RESUMED.match(text)
            is_file = resumed is not None and resumed[1] not in self.listing
            return [("file", resumed[2])] if resumed and is_file else []

        # Where the result is in another line, the flags are in this one alone.
        thread, name, rest = match.groups()
        self.listing.discard(thread)
        path = PATH.search(rest)
        if path is not None and rest.endswith(UNFINISHED) and "O_DIRECTORY" in rest[path.end() :]:
            self.listing.add(thread)
        return self._events(name, rest)

    def _events(self, name: str, rest: str) -> list[Event]:
        """Return the events of a call; `rest` is its line after the opening bracket."""
        if name in FILE_CALLS:
            path = self._opened(name, rest)
            return [] if path is None else [("file", path)]
        if name in LINK_CALLS:
            return [("link", path) for path in self._linked(name, rest)]
        if name in SOCKET_CALLS:
            return self._contacted(name, rest)
        if name in IPC_CALLS:
            return [] if rest.startswith("IPC_PRIVATE") else [("ipc", f"{name} {rest.split(', ')[0]}")]
        if name == "unshare" and "CLONE_NEW" not in rest:
            return []
        if name in MOUNT_CALLS:
            return [("mount", " ".join([name, *(_unquoted(path) for _, path in PATH.findall(rest))]))]
        return []

    def _opened(self, name: str, rest: str) -> str | None:
        """Find the path that was opened, links resolved if the call succeeded.

        None for the listing of a folder.
        """
        if name == "fchdir":
            descriptor = DESCRIPTOR.match(rest)
            return descriptor[1] if descriptor else None
        match = PATH.search(rest)
        if match is None or "O_DIRECTORY" in rest[match.end() :].partition(")")[0]:
            return None
        if opened := OPENED.search(rest, match.end()):
            return opened[1]

        # The call failed, or another thread's line follows: the path as it was given.
        return self._absolute(*match.groups())

    def _linked(self, name: str, rest: str) -> list[str]:
        """Find the paths that a link, a renaming or a new node is about."""
        paths = PATH.findall(rest)
        absolute = [self._absolute(*path) for path in paths]
        # What a symbolic link says starts from its own folder.
        if name.startswith("symlink") and len(paths) == 2:
            absolute[0] = os.path.normpath(Path(absolute[1]).parent / _unquoted(paths[0][1]))
        return absolute

    def _contacted(self, name: str, rest: str) -> list[Event]:
        """Find hosts and sockets; name servers are left out, because torchrun looks up its own host."""
        events: list[Event] = []
        for port, *hosts in INET.findall(rest):
            if port != NAME_SERVER_PORT:
                events += [("address", host) for host in hosts if host]
        kind = "bound" if name == "bind" else "socket"
        for abstract, path in SOCKET_NAME.findall(rest):
            events.append((kind, f"@{_unquoted(path)}" if abstract else self._absolute("", path)))
        return events

    def _absolute(self, folder: str | None, path: str) -> str:
        return os.path.normpath((Path(folder) if folder else self.folder) / _unquoted(path))


class OutputReader:
    """Reads what a command prints in a thread, and keeps the end of it."""

    def __init__(self) -> None:
        """Create the pipe that the command gets as its output."""
        self.pipe, self.writer = os.pipe()
        self.end = b""
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def close_writer(self) -> None:
        """Close the end that the command has got, unless it is closed already."""
        if self.writer != -1:
            os.close(self.writer)
            self.writer = -1

    def finish(self) -> str:
        """Return the end of the output, once the command has ended."""
        self.thread.join(DRAIN_SECONDS)
        return self.end.decode("utf-8", errors="replace")[-OUTPUT_CHARACTERS:]

    def _read(self) -> None:
        while piece := os.read(self.pipe, 1 << 16):
            self.end = (self.end + piece)[-4 * OUTPUT_CHARACTERS :]
        os.close(self.pipe)


@cache
def strace_works() -> bool:
    """Find out by trying whether strace is installed and may trace."""
    if shutil.which("strace") is None:
        return False
    command = [*_strace_command(Path(os.devnull)), "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def run_traced(
    command: Sequence[str],
    contents: Room,
    log: Path,
    timeout_seconds: float,
    isolation: Isolation | None = None,
    strace: bool | None = None,
) -> Trace:
    """Run a Python command in a sandbox and trace it; no process of the command outlives this call.

    contents: what it sees, with a working folder; log: an empty folder for the pipes; isolation and
    strace: what is used, that of the system by default. Without a complete sandbox, processes that
    leave their process group may survive.
    """
    isolation = room.detect_isolation() if isolation is None else isolation
    is_traced = strace_works() if strace is None else strace
    hooks = log / "hooks"
    seen_as = HOOK_FOLDER if isolation.complete else str(hooks)
    hook_reader = _install_hooks(hooks, seen_as)
    strace_reader = None

    # The hooks' folder, and strace around everything. The first program is then enter.py, the second the
    # command.
    variables = {
        "PYTHONPATH": seen_as,  # sitecustomize.py
        "PYTHONNOUSERSITE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    contents = replace(
        contents,
        read_only={**contents.read_only, HOOK_FOLDER: hooks},
        environment=variables | dict(contents.environment),
    )

    prefix: list[str] = []
    if is_traced:
        folder = contents.working_folder if not isolation.complete else room.WORKING_FOLDER
        parser = StraceParser(folder or Path("/"), 2 if isolation.complete else 1)
        strace_reader = PipeReader(log / "strace", parser)
        prefix = _strace_command(log / "strace")

    # Start it. Times of files have the epoch's clock; the duration is measured with one that is never set
    # back.
    output = OutputReader()
    returncode = None

    try:
        process = room.start(
            contents,
            command,
            isolation,
            stdin=subprocess.DEVNULL,
            stdout=output.writer,
            stderr=subprocess.STDOUT,
            prefix=prefix,
        )

        started_at = time.time()
        started = time.monotonic()
        output.close_writer()

        # Wait for it; at its end, at the timeout and after an error, what is left of it is killed.
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                returncode = process.wait(timeout_seconds)
        finally:
            process.kill()
            process.wait()
            seconds = time.monotonic() - started
    finally:
        output.close_writer()
        events = hook_reader.finish()
        traced = strace_reader.finish() if strace_reader else set()

    # strace also saw that the interpreters opened the hooks.
    events |= {(kind, name) for kind, name in traced if not Path(name).is_relative_to(seen_as)}
    return _make_trace(events, returncode, started_at, seconds, output.finish(), isolation, is_traced)


def _make_trace(
    events: set[Event],
    returncode: int | None,
    started_at: float,
    seconds: float,
    output: str,
    isolation: Isolation,
    is_traced: bool,
) -> Trace:
    """Sort the events by their kind."""
    names: dict[str, set[str]] = {
        kind: set() for kind in ("file", "link", "socket", "bound", "mount", "ipc", "address")
    }
    for kind, name in events:
        names.setdefault(kind, set()).add(name)

    # An abstract name means nothing outside if the command offers it itself.
    abstract = {name for name in names["bound"] if name.startswith("@")}

    return Trace(
        returncode,
        started_at,
        seconds,
        output,
        files=_paths(names["file"]),
        links=_paths(names["link"]),
        sockets=frozenset((names["socket"] | names["bound"]) - abstract),
        calls=frozenset(names["mount"] | names["ipc"]),
        addresses=frozenset(name for name in names["address"] if not _is_loopback(name)),
        isolation=isolation,
        is_traced=is_traced,
    )


def _install_hooks(folder: Path, seen_as: str) -> PipeReader:
    """Write the audit hooks to a new folder, from which every interpreter imports sitecustomize.py."""
    folder.mkdir()
    hook_source = Path(audit_hook.__file__).read_text(encoding="utf-8")
    (folder / audit_hook.MODULE).write_text(hook_source, encoding="utf-8")
    sitecustomize = audit_hook.SITECUSTOMIZE.format(pipe=f"{seen_as}/{EVENT_PIPE}")
    (folder / "sitecustomize.py").write_text(sitecustomize, encoding="utf-8")
    return PipeReader(folder / EVENT_PIPE, _parse_event)


def _strace_command(log: Path) -> list[str]:
    options = ["-f", "-qq", "-y", "-s", "4096", "--seccomp-bpf", "-e", "signal=none", "-e", TRACED_CALLS]
    return ["strace", *options, "-o", str(log)]


def _parse_event(line: bytes) -> list[Event]:
    """Parse a line of the hooks.

    A line that no hook wrote was written by the traced process; it counts as a file of that name.
    """
    text = line.decode("utf-8", errors="surrogateescape")
    with contextlib.suppress(ValueError, RecursionError):
        event = json.loads(text)
        if isinstance(event, list) and len(event) == 2:
            return [(str(event[0]), str(event[1]))]
    return [("file", text)]


def _unquoted(text: str) -> str:
    """Undo the escapes of strace."""
    if "\\" not in text:
        return text
    return text.encode("latin-1", errors="replace").decode("unicode_escape")


def _paths(names: Iterable[str]) -> frozenset[Path]:
    return frozenset(Path(os.path.normpath(name)) for name in names)


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1", "", "None") or host.removeprefix("::ffff:").startswith("127.")
