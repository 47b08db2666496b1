"""Work on many tensors at once, with results that do not depend on how many threads there are.

A sum that torch splits over threads depends on their number in its last bits, and those decide roundings, and so the bytes of the
artifact. Here every tensor, or batch of tensors of one shape, is worked on by one thread with one torch thread, and these are spread over
threads; what is a batch does not depend on how many there are.
"""

import gc
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any, TypeVar

from stages.common.failure_detector import end_with_parent

T = TypeVar("T")
R = TypeVar("R")


def usable_cores() -> int:
    """Cores this process may run on; they decide the speed and nothing else."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(work: Callable[[T], R], items: Sequence[T], size: Callable[[T], int], threads: int) -> list[R]:
    """`work` done on every item, the largest first so that none of them is left for the end; results in the order of the items.

    The first error, in that order, is raised once the work that has begun is done.
    """
    if threads == 1 or len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(threads, len(items))) as pool:
        futures = {}
        for index in sorted(range(len(items)), key=lambda i: size(items[i]), reverse=True):
            futures[index] = pool.submit(work, items[index])
        try:
            return [futures[index].result() for index in range(len(items))]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def beside(work: Callable[[], object]) -> None:
    """Do this on a thread of its own, while the caller goes on; compiled code is waited for by whoever calls it."""
    Thread(target=work).start()


def forked(work: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Begin `work` in a fork, which ends when this process does; for as long as this one has no threads and no GPU of its own."""
    process = get_context("fork").Process(target=_alone, args=(work, *arguments), daemon=True)
    process.start()
    return process


def _alone(work: Callable[..., None], *arguments: Any) -> None:
    end_with_parent()
    gc.disable()  # it would look through all that was imported, again and again, and copy it by doing so
    work(*arguments)
