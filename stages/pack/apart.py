"""A model file decoded by another process, while this one gets ready to use its weights.

Compiling the decoder is seconds of Python, and so is compiling kernels: two threads would take turns under one lock. The process is a fork,
made before this one has threads or a GPU of its own, and leaves the weights in memory that both see.
"""

import gc
import math
import mmap
import signal
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stages.pack.artifact import opened
from stages.pack.container import Entry
from stages.pack.tensors import decode
from stages.pack.workers import in_threads, usable_cores
from stages.parallel import end_with_parent


class Unpacking:
    """The parameters of the model in a file, at once, and its weights, later; a ValueError for a file that is damaged or not lawful."""

    def __init__(self, path: Path) -> None:
        self.params, contents = opened(path.read_bytes())
        self._state = shared({entry.name: entry.shape for entry in contents.entries})
        fork = get_context("fork")
        self._answer, answer = fork.Pipe(duplex=False)
        self._process = fork.Process(target=_decode, args=(contents.entries, self._state, answer), daemon=True)
        self._process.start()
        answer.close()

    def state(self) -> dict[str, Tensor]:
        """The float32 weights, once they are there. A ChildProcessError when the other process was killed."""
        try:
            refusal = self._answer.recv_bytes().decode()
        except EOFError:
            refusal = ""
        self._process.join()
        if refusal:
            raise ValueError(refusal)
        if code := self._process.exitcode:
            ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}; the lines above say why"
            raise ChildProcessError(f"the process that decoded the weights {ended}")
        return self._state


def shared(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Float32 tensors in memory that is a fork's too, and takes no room before it is written to."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    memory = torch.from_numpy(np.frombuffer(mmap.mmap(-1, 4 * max(1, sum(sizes))), np.float32))
    pieces = memory[: sum(sizes)].split(sizes)
    return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


def _decode(entries: Sequence[Entry], state: Mapping[str, Tensor], answer: Connection) -> None:
    """What the other process does: fill `state`, or send why it cannot."""
    end_with_parent()
    gc.disable()  # it would look through all that was imported, again and again, and copy it by doing so
    torch.set_num_threads(1)  # each tensor has a thread of its own
    try:
        in_threads(
            lambda entry: state[entry.name].copy_(torch.from_numpy(decode(entry))),
            entries,
            lambda entry: entry.payload_bytes,
            usable_cores(),
        )
    except ValueError as error:
        answer.send_bytes(str(error).encode())
