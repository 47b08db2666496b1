"""Parallel compilation of the Triton kernels before they are needed.

Triton compiles a kernel when it is first launched, while everything else waits. Here a rehearsal of
the work only collects the kernels, and a pool of threads compiles them at the same time.
"""

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from triton import knobs


@contextlib.contextmanager
def precompile_kernels(device: int) -> Iterator[None]:
    """Compile all kernels that are launched in the context, on that GPU, each on a thread of its own.

    The context ends when all are compiled. A launch whose kernel is not compiled yet is skipped, so
    results computed inside are meaningless.
    """
    futures: dict[tuple[str, str], Future[Any]] = {}

    def skip_launch(*, key, fn, compile, is_manual_warmup, **_):
        """Triton's hook before a compilation: start it on a thread; True skips compilation and launch."""
        if not is_manual_warmup and (fn.name, key) not in futures:
            futures[fn.name, key] = pool.submit(fn.jit_function.preload, compile["specialization_data"])
        return not is_manual_warmup

    with ThreadPoolExecutor(initializer=torch.cuda.set_device, initargs=(device,)) as pool:
        knobs.runtime.jit_cache_hook = skip_launch
        try:
            yield
        finally:
            knobs.runtime.jit_cache_hook = None
    for future in futures.values():
        future.result()
