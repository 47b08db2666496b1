"""The protocol of everything that scores a stream, and so the only thing that an audit sees.

The stream is x_0, x_1, ..., x_{N-1}; x_0 is given, x_1 ... x_{N-1} are the N-1 targets. `predict` commits to a full distribution
over the next token before that token exists to the scorer, `observe` reveals it: the four conditions of a lawful score (#1017) then
hold by the shape of the interface, and what remains to be audited is that `score_stream`, the fast form, says the same. The number
of targets is a public constant that a factory is given, because a schedule over chunks needs it.
"""

from typing import Protocol

import numpy as np


class Scorer(Protocol):
    """A stateful predictor that has observed some prefix of a stream."""

    @property
    def vocab_size(self) -> int:
        """The number of token ids a distribution is over."""
        ...

    def predict(self) -> np.ndarray:
        """Natural log-probabilities of the next token, (V,) float64; a function of the observed prefix alone."""
        ...

    def observe(self, token: int) -> None:
        """Append the token to the observed prefix; only now may any state depend on it."""
        ...

    def fork(self) -> "Scorer":
        """An independent copy: what is done to one does not show in the other."""
        ...

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Score and observe many tokens, uint16, in order: their negative log-likelihoods in nats, float32.

        From an empty prefix the first token is given, so that N tokens yield N-1 values; later calls go on where the last ended and
        yield one value for each token.
        """
        ...
