"""The decoder in a process of its own, which is begun before this one imports torch.

Compiling it is seconds of Python, and so are importing torch and compiling kernels: two threads would take turns under one lock. The
other process is a fork made while this one has no threads and no GPU, and compiles before it is told which file. It decodes to memory that
both see, and that takes no room before it is written to: as much as the checked header says.
"""

import mmap
import os
import signal
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from stages.common.concurrency import beside, forked, in_threads, usable_cores

MOST_BYTES = 1 << 30  # that the weights of a lawful header take (container.py)


class Decoder:
    """The other process, which decodes one file; its weights lie in `memory` one after another (shared_memory.py)."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, MOST_BYTES)
        self._line, line = Pipe()
        self._process = forked(_serve, line, self.memory)
        line.close()

    def hear(self, path: Path | None = None) -> Any:
        """Have the file at `path` decoded, and hear the model and the shapes in its header; then, without one, that the weights are there.

        A ValueError when the file cannot be read or is damaged, a ChildProcessError when the other process was killed.
        """
        try:
            if path:
                self._line.send(path)
            said = self._line.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode or 0
            ended = (
                f"was killed by {signal.Signals(-code).name}"
                if code < 0
                else f"ended with exit code {code}; the lines above say why"
            )
            raise ChildProcessError(f"the process that decoded the weights {ended}") from None
        if isinstance(said, ValueError):
            raise said
        return said


def _serve(line: Connection, memory: mmap.mmap) -> None:
    """What the other process does."""
    os.environ["NUMBA_OPT"] = (
        "1"  # an eighth less to compile, and as fast to decode; numba reads it when it is imported
    )
    from stages.pack.entropy import codecs
    from stages.pack.file import container, shared_memory, tensors

    beside(lambda: codecs.compile_ahead("adaptive"))
    try:
        contents = container.read(line.recv().read_bytes())
        state = shared_memory.arrays(memory, contents.shapes)
        line.send((contents.model, contents.shapes))

        def fill(entry: container.Entry) -> None:
            state[entry.name][...] = tensors.decode(entry)

        in_threads(fill, contents.entries, lambda entry: entry.payload_bytes, usable_cores())
        line.send(None)
    except (ValueError, OSError) as error:
        line.send(ValueError(str(error)))
