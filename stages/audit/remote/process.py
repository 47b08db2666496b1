"""Starts a scorer's process in a sandbox, and makes scorers of it that the audit can use.

`ScorerProcess` owns the process and its pipe, `RemoteScorer` is a scorer (stages/common/scorer.py) in it.
The audit never imports the scorer's code: everything that it learns of a scorer comes through the pipe
as numbers, each answer of a length that is known beforehand.

How a process can fail, and what the audit makes of it:

    raises an error, runs out of memory, exits, is killed    ScorerError: the audit could not run
    sends no answer within `answer_seconds`                  ScorerError
    sends an answer of another length or status              ScorerError
    returns an array of another shape or kind                ProtocolError: a failed check (B6)
    prints without end                                       the last characters are kept, the rest is dropped
"""

import collections
import contextlib
import fcntl
import itertools
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from stages.audit.probe_runner import Cost, ProtocolError
from stages.audit.remote import server
from stages.audit.sandbox import room

SERVER_PATH = "/audit/server.py"  # in the sandbox
MAX_DESCRIPTION_BYTES = 1 << 16
MAX_NAME_CHARACTERS = 50  # of a scope or a precision
MAX_BUFFERED_TOKENS = 1 << 14  # observed tokens that are sent together
KEPT_OUTPUT_BYTES = 2000  # of the end of what the scorer prints
QUOTED_OUTPUT_CHARACTERS = 200
END_SECONDS = 10.0  # for a process to end after its pipe was closed
PIPE_BYTES = 1 << 20  # capacity of a pipe, so that a distribution fits; Linux allows this without privileges


class ScorerError(ChildProcessError):
    """The scorer or its process failed, so that it could not be audited. That is not a failed check."""


@dataclass(frozen=True)
class ScorerSource:
    """Everything that a scorer is built from, and that its process sees."""

    factory: str  # module:function
    arguments: tuple[Any, ...]  # of the factory: the number of targets, and strings
    visible: Mapping[str, Path]  # path in the sandbox -> file or folder
    search_path: tuple[str, ...]  # folders in the sandbox that modules are imported from
    environment: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[Path, ...] = ()  # of GPUs (room.gpu_devices)
    precision: str | None = None  # of its arithmetic, by name; None: what the scorer declares


class Description(NamedTuple):
    """Interface and declarations of the scorers of a factory, as their process describes them."""

    vocab_size: int | None
    predicts: bool  # predict, observe and fork; otherwise score_stream alone
    scope: str
    precision: str
    variants: tuple[str, ...]  # keywords that the factory takes


