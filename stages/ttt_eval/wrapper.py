"""Base class of scorers that wrap another.

Single observed tokens are collected until something depends on them: scored as a batch they cost a
fraction.
"""

import copy
from abc import ABC, abstractmethod
from typing import Self

import numpy as np

from stages.scoring.evaluate import QueryableScorer
from stages.scoring.queries import Queries


class Wrapper(ABC):
    """A scorer on top of another."""

    def __init__(self, scorer: QueryableScorer) -> None:
        self.scorer = scorer
        self.pending_tokens: list[int] = []  # observed, not scored yet

    @abstractmethod
    def _score(self, tokens: np.ndarray, queries: Queries | None) -> np.ndarray:
        """`score`, when no observed tokens are pending."""

    @abstractmethod
    def _adjust_distribution(self, logp_V: np.ndarray) -> np.ndarray:
        """This scorer's prediction, (V,) float64 log-probabilities, from the wrapped scorer's."""

    @property
    def vocab_size(self) -> int:
        """The number of token ids a distribution is over."""
        return self.scorer.vocab_size

    @property
    def warm_up_targets(self) -> int:
        """That of the wrapped scorer."""
        return self.scorer.warm_up_targets

    def fork(self) -> Self:
        """An independent copy of this and of the wrapped scorer.

        A subclass with more state that changes extends it.
        """
        self._score_pending()
        twin = copy.copy(self)
        twin.scorer = self.scorer.fork()
        twin.pending_tokens = []
        return twin

    def predict(self) -> np.ndarray:
        """Natural log-probabilities of the next token, (V,) float64."""
        self._score_pending()
        return self._adjust_distribution(self.scorer.predict())

    def observe(self, token: int) -> None:
        """Append a token to the prefix."""
        self.pending_tokens.append(token)

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Score and observe tokens in order; nats, float32."""
        return self.score(tokens, None)[0]

    def score(self, tokens: np.ndarray, queries: Queries | None) -> np.ndarray:
        """Score and observe tokens in order; returns losses and query results, (R, N) (queries.py)."""
        self._score_pending()
        return self._score(tokens, queries)

    def _score_pending(self) -> None:
        if self.pending_tokens:
            self._score(np.array(self.pending_tokens, dtype=np.uint16), None)
            self.pending_tokens = []
