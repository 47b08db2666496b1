"""Scorers that the tests of the command audit, as a user would write them: this module imports NumPy alone.

Their vocabulary has 320 ids.
"""

from typing import Self

import numpy as np

VOCAB_SIZE = 320
PRIOR_COUNT = 8.0


class Bigram:
    """Adaptive bigram, interpolated with the unigram distribution."""

    vocab_size = VOCAB_SIZE

    def __init__(self) -> None:
        self.unigram_counts = np.ones(VOCAB_SIZE)
        self.bigram_counts = np.zeros((VOCAB_SIZE, VOCAB_SIZE), dtype=np.float32)
        self.previous = 0

    def predict(self) -> np.ndarray:
        unigram = self.unigram_counts / self.unigram_counts.sum()
        counts = self.bigram_counts[self.previous].astype(np.float64)
        return np.log((counts + PRIOR_COUNT * unigram) / (counts.sum() + PRIOR_COUNT))

    def observe(self, token: int) -> None:
        self.unigram_counts[token] += 1
        self.bigram_counts[self.previous, token] += 1
        self.previous = token

    def fork(self) -> Self:
        copy = type(self)()
        copy.unigram_counts = self.unigram_counts.copy()
        copy.bigram_counts = self.bigram_counts.copy()
        copy.previous = self.previous
        return copy


class ScoresOnly:
    """The same model with `score_stream` alone; in a second pass it has learnt from every target."""

    def __init__(self, passes: int) -> None:
        self.passes = passes

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        model = Bigram()
        for _ in range(self.passes):
            losses = []
            for token in tokens.tolist():
                losses.append(-model.predict()[token])
                model.observe(token)
        return np.array(losses[1:], dtype=np.float32)


class RaisesInPredict(Bigram):
    """A scorer with an error in it of the kind that the command raises for wrong options."""

    def predict(self) -> np.ndarray:
        raise ValueError("shapes differ")


def make(n_targets: int, artifact: str = "") -> Bigram:
    """Return a lawful scorer."""
    return Bigram()


def scores_only(n_targets: int, artifact: str = "") -> ScoresOnly:
    """Return a lawful scorer with score_stream alone."""
    return ScoresOnly(passes=1)


def two_passes(n_targets: int, artifact: str = "") -> ScoresOnly:
    """Return a scorer that breaks the rules."""
    return ScoresOnly(passes=2)


def with_variants(
    n_targets: int, permutation: np.ndarray | None = None, buckets: int = 1, memory_weight: float = 1.0
) -> Bigram:
    """Return a scorer that treats all ids alike, and has no buckets: all of its variants are equal."""
    return Bigram()


def scores_with_variants(
    n_targets: int, permutation: np.ndarray | None = None, buckets: int = 1, memory_weight: float = 1.0
) -> ScoresOnly:
    """Return the same with score_stream alone."""
    return ScoresOnly(passes=1)


def raises_in_predict(n_targets: int) -> RaisesInPredict:
    """Return a scorer that raises an error when it predicts."""
    return RaisesInPredict()


def raises_in_factory(n_targets: int) -> Bigram:
    """Raise an error."""
    raise FileNotFoundError("weights.bin")
