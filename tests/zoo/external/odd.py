"""Lawful scorers that do things in another way than most, and must pass."""

import multiprocessing
import os
import sys
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np

from .bigram import BigramModel, ScoresAlone

IMPOSSIBLE = [0, 2, 3, 4]  # ids that no token of the stream has


class Float32(BigramModel):
    """Predictions in float32, and a fast path from the same."""

    def predict(self) -> np.ndarray:
        return super().predict().astype(np.float32)

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        losses = []
        for token in tokens.tolist():
            if self.observed:
                losses.append(-self.predict()[token])
            self.observe(token)
        return np.array(losses, dtype=np.float32)


class Float64(BigramModel):
    """Says that it computes in float64; its losses are float64 as well."""

    precision = "float64"

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        return super().score_stream(tokens).astype(np.float64)


class WithoutSize:
    """A scorer that says nothing of its vocabulary, and has no score_stream."""

    def __init__(self, inner: BigramModel) -> None:
        self.inner = inner

    def predict(self) -> np.ndarray:
        return self.inner.predict()

    def observe(self, token: int) -> None:
        self.inner.observe(token)

    def fork(self) -> "WithoutSize":
        return WithoutSize(self.inner.fork())


class NeverPads(BigramModel):
    """Gives some ids the probability zero, and their share to the others."""

    def predict(self) -> np.ndarray:
        logp = super().predict()
        logp[IMPOSSIBLE] = -np.inf
        return logp - np.log(np.exp(logp).sum())

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        losses = []
        for token in tokens.tolist():
            if self.observed:
                losses.append(-float(self.predict()[token]))
            self.observe(token)
        return np.array(losses, dtype=np.float32)


class RoundsByBatch(BigramModel):
    """Each loss differs by up to 2e-6 nats with the number of tokens in a call."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        losses = super().score_stream(tokens).astype(np.float64)
        signs = np.random.default_rng(len(tokens)).uniform(-1, 1, len(losses))
        return np.maximum(losses + 2e-6 * signs, 0).astype(np.float32)


class ByDocument(BigramModel):
    """Begins again at each BOS."""

    scope = "document"
    bos = 1

    def observe(self, token: int) -> None:
        if token == self.bos:
            self.unigram_counts = np.ones_like(self.unigram_counts)
            self.bigram_counts = {}
            self.previous = 0
        super().observe(token)

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        losses = []
        for token in tokens.tolist():
            if self.observed:
                losses.append(-float(self.predict()[token]))
            self.observe(token)
        return np.array(losses, dtype=np.float32)


class Talkative(BigramModel):
    """Prints at each step, on both streams, and warns."""

    def predict(self) -> np.ndarray:
        print("predicts", self.observed)
        print("Traceback (most recent call last): not really", file=sys.stderr)
        os.write(1, b"\0\xff\n")
        warnings.warn("a warning", stacklevel=1)
        return super().predict()


class Threaded(BigramModel):
    """Computes in threads, one of which never ends."""

    pool = ThreadPoolExecutor(4)
    waiting = threading.Thread(target=threading.Event().wait, daemon=True)

    def predict(self) -> np.ndarray:
        if not self.waiting.is_alive():
            self.waiting.start()
        return self.pool.submit(BigramModel.predict, self).result()


class Buffered(BigramModel):
    """Keeps its last prediction in a file in the temporary folder, and in a subfolder of the current one."""

    def predict(self) -> np.ndarray:
        Path("cache").mkdir(exist_ok=True)
        for folder in (Path(tempfile.gettempdir()), Path("cache"), Path("/dev/shm")):
            np.save(folder / "last.npy", super().predict())
        kept: np.ndarray = np.load(Path(tempfile.gettempdir()) / "last.npy")
        return kept


class Processes(BigramModel):
    """Has another process take the logarithm of the first predictions."""

    pool: Any = None
    asked = 0

    def predict(self) -> np.ndarray:
        logp = super().predict()
        Processes.asked += 1
        if Processes.asked > 20:
            return logp
        if Processes.pool is None:
            Processes.pool = multiprocessing.get_context("fork").Pool(1)
        probabilities: np.ndarray = Processes.pool.apply(np.exp, (logp,))
        return np.log(probabilities)


class AloneInFloat64(ScoresAlone):
    """Scores alone, in float64."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        return super().score_stream(tokens).astype(np.float64)


class Slots:
    """A scorer without a dictionary of attributes, whose fork copies itself."""

    __slots__ = ("inner",)
    vocab_size = np.int64(320)

    def __init__(self) -> None:
        self.inner = BigramModel()

    def predict(self) -> list[float]:
        return list(self.inner.predict())

    def observe(self, token: int) -> None:
        self.inner.observe(token)

    def fork(self) -> Self:
        copy = type(self)()
        copy.inner = self.inner.fork()
        return copy


def float32(n_targets: int) -> BigramModel:
    return Float32()


def float64(n_targets: int) -> BigramModel:
    return Float64()


def without_size(n_targets: int) -> WithoutSize:
    return WithoutSize(BigramModel())


def never_pads(n_targets: int) -> BigramModel:
    return NeverPads()


def rounds_by_batch(n_targets: int) -> BigramModel:
    return RoundsByBatch()


def by_document(n_targets: int) -> BigramModel:
    return ByDocument()


def talkative(n_targets: int) -> BigramModel:
    print("this module makes a scorer")
    return Talkative()


def threaded(n_targets: int) -> BigramModel:
    return Threaded()


def buffered(n_targets: int) -> BigramModel:
    return Buffered()


def processes(n_targets: int) -> BigramModel:
    return Processes()


def alone(n_targets: int) -> ScoresAlone:
    return AloneInFloat64()


def slots(n_targets: int) -> Slots:
    return Slots()
