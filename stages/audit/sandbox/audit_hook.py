"""Traces a Python interpreter from inside with audit hooks (PEP 578), which cannot be removed again.

This file is copied next to a sitecustomize.py that calls `install`, so it imports nothing of the
project. The hook is called before an attempt to open a file, run a program or contact a host, whether
or not the attempt succeeds. It covers everything that goes through Python, in every interpreter that
reads the sitecustomize.py; native code opens files without it.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Event = tuple[str, str]  # "file", "program" or "address", and its name
MAX_NAME = 900  # characters; a write of up to 4,096 bytes to a pipe is not interleaved with others
SITECUSTOMIZE = "import caddie_audit_hook\ncaddie_audit_hook.install({pipe!r})\n"
MODULE = "caddie_audit_hook.py"


def install(pipe: str) -> None:
    """From now on, write each event to the named pipe as a line of JSON.

    If that fails, the traced operation fails too.
    """
    handle = os.open(pipe, os.O_WRONLY)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        reader = READERS.get(event)
        if reader is None:
            return
        found = reader(arguments)
        if found is not None:
            kind, name = found
            line = json.dumps((kind, name[:MAX_NAME]), ensure_ascii=False) + "\n"
            os.write(handle, line.encode("utf-8", errors="surrogateescape"))

    sys.addaudithook(hook)


def _file(arguments: tuple[Any, ...]) -> Event | None:
    """Read the opened path, links resolved; None for a descriptor, or for the program itself (dlopen)."""
    path = arguments[0]
    if not isinstance(path, (str, bytes, os.PathLike)):
        return None
    return "file", os.path.realpath(os.fsdecode(path))


def _library(arguments: tuple[Any, ...]) -> Event | None:
    """Read the path of a library; None for a bare name, which the system's loader looks up."""
    found = _file(arguments)
    return found if found is not None and os.sep in os.fsdecode(arguments[0]) else None


def _program(arguments: tuple[Any, ...]) -> Event:
    name = arguments[0]
    return "program", os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else str(name)


def _address(arguments: tuple[Any, ...]) -> Event | None:
    """Read the host of a connection or a datagram; None for the address of a file (AF_UNIX)."""
    address = arguments[-1]
    return ("address", str(address[0])) if isinstance(address, tuple) and address else None


def _host(arguments: tuple[Any, ...]) -> Event:
    return "address", str(arguments[0])


READERS: dict[str, Callable[[tuple[Any, ...]], Event | None]] = {
    "open": _file,
    "ctypes.dlopen": _library,
    "subprocess.Popen": _program,
    "os.exec": _program,
    "os.posix_spawn": _program,
    "os.system": _program,
    "socket.connect": _address,
    "socket.sendto": _address,
    "socket.sendmsg": _address,
    "socket.getaddrinfo": _host,
    "socket.gethostbyname": _host,
}
