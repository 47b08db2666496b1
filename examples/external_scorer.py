"""A scorer written by somebody else, ready for the audit: an interpolated bigram model that learns.

It imports nothing of this repository and has the methods that docs/audit.md asks for. Three
factories show the three cases:

    make         has predict, observe and fork; passes
    scores_only  has only score_stream; passes, but checks that need a distribution cannot tell
    two_passes   scores the stream a second time after having learnt from it; fails
"""

import numpy as np

VOCAB_SIZE = 2048  # ids of the tokenizer that the stream was made with; the pipeline's default
PRIOR_COUNT = 8.0  # pseudo-observations given to the unigram distribution in every context


class InterpolatedBigram:
    """p(b | a) = (n(ab) + PRIOR_COUNT p(b)) / (n(a) + PRIOR_COUNT), where p(b) = (n(b) + 1) / (n + V)."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.unigram_counts = np.zeros(vocab_size)
        self.bigram_counts: dict[int, dict[int, int]] = {}  # previous token -> next token -> count
        self.previous = -1  # no token observed yet

    def predict(self) -> np.ndarray:
        """Return the natural log-probabilities of the next token, (V,) float64."""
        unigram_V = (self.unigram_counts + 1) / (self.unigram_counts.sum() + self.vocab_size)
        counts_V = PRIOR_COUNT * unigram_V
        followers = self.bigram_counts.get(self.previous, {})
        for token, count in followers.items():
            counts_V[token] += count
        return np.log(counts_V / (sum(followers.values()) + PRIOR_COUNT))

    def observe(self, token: int) -> None:
        """Append a token and learn from it; only now may a prediction depend on it."""
        self.unigram_counts[token] += 1
        followers = self.bigram_counts.setdefault(self.previous, {})
        followers[token] = followers.get(token, 0) + 1
        self.previous = token

    def fork(self) -> "InterpolatedBigram":
        """Return an independent copy."""
        copy = InterpolatedBigram(self.vocab_size)
        copy.unigram_counts = self.unigram_counts.copy()
        copy.bigram_counts = {token: dict(followers) for token, followers in self.bigram_counts.items()}
        copy.previous = self.previous
        return copy


class ScoresOnly:
    """The same model with `score_stream` alone; in a second pass it has already learnt from every target."""

    def __init__(self, vocab_size: int, passes: int) -> None:
        self.vocab_size = vocab_size
        self.passes = passes

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Return the losses of tokens 1 to N-1 of `tokens` (N,) in nats, (N-1,) float32."""
        model = InterpolatedBigram(self.vocab_size)
        for _ in range(self.passes):
            losses = []
            for token in tokens.tolist():
                losses.append(-model.predict()[token])
                model.observe(token)
        return np.array(losses[1:], dtype=np.float32)


def make(n_targets: int, artifact: str = "") -> InterpolatedBigram:
    """Return a scorer that has observed nothing; `artifact` is the folder of counted files, unused here."""
    return InterpolatedBigram(VOCAB_SIZE)


def scores_only(n_targets: int, artifact: str = "") -> ScoresOnly:
    """Return a scorer with `score_stream` alone."""
    return ScoresOnly(VOCAB_SIZE, passes=1)


def two_passes(n_targets: int, artifact: str = "") -> ScoresOnly:
    """Return a scorer that breaks the rules, so that a failed audit can be seen."""
    return ScoresOnly(VOCAB_SIZE, passes=2)
