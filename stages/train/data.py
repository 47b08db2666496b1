"""Order of the training data: a function of the seed and the shards, and of nothing else.

Each epoch cuts every shard into windows of T + 1 tokens that overlap by one, from a random phase,
and visits all windows of all shards in a random order; windows ignore document boundaries (#1493).
The global batch of a step is the next run of that order, whatever the number of ranks.

`TrainingWindows` is that order with random access; `PrefetchedBatches` reads it ahead on a thread.

Shapes: n windows, T tokens of a window (`context`).
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

# Batches read before they are needed: enough to hide the reading, few enough that a run hardly
# reads past its end.
PREFETCHED = 2


class TrainingWindows:
    """The endless sequence of training windows of `context` + 1 tokens, with random access."""

    def __init__(self, folder: Path, context: int, vocab_size: int, seed: int) -> None:
        self.views = [shards.view(path) for path in shards.find(folder)]
        self.context = context
        self.vocab_size = vocab_size
        self.seed = seed
        self.folder = folder
        self._epoch = -1
        self._epoch_start = 0  # number of the epoch's first window
        self._begin_epoch(0, 0)

    def batch(self, first: int, count: int) -> np.ndarray:
        """Windows number `first` to `first + count - 1` of the order, (count, T + 1) int64.

        A ValueError if a token is not an id of the vocabulary.
        """
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
        """One window, (T + 1,) uint16, a view of its shard; moves on to the window's epoch."""
        while number >= self._epoch_start + len(self._order):
            self._begin_epoch(self._epoch + 1, self._epoch_start + len(self._order))
        index = int(self._order[number - self._epoch_start])
        shard = int(np.searchsorted(self._first_window, index, side="right")) - 1
        start = int(self._phases[shard]) + (index - int(self._first_window[shard])) * self.context
        return self.views[shard][start : start + self.context + 1]

    def _begin_epoch(self, epoch: int, start: int) -> None:
        """Draw the phases and the order of an epoch whose first window has the number `start`."""
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        lengths = np.array([len(view) for view in self.views], dtype=np.int64)
        self._phases = generator.integers(0, self.context, len(lengths))
        counts = np.maximum(0, (lengths - 1 - self._phases) // self.context)
        if counts.sum() == 0:
            raise ValueError(
                f"{self.folder}: the shards hold {lengths.sum()} tokens, too few for one window"
                f" of {self.context} + 1 (twice that is always enough);"
                " give more text or a smaller model.context"
            )
        self._first_window = np.concatenate(([0], np.cumsum(counts)[:-1]))  # of each shard, in the epoch
        self._order = generator.permutation(int(counts.sum()))
        self._epoch = epoch
        self._epoch_start = start


class PrefetchedBatches:
    """Batches of consecutive steps, read ahead by one thread; for a GPU into pinned memory.

    `first_window` maps a step to the number of the first of its `count` windows; `step` is the
    first step read. Used as a context manager, which stops the thread at its end.
    """

    def __init__(
        self,
        windows: TrainingWindows,
        first_window: Callable[[int], int],
        count: int,
        step: int,
        device: torch.device,
    ) -> None:
        self._windows = windows
        self._first_window = first_window
        self._count = count
        self._device = device
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next_step = step
        self._pending = deque(self._submit() for _ in range(PREFETCHED))

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next step, each (count, T) int64 on the device, copied asynchronously."""
        host = self._pending.popleft().result()
        self._pending.append(self._submit())
        return inputs_and_targets(host.to(self._device, non_blocking=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _submit(self) -> Future[Tensor]:
        step = self._next_step
        self._next_step += 1
        return self._thread.submit(self._read, step)

    def _read(self, step: int) -> Tensor:
        """The windows of a step, (count, T + 1) int32 on the host."""
        host = torch.from_numpy(self._windows.batch(self._first_window(step), self._count).astype(np.int32))
        return host.pin_memory() if self._device.type == "cuda" else host


def inputs_and_targets(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Split windows (n, T + 1) into inputs and targets, each (n, T) int64 and contiguous."""
    return windows[:, :-1].long().contiguous(), windows[:, 1:].long().contiguous()


def windows_to_device(windows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets of windows (n, T + 1), each (n, T) int64 on the device, copied asynchronously."""
    host = torch.from_numpy(windows)
    if device.type == "cuda":
        host = host.pin_memory()
    return inputs_and_targets(host.to(device, non_blocking=True))


def micro_batch_size(local_windows: int, limit: int) -> int:
    """The largest divisor of a rank's windows that is at most `limit`, so that all passes have one shape."""
    limit = min(local_windows, max(1, limit))
    return max(size for size in range(1, limit + 1) if local_windows % size == 0)
