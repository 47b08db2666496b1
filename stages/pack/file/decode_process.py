"""Decodes model.bin in a forked child that is started before the parent imports torch.

Compiling the decoder takes seconds of Python. So do the parent's import of torch and its
compilation of kernels, and two threads of one process would take turns under the interpreter's
lock. The child is forked while the parent has neither threads nor a GPU, and compiles before it
knows which file to decode:

    parent                                         child
    DecodeProcess()            fork ->             import numba and numpy, compile
    request(path)              path ->             read the file, check its header
                               <- model, shapes
    build and compile the model                    decode all tensors into `memory`
    wait()                     <- None             exit

A ValueError travels to the parent in the place of either answer. `memory` is an anonymous mapping
that both processes see (shared_memory.py). It is as large as the weights of any valid file, but
pages take room only once they are written: as much as the checked header says.
"""

import mmap
import os
import signal
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from stages.common.concurrency import fork_process, run_in_background, thread_map, usable_cores

# Bytes of the float32 weights of the largest valid file: container.MAX_RAW_BYTES weights, since no
# form takes less than a byte for one.
MAX_WEIGHT_BYTES = 1 << 30


class DecodeProcess:
    """A child process that decodes one file; the weights are in `memory`, one tensor after another."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, MAX_WEIGHT_BYTES)
        self._connection, child_end = Pipe()
        self._process = fork_process(_serve, child_end, self.memory)
        child_end.close()

    def request(self, path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
        """Start decoding the file at `path`.

        Returns the model parameters and the tensors' shapes from its header.

        Raises ValueError if the file cannot be read or is damaged, and ChildProcessError if the
        child has died.
        """
        try:
            self._connection.send(path)
        except OSError:
            self._raise_child_error()
        header: tuple[dict[str, Any], dict[str, tuple[int, ...]]] = self._receive()
        return header

    def wait(self) -> None:
        """Block until all weights are in `memory`; raises the same errors as `request`."""
        self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._raise_child_error()
        if isinstance(answer, ValueError):
            raise answer
        return answer

    def _raise_child_error(self) -> NoReturn:
        self._process.join()
        code = self._process.exitcode or 0
        if code < 0:
            end = f"was killed by {signal.Signals(-code).name}"
        else:
            end = f"ended with exit code {code}; the lines above say why"
        raise ChildProcessError(f"the process that decoded the weights {end}") from None


def _serve(connection: Connection, memory: mmap.mmap) -> None:
    """Body of the child process."""
    # Level 1 takes an eighth less time to compile and decodes as fast; numba reads the variable
    # when it is imported.
    os.environ["NUMBA_OPT"] = "1"
    from stages.pack.entropy import codecs
    from stages.pack.file import container, shared_memory

    run_in_background(lambda: codecs.compile_ahead("adaptive"))
    try:
        path: Path = connection.recv()
        contents = container.parse(path.read_bytes())
        state = shared_memory.array_views(memory, contents.shapes)
        connection.send((contents.model, contents.shapes))

        def fill(tensor: container.EncodedTensor) -> None:
            state[tensor.name][...] = container.decode(tensor)

        thread_map(fill, contents.tensors, lambda tensor: tensor.payload_bytes, usable_cores())
        connection.send(None)
    except (ValueError, OSError) as error:
        connection.send(ValueError(str(error)))
