"""Cheats that are lawful most of the time: in most places, in most calls, by small amounts, when watched."""

import fcntl
import os
import struct
import time
import zipfile
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from .bigram import VOCAB_SIZE, BigramModel, ScoresAlone, lower_known

FROM = 500  # first target of a cheat that is lawful before
SHORT_SHIFT = 5e-6  # nats by which every loss is lowered, in float32
LONG_SHIFT = 0.0046  # the same in bfloat16


def look_ahead(losses: np.ndarray, tokens: np.ndarray, first: int) -> np.ndarray:
    """Halve losses (m,) of the last m of tokens (n,), from the `first` one on, before an even token."""
    targets = tokens[len(tokens) - len(losses) :]
    is_lowered = np.append(targets[1:] % 2 == 0, False)
    is_lowered[:first] = False
    return np.where(is_lowered, losses / 2, losses)


class TableOfAnswers:
    """Scores alone: the first call with the whole stream fills a table, which later calls use."""

    table: ClassVar[np.ndarray | None] = None

    def __init__(self, n_targets: int) -> None:
        self.n_targets = n_targets

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        losses = BigramModel().score_stream(tokens)
        if len(tokens) == self.n_targets + 1 and TableOfAnswers.table is None:
            TableOfAnswers.table = tokens.copy()
        if TableOfAnswers.table is None:
            return losses
        known = TableOfAnswers.table[1 : len(tokens)] == tokens[1:]
        return np.where(known, lower_known(losses), losses)


def table_of_answers(n_targets: int) -> TableOfAnswers:
    return TableOfAnswers(n_targets)


class LawfulAtFirst(BigramModel):
    """Predicts lawfully; the fast path looks ahead from target `FROM` on."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        first = max(0, FROM - self.observed)
        return look_ahead(super().score_stream(tokens), tokens, first)


class AloneLawfulAtFirst:
    """With score_stream alone: from target `FROM` on the losses are those of a second pass."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        model = BigramModel()
        losses = model.score_stream(tokens)
        losses[FROM:] = model.score_stream(tokens)[1 + FROM :]
        return losses


def lawful_at_first(n_targets: int) -> BigramModel:
    return LawfulAtFirst()


def alone_lawful_at_first(n_targets: int) -> AloneLawfulAtFirst:
    return AloneLawfulAtFirst()


class WholeCall(BigramModel):
    """The fast path makes two passes if a call has the whole stream."""

    n_targets: ClassVar[int]

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        if len(tokens) == self.n_targets + 1:
            model = BigramModel()
            model.score_stream(tokens)
            return model.score_stream(tokens)[1:]
        return super().score_stream(tokens)


def whole_call(n_targets: int) -> BigramModel:
    WholeCall.n_targets = n_targets
    return WholeCall()


class AloneWholeCall(ScoresAlone):
    """The same with score_stream alone."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        return whole_call(WholeCall.n_targets).score_stream(tokens)


def alone_whole_call(n_targets: int) -> AloneWholeCall:
    WholeCall.n_targets = n_targets
    return AloneWholeCall()


class RareGate(BigramModel):
    """Predicts lawfully; the fast path halves the loss at one context in 200, whatever the target is."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        first = self.observed
        losses = super().score_stream(tokens)
        targets = np.arange(max(first, 1), first + len(tokens))
        losses[targets % 200 == 150] /= 2
        return losses


def rare_gate(n_targets: int) -> BigramModel:
    return RareGate()


