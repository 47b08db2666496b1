"""Serves the scorers of one factory over a pipe; this program runs in the sandbox, next to nothing else.

remote/process.py starts it and is at the other end of its standard input and output. It imports nothing
of the project, so that a scorer of a few lines starts in a fraction of a second. Nothing that it sends
is trusted: the audit knows how long each answer must be.

A request is a header, little-endian `<BIII` (operation, handle, second number, length), and a payload of
that length. A scorer is known by its handle, which the audit chooses. An answer is a header `<BI`
(status, length) and a payload.

    operation  payload                                  answer
    ---------  ---------------------------------------  -----------------------------------------
    BUILD      JSON: factory, arguments, search_path    JSON: what the scorers of the factory offer
    NEW        JSON: keywords for the factory           nothing
    OBSERVE    uint16 tokens                            none is sent; an error is the next answer
    PREDICT    nothing                                  "d" or "f", and V float64 or float32
    SCORE      uint16 tokens                            float32, one for each target
    FORK       nothing; second number: the new handle   nothing
    DROP       nothing                                  none is sent

Two kinds of scorers are served (docs/audit.md). A stepwise scorer has `predict`, `observe` and `fork`,
and perhaps a fast `score_stream`; without it, losses are read from predictions. A replay scorer has
`score_stream` alone: a fork of it is a new scorer that scores the same tokens again.
"""

import importlib
import inspect
import json
import os
import struct
import sys
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

REQUEST = struct.Struct("<BIII")
ANSWER = struct.Struct("<BI")
BUILD, NEW, OBSERVE, PREDICT, SCORE, FORK, DROP = range(1, 8)
OK, SCORER_RAISED, WRONG_RESULT = range(3)  # status of an answer
UNANSWERED = (OBSERVE, DROP)
STEPWISE_METHODS = ("predict", "observe", "fork")
VARIANT_KEYWORDS = ("permutation", "buckets", "memory_weight")  # that a factory may take
MAX_ERROR_CHARACTERS = 500
DEFAULT_PRECISION = "float32"


class WrongResultError(Exception):
    """A method of the scorer did not return what docs/audit.md promises."""


class ServedScorer(Protocol):
    """A scorer of either kind, as the server uses it."""

    def predict(self) -> np.ndarray:
        """Log-probabilities of the next token, (V,) float64 or float32."""
        ...

    def observe(self, token: int) -> None:
        """Append a token."""
        ...

    def fork(self) -> "ServedScorer":
        """An independent copy."""
        ...

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Append tokens (n,) uint16; returns their losses, float32, but none for a stream's first token."""
        ...


class StepwiseScorer:
    """A scorer with predict, observe and fork; `score_stream` is its own if it has one."""

    def __init__(self, inner: Any, has_observed: bool = False) -> None:
        self.inner = inner
        self.has_observed = has_observed  # the first token of a stream has no loss

    def predict(self) -> np.ndarray:
        """Log-probabilities of the next token, float32 if the scorer returns that or less, else float64."""
        logp = as_array(self.inner.predict())
        if logp.dtype.kind != "f":
            raise WrongResultError(f"predict returned {logp.dtype} {logp.shape}, expected log-probabilities")
        return logp.astype(np.float64 if logp.dtype.itemsize > 4 else np.float32)

    def observe(self, token: int) -> None:
        """Append a token."""
        self.inner.observe(token)
        self.has_observed = True

    def fork(self) -> "StepwiseScorer":
        """An independent copy."""
        return StepwiseScorer(self.inner.fork(), self.has_observed)

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Losses of tokens (n,) in nats, float32."""
        if hasattr(self.inner, "score_stream"):
            losses = as_array(self.inner.score_stream(tokens)).astype(np.float32)
            self.has_observed = self.has_observed or bool(len(tokens))
            return losses

        losses_so_far = []
        for token in tokens.tolist():
            if self.has_observed:
                losses_so_far.append(-float(self.predict()[token]))
            self.observe(token)
        return np.array(losses_so_far, dtype=np.float32)


class ReplayScorer:
    """A scorer with score_stream alone: its state is its tokens, and each call scores them again."""

    def __init__(self, make: Callable[[], Any], observed: np.ndarray | None = None) -> None:
        self.make = make
        self.observed = np.empty(0, dtype=np.uint16) if observed is None else observed

    def predict(self) -> np.ndarray:
        """Raise an error: no check that needs predict() is run."""
        raise WrongResultError("this scorer has no predict()")

    def observe(self, token: int) -> None:
        """Append a token."""
        self.observed = np.append(self.observed, np.uint16(token))

    def fork(self) -> "ReplayScorer":
        """An independent copy."""
        return ReplayScorer(self.make, self.observed)

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Losses of tokens (n,) in nats, float32."""
        self.observed = np.concatenate([self.observed, tokens])
        losses = as_array(self.make().score_stream(self.observed)).astype(np.float32)
        targets = len(self.observed) - 1
        if losses.shape != (targets,):
            raise WrongResultError(
                f"score_stream of {targets + 1} tokens returned {losses.shape}, expected ({targets},)"
            )
        return losses[targets - min(len(tokens), targets) :]


