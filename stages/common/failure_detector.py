"""Failure detector: when one rank of a run dies, all others exit at once and print its error.

Every rank keeps a TCP connection to rank 0. Collectives do not report a death in time: NCCL's
kernels wait on the GPU for the lost peer until a timeout of minutes, and torchrun ends only the
ranks of the dead one's own machine.

Nothing is sent while all ranks work. A rank that fails sends one line. When a process is killed the
kernel closes its connections, and a machine that is gone does not answer keep-alive probes; both
read as an empty line. Rank 0 forwards what it reads (other ranks send it back to rank 0, which no
longer reads):

    rank 2 -- "2 failed: x.bin is not a shard" --> rank 0 -- the same line --> ranks 1, 3, 4, ...

States of a rank, kept in three events:

    running            no event is set; the thread waits for lines
    failure received   a peer failed: its line is forwarded, then `report_delay` seconds pass
    failure reported   `report` was called; the main thread has UNWIND_SECONDS to leave the context
    leaving            the context is left, normally or by an error; the thread ends

If the main thread does not leave in time, the thread ends the process: the main thread may be
waiting for the GPU, and the GPU for the dead rank.

Events after rank 2 was killed at 0 s. If its machine was switched off instead, the events of the
other machines begin at 20 s, when 10 s of silence and two probes of 5 s have passed. The delays and
messages are those of parallel.py; a rank that torchrun has stopped before its time does nothing:

    0 s       all          the kernel closes rank 2's connection; rank 0 reads that and forwards it
    ~0.1 s    2's machine  torchrun sees the end and stops the other ranks there. The process that
                           ran it prints "error: STAGE: rank 2 (process ...) was killed by SIGKILL"
                           and exits with code 1
    0 s       others       local rank 0 prints "error: rank 2 is gone without a message; ...", and
                           leaves that line in torchrun's error file
    1 s       others       their other ranks leave the line in the error file and print nothing
    4 s, 5 s  2's machine  local rank 0 and the other ranks there do the same; torchrun has usually
                           stopped them by then
    +5 s      all          a rank whose main thread has not left the context 5 s after its report
                           ends with os._exit(1)

A user who types `torchrun` gets no "error:" line on rank 2's machine, unless the events of 4 s
happen: torchrun prints its own report there, which names the signal.
"""

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

NO_OWN_ERROR = "done"  # last line of a rank that has no error of its own
ADDRESS_KEY = "failure_detector"  # key of rank 0's port and token in the store
# Keep-alive probes of a silent connection: a machine is given up after 10 + 2 x 5 s without an
# answer. A process that is stopped still answers, since its kernel does.
PROBE_AFTER_SECONDS, PROBE_EVERY_SECONDS, PROBES = 10, 5, 2
# A death breaks collectives and this connection in any order. An error of a collective waits this
# long for the news of a death that explains it.
EXPLANATION_WAIT_SECONDS = 2.0
UNWIND_SECONDS = 5.0  # given to the main thread to clean up, after which the process is ended


class KeyValueStore(Protocol):
    """The store in which rank 0 publishes its port: a part of torch.distributed.Store."""

    def set(self, key: str, value: str) -> None:
        """Make `key` visible to every rank."""

    def get(self, key: str) -> bytes:
        """The value of `key`; blocks until there is one."""


