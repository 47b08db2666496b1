"""Who of a run still lives: a connection from every rank to rank 0, so that a rank that dies ends all of them at once, with its reason.

Collectives do not say it in time. NCCL's kernels wait on the GPU for a peer that is gone until a timeout of minutes, and torchrun ends
only the ranks of the dead one's own machine. Here nothing is sent while all is well. A rank that fails sends one line, the kernel closes
the connections of one that is killed, and a machine that is gone does not answer keep-alive probes. Rank 0 hands the line on:

    rank 2 -- "2 failed: x.bin is no shard" --> rank 0 -- the same line --> ranks 1, 3, 4, ...
"""

import contextlib
import ctypes
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

WELL = "well"  # the line of a rank that has ended as it should
MEETING_KEY = "lifeline"
# Probes of a silent connection: a machine is given up after 10 + 2 x 5 s without an answer. A process that is stopped still answers.
PROBE_AFTER_SECONDS, PROBE_EVERY_SECONDS, PROBES = 10, 5, 2
# A death breaks collectives and this connection in any order; so long an error waits to learn whether it is its consequence.
HEARSAY_SECONDS = 2.0
# What the main thread gets to clean up, after which the process is ended: it may be waiting for the GPU, and that for the dead rank.
UNWIND_SECONDS = 5.0

_PR_SET_PDEATHSIG = 1  # prctl(2)


class Board(Protocol):
    """Where rank 0 writes its port for the others: a torch.distributed.Store."""

    def set(self, key: str, value: str) -> None:
        """Make `key` visible to every rank."""

    def get(self, key: str) -> bytes:
        """The value of `key`, once it is there."""


class Lifeline:
    """One rank's end of it: a context manager around the work that the ranks do together, and a thread that waits for bad news.

    When another rank ends badly, so does this one, with exit code 1: the thread calls `speak` with the reason, `stay` seconds after the
    news, and then the context is left by SystemExit if an error of the main thread follows from that end. Else the process is ended.
    """

    def __init__(
        self,
        rank: int,
        lines: dict[int, socket.socket],
        stay: Callable[[int], float],
        speak: Callable[[str], None],
    ) -> None:
        self.rank, self.lines, self.stay, self.speak = rank, lines, stay, speak
        self._heard, self._spoken, self._leaving = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._listen, name="lifeline", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Errors of collectives, of NCCL and of the GPU are RuntimeErrors; any other is this rank's own.
        may_follow = error is None or isinstance(error, RuntimeError)
        if may_follow and self._heard.wait(0 if error is None else HEARSAY_SECONDS):
            self._spoken.wait()
            self.leave(WELL)
            raise SystemExit(1) from error
        self.leave(WELL if error is None else f"{self.rank} failed: {_one_line(error)}")

    def leave(self, word: str) -> None:
        """Tell the others how this rank ends, and hear no more of them."""
        self._leaving.set()
        self._tell(word)
        for line in self.lines.values():
            with contextlib.suppress(OSError):  # the other end may be gone
                line.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for line in self.lines.values():
            line.close()

    def _tell(self, word: str) -> None:
        for line in self.lines.values():
            with contextlib.suppress(OSError):
                line.sendall(f"{word}\n".encode())

    def _listen(self) -> None:
        with selectors.DefaultSelector() as ends:
            for peer, line in self.lines.items():
                ends.register(line, selectors.EVENT_READ, peer)
            while ends.get_map():
                for key, _ in ends.select():
                    word = _read(self.lines[key.data])
                    if self._leaving.is_set():
                        return
                    if word != WELL:
                        self._mourn(
                            word
                            or f"{key.data} is gone without a word; the output on its machine may say why"
                        )
                        return
                    ends.unregister(key.fileobj)

    def _mourn(self, word: str) -> None:
        self._heard.set()
        self._tell(word)
        if self._leaving.wait(self.stay(int(word.split()[0]))):
            return
        self.speak(f"rank {word}")
        self._spoken.set()
        if not self._leaving.wait(UNWIND_SECONDS):
            os._exit(1)


def end_with_parent() -> None:
    """Ask the kernel to end this process with its parent: a killed `dvc` must not leave a training behind (treeverse/dvc#5818)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def connect(rank: int, size: int, address: str, board: Board, patience: float) -> dict[int, socket.socket]:
    """The connections of a rank, by the rank at the other end: rank 0, at `address`, has one with everyone, the others one with rank 0."""
    try:
        return _accept(size, board, patience) if rank == 0 else {0: _call(rank, address, board, patience)}
    except OSError as error:
        where = f"rank {rank}: no connection with rank 0 at {address}"
        raise ConnectionError(
            f"{where} ({error}); the machines must reach each other on every port"
        ) from None


def _call(rank: int, address: str, board: Board, patience: float) -> socket.socket:
    port, token = board.get(MEETING_KEY).decode().split()
    line = socket.create_connection((address, int(port)), timeout=patience)
    line.sendall(f"{token} {rank}\n".encode())
    return _kept_alive(line)


def _accept(size: int, board: Board, patience: float) -> dict[int, socket.socket]:
    lines: dict[int, socket.socket] = {}
    token = secrets.token_hex(8)  # so that a stranger who finds the port is not taken for a rank
    both = socket.has_dualstack_ipv6()
    with socket.create_server(
        ("", 0), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
    ) as door:
        door.settimeout(patience)
        board.set(MEETING_KEY, f"{door.getsockname()[1]} {token}")
        while len(lines) < size - 1:
            line, _ = door.accept()
            line.settimeout(patience)
            said, _, rank = _read(line).partition(" ")
            if said == token:
                lines[int(rank)] = _kept_alive(line)
            else:
                line.close()
    return lines


def _kept_alive(line: socket.socket) -> socket.socket:
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_AFTER_SECONDS)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_EVERY_SECONDS)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
    return line


def _read(line: socket.socket) -> str:
    """The next line; empty when the other end is gone."""
    text = b""
    while not text.endswith(b"\n"):
        try:
            piece = line.recv(4096)
        except OSError:
            return ""
        if not piece:
            return ""
        text += piece
    return text.decode().rstrip("\n")


def _one_line(error: BaseException) -> str:
    return " ".join((str(error) if isinstance(error, (ValueError, OSError)) else repr(error)).split())
