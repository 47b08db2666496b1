"""What scorers that wrap another have in common.

Observed tokens wait until something depends on them, because in a batch they cost a fraction.
"""

from abc import ABC, abstractmethod
from typing import Self

import numpy as np

from stages.scoring.evaluate import AskedScorer
from stages.scoring.queries import Asked


class Wrapper(ABC):
    """A scorer on top of another."""

    def __init__(self, scorer: AskedScorer) -> None:
        self.scorer = scorer
        self.waiting: list[int] = []

    @abstractmethod
    def _score(self, tokens: np.ndarray, asked: Asked | None) -> np.ndarray:
        """`score`, with no token waiting."""

    @abstractmethod
    def _bend(self, logp_V: np.ndarray) -> np.ndarray:
        """The wrapped scorer's prediction, (V,) float64 log-probabilities, to this one's."""

    @property
    def vocab_size(self) -> int:
        """The number of token ids a distribution is over."""
        return self.scorer.vocab_size

    @property
    def warm_up_targets(self) -> int:
        """The wrapped scorer's."""
        return self.scorer.warm_up_targets

    def fork(self) -> Self:
        """An independent copy of this and of the wrapped scorer; a class that has more that changes adds it."""
        self._catch_up()
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.scorer, twin.waiting = self.scorer.fork(), []
        return twin

    def predict(self) -> np.ndarray:
        """Natural log-probabilities of the next token, (V,) float64."""
        self._catch_up()
        return self._bend(self.scorer.predict())

    def observe(self, token: int) -> None:
        """Append a token to the prefix."""
        self.waiting.append(token)

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Score and observe tokens in order; nats, float32."""
        return self.score(tokens, None)[0]

    def score(self, tokens: np.ndarray, asked: Asked | None) -> np.ndarray:
        """`score_stream` as the first of (R, N) rows; the others answer what is asked."""
        self._catch_up()
        return self._score(tokens, asked)

    def _catch_up(self) -> None:
        if self.waiting:
            self._score(np.array(self.waiting, dtype=np.uint16), None)
            self.waiting = []
