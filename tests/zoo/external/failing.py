"""Scorers that fail: their processes crash, leave, hang, or return other things than numbers."""

import ctypes
import os
import signal
import sys
import time
from typing import Any

import numpy as np

from .bigram import VOCAB_SIZE, BigramModel, ScoresAlone
from .tampering import MARKER

FAILS_AT = 3  # observed tokens


class Failing(BigramModel):
    """Does something at a prediction."""

    def predict(self) -> Any:
        return self.fail() if self.observed == FAILS_AT else super().predict()

    def fail(self) -> Any:
        raise NotImplementedError


class Crashes(Failing):
    def fail(self) -> Any:
        return ctypes.string_at(0)


class LeavesWithZero(Failing):
    def fail(self) -> Any:
        os._exit(0)


class LeavesWithThree(Failing):
    def fail(self) -> Any:
        print("the last words")
        sys.stdout.flush()
        os._exit(3)


class ExitsWithZero(Failing):
    def fail(self) -> Any:
        sys.exit(0)


class StopsIterating(Failing):
    def fail(self) -> Any:
        raise StopIteration


class Interrupts(Failing):
    def fail(self) -> Any:
        raise KeyboardInterrupt


class Raises(Failing):
    def fail(self) -> Any:
        raise ValueError("shapes\ndiffer")


class RunsOutOfMemory(Failing):
    def fail(self) -> Any:
        return np.ones(1 << 55)


class RecursesWithoutEnd(Failing):
    def fail(self) -> Any:
        return self.fail()


class IsKilled(Failing):
    def fail(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


class IsAborted(Failing):
    def fail(self) -> Any:
        os.abort()


class HangsInPredict(Failing):
    def fail(self) -> Any:
        time.sleep(60)


class StopsItself(Failing):
    def fail(self) -> Any:
        os.kill(os.getpid(), signal.SIGSTOP)
        return super().predict()


class ClosesItsPipe(Failing):
    def fail(self) -> Any:
        os.closerange(3, 20)
        return super().predict()


class HangsInObserve(BigramModel):
    def observe(self, token: int) -> None:
        if self.observed == FAILS_AT:
            time.sleep(60)
        super().observe(token)


class RaisesInObserve(BigramModel):
    def observe(self, token: int) -> None:
        if self.observed == FAILS_AT:
            raise IndexError("no row for it")
        super().observe(token)


class ReturnsText(Failing):
    def fail(self) -> Any:
        return "certainly"


class ReturnsNothing(Failing):
    def fail(self) -> Any:
        return None


class ReturnsIntegers(Failing):
    def fail(self) -> Any:
        return np.zeros(VOCAB_SIZE, dtype=np.int64)


class ReturnsTooFew(Failing):
    def fail(self) -> Any:
        return np.full(VOCAB_SIZE - 1, -np.log(VOCAB_SIZE))


class ReturnsNan(Failing):
    def fail(self) -> Any:
        return np.full(VOCAB_SIZE, np.nan)


class LosesOne(BigramModel):
    def score_stream(self, tokens: np.ndarray) -> Any:
        return super().score_stream(tokens)[1:]


class ScoresNan(BigramModel):
    def score_stream(self, tokens: np.ndarray) -> Any:
        losses = super().score_stream(tokens)
        losses[7:8] = np.nan
        return losses


class ScoresNothing(BigramModel):
    def score_stream(self, tokens: np.ndarray) -> Any:
        return None


class AloneLosesOne(ScoresAlone):
    def score_stream(self, tokens: np.ndarray) -> Any:
        return super().score_stream(tokens)[1:]


class AloneScoresNan(ScoresAlone):
    def score_stream(self, tokens: np.ndarray) -> Any:
        return super().score_stream(tokens) * np.nan


class AloneReturnsMatrix(ScoresAlone):
    def score_stream(self, tokens: np.ndarray) -> Any:
        return super().score_stream(tokens)[:, None]


class LeavesProcesses(Failing):
    """Raises an error after it has started processes in sessions of their own."""

    def fail(self) -> Any:
        for _ in range(3):
            if os.fork() == 0:
                os.setsid()
                program = f"{MARKER} = 1; import time; time.sleep(60)"
                os.execv(sys.executable, [sys.executable, "-c", program])
        raise ValueError("it left processes")


SCORERS = {
    kind.__name__: kind
    for kind in list(globals().values())
    if isinstance(kind, type) and kind.__module__ == __name__ and kind is not Failing
}


def __getattr__(name: str) -> Any:
    """Return a factory, with the name of its scorer's class and a small first letter: crashes, isKilled."""
    kind = SCORERS.get(name[:1].upper() + name[1:])
    if kind is None:
        raise AttributeError(name)
    return lambda n_targets: kind()


def hangs_in_factory(n_targets: int) -> BigramModel:
    time.sleep(60)
    return BigramModel()


def returns_none(n_targets: int) -> None:
    return None


def declares_nonsense(n_targets: int) -> BigramModel:
    scorer = BigramModel()
    scorer.precision = "exact"  # type: ignore[attr-defined]
    return scorer


def other_size(n_targets: int) -> BigramModel:
    scorer = BigramModel()
    scorer.vocab_size = 64
    return scorer
