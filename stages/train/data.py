"""The order of the training data: a function of the seed and the shards, and of nothing else.

Each epoch cuts every shard into windows of T + 1 tokens that overlap by one, from a random phase, and visits all windows of all shards in a
random order; windows ignore document boundaries (#1493). A step's global batch is the next run of that order, whatever the number of ranks.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stages import shards


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


def to_device(rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets of windows (n, T + 1), each (n, T) int64 on the device, copied without waiting."""
    host = torch.from_numpy(rows)
    if device.type == "cuda":
        host = host.pin_memory()
    held = host.to(device, non_blocking=True)
    return held[:, :-1].contiguous(), held[:, 1:].contiguous()


def micro_batch_size(local_sequences: int, most: int) -> int:
    """The largest divisor of a rank's sequences that is at most `most`: all forward passes of a run have one shape."""
    return max(size for size in range(1, min(local_sequences, max(1, most)) + 1) if local_sequences % size == 0)
