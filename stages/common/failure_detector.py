"""Failure detector: when one rank of a run dies, all others exit at once and print its error.

Every rank keeps a TCP connection to rank 0. Collectives do not report a death in time: NCCL's
kernels wait on the GPU for the lost peer until a timeout of minutes, and torchrun's agent, one on
each machine, stops only the ranks of its own machine.

Nothing is sent while all ranks work. A rank that fails sends one line. When a process is killed the
kernel closes its connections, and a machine that is gone does not answer keep-alive probes; both
read as an empty line. Rank 0 forwards what it reads (other ranks send it back to rank 0, which no
longer reads):

    rank 2 -- "2 failed: x.bin is not a shard" --> rank 0 -- the same line --> ranks 1, 3, 4, ...

States of a rank (`State`). The detector's thread moves to PEER_FAILED and REPORTED and ends the
process; the main thread moves to LEAVING:

    state        event                              action                             next state
    -----------  ---------------------------------  ---------------------------------  -----------
    RUNNING      a peer's error or end is read      forward it, start report_delay()   PEER_FAILED
    RUNNING      the main thread ends or fails      send "done", or its own error      LEAVING
    PEER_FAILED  report_delay() has passed          report_failure()                   REPORTED
    PEER_FAILED  the main thread has its own error  send it, report nothing            LEAVING
    REPORTED     the main thread ends or fails      send "done", raise SystemExit(1)   LEAVING
    REPORTED     UNWIND_SECONDS have passed         os._exit(1)                        (none)

An error of the main thread is its own unless it is a RuntimeError, which collectives and the GPU
raise. A RuntimeError waits for EXPLANATION_WAIT_SECONDS in RUNNING for a peer's end that explains
it; in PEER_FAILED a main thread without an error of its own waits for REPORTED. The time in REPORTED
is limited because the main thread may be waiting for the GPU, and the GPU for the dead rank.

The delays are constants of this module:

    LOCAL_REPORT_DELAY_SECONDS = 4  report_delay() if the failed rank was on the same machine
    PRINT_FIRST_SECONDS = 1         added to it on every rank except local rank 0
    EXPLANATION_WAIT_SECONDS = 2    from the error of a collective to the peer's end that explains it
    UNWIND_SECONDS = 5              from the report to os._exit(1)
    PROBE_AFTER_SECONDS = 10        from a connection's last answer to the first keep-alive probe
    PROBE_EVERY_SECONDS = 5         between probes
    PROBES = 2                      without an answer, after which the connection is closed

A rank dies, all ranks on one machine. The agent is the command that the user started, such as
`python -m stages.train` with two ranks; it stops rank 0 before rank 0 reports:

    agent                          rank 0                      rank 1
      |                              |                           |
      |                              |                    0 s    X SIGKILL
      |                       0 s    |<-- connection closed -----+
      |                              | PEER_FAILED, waits 4 s    |
      |<-- exit status -9 -----------|---------------------------+
      |    0.1 s                     |
      |--- SIGTERM ----------------->X prints nothing
      | prints "error: train: rank 1 (process N) was killed by SIGKILL"
      X exits with code 1

A rank dies on another machine. The user started torchrun on machines A and B:

    agent A       rank 0               rank 1        rank 2        rank 3      agent B
      |             |                    |             |             |            |
      |             |                    |             |      0 s    X SIGKILL    |
      |      0 s    |<-- connection closed ------------|-------------+            |
      |             |--- "3 is gone" --->|             |             |            |
      |             |--- "3 is gone" ----|------------>|             |            |
      |             | PEER_FAILED        | PEER_FAILED | PEER_FAILED |            |
      |             | waits 0 s          | waits 1 s   | waits 4 s   |            |
      |             | REPORTED           |             |             +- status -->|
      |             | prints "error:     |             |                  0.1 s   |
      |             |  rank 3 is gone    |             X<-------------- SIGTERM --|
      |             |  without a message"|               prints torchrun's report |
      |             |                    | 1 s                                    X exits with code 1
      |             |                    | REPORTED
      |             | 0 to 5 s           | prints nothing
      |<-- status --X exits with code 1  |
      |    0.1 s                         |
      |--- SIGTERM --------------------->X unless it has left
      | prints torchrun's report, with the line that rank 0 printed
      X exits with code 1

Rank 0 leaves when its main thread fails: soon in a collective on the CPU, otherwise by os._exit 5 s
after the report. Two variants:

- The agents' own rendezvous has its store in one of them. If that is agent B, agent A loses the
  store when B exits, stops its ranks, and prints a RendezvousConnectionError instead of the report.
- If machine B is switched off, its connections are closed by the probes, after 20 s.

Before the rendezvous has ended, a rank has no detector; see rendezvous.py.
"""

import contextlib
import enum
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

