"""Threads and forked processes, arranged so that results do not depend on how many there are.

A sum that torch splits over threads depends on their number in its last bits. Those bits decide
roundings, and so the bytes of the artifact. `thread_map` therefore gives each tensor, or batch of
tensors of one shape, to one thread that uses one torch thread; what forms a batch does not depend
on the number of threads.

A forked child (`fork_process`, `fork_pool`) ends when its parent does, and never collects garbage.
"""

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_PR_SET_PDEATHSIG = 1  # prctl(2): the signal that a process receives when its parent ends


def usable_cores() -> int:
    """Number of cores that this process may run on; affects speed only."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_map(
    function: Callable[[T], R], items: Sequence[T], size: Callable[[T], int], threads: int
) -> list[R]:
    """Apply `function` to every item on a pool of threads; returns the results in the order of the items.

    The largest items by `size` start first, so that none of them is left over for the end. When
    calls fail, the error of the first failed item, in the order of the items, is raised after the
    running calls have finished.
    """
    if threads == 1 or len(items) < 2:
        return [function(item) for item in items]

    with ThreadPoolExecutor(min(threads, len(items))) as pool:
        futures = {}
        for index in sorted(range(len(items)), key=lambda i: size(items[i]), reverse=True):
            futures[index] = pool.submit(function, items[index])
        try:
            return [futures[index].result() for index in range(len(items))]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_in_background(function: Callable[[], object]) -> None:
    """Run `function` on a background thread.

    Used to JIT-compile ahead of time; a call of the compiled function blocks until it is ready.
    """
    Thread(target=function).start()


def fork_process(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start `function` in a forked child, which ends when this process does.

    Only while this process has neither threads nor a GPU, which a fork does not copy.
    """
    process = get_context("fork").Process(target=_child_main, args=(function, *arguments), daemon=True)
    process.start()
    return process


def fork_pool(processes: int, initializer: Callable[[], None]) -> ProcessPoolExecutor:
    """A pool of forked children, each of which calls `initializer` first.

    The restriction of `fork_process` applies. Spawned children would have to import the caller's
    module, and so torch, which can take longer than their work.
    """
    return ProcessPoolExecutor(processes, get_context("fork"), _child_main, (initializer,))


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent ends (Linux only).

    When `dvc` is killed, its training run must end as well (treeverse/dvc#5818).
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    # The parent may have ended before the kernel was asked.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _child_main(function: Callable[..., None], *arguments: Any) -> None:
    die_with_parent()
    # A collection would visit every object that was imported before the fork, and copy its memory
    # page by doing so.
    gc.disable()
    function(*arguments)
