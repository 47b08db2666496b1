"""Traces a Python interpreter from inside with audit hooks (PEP 578), which cannot be removed again.

This file is copied next to a sitecustomize.py that calls `install`, so it imports nothing of the
project. The hook is called before an attempt to open, link or rename a file, run a program, look up a
function of a library, or contact a host or a socket, whether or not the attempt succeeds. It covers
everything that goes through Python, in every interpreter that reads the sitecustomize.py; native code
does all that without it.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

# Kind and name: "file", "link", "program" and the path; "socket" and "bound" and its name, "@" in front
# if it is not a path; "address" and the host; "mount" and "ipc" and the call.
Event = tuple[str, str]
MAX_NAME = 900  # characters; a write of up to 4,096 bytes to a pipe is not interleaved with others
SITECUSTOMIZE = "import caddie_audit_hook\ncaddie_audit_hook.install({pipe!r})\n"
MODULE = "caddie_audit_hook.py"
# Functions of the C library that a program looks up to share memory or to mount.
FUNCTIONS = {
    "shmget": "ipc",
    "msgget": "ipc",
    "semget": "ipc",
    "mq_open": "ipc",
    "mount": "mount",
    "umount2": "mount",
    "unshare": "mount",
    "setns": "mount",
    "chroot": "mount",
}


def install(pipe: str) -> None:
    """From now on, write each event to the named pipe as a line of JSON.

    If that fails, the traced operation fails too.
    """
    handle = os.open(pipe, os.O_WRONLY)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        reader = READERS.get(event)
        if reader is None:
            return
        for kind, name in reader(arguments):
            line = json.dumps((kind, name[:MAX_NAME]), ensure_ascii=False) + "\n"
            os.write(handle, line.encode("utf-8", errors="surrogateescape"))

    sys.addaudithook(hook)


def _file(arguments: tuple[Any, ...]) -> list[Event]:
    """Read the opened path, links resolved; nothing for a descriptor, or for the program itself (dlopen)."""
    path = arguments[0]
    if not isinstance(path, (str, bytes, os.PathLike)):
        return []
    return [("file", os.path.realpath(os.fsdecode(path)))]


def _library(arguments: tuple[Any, ...]) -> list[Event]:
    """Read the path of a library; nothing for a bare name, which the system's loader looks up."""
    found = _file(arguments)
    return found if found and os.sep in os.fsdecode(arguments[0]) else []


def _function(arguments: tuple[Any, ...]) -> list[Event]:
    """Read the name of a function that is looked up in a library, if it is one of FUNCTIONS."""
    name = str(arguments[1])
    return [(FUNCTIONS[name], name)] if name in FUNCTIONS else []


def _link(arguments: tuple[Any, ...]) -> list[Event]:
    """Read both paths of a hard link or a renaming, links resolved."""
    return [("link", os.path.realpath(os.fsdecode(path))) for path in arguments[:2]]


def _symbolic_link(arguments: tuple[Any, ...]) -> list[Event]:
    """Read the path of a new link, and the one that it leads to."""
    target, place = map(os.fsdecode, arguments[:2])
    parent, name = os.path.split(place)
    folder = os.path.realpath(parent)
    return [("link", f"{folder}/{name}"), ("link", target if target[:1] == "/" else f"{folder}/{target}")]


def _program(arguments: tuple[Any, ...]) -> list[Event]:
    name = arguments[0]
    return [("program", os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else str(name))]


def _address(arguments: tuple[Any, ...]) -> list[Event]:
    """Read the host of a connection or a datagram, or the name of a socket of this machine."""
    address = arguments[-1]
    if isinstance(address, tuple) and address:
        return [("address", str(address[0]))]
    return _socket("socket", address)


def _bound(arguments: tuple[Any, ...]) -> list[Event]:
    """Read the name of a socket of this machine that is offered to others."""
    return _socket("bound", arguments[-1])


def _socket(kind: str, address: Any) -> list[Event]:
    if not isinstance(address, (str, bytes)) or not address:
        return []
    name = os.fsdecode(address)
    return [(kind, f"@{name[1:]}" if name.startswith("\0") else os.path.realpath(name))]


def _host(arguments: tuple[Any, ...]) -> list[Event]:
    return [("address", str(arguments[0]))]


READERS: dict[str, Callable[[tuple[Any, ...]], list[Event]]] = {
    "open": _file,
    "os.chdir": _file,
    "os.link": _link,
    "os.rename": _link,
    "os.symlink": _symbolic_link,
    "ctypes.dlopen": _library,
    "ctypes.dlsym": _function,
    "subprocess.Popen": _program,
    "os.exec": _program,
    "os.posix_spawn": _program,
    "os.system": _program,
    "socket.bind": _bound,
    "socket.connect": _address,
    "socket.sendto": _address,
    "socket.sendmsg": _address,
    "socket.getaddrinfo": _host,
    "socket.gethostbyname": _host,
}
