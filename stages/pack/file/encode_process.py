"""The coder in a process of its own, which is begun before this one imports torch.

Compiling is seconds of Python, of the coder as of the search: two threads would take turns under one lock, and both with what this process
does. The other process is a fork, made before this one has threads or a GPU of its own, and compiles before it is told what to encode.
"""

from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import Queue
from threading import Thread

from stages.common.concurrency import forked, usable_cores
from stages.pack.entropy import codecs
from stages.pack.file import container
from stages.pack.file.container import Form, Stream


class Encoder:
    """`container.encode_streams` elsewhere, for as many callers at once as there are cores; use as a context manager."""

    def __init__(self) -> None:
        pairs = [Pipe() for _ in range(usable_cores())]
        self._process = forked(_serve, pairs)
        self._free: Queue[Connection] = Queue()
        for ours, theirs in pairs:
            theirs.close()
            self._free.put(ours)

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(self, *exception: object) -> None:
        while not self._free.empty():
            self._free.get().close()
        self._process.join()

    def __call__(
        self, form: Form, shape: Sequence[int], raw: Sequence[bytes], family: str, quality: int
    ) -> tuple[Stream, ...]:
        """A tensor's streams from their raw bytes. A ChildProcessError when the other process is gone."""
        line = self._free.get()
        try:
            line.send((form, shape, raw, family, quality))
            answer: tuple[Stream, ...] | ValueError = line.recv()
        except (EOFError, OSError) as error:
            raise ChildProcessError(
                "the process that encodes the weights ended; the lines above may say why"
            ) from error
        finally:
            self._free.put(line)
        if isinstance(answer, ValueError):
            raise answer
        return answer


def _serve(pairs: Sequence[tuple[Connection, Connection]]) -> None:
    """What the other process does until nobody is there to ask."""
    for ours, _ in pairs:
        ours.close()
    threads = [Thread(target=_answer, args=(line,)) for _, line in pairs]
    for thread in threads:
        thread.start()
    codecs.compile_ahead("adaptive")
    for thread in threads:
        thread.join()


def _answer(line: Connection) -> None:
    with line:
        while True:
            try:
                question = line.recv()
            except EOFError:
                return
            try:
                line.send(container.encode_streams(*question))
            except ValueError as error:
                line.send(error)
