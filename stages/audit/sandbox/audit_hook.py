"""What a watched interpreter tells of itself: files, programs and addresses, from audit hooks (PEP 578), which cannot be removed again.

This file is copied beside a sitecustomize.py that calls `record`, so it imports nothing of the project. A hook is told of an attempt before
it is made. It sees what goes through Python, in every interpreter that reads sitecustomize; native code opens files without it.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Told = tuple[str, str]  # what happened, and to which file, program or address
LONGEST = 900  # characters of a name: a line of a pipe is written whole up to 4,096 bytes
SITECUSTOMIZE = "import caddie_recorder\ncaddie_recorder.record({log!r})\n"
MODULE = "caddie_recorder.py"


def record(log: str) -> None:
    """Write a line of JSON to the pipe `log` for each event from now on; without the pipe, what would be told cannot be done."""
    handle = os.open(log, os.O_WRONLY)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        reader = READERS.get(event)
        told = reader(arguments) if reader is not None else None
        if told is not None:
            line = json.dumps((told[0], told[1][:LONGEST]), ensure_ascii=False) + "\n"
            os.write(handle, line.encode("utf-8", errors="surrogateescape"))

    sys.addaudithook(hook)


def _file(arguments: tuple[Any, ...]) -> Told | None:
    if not isinstance(arguments[0], (str, bytes, os.PathLike)):
        return None  # a descriptor that is open already, or the program itself (dlopen)
    return "file", os.path.realpath(os.fsdecode(arguments[0]))  # a link in the room is no way out of it


def _library(arguments: tuple[Any, ...]) -> Told | None:
    told = _file(arguments)
    return (
        told if told is not None and os.sep in os.fsdecode(arguments[0]) else None
    )  # a bare name is looked up by the system's loader


def _program(arguments: tuple[Any, ...]) -> Told:
    return "program", os.fsdecode(arguments[0]) if isinstance(
        arguments[0], (str, bytes, os.PathLike)
    ) else str(arguments[0])


def _address(arguments: tuple[Any, ...]) -> Told | None:
    """Of a connection or a datagram: a host, unless the address is a file's."""
    address = arguments[-1]
    return ("address", str(address[0])) if isinstance(address, tuple) and address else None


def _host(arguments: tuple[Any, ...]) -> Told:
    return "address", str(arguments[0])


READERS: dict[str, Callable[[tuple[Any, ...]], Told | None]] = {
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
