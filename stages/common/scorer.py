"""The protocol of everything that scores a stream; an audit needs nothing else.

The stream is x_0, x_1, ..., x_{N-1}. x_0 is given; x_1 ... x_{N-1} are the N-1 targets. `predict`
commits to a full distribution over the next token before the scorer has that token, and `observe`
reveals it. The four conditions of a lawful score (#1017) then hold by the form of the interface.
It remains to be audited that `score_stream`, the fast form, gives the same scores. A factory of
scorers receives the number of targets, a public constant, because a schedule over chunks needs it.
"""

from typing import Protocol

import numpy as np


class Scorer(Protocol):
    """A stateful predictor that has observed some prefix of a stream."""

    @property
    def vocab_size(self) -> int:
        """V, the number of token ids of a distribution."""
        ...

    def predict(self) -> np.ndarray:
        """Natural log-probabilities of the next token, (V,) float64, from the observed prefix alone."""
        ...

    def observe(self, token: int) -> None:
        """Append a token to the observed prefix; no state may depend on it before."""
        ...

    def fork(self) -> "Scorer":
        """An independent copy: a change of one does not affect the other."""
        ...

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Score and observe tokens (N,) uint16 in order; returns negative log-likelihoods in nats, float32.

        From an empty prefix the first token is given, so N tokens yield N-1 values. Later calls
        continue where the last ended and yield one value for each token.
        """
        ...


class TimedScorer(Scorer, Protocol):
    """A scorer that states how many targets it takes until its speed is steady."""

    @property
    def warm_up_targets(self) -> int:
        """Number of targets that are scored first and timed separately.

        Scoring a stream in two calls, cut after these targets, forms the same batches as scoring it
        in one.
        """
        ...
