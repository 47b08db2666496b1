"""The order of the training data: a function of the seed and the shards, and of nothing else.

Each epoch cuts every shard into windows of T + 1 tokens that overlap by one, from a random phase, and visits all windows of all shards in a
random order; windows ignore document boundaries (#1493). A step's global batch is the next run of that order, whatever the number of ranks.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from stages.common import shards

READ_AHEAD = 2  # batches: enough to hide the reading, little enough that a run reads hardly past its end


class Windows:
    """Random access to the sequence of training windows of `context` + 1 tokens."""

    def __init__(self, folder: Path, context: int, vocab_size: int, seed: int) -> None:
        self.views = [shards.view(path) for path in shards.find(folder)]
        self.context = context
        self.vocab_size = vocab_size
        self.seed = seed
        self.folder = folder
        self._epoch = -1
        self._epoch_start = 0
        self._begin_epoch(0, 0)

    def batch(self, first: int, count: int) -> np.ndarray:
        """Windows number `first` to `first + count` of the order, (count, context + 1) int64."""
        if first < self._epoch_start:
            self._begin_epoch(0, 0)
        rows = np.empty((count, self.context + 1), dtype=np.int64)
        for row in range(count):
            rows[row] = self._window(first + row)
        largest = int(rows.max(initial=0))
        if largest >= self.vocab_size:
            raise ValueError(f"{self.folder}: token id {largest}, but model.vocab_size is {self.vocab_size}")
        return rows

    def _window(self, number: int) -> np.ndarray:
        while number >= self._epoch_start + len(self._order):
            self._begin_epoch(self._epoch + 1, self._epoch_start + len(self._order))
        index = int(self._order[number - self._epoch_start])
        shard = int(np.searchsorted(self._first_window, index, side="right")) - 1
        start = int(self._phases[shard]) + (index - int(self._first_window[shard])) * self.context
        return self.views[shard][start : start + self.context + 1]

    def _begin_epoch(self, epoch: int, start: int) -> None:
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        lengths = np.array([len(view) for view in self.views], dtype=np.int64)
        self._phases = generator.integers(0, self.context, len(lengths))
        counts = np.maximum(0, (lengths - 1 - self._phases) // self.context)
        if counts.sum() == 0:
            raise ValueError(
                f"{self.folder}: the shards hold {lengths.sum()} tokens, too few for one window of {self.context} + 1"
                " (twice that is always enough); give more text or a smaller model.context"
            )
        self._first_window = np.concatenate(([0], np.cumsum(counts)[:-1]))
        self._order = generator.permutation(int(counts.sum()))
        self._epoch, self._epoch_start = epoch, start


class Prefetched:
    """Batches read ahead of the steps that use them, in order, by one thread; for a GPU into pinned memory.

    `first` gives the number of a step's first window. Used as a context, whose end stops the thread.
    """

    def __init__(
        self, windows: Windows, first: Callable[[int], int], count: int, step: int, device: torch.device
    ) -> None:
        self._windows, self._first, self._count, self._device = windows, first, count, device
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next = step
        self._ahead = deque(self._begin() for _ in range(READ_AHEAD))

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next step, each (count, T) int64 on the device; the copy is asynchronous."""
        host = self._ahead.popleft().result()
        self._ahead.append(self._begin())
        return split(host.to(self._device, non_blocking=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _begin(self) -> Future[Tensor]:
        step = self._next
        self._next += 1
        return self._thread.submit(self._read, step)

    def _read(self, step: int) -> Tensor:
        host = torch.from_numpy(self._windows.batch(self._first(step), self._count).astype(np.int32))
        return host.pin_memory() if self._device.type == "cuda" else host


def split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets of windows (n, T + 1), each (n, T) int64 and contiguous."""
    return rows[:, :-1].long().contiguous(), rows[:, 1:].long().contiguous()


def to_device(rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets of windows (n, T + 1), each (n, T) int64 on the device, copied without waiting."""
    host = torch.from_numpy(rows)
    return split((host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True))


def micro_batch_size(local_sequences: int, most: int) -> int:
    """The largest divisor of a rank's sequences that is at most `most`: all forward passes of a run have one shape."""
    return max(
        size for size in range(1, min(local_sequences, max(1, most)) + 1) if local_sequences % size == 0
    )
