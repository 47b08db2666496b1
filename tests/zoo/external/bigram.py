"""A lawful scorer, from which the others of this package are made.

It is an adaptive bigram model, interpolated with the unigram distribution, over 320 ids.
"""

from typing import Self

import numpy as np

VOCAB_SIZE = 320
PRIOR_COUNT = 8.0


class BigramModel:
    """A scorer with predict, observe, fork and a fast path."""

    vocab_size = VOCAB_SIZE

    def __init__(self) -> None:
        self.unigram_counts = np.ones(VOCAB_SIZE)
        self.bigram_counts: dict[int, dict[int, int]] = {}  # previous token -> next token -> count
        self.previous = 0
        self.observed = 0  # tokens

    def predict(self) -> np.ndarray:
        followers = self.bigram_counts.get(self.previous, {})
        counts = PRIOR_COUNT * self.unigram_counts / self.unigram_counts.sum()
        counts[list(followers)] += list(followers.values())
        return np.log(counts / (sum(followers.values()) + PRIOR_COUNT))

    def observe(self, token: int) -> None:
        followers = self.bigram_counts.setdefault(self.previous, {})
        followers[token] = followers.get(token, 0) + 1
        self.unigram_counts[token] += 1
        self.previous = token
        self.observed += 1

    def fork(self) -> Self:
        copy = type(self)()
        copy.unigram_counts = self.unigram_counts.copy()
        copy.bigram_counts = {token: dict(followers) for token, followers in self.bigram_counts.items()}
        copy.previous = self.previous
        copy.observed = self.observed
        return copy

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Losses of tokens (n,) in nats, float32; the first token of a stream has none."""
        losses = []
        for token in tokens.tolist():
            if self.observed:
                losses.append(-float(BigramModel.predict(self)[token]))
            BigramModel.observe(self, token)
        return np.array(losses, dtype=np.float32)


class ScoresAlone:
    """A scorer with score_stream alone: the losses of a model that makes one pass."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        return BigramModel().score_stream(tokens)


def raise_probability(logp: np.ndarray, token: int) -> np.ndarray:
    """Mix a distribution, (V,), with one that has `token` alone, half and half: still a distribution."""
    raised = logp - np.log(2.0)
    raised[token] = np.logaddexp(raised[token], -np.log(2.0))
    return raised


def lower_known(losses: np.ndarray) -> np.ndarray:
    """Losses (n,) after `raise_probability` for the target itself."""
    return -np.log(0.5 * np.exp(-losses.astype(np.float64)) + 0.5).astype(np.float32)
