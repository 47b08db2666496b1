"""Kernels compiled side by side before they are needed: Triton compiles one when it is first launched, while all else waits."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from triton import knobs


@contextlib.contextmanager
def compiled_side_by_side(device: int) -> Iterator[None]:
    """What is launched within, on that GPU, is compiled, each kernel on a thread of its own, and all are when this ends.

    A launch is left out while its kernel is compiled, so that results within are worth nothing.
    """
    begun: dict[tuple[str, str], Future[Any]] = {}

    def begin(*, key, fn, compile, is_manual_warmup, **_):
        """What Triton asks before it compiles: whether it shall leave that, and the launch, alone."""
        if not is_manual_warmup and (fn.name, key) not in begun:
            begun[fn.name, key] = pool.submit(fn.jit_function.preload, compile["specialization_data"])
        return not is_manual_warmup

    with ThreadPoolExecutor(initializer=torch.cuda.set_device, initargs=(device,)) as pool:
        knobs.runtime.jit_cache_hook = begin
        try:
            yield
        finally:
            knobs.runtime.jit_cache_hook = None
    for compiled in begun.values():
        compiled.result()