NO_OWN_ERROR = "done"  # last line of a rank that has no error of its own
ADDRESS_KEY = "failure_detector"  # key of rank 0's port and token in the store
# The agent sees the end of a rank on its machine too, stops the other ranks, and names the cause; a
# rank that exited first would be taken for it. The agent looks ten times a second, but a killed
# process that held a GPU takes longer to end.
LOCAL_REPORT_DELAY_SECONDS = 4.0
PRINT_FIRST_SECONDS = 1.0  # for local rank 0 to print before another rank of its machine exits
# A death breaks collectives and this connection in any order. An error of a collective waits this
# long for the news of a death that explains it.
EXPLANATION_WAIT_SECONDS = 2.0
UNWIND_SECONDS = 5.0  # given to the main thread to clean up, after which the process is ended
# Keep-alive probes of a silent connection: a machine is given up after 10 + 2 x 5 s without an
# answer. A process that is stopped still answers, since its kernel does.
PROBE_AFTER_SECONDS = 10
PROBE_EVERY_SECONDS = 5
PROBES = 2


class KeyValueStore(Protocol):
    """The store in which rank 0 publishes its port: a part of torch.distributed.Store."""

    def set(self, key: str, value: str) -> None:
        """Make `key` visible to every rank."""

    def get(self, key: str) -> bytes:
        """The value of `key`; blocks until there is one."""


class State(enum.IntEnum):
    """State of a rank's detector. It only moves to later states, and may skip some."""

    RUNNING = 0
    PEER_FAILED = 1
    REPORTED = 2
    LEAVING = 3


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
        self._state = State.RUNNING
        self._state_changed = threading.Condition()
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
        wait_seconds = 0.0 if error is None else EXPLANATION_WAIT_SECONDS
        if may_follow and self._wait_for(State.PEER_FAILED, wait_seconds):
            self._wait_for(State.REPORTED)
            self.leave(NO_OWN_ERROR)
            raise SystemExit(1) from error

        self.leave(NO_OWN_ERROR if error is None else f"{self.rank} failed: {_one_line(error)}")

    def leave(self, line: str) -> None:
        """Send the peers `line`, how this rank ends, and close the connections."""
        self._move_to(State.LEAVING)
        self._send(line)
        for connection in self.connections.values():
            with contextlib.suppress(OSError):  # the other end may be gone
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for connection in self.connections.values():
            connection.close()

    def _move_to(self, state: State) -> None:
        """Enter `state` and wake who waits for it, unless this rank is in a later one."""
        with self._state_changed:
            if state > self._state:
                self._state = state
                self._state_changed.notify_all()

    def _wait_for(self, state: State, seconds: float | None = None) -> bool:
        """Wait until this rank is in `state` or a later one; False if `seconds` pass before."""
        with self._state_changed:
            return self._state_changed.wait_for(lambda: self._state >= state, seconds)

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
                    if self._wait_for(State.LEAVING, 0.0):
                        return
                    if line == NO_OWN_ERROR:
                        selector.unregister(key.fileobj)
                        continue
                    lost = f"{key.data} is gone without a message; the output on its machine may say why"
                    self._on_peer_failure(line or lost)
                    return

    def _on_peer_failure(self, line: str) -> None:
        """Forward the line, report it after the delay, and end a process that hangs."""
        self._move_to(State.PEER_FAILED)
        self._send(line)
        failed_rank = int(line.split()[0])
        if self._wait_for(State.LEAVING, self.report_delay(failed_rank)):
            return

        self.report(f"rank {line}")
        self._move_to(State.REPORTED)
        if not self._wait_for(State.LEAVING, UNWIND_SECONDS):
            os._exit(1)


def report_delay(failed_rank: int) -> float:
    """Seconds from the news that `failed_rank` has failed to this rank's report of it.

    Time for the agent to report it first if that rank was on this machine, and for local rank 0 to
    print the message before the other ranks exit.
    """
    first_of_machine = int(os.environ["RANK"]) - int(os.environ.get("LOCAL_RANK", "0"))
    is_local = 0 <= failed_rank - first_of_machine < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    seconds = LOCAL_REPORT_DELAY_SECONDS if is_local else 0.0
    if not is_local_rank_zero():
        seconds += PRINT_FIRST_SECONDS
    return seconds


def report_failure(reason: str) -> None:
    """Print why another rank's failure ends this one, and leave it for the agent."""
    with contextlib.suppress(OSError):  # a full disk or a closed terminal must not keep this rank alive
        if is_local_rank_zero():
            sys.stderr.write(f"error: {reason}\n")
            sys.stderr.flush()
        write_torchelastic_error(reason)


def is_local_rank_zero() -> bool:
    """True on the one rank of this machine that prints what all its ranks know."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def write_torchelastic_error(reason: str) -> None:
    """Write the reason of this rank's end to torchrun's error file, if torchrun started this process.

    The agent reads it when the rank has exited: torchrun.py, or torchrun's report.
    """
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        record = {"message": {"message": reason, "extraInfo": {"timestamp": str(int(time.time()))}}}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(record), encoding="utf-8")


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
