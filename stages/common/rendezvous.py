"""Rendezvous: every rank waits for all others, through the store on rank 0's machine.

Each rank sets the key `ready/RANK` and waits for those of all ranks. The value is empty, or the
reason why the rank will not come (`announce_failure`). What ends the rendezvous, and when; each
event is a ConnectionError, which local rank 0 prints as one line, and exit code 1 (stage.py):

    event                                   after
    a rank has announced that it failed     report_delay() of failure_detector.py
    the store's machine does not answer     at most CONNECT_TIMEOUT_SECONDS = 10
    a rank has not arrived                  RENDEZVOUS_TIMEOUT = 2 minutes
    rank 0 has not opened its connection    another RENDEZVOUS_TIMEOUT

A rank that dies without an announcement ends the ranks of its own machine at once, which the agent
stops; those of other machines wait for the timeout, or until their agent loses the rendezvous of
the agents. After the rendezvous every rank is connected to rank 0, and the failure detector begins.
"""

import contextlib
import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from stages.common import failure_detector

# From the start of the first rank to that of the last. They start together and import torch; the
# audit also reads the validation text.
RENDEZVOUS_TIMEOUT = timedelta(minutes=2)
CONNECT_TIMEOUT_SECONDS = 10.0  # for rank 0's machine, whose store is known to be open


def connect_ranks(rank: int, size: int) -> tuple[Store, dict[int, socket.socket]]:
    """Wait for all ranks; returns their store, and this rank's connections for the failure detector.

    A ConnectionError when a rank does not arrive in time, has announced that it will not, or cannot
    be reached.
    """
    try:
        store = _wait_for_ranks(rank, size)
        seconds = RENDEZVOUS_TIMEOUT.total_seconds()
        return store, failure_detector.connect(rank, size, os.environ["MASTER_ADDR"], store, seconds)
    except dist.DistNetworkError as error:
        raise ConnectionError(_unreachable(error)) from None
    except dist.DistStoreError:
        raise ConnectionError(
            f"rank 0 arrived, but opened no connection within {RENDEZVOUS_TIMEOUT.total_seconds():.0f} s;"
            " the output on its machine may say why"
        ) from None


def announce_failure(reason: str) -> None:
    """Tell ranks that wait for this one in the rendezvous why it will not come."""
    if _torchrun_hosts_the_store():
        with contextlib.suppress(ConnectionError, dist.DistError):  # the store's machine may be gone
            _open_store().set(f"ready/{os.environ['RANK']}", reason)


def _wait_for_ranks(rank: int, size: int) -> Store:
    """Wait until every rank is ready; returns the store that they share."""
    keys = [f"ready/{other}" for other in range(size)]
    store = _open_store()
    store.set(keys[rank], "")
    with contextlib.suppress(dist.DistStoreError):  # if some are absent
        store.wait(keys, RENDEZVOUS_TIMEOUT)

    # A rank that failed before the rendezvous has put its reason there (announce_failure).
    absent = [other for other, key in enumerate(keys) if not store.check([key])]
    for other in range(size):
        reason = "" if other in absent else store.get(keys[other]).decode()
        if reason:
            time.sleep(failure_detector.report_delay(other))
            raise ConnectionError(f"rank {other} failed: {reason}")

    if absent:
        waited = f"{RENDEZVOUS_TIMEOUT.total_seconds():.0f} s"
        raise ConnectionError(
            f"ranks {absent} of {size} did not arrive within {waited};"
            " the output on their machine may say why"
        )
    return store


def _open_store() -> Store:
    """Connect to the key-value store on rank 0's machine."""
    if _torchrun_hosts_the_store():
        # The store is open by now. Check that it can be reached: torch's own client would retry for
        # minutes, and print each attempt.
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            socket.create_connection(address, CONNECT_TIMEOUT_SECONDS).close()
        except OSError as error:
            raise ConnectionError(_unreachable(error)) from None
    store, _, _ = next(rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
    return PrefixStore(f"caddie/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _unreachable(error: Exception) -> str:
    address = os.environ["MASTER_ADDR"]
    cause = str(error).splitlines()[0]
    return f"rank 0's machine, {address}, does not answer ({cause}); the output there may say why"


def _torchrun_hosts_the_store() -> bool:
    """True if torchrun opened the store before it started the ranks; otherwise rank 0 opens it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
