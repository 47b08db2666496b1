"""A command in a folder of its own: without a network, with read-only inputs and covered folders, watched, as far as the system lets us.

Nothing here needs root where unprivileged user namespaces are allowed (util-linux's unshare); where they are not, the command runs all the
same and `Means` says what was missing. Watching is done twice: by audit hooks inside every interpreter (audit_hook.py), which see attempts,
and by strace where it is installed and may trace, which sees every process and native code too.
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

ARRANGE = """set -e
ip link set lo up 2>/dev/null || true
while [ "$1" != -- ]; do
  case "$1" in
    cover) mount -t tmpfs none "$2" ;;
    bind) mkdir -p "$3"; mount --bind "$2" "$3" ;;
    keep) mount --bind "$2" "$2"; mount -o remount,bind,ro "$2" ;;
  esac
  shift 3
done
shift
exec "$@"
"""  # torchrun talks to itself over the loopback; `ip` may be absent
TRACED = "trace=open,openat,openat2,creat,execve,execveat,connect,sendto,sendmsg,sendmmsg"
PATH_CALL = re.compile(
    r'^\d+ +(?:open|openat|openat2|creat|execve|execveat)\((?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"'
)
OPENED = re.compile(r"= \d+<([^>]*)>$")  # what a descriptor leads to, links resolved
RESUMED = re.compile(
    r"^\d+ +<\.\.\. (?:open|openat|openat2|creat) resumed>.*= \d+<([^>]*)>$"
)  # after another thread's line
INET = re.compile(
    r'sin6?_port=htons\((\d+)\)[^"]*?(?:inet_addr\("([^"]*)"\)|inet_pton\(AF_INET6, "([^"]*)"|sin6_addr="([^"]*)")'
)
NAME_SERVER = "53"  # its port


@dataclass(frozen=True)
class Means:
    """How far the system let us go."""

    network: bool  # a namespace without interfaces but the loopback
    mounts: bool  # inputs mounted read-only, folders covered
    traced: bool  # every process watched by strace; otherwise Python alone, by hooks

    def __str__(self) -> str:
        network = "no network (namespace)" if self.network else "the network was there"
        mounts = "inputs mounted read-only" if self.mounts else "inputs read-only by their mode alone"
        traced = (
            "every process traced (strace)"
            if self.traced
            else "Python watched by audit hooks, native code not"
        )
        return f"{network}, {mounts}, {traced}"


@dataclass(frozen=True)
class Seen:
    """What a confined command did."""

    returncode: int | None  # None: it was stopped when patience ended
    began: float  # when its process was made, in seconds since the epoch, as files are dated
    seconds: float  # from then to its end
    output: str  # what it printed last
    files: frozenset[Path]  # opened, or tried to
    programs: frozenset[str]
    addresses: frozenset[str]  # hosts spoken to or looked up, the loopback aside
    means: Means


def interpreter() -> list[Path]:
    """The folders of this interpreter, its library and its packages."""
    places = [
        sys.prefix,
        sys.base_prefix,
        *site.getsitepackages(),
        *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
    ]
    return sorted({Path(place).absolute() for place in places} | {Path(place).resolve() for place in places})


class Listener:
    """Reads what the hooks tell from a named pipe, which, other than a file, cannot be emptied by who is watched."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.pipe = os.open(path, os.O_RDWR)
        self.heard = bytearray()
        self.last = f"{secrets.token_hex(16)}\n".encode()
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def finish(self) -> set[tuple[str, str]]:
        """All that was told; a line that is none of the hooks' was written by who is watched, and counts as a file of that name."""
        os.write(self.pipe, b"\n" + self.last)
        self.thread.join()
        os.close(self.pipe)
        return {_line(line) for line in bytes(self.heard).removesuffix(self.last).splitlines() if line}

    def _listen(self) -> None:
        while not self.heard.endswith(self.last):
            self.heard += os.read(self.pipe, 1 << 16)


def available(strace: bool = True) -> Means:
    """What this system allows, found out by trying; `strace` False does without it."""
    network = _works("unshare", "-rn", "true")
    mounts = network and _works("unshare", "-rnm", "sh", "-c", "mount -t tmpfs none /mnt")
    return Means(
        network,
        mounts,
        strace
        and _works("strace", "-f", "-qq", "-y", "--seccomp-bpf", "-e", TRACED, "-o", os.devnull, "true"),
    )