class ScorerProcess:
    """A process in a sandbox that serves the scorers of one factory; a context manager that ends it."""

    def __init__(self, source: ScorerSource, vocab_size: int, answer_seconds: float) -> None:
        """Start the process and build the factory.

        vocab_size: number of ids of the tokenizer; answer_seconds: longest wait for one answer.
        """
        self.vocab_size = vocab_size
        self.answer_seconds = answer_seconds
        self.ended = ""  # how the process failed; nothing is sent to it afterwards
        self.cost = Cost()  # work that was asked of it
        self._handles = itertools.count()
        self._observed_handle = 0  # of the tokens that are not sent yet
        self._observed: list[int] = []
        self._dropped: collections.deque[int] = collections.deque()

        # Without a sandbox, what is visible in it is linked into a folder, and paths begin with that.
        visible = {SERVER_PATH: Path(server.__file__)} | dict(source.visible)
        isolation = room.detect_isolation()
        self._folder = None if isolation.complete else tempfile.TemporaryDirectory()
        root = "" if self._folder is None else _link_into(self._folder.name, visible)

        # Start it.
        try:
            self._process = room.start(
                room.Room(read_only=visible, environment=source.environment, devices=source.devices),
                [sys.executable, "-I", root + SERVER_PATH],
                isolation,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ScorerError(f"could not be started: {error}") from None

        # Its pipes, and a thread that reads what it prints.
        self._requests, self._answers = _descriptors(self._process)
        self._printed: collections.deque[int] = collections.deque(maxlen=KEPT_OUTPUT_BYTES)
        self._reader = threading.Thread(target=self._keep_end_of_output, daemon=True)
        self._reader.start()

        try:
            self.description = self._build(source, root)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def new_scorer(self, **keywords: Any) -> "RemoteScorer":
        """Make a scorer that has observed nothing; keywords: a variant of it."""
        handle = next(self._handles)
        as_lists = {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in keywords.items()
        }
        self.request(server.NEW, handle, payload=json.dumps(as_lists).encode(), answer_bytes=[0])
        return RemoteScorer(self, handle, observed=0)

    def observe(self, handle: int, token: int) -> None:
        """Send a token that a scorer observes, at the latest before the next request.

        Tokens are sent together, but always before anything is asked of this or another scorer.
        """
        if handle != self._observed_handle or len(self._observed) >= MAX_BUFFERED_TOKENS:
            self._send_observed()
        self._observed_handle = handle
        self._observed.append(token)

    def fork(self, handle: int) -> int:
        """Fork a scorer; returns the handle of its copy."""
        copy = next(self._handles)
        self.request(server.FORK, handle, copy, answer_bytes=[0])
        return copy

    def drop(self, handle: int) -> None:
        """Forget a scorer that is not used any more, before the next request.

        The garbage collector may call this at any time, so nothing is sent here.
        """
        self._dropped.append(handle)

    def request(
        self,
        operation: int,
        handle: int = 0,
        second: int = 0,
        payload: bytes = b"",
        answer_bytes: Sequence[int] = (),
    ) -> bytes:
        """Send a request and wait for its answer, which must have one of the lengths `answer_bytes`."""
        self._send_observed()
        self._send(operation, handle, second, payload)

        # The status, which may be that of an error.
        deadline = time.monotonic() + self.answer_seconds
        status, length = server.ANSWER.unpack(self._receive(server.ANSWER.size, deadline))
        is_error = status in (server.SCORER_RAISED, server.WRONG_RESULT)
        if is_error and length <= 4 * server.MAX_ERROR_CHARACTERS:
            message = _printable(self._receive(length, deadline))
            if status == server.WRONG_RESULT:
                raise ProtocolError(message)
            raise self._failure(f"raised {message}")
        if status != server.OK:
            raise self._failure(f"answered with status {status} and {length} bytes, which no answer has")

        # The length. An array of another size is a wrong result, all else a broken protocol.
        if operation == server.BUILD:
            answer_bytes = range(MAX_DESCRIPTION_BYTES)
        if length not in answer_bytes:
            if operation in (server.PREDICT, server.SCORE):
                self._failure("returned an array of another size")
                raise ProtocolError(self._wrong_size(operation, length, answer_bytes))
            raise self._failure(f"answered with {length} bytes, which is not the length of that answer")
        return self._receive(length, deadline)

    def _wrong_size(self, operation: int, length: int, expected: Sequence[int]) -> str:
        if operation == server.SCORE:
            return f"score_stream returned {length // 4} losses, expected {expected[0] // 4}"
        return (
            f"predict returned {length - 1} bytes, expected {self.vocab_size} numbers of 8 or 4 bytes, "
            "one for each id of the tokenizer"
        )

    def kill(self) -> None:
        """End the process from another thread; the one that waits for an answer gets a ScorerError."""
        self.ended = self.ended or "was ended"
        self._process.kill()

    def close(self) -> None:
        """End the process, and with it everything that it has started."""
        self.ended = self.ended or "was ended"
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        self._reader.join(END_SECONDS)
        if self._folder is not None:
            self._folder.cleanup()

    def _build(self, source: ScorerSource, root: str) -> Description:
        task = {
            "factory": source.factory,
            "arguments": [
                root + argument if argument in source.visible else argument for argument in source.arguments
            ],
            "search_path": [root + path for path in source.search_path],
        }
        answer = self.request(server.BUILD, payload=json.dumps(task).encode())
        try:
            declared = json.loads(answer)
            return Description(
                vocab_size=declared["vocab_size"],
                predicts=bool(declared["predicts"]),
                scope=str(declared["scope"])[:MAX_NAME_CHARACTERS],
                precision=source.precision or str(declared["precision"])[:MAX_NAME_CHARACTERS],
                variants=tuple(map(str, declared["variants"])),
            )
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise self._failure(f"described itself in another form ({error})") from None

    def _send_observed(self) -> None:
        while self._dropped:
            self._send(server.DROP, self._dropped.popleft())
        if self._observed:
            tokens = np.array(self._observed, dtype="<u2").tobytes()
            self._observed.clear()
            self._send(server.OBSERVE, self._observed_handle, payload=tokens)

    def _send(self, operation: int, handle: int, second: int = 0, payload: bytes = b"") -> None:
        if self.ended:
            raise ScorerError(self.ended)
        unsent = memoryview(server.REQUEST.pack(operation, handle, second, len(payload)) + payload)
        deadline = time.monotonic() + self.answer_seconds
        while unsent:
            self._wait_for(deadline, writable=[self._requests])
            try:
                unsent = unsent[os.write(self._requests, unsent) :]
            except BlockingIOError:
                continue
            except OSError:
                raise self._failure(self._how_it_ended()) from None

    def _receive(self, length: int, deadline: float) -> bytes:
        """Read exactly `length` bytes of an answer."""
        received = bytearray()
        while len(received) < length:
            self._wait_for(deadline, readable=[self._answers])
            piece = os.read(self._answers, length - len(received))
            if not piece:
                raise self._failure(self._how_it_ended())
            received += piece
        return bytes(received)

    def _wait_for(self, deadline: float, readable: Sequence[int] = (), writable: Sequence[int] = ()) -> None:
        ready = select.select(readable, writable, [], max(0.0, deadline - time.monotonic()))
        if not any(ready):
            raise self._failure(f"did not answer within {self.answer_seconds:g} seconds")

    def _failure(self, how: str) -> ScorerError:
        """Build the error of a process that is of no use any more."""
        self.ended = how
        return ScorerError(how)

    def _how_it_ended(self) -> str:
        """Say how the process ended, with the end of what it printed."""
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        self._reader.join(END_SECONDS)
        words = _printable(bytes(self._printed))[-QUOTED_OUTPUT_CHARACTERS:]
        how = f"ended with exit code {code}" if code >= 0 else f"was killed by signal {-code}"
        if code in (-9, 137):
            how = "was killed (signal 9; perhaps out of memory)"
        return f"{how} before it had answered" + (f": {words}" if words else "")

    def _keep_end_of_output(self) -> None:
        """Main function of a thread: read what the process prints, and keep the end of it."""
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            while piece := os.read(stream.fileno(), 1 << 16):
                self._printed.extend(piece)


class RemoteScorer:
    """A scorer in another process; predictions are converted to float64."""

    def __init__(self, process: ScorerProcess, handle: int, observed: int) -> None:
        self.process = process
        self.handle = handle
        self.observed = observed  # number of tokens; the first of a stream has no loss

    def __del__(self) -> None:
        self.process.drop(self.handle)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.process.vocab_size

    @property
    def predicts(self) -> bool:
        """True if the scorer has predict()."""
        return self.process.description.predicts

    @property
    def precision(self) -> str:
        """The precision that it declares, by name (stages/audit/precision.py)."""
        return self.process.description.precision

    @property
    def scope(self) -> str:
        """The scope that it declares: "stream" or "document"."""
        return self.process.description.scope

    def predict(self) -> np.ndarray:
        """Natural log-probabilities of the next token, (V,) float64."""
        self.process.cost += Cost(predictions=1)
        lengths = [1 + self.vocab_size * 8, 1 + self.vocab_size * 4]
        answer = self.process.request(server.PREDICT, self.handle, answer_bytes=lengths)
        dtype = "<f8" if len(answer) == lengths[0] else "<f4"
        return np.frombuffer(answer[1:], dtype=dtype).astype(np.float64)

    def observe(self, token: int) -> None:
        """Append a token."""
        self.process.observe(self.handle, token)
        self.observed += 1
        if self.predicts:
            self.process.cost += Cost(targets=1)

    def fork(self) -> "RemoteScorer":
        """An independent copy, in the same process."""
        return RemoteScorer(self.process, self.process.fork(self.handle), self.observed)

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Append tokens (n,) and return their losses in nats, float32; (n-1,) at the start of the stream."""
        # Without predict() the scorer scores its whole prefix again.
        again = 0 if self.predicts else self.observed
        self.process.cost += Cost(calls=1, targets=again + len(tokens))

        targets = len(tokens) if self.observed else max(0, len(tokens) - 1)
        payload = tokens.astype("<u2").tobytes()
        answer = self.process.request(server.SCORE, self.handle, payload=payload, answer_bytes=[4 * targets])
        self.observed += len(tokens)
        return np.frombuffer(answer, dtype="<f4").astype(np.float32)


def _link_into(folder: str, visible: Mapping[str, Path]) -> str:
    """Link files and folders into a folder at their paths in a sandbox; returns the folder."""
    for name, path in visible.items():
        place = Path(folder + name)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path.absolute())
    return folder


def _printable(sent: bytes) -> str:
    """Decode what a scorer sent as one line without control characters."""
    text = sent.decode("utf-8", errors="replace")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _descriptors(process: "subprocess.Popen[bytes]") -> tuple[int, int]:
    """The ends of the pipes: of requests, which never blocks, and of answers."""
    assert process.stdin is not None
    assert process.stdout is not None
    requests = process.stdin.fileno()
    answers = process.stdout.fileno()
    os.set_blocking(requests, False)
    for descriptor in (requests, answers):
        with contextlib.suppress(OSError):  # a smaller one is slower
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return requests, answers
