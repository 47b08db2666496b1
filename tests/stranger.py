"""An outside scorer as a stranger would write it, from docs/audit.md alone: nothing of this repository is imported here.

An interpolated bigram model that learns as it goes. `make` has the three steps; `scores_only` offers nothing but score_stream; `two_passes`
is what the stranger would rather not have audited.
"""

import numpy as np

V = 320
STRENGTH = 8.0


class Interpolated:
    """p(b | a) = (n(ab) + S p(b)) / (n(a) + S), p(b) = (n(b) + 1) / (n + V)."""

    vocab_size = V

    def __init__(self) -> None:
        self.singles = np.zeros(V)
        self.pairs: dict[int, dict[int, int]] = {}
        self.last = -1

    def predict(self) -> np.ndarray:
        unigram = (self.singles + 1) / (self.singles.sum() + V)
        law = STRENGTH * unigram
        seen = self.pairs.get(self.last, {})
        for token, count in seen.items():
            law[token] += count
        return np.log(law / (sum(seen.values()) + STRENGTH))

    def observe(self, token: int) -> None:
        self.singles[token] += 1
        after = self.pairs.setdefault(self.last, {})
        after[token] = after.get(token, 0) + 1
        self.last = token

    def fork(self) -> "Interpolated":
        twin = Interpolated()
        twin.singles = self.singles.copy()
        twin.pairs = {token: dict(after) for token, after in self.pairs.items()}
        twin.last = self.last
        return twin


class ScoresOnly:
    """The same model behind the one method; it can be asked to go over its stream twice."""

    def __init__(self, passes: int) -> None:
        self.passes = passes

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        model = Interpolated()
        for _ in range(self.passes):
            losses = []
            for token in tokens.tolist():
                losses.append(-model.predict()[token])
                model.observe(token)
        return np.array(losses[1:], dtype=np.float32)


def make(n_targets: int, artifact: str = "") -> Interpolated:
    return Interpolated()


def scores_only(n_targets: int, artifact: str = "") -> ScoresOnly:
    return ScoresOnly(1)


def two_passes(n_targets: int, artifact: str = "") -> ScoresOnly:
    return ScoresOnly(2)