def run(
    command: Sequence[str],
    room: Path,
    log: Path,
    means: Means,
    read_only: Sequence[Path],
    covered: Sequence[Path],
    environment: Mapping[str, str],
    patience_seconds: float,
) -> Seen:
    """Run a Python command in `room`; `log` is an empty folder outside it, for what the watchers write.

    Nothing of the caller's environment is handed on; HOME and TMPDIR lie in the room. No process of the command outlives this call. Folders
    in `covered` are empty for it, but for the interpreter.
    """
    (log / audit_hook.MODULE).write_text(
        Path(audit_hook.__file__).read_text(encoding="utf-8"), encoding="utf-8"
    )
    (log / "sitecustomize.py").write_text(
        audit_hook.SITECUSTOMIZE.format(log=str(log / "told")), encoding="utf-8"
    )
    listener = Listener(log / "told")
    variables = _variables(room, log) | dict(environment)
    wrapped = _wrapped(command, log, means, read_only, covered)
    with (log / "output").open("wb") as output:
        began, started = time.time(), time.monotonic()
        process = subprocess.Popen(
            wrapped, cwd=room, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        returncode = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                returncode = process.wait(patience_seconds)
        finally:
            seconds = time.monotonic() - started
            _end(process)
    told = listener.finish() | {
        (kind, what) for kind, what in _traced(log / "trace") if not what.startswith(str(log))
    }
    return Seen(
        returncode,
        began,
        seconds,
        (log / "output").read_text(encoding="utf-8", errors="replace")[-2000:],
        frozenset(Path(os.path.normpath(what)) for kind, what in told if kind == "file"),
        frozenset(what for kind, what in told if kind == "program"),
        frozenset(what for kind, what in told if kind == "address" and not _is_loopback(what)),
        means,
    )


def _variables(room: Path, log: Path) -> dict[str, str]:
    """The whole environment of the command."""
    for name in ("home", "tmp"):
        (room / name).mkdir()
    folders = [str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"]
    return {
        "PATH": os.pathsep.join(folders),
        "HOME": str(room / "home"),
        "TMPDIR": str(room / "tmp"),
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(log),  # sitecustomize
        "PYTHONNOUSERSITE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill what is left of the process and of its children, which are in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wrapped(
    command: Sequence[str], log: Path, means: Means, read_only: Sequence[Path], covered: Sequence[Path]
) -> list[str]:
    words = list(command)
    if means.traced:
        words = [
            "strace",
            "-f",
            "-qq",
            "-y",
            "-s",
            "4096",
            "--seccomp-bpf",
            "-e",
            TRACED,
            "-o",
            str(log / "trace"),
            *words,
        ]
    if not means.network:
        return words
    arranged: list[str] = []
    if means.mounts:
        arranged += [
            word for number, path in enumerate(covered) for word in _cover(path, log, log / f"saved{number}")
        ]
        arranged += [word for path in read_only for word in ("keep", str(path), "-")]
    return ["unshare", "-rnm" if means.mounts else "-rn", "sh", "-c", ARRANGE, "sh", *arranged, "--", *words]


def _cover(path: Path, log: Path, saved: Path) -> list[str]:
    """Put an empty folder in a folder's place, and the interpreter back into it if it lies there, as in a repository with its `.venv`.

    What holds the watchers, or is the interpreter's own, stays as it is.
    """
    path, homes = path.resolve(), interpreter()
    if not path.is_dir() or log.is_relative_to(path) or any(path.is_relative_to(home) for home in homes):
        return []
    nested = [home for home in homes if home.is_relative_to(path)]
    inside = [
        home for home in nested if not any(home != other and home.is_relative_to(other) for other in nested)
    ]
    places = [str(saved / str(number)) for number in range(len(inside))]
    away = [word for home, place in zip(inside, places, strict=True) for word in ("bind", str(home), place)]
    back = [word for home, place in zip(inside, places, strict=True) for word in ("bind", place, str(home))]
    return [*away, "cover", str(path), "-", *back]


def _line(line: bytes) -> tuple[str, str]:
    text = line.decode("utf-8", errors="surrogateescape")
    try:
        told = json.loads(text)
    except ValueError:
        return "file", text
    return (str(told[0]), str(told[1])) if isinstance(told, list) and len(told) == 2 else ("file", text)


def _traced(log: Path) -> set[tuple[str, str]]:
    """What strace wrote, if it ran: files opened or run, and addresses but of name servers, which torchrun asks about itself."""
    lines = log.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if log.exists() else []
    files = {("file", path) for line in lines if (path := _path(line)) is not None}
    hosts = {
        ("address", host)
        for line in lines
        for port, *hosts in INET.findall(line)
        if port != NAME_SERVER
        for host in hosts
        if host
    }
    return files | hosts


def _path(line: str) -> str | None:
    """The path that a line is about, links resolved where the call succeeded; None for a list of names."""
    if resumed := RESUMED.match(line):
        return resumed.group(1)
    match = PATH_CALL.match(line)
    if match is None or "O_DIRECTORY" in line[match.end() :].partition(")")[0]:
        return None
    if opened := OPENED.search(line, match.end()):
        return opened.group(1)
    folder, name = match.groups()
    name = name.encode("latin-1", errors="replace").decode("unicode_escape") if "\\" in name else name
    return name if name.startswith("/") or folder is None else f"{folder}/{name}"


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1", "", "None") or host.removeprefix("::ffff:").startswith("127.")


def _works(*command: str) -> bool:
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