class FailureDetector:
    """Context manager around the ranks' common work, with a thread that waits for failures.

    When another rank fails, this process ends too, with exit code 1. `report_delay` is called with
    the failed rank and returns how many seconds to wait before `report` is called with the reason.
    If the main thread then fails because of it, the context is left by SystemExit.
    """

    def __init__(
        self,
        rank: int,
        connections: dict[int, socket.socket],
        report_delay: Callable[[int], float],
        report: Callable[[str], None],
    ) -> None:
        self.rank = rank
        self.connections = connections
        self.report_delay = report_delay
        self.report = report
        self._failure_received = threading.Event()
        self._failure_reported = threading.Event()
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="failure detector", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Errors of collectives, of NCCL and of the GPU are RuntimeErrors, and may follow from a
        # peer's death; any other error is this rank's own.
        may_follow = error is None or isinstance(error, RuntimeError)

        # If a peer's failure explains this end, leave as its consequence. A rank that has finished
        # looks without waiting; one with an error waits for the news.
        wait_seconds = 0 if error is None else EXPLANATION_WAIT_SECONDS
        if may_follow and self._failure_received.wait(wait_seconds):
            self._failure_reported.wait()
            self.leave(NO_OWN_ERROR)
            raise SystemExit(1) from error

        self.leave(NO_OWN_ERROR if error is None else f"{self.rank} failed: {_one_line(error)}")

    def leave(self, line: str) -> None:
        """Send the peers `line`, how this rank ends, and close the connections."""
        self._leaving.set()
        self._send(line)
        for connection in self.connections.values():
            with contextlib.suppress(OSError):  # the other end may be gone
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for connection in self.connections.values():
            connection.close()

    def _send(self, line: str) -> None:
        for connection in self.connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{line}\n".encode())

    def _listen(self) -> None:
        """Main function of the thread: wait for lines until all peers have ended or one has failed."""
        with selectors.DefaultSelector() as selector:
            for peer, connection in self.connections.items():
                selector.register(connection, selectors.EVENT_READ, peer)

            while selector.get_map():
                for key, _ in selector.select():
                    line = _read_line(self.connections[key.data])
                    if self._leaving.is_set():
                        return
                    if line == NO_OWN_ERROR:
                        selector.unregister(key.fileobj)
                        continue
                    lost = f"{key.data} is gone without a message; the output on its machine may say why"
                    self._on_peer_failure(line or lost)
                    return

    def _on_peer_failure(self, line: str) -> None:
        """Forward the line, report it after the delay, and end a process that hangs."""
        self._failure_received.set()
        self._send(line)
        failed_rank = int(line.split()[0])
        if self._leaving.wait(self.report_delay(failed_rank)):
            return
        self.report(f"rank {line}")
        self._failure_reported.set()
        if not self._leaving.wait(UNWIND_SECONDS):
            os._exit(1)


def connect(
    rank: int, size: int, address: str, store: KeyValueStore, timeout: float
) -> dict[int, socket.socket]:
    """Open the connections of a rank; returns them by the rank at the other end.

    Rank 0, at `address`, gets one with every other rank, which gets one with rank 0.
    """
    try:
        if rank == 0:
            return _accept_ranks(size, store, timeout)
        return {0: _connect_to_rank_zero(rank, address, store, timeout)}
    except OSError as error:
        where = f"rank {rank}: no connection with rank 0 at {address}"
        raise ConnectionError(
            f"{where} ({error}); the machines must reach each other on every port"
        ) from None


def _connect_to_rank_zero(rank: int, address: str, store: KeyValueStore, timeout: float) -> socket.socket:
    port, token = store.get(ADDRESS_KEY).decode().split()
    connection = socket.create_connection((address, int(port)), timeout=timeout)
    connection.sendall(f"{token} {rank}\n".encode())
    return _keep_alive(connection)


def _accept_ranks(size: int, store: KeyValueStore, timeout: float) -> dict[int, socket.socket]:
    connections: dict[int, socket.socket] = {}
    token = secrets.token_hex(8)  # a foreign process that finds the port must not pass for a rank
    dual_stack = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual_stack else socket.AF_INET
    with socket.create_server(("", 0), family=family, dualstack_ipv6=dual_stack) as server:
        server.settimeout(timeout)
        store.set(ADDRESS_KEY, f"{server.getsockname()[1]} {token}")
        while len(connections) < size - 1:
            connection, _ = server.accept()
            connection.settimeout(timeout)
            given_token, _, rank = _read_line(connection).partition(" ")
            if given_token == token:
                connections[int(rank)] = _keep_alive(connection)
            else:
                connection.close()
    return connections


def _keep_alive(connection: socket.socket) -> socket.socket:
    """Make a connection block without a timeout, and break when its machine is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_AFTER_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_EVERY_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
    return connection


def _read_line(connection: socket.socket) -> str:
    """The next line; empty when the other end is gone."""
    text = b""
    while not text.endswith(b"\n"):
        try:
            piece = connection.recv(4096)
        except OSError:
            return ""
        if not piece:
            return ""
        text += piece
    return text.decode().rstrip("\n")


def _one_line(error: BaseException) -> str:
    text = str(error) if isinstance(error, (ValueError, OSError)) else repr(error)
    return " ".join(text.split())
