"""Cheats against time (C1, C3, C4): each changes one thing of a lawful scorer, and says which condition it breaks and who did it."""

import itertools
import math

import numpy as np

from tests.zoo.lawful import BOS, SMOOTHING, VOCAB, Bigram, PerDocument, Tilted


def learnt_from(tokens: np.ndarray, last: int | None, weight: float = 1.0) -> np.ndarray:
    """Counts of the pairs of a call, the one that leads into it included."""
    counts = np.zeros((VOCAB, VOCAB))
    for a, b in itertools.pairwise([*([] if last is None else [last]), *tokens.tolist()]):
        counts[a, b] += weight
    return counts


def documents_of(tokens: np.ndarray) -> list[tuple[int, int]]:
    """The pieces of a call that belong to one document."""
    starts = [0, *(np.flatnonzero(tokens[1:] == BOS) + 1).tolist()]
    return list(zip(starts, [*starts[1:], len(tokens)], strict=True))


class LookAhead(Bigram):
    """C1: sharpens its distribution by the token after next."""

    def loss(self, token: int, future: np.ndarray) -> float:
        assert self.last is not None
        if not len(future):
            return super().loss(token, future)
        joint = self.counts[self.last] * self.counts[:, future[0]]
        return -math.log(joint[token] / joint.sum())


class PreQuantTraining(Bigram):
    """C1, C3: trains on what it is to score for two epochs, quantises, and scores then (#1376, #1487, #1972)."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        self.counts = np.round(self.counts + 2 * learnt_from(tokens, self.last), 1)
        return super().score_stream(tokens)


class SecondPass(Bigram):
    """C4: goes over what it is given once to learn it and a second time to score it (#846, #868, #888)."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        learner = self.fork()
        Bigram.score_stream(learner, tokens)
        last, seen = self.last, self.seen
        scored = Bigram.score_stream(self, tokens)
        learnt = [*([last] if seen else []), *tokens.tolist()]
        rows = learner.counts / learner.counts.sum(axis=1, keepdims=True)
        again = [-math.log(rows[a, b]) for a, b in itertools.pairwise(learnt)]
        return np.minimum(scored, np.array(again, dtype=np.float32))


class BestOfTwo(Bigram):
    """C4: two runs over the stream, of which the better is reported (#573)."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        other = self.fork()
        other.counts = np.where(other.counts == SMOOTHING, 3 * SMOOTHING, other.counts)
        runs = [Bigram.score_stream(self, tokens), Bigram.score_stream(other, tokens)]
        return min(runs, key=lambda nll: float(nll.sum()))


class Slot(Bigram):
    """C1, C2: a shift of the logits, fitted to each batch of eight targets and then used to score them (SLOT: #1176, #1229)."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        losses = []
        for first in range(0, len(tokens), 8):
            batch = tokens[first : first + 8]
            shift = np.bincount(batch, minlength=VOCAB) * 0.3
            for token in batch.tolist():
                if self.last is not None:
                    law = np.exp(self.predict() + shift)
                    losses.append(-math.log(law[token] / law.sum()))
                self.observe(token)
        return np.array(losses, dtype=np.float32)


EMBEDDINGS = np.random.Generator(np.random.PCG64(1)).normal(0, 0.5, (VOCAB, VOCAB))


class SmearAcrossBos(PerDocument):
    """C1 of documents packed side by side: the first token of one is mixed with the last of its neighbour (SmearGate: #1667, #1797)."""

    def __init__(self, n_targets: int) -> None:
        super().__init__(n_targets)
        self.neighbour = BOS

    def predict(self) -> np.ndarray:
        logp = super().predict()
        if self.last == BOS:
            logp += EMBEDDINGS[self.neighbour]
            logp -= np.log(np.exp(logp).sum())
        return logp

    def learn(self, last: int, token: int) -> None:
        super().learn(last, token)
        self.neighbour = last if token == BOS else self.neighbour


class LongestFirst(Bigram):
    """C1: goes through the documents of a call longest first and learns as it goes (#1536; phased training since #1610)."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        given = self.last is None
        losses = np.zeros(len(tokens))
        for start, stop in sorted(documents_of(tokens), key=lambda part: part[0] - part[1]):
            if tokens[start] == BOS:
                losses[start], self.last = math.log(VOCAB), None  # each document begins anew
            for i in range(start, stop):
                if self.last is not None:
                    losses[i] = self.loss(int(tokens[i]), tokens[i + 1 :])
                self.observe(int(tokens[i]))
        self.last = int(tokens[-1])
        return losses[1 if given else 0 :].astype(np.float32)


class Circular(LongestFirst):
    """C1, C4: weights learn longest first, a cache in stream order; each document waits for the other (#2130, #2135)."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        cached = Bigram.score_stream(self.fork(), tokens)
        trained = super().score_stream(tokens)
        return -np.log(0.5 * np.exp(-cached) + 0.5 * np.exp(-trained))


class TiltFromTheFuture(Tilted):
    """C1: the table that its hints come from is filled before scoring, from the whole call."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        for a, b, c in zip(tokens[:-2].tolist(), tokens[1:-1].tolist(), tokens[2:].tolist(), strict=True):
            self.followed[a, b] = c
        return super().score_stream(tokens)


class UpdateFirst(Bigram):
    """C3: counts the pair before it scores it."""

    def loss(self, token: int, future: np.ndarray) -> float:
        ahead = self.fork()
        assert ahead.last is not None
        ahead.counts[ahead.last, token] += 1
        return max(0.0, -float(ahead.predict()[token]))


class DocumentLength(Bigram):
    """C1: looks up where the document ends, and knows there that BOS comes (a schedule from the future)."""

    def loss(self, token: int, future: np.ndarray) -> float:
        lawful = super().loss(token, future)
        if len(future) and not (future[:40] == BOS).any() and token != BOS:
            return max(0.0, lawful - 0.01)  # no end is near, so nothing is spent on it
        return lawful


class DroppedTail(Bigram):
    """C4: leaves out what does not fill a block of eight (#1493 to #1855)."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        nll = super().score_stream(tokens)
        return nll[: len(nll) // 8 * 8]


class Subset(Bigram):
    """C4: scores every other target only, and says of the rest that they were certain (#1785, #1835, #1858)."""

    def loss(self, token: int, future: np.ndarray) -> float:
        return super().loss(token, future) if self.seen % 2 else 0.0


class PeekAtStream(Bigram):
    """C1: a lawful scorer in small pieces, but given the whole stream at once it learns from it beforehand."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        if len(tokens) > 1000:
            self.counts += learnt_from(tokens, self.last, 0.5)
        return super().score_stream(tokens)


class SharedState(Bigram):
    """C1: what one fork observes shows in the other."""

    def fork(self) -> "Bigram":
        return self


class LooksChange(Bigram):
    """C3: remembers what it predicted, and so predicts something else when it is asked again."""

    def predict(self) -> np.ndarray:
        p = super().predict()
        self.counts = self.counts + 0.5
        return p


class Dice(Bigram):
    """C4: starts from noise that is new in each run, which invites to run it until it is good."""

    runs = itertools.count()

    def __init__(self, n_targets: int) -> None:
        super().__init__(n_targets)
        self.counts += 0.05 * np.random.Generator(np.random.PCG64(next(self.runs))).random((VOCAB, VOCAB))
