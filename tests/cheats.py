"""A small lawful scorer, and the same scorer made unlawful in one way each.

The lawful one counts pairs of tokens as it goes. Every cheat changes one method, says which condition it breaks, and scores better than the
lawful one for it (or shows a number that was not scored); the audit must convict each.
"""

import copy
import itertools
import math

import numpy as np

VOCAB = 32
BOS = 1
SMOOTHING = 0.1


class Bigram:
    """Adaptive: p(b | a) = (count of ab + s) / (count of a + V s), counts over the observed prefix."""

    def __init__(self, n_targets: int) -> None:
        self.n_targets = n_targets
        self.counts = np.full((VOCAB, VOCAB), SMOOTHING)
        self.last: int | None = None
        self.seen = 0

    @property
    def vocab_size(self) -> int:
        return VOCAB

    def fork(self) -> "Bigram":
        return copy.deepcopy(self)

    def predict(self) -> np.ndarray:
        assert self.last is not None
        row = self.counts[self.last]
        return np.log(row / row.sum())

    def observe(self, token: int) -> None:
        if self.last is not None:
            self.counts[self.last, token] += 1
        self.last = token
        self.seen += 1

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        losses = []
        for i, token in enumerate(tokens.tolist()):
            if self.last is not None:
                losses.append(self.loss(token, tokens[i + 1 :]))
            self.observe(token)
        return np.array(losses, dtype=np.float32)

    def loss(self, token: int, future: np.ndarray) -> float:
        """Nats of the next token; a lawful scorer has no use for the future, which the cheats look into."""
        return max(0.0, -float(self.predict()[token]))


class LookAhead(Bigram):
    """C1: sharpens its distribution by the token after next."""

    def loss(self, token: int, future: np.ndarray) -> float:
        assert self.last is not None
        if not len(future):
            return super().loss(token, future)
        joint = self.counts[self.last] * self.counts[:, future[0]]
        return -math.log(joint[token] / joint.sum())


class SecondPass(Bigram):
    """C4: goes over what it is given once to learn it and a second time to score it."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        learner = self.fork()
        Bigram.score_stream(learner, tokens)
        last, seen = self.last, self.seen
        scored = Bigram.score_stream(self, tokens)
        learnt = [*([last] if seen else []), *tokens.tolist()]
        rows = learner.counts / learner.counts.sum(axis=1, keepdims=True)
        again = [-math.log(rows[a, b]) for a, b in itertools.pairwise(learnt)]
        return np.minimum(scored, np.array(again, dtype=np.float32))


class TargetGate(Bigram):
    """C2: of two distributions takes the one that the target likes better, so that the sum exceeds one."""

    def loss(self, token: int, future: np.ndarray) -> float:
        totals = self.counts.sum(axis=0)
        return min(super().loss(token, future), -math.log(totals[token] / totals.sum()))


class UpdateFirst(Bigram):
    """C3: counts the pair before it scores it."""

    def loss(self, token: int, future: np.ndarray) -> float:
        ahead = self.fork()
        assert ahead.last is not None
        assert self.last is not None
        ahead.counts[ahead.last, token] += 1
        ahead.last = self.last
        return max(0.0, -float(ahead.predict()[token]))


class HashedBuckets(Bigram):
    """C2: each id has its bucket's mass instead of its share of it; predict() shows it openly."""

    def predict(self) -> np.ndarray:
        p = np.exp(super().predict())
        return np.log(p.reshape(-1, 2).sum(axis=1).repeat(2))


class DocumentLength(Bigram):
    """C1: looks up where the document ends, and knows there that BOS comes (a schedule from the future)."""

    def loss(self, token: int, future: np.ndarray) -> float:
        lawful = super().loss(token, future)
        if len(future) and not (future[:40] == BOS).any() and token != BOS:
            return max(0.0, lawful - 0.01)  # no end is near, so nothing is spent on it
        return lawful


class DroppedTail(Bigram):
    """C4: leaves out what does not fill a block of eight."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        nll = super().score_stream(tokens)
        return nll[: len(nll) // 8 * 8]


class Subset(Bigram):
    """C4: scores every other target only, and says of the rest that they were certain."""

    def loss(self, token: int, future: np.ndarray) -> float:
        return super().loss(token, future) if self.seen % 2 else 0.0


class PeekAtStream(Bigram):
    """C1: a lawful scorer in small pieces, but given the whole stream at once it learns from it beforehand."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        if len(tokens) > 1000:
            for a, b in zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True):
                self.counts[a, b] += 0.5
        return super().score_stream(tokens)


class SharedState(Bigram):
    """C1: what one fork observes shows in the other."""

    def fork(self) -> "Bigram":
        twin = copy.copy(self)
        return twin


class LooksChange(Bigram):
    """C3: remembers what it predicted, and so predicts something else when it is asked again."""

    def predict(self) -> np.ndarray:
        p = super().predict()
        self.counts[self.last] += 0.5
        return p


UNLAWFUL = (
    LookAhead,
    SecondPass,
    TargetGate,
    UpdateFirst,
    HashedBuckets,
    DocumentLength,
    DroppedTail,
    Subset,
    PeekAtStream,
    SharedState,
    LooksChange,
)


def stream(length: int = 3000, seed: int = 3) -> np.ndarray:
    """Documents of a sparse random chain, (length,) uint16; each begins with BOS and ends at random."""
    generator = np.random.Generator(np.random.PCG64(seed))
    follows = 2 + generator.integers(0, VOCAB - 2, (VOCAB, 3))
    tokens = [BOS]
    while len(tokens) < length:
        tokens.append(BOS if generator.random() < 0.02 else int(follows[tokens[-1], generator.integers(0, 3)]))
    return np.array(tokens, dtype=np.uint16)
