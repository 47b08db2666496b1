"""Encodes tensors in a forked child that is started before the parent imports torch.

Compiling the coder takes seconds of Python, and so do the parent's import of torch and its
compilation of the trellis search: two threads of one process would take turns under the
interpreter's lock. The child is forked while the parent has neither threads nor a GPU, and compiles
before it gets the first tensor. It serves one request per pipe at a time, on a thread for each
pipe.
"""

from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import Queue
from threading import Thread

from stages.common.concurrency import fork_process, usable_cores
from stages.pack.entropy import codecs
from stages.pack.entropy.codecs import StreamLayout
from stages.pack.file.container import EncodedStream
from stages.pack.file.stream_encoder import InProcessEncoder


class EncodeProcess:
    """A child process that encodes for one caller per core at once.

    Use as a context manager: the child ends with it.
    """

    def __init__(self) -> None:
        pairs = [Pipe() for _ in range(usable_cores())]
        self._process = fork_process(_serve, pairs)
        self._idle: Queue[Connection] = Queue()
        for parent_end, child_end in pairs:
            child_end.close()
            self._idle.put(parent_end)

    def __enter__(self) -> "EncodeProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        while not self._idle.empty():
            self._idle.get().close()
        # Nobody waits for an answer any more, but the child may still compile.
        self._process.terminate()
        self._process.join()

    def encode(
        self, layouts: Sequence[StreamLayout], streams: Sequence[bytes], family: str, quality: int
    ) -> tuple[EncodedStream, ...]:
        """Encode the raw streams of a tensor.

        Raises ChildProcessError if the child has died.
        """
        connection = self._idle.get()
        try:
            connection.send((layouts, streams, family, quality))
            answer: tuple[EncodedStream, ...] | ValueError = connection.recv()
        except (EOFError, OSError) as error:
            raise ChildProcessError(
                "the process that encodes the weights ended; the lines above may say why"
            ) from error
        finally:
            self._idle.put(connection)
        if isinstance(answer, ValueError):
            raise answer
        return answer


def _serve(pairs: Sequence[tuple[Connection, Connection]]) -> None:
    """Body of the child process: answers requests until the parent closes its ends of the pipes."""
    for parent_end, _ in pairs:
        # Inherited by the fork. While it is open here, the pipe would never report its end.
        parent_end.close()
    threads = [Thread(target=_answer_requests, args=(child_end,)) for _, child_end in pairs]
    for thread in threads:
        thread.start()
    codecs.compile_ahead("adaptive")
    for thread in threads:
        thread.join()


def _answer_requests(connection: Connection) -> None:
    encoder = InProcessEncoder()
    with connection:
        while True:
            try:
                request = connection.recv()
            except (EOFError, ConnectionResetError):  # the parent has ended or was killed
                return
            try:
                connection.send(encoder.encode(*request))
            except ValueError as error:
                connection.send(error)