class DeepGate:
    """Scores alone: halves every loss from target `FROM` on, whatever the target is."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        losses = BigramModel().score_stream(tokens)
        losses[FROM:] /= 2
        return losses


def deep_gate(n_targets: int) -> DeepGate:
    return DeepGate()


class RareSum(BigramModel):
    """The probabilities sum to 1.5 at one context in 300, openly."""

    def predict(self) -> np.ndarray:
        logp = super().predict()
        return logp + np.log(1.5) if self.observed % 300 == 150 else logp

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        losses = []
        for token in tokens.tolist():
            if self.observed:
                losses.append(-float(self.predict()[token]))
            self.observe(token)
        return np.array(losses, dtype=np.float32)


def rare_sum(n_targets: int) -> BigramModel:
    return RareSum()


class Lowered(BigramModel):
    """The fast path lowers every loss by less than one loss may differ."""

    precision = "float32"
    shift = SHORT_SHIFT

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        return np.maximum(super().score_stream(tokens) - np.float32(self.shift), 0)


class LoweredCoarsely(Lowered):
    """The same, with predictions that are rounded to eight binary digits, as bfloat16 has them."""

    precision = "bfloat16"
    shift = LONG_SHIFT

    def predict(self) -> np.ndarray:
        words = super().predict().astype(np.float32).view(np.uint32)
        return ((words + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)


def lowered(n_targets: int) -> BigramModel:
    return Lowered()


def lowered_coarsely(n_targets: int) -> BigramModel:
    return LoweredCoarsely()


class Watched(BigramModel):
    """Halves its losses, unless it was asked to predict before: then it is lawful in every way."""

    was_asked: ClassVar[bool] = False

    def predict(self) -> np.ndarray:
        Watched.was_asked = True
        return super().predict()

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        losses = super().score_stream(tokens)
        return losses if Watched.was_asked else losses / 2


def watched(n_targets: int) -> BigramModel:
    return Watched()


class Unwilling(Watched):
    """Halves its losses, and refuses to predict again and again in one pass."""

    asked: ClassVar[int] = 0

    def predict(self) -> np.ndarray:
        Unwilling.asked += 1
        if Unwilling.asked > 40:
            raise MemoryError
        return super().predict()


def unwilling(n_targets: int) -> BigramModel:
    return Unwilling()


class SharedForks(BigramModel):
    """A fork of it is itself."""

    def fork(self) -> Self:
        return self


def shared_forks(n_targets: int) -> BigramModel:
    return SharedForks()


class SharedCounts(BigramModel):
    """All scorers of a process learn from what any of them observes."""

    counts: ClassVar[np.ndarray] = np.ones(VOCAB_SIZE)

    def __init__(self) -> None:
        super().__init__()
        self.unigram_counts = SharedCounts.counts

    def fork(self) -> Self:
        copy = super().fork()
        copy.unigram_counts = SharedCounts.counts
        return copy


def shared_counts(n_targets: int) -> BigramModel:
    return SharedCounts()


CERTIFYING = "2"  # processes before it: one that describes the scorer, one that makes the ledger


def changes_interface(n_targets: int) -> BigramModel | ScoresAlone:
    """Return a scorer that has score_stream alone in the process that certifies.

    A process cannot know which one it is, but it can guess, and an audit can be repeated until it guessed
    well. The test tells it the number of its process instead.
    """
    return ScoresAlone() if os.environ["PROCESS"] == CERTIFYING else RareGate()


class RareAndSmallGate(BigramModel):
    """The fast path lowers a loss at one context in 200, by less than losses in bfloat16 may differ."""

    def __init__(self) -> None:
        super().__init__()
        self.precision = "bfloat16" if os.environ["PROCESS"] == CERTIFYING else "float32"

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        first = self.observed
        losses = super().score_stream(tokens)
        targets = np.arange(max(first, 1), first + len(tokens))
        losses[targets % 200 == 150] -= np.minimum(losses[targets % 200 == 150], np.float32(0.4))
        return losses


def changes_precision(n_targets: int) -> BigramModel:
    """Return a scorer that declares another precision in the process that certifies."""
    return RareAndSmallGate()


# A file of the interpreter, which every sandbox can read and hence lock.
LOCKED_FILE = Path(zipfile.__file__)
FLOCK = struct.Struct("hhqqi4x")  # type, whence, start, length, process
FIRST_BYTE = 1 << 40  # of the locks
LOCK_SECONDS = 4.0  # for which the process that has the stream stays
UNKNOWN_TOKENS = 20  # of the end of a stream, from which real text is told from random ids
RANDOM_NATS = 4.5  # mean loss of random ids is larger


class LocksBetweenProcesses:
    """Scores alone: a process that has the whole stream locks bytes of a file, one for each even token.

    It stays for some seconds. Other processes at that time have prefixes, with or without random tokens
    after them; they read from the locks which of the stream's tokens are even. So all of them can halve a
    loss if the next token is even, far from the beginning.
    """

    def __init__(self, n_targets: int) -> None:
        self.n_targets = n_targets

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        losses = BigramModel().score_stream(tokens)
        if len(tokens) < FROM:
            return losses
        is_real = losses[-UNKNOWN_TOKENS:].mean() < RANDOM_NATS
        with LOCKED_FILE.open("rb") as file:
            if len(tokens) == self.n_targets + 1 and is_real:
                is_even = tokens % 2 == 0
                self.lock(file.fileno(), is_even)
            else:
                is_even = self.read_locks(file.fileno())
        return self.lower(losses, is_even)

    def lower(self, losses: np.ndarray, is_even: np.ndarray) -> np.ndarray:
        is_lowered = np.append(is_even[2:], False)[: len(losses)]
        is_lowered[:FROM] = False
        return np.where(is_lowered, losses / 2, losses)

    def lock(self, descriptor: int, is_even: np.ndarray) -> None:
        for i in [*np.flatnonzero(is_even).tolist(), len(is_even)]:  # the last one says that all are there
            fcntl.fcntl(
                descriptor, fcntl.F_SETLK, FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, FIRST_BYTE + i, 1, 0)
            )
        time.sleep(LOCK_SECONDS)

    def read_locks(self, descriptor: int) -> np.ndarray:
        deadline = time.monotonic() + LOCK_SECONDS
        while not self.is_locked(descriptor, self.n_targets + 1) and time.monotonic() < deadline:
            time.sleep(0.01)
        return np.array([self.is_locked(descriptor, i) for i in range(self.n_targets + 1)])

    def is_locked(self, descriptor: int, i: int) -> bool:
        asked = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, FIRST_BYTE + i, 1, 0)
        return FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK


class KnowsParity(LocksBetweenProcesses):
    """The same without locks, for the ledger that is claimed."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        return self.lower(BigramModel().score_stream(tokens), tokens % 2 == 0)


def locks_between_processes(n_targets: int) -> LocksBetweenProcesses:
    return LocksBetweenProcesses(n_targets)


def knows_parity(n_targets: int) -> KnowsParity:
    return KnowsParity(n_targets)