class Server:
    """The scorers of one factory by their handles, and the operations on them."""

    def __init__(self) -> None:
        self.scorers: dict[int, ServedScorer] = {}
        self.make: Callable[..., Any] = lambda: None
        self.is_stepwise = False

    def build(self, payload: bytes) -> bytes:
        """Import the factory, make a scorer to see what it offers, and describe that."""
        task = json.loads(payload)
        sys.path[:0] = task["search_path"]
        module, _, name = task["factory"].partition(":")
        function = getattr(importlib.import_module(module), name)
        self.make = lambda **keywords: function(*task["arguments"], **keywords)

        # The kind of the scorers.
        scorer = self.make()
        missing = [method for method in STEPWISE_METHODS if not callable(getattr(scorer, method, None))]
        self.is_stepwise = not missing
        has_score_stream = callable(getattr(scorer, "score_stream", None))
        if missing and not has_score_stream:
            raise TypeError(f"the scorer lacks {', '.join(missing)}, and it has no score_stream either")

        # What it declares, and the variants that the factory can make.
        accepted = inspect.signature(function).parameters
        declared = {
            "vocab_size": _optional_int(getattr(scorer, "vocab_size", None)),
            "predicts": self.is_stepwise,
            "scope": str(getattr(scorer, "scope", "stream")),
            "precision": str(getattr(scorer, "precision", DEFAULT_PRECISION)),
            "variants": [keyword for keyword in VARIANT_KEYWORDS if keyword in accepted],
        }
        return json.dumps(declared).encode()

    def answer(self, operation: int, handle: int, second: int, payload: bytes) -> bytes:
        """Carry out an operation; returns the payload of its answer."""
        if operation == BUILD:
            return self.build(payload)

        if operation == NEW:
            keywords = json.loads(payload)
            if "permutation" in keywords:
                keywords["permutation"] = np.array(keywords["permutation"], dtype=np.int64)
            if self.is_stepwise:
                self.scorers[handle] = StepwiseScorer(self.make(**keywords))
            else:
                self.scorers[handle] = ReplayScorer(lambda: self.make(**keywords))
            return b""

        if operation == DROP:
            self.scorers.pop(handle, None)
            return b""

        # All others concern one scorer.
        return self.ask(operation, self.scorers[handle], second, payload)

    def ask(self, operation: int, scorer: ServedScorer, second: int, payload: bytes) -> bytes:
        """Carry out an operation on a scorer; returns the payload of its answer."""
        if operation == OBSERVE:
            for token in np.frombuffer(payload, dtype="<u2").tolist():
                scorer.observe(token)
            return b""
        if operation == FORK:
            self.scorers[second] = scorer.fork()
            return b""
        if operation == PREDICT:
            logp = scorer.predict()
            return logp.dtype.char.encode() + np.ascontiguousarray(logp).tobytes()
        if operation == SCORE:
            losses = scorer.score_stream(np.frombuffer(payload, dtype="<u2").astype(np.uint16))
            return losses.tobytes()
        raise ValueError(f"operation {operation}")


def as_array(returned: Any) -> np.ndarray:
    """Convert what a scorer returned: an array, or a tensor on any device and of any precision."""
    if hasattr(returned, "detach"):  # a tensor; NumPy has no bfloat16
        host = returned.detach().cpu()
        returned = host.numpy() if str(host.dtype) == "torch.float64" else host.float().numpy()
    return np.asarray(returned)


def serve(requests: int, answers: int) -> None:
    """Answer requests from one descriptor to another, until the first is closed."""
    server = Server()
    failed: tuple[int, str] | None = None  # an error of an operation that sends no answer
    while header := _read(requests, REQUEST.size):
        operation, handle, second, length = REQUEST.unpack(header)
        payload = _read(requests, length)

        # Whatever the scorer raises, SystemExit among it, is an answer.
        status, result = OK, b""
        try:
            if failed is None:
                result = server.answer(operation, handle, second, payload)
        except WrongResultError as error:
            failed = WRONG_RESULT, str(error)
        except BaseException as error:
            failed = SCORER_RAISED, f"{type(error).__name__}: {error}"

        if operation not in UNANSWERED:
            if failed is not None:
                status, result = failed[0], " ".join(failed[1].split())[:MAX_ERROR_CHARACTERS].encode()
            _write(answers, ANSWER.pack(status, len(result)) + result)


def main() -> None:
    """Keep the pipe for the protocol alone: what the scorer prints goes to standard error."""
    requests = os.dup(0)
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    serve(requests, answers)


def _optional_int(value: Any) -> int | None:
    return None if value is None else int(value)


def _read(descriptor: int, length: int) -> bytes:
    """Read `length` bytes; empty at the end of the requests."""
    received = bytearray()
    while len(received) < length:
        piece = os.read(descriptor, min(length - len(received), 1 << 20))
        if not piece:
            return b""
        received += piece
    return bytes(received)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


if __name__ == "__main__":
    main()
