"""Cheats that use time (C1, C3, C4).

Each changes one thing of a lawful scorer; its docstring names the condition that it breaks.
"""

import itertools
import math

import numpy as np

from tests.zoo.lawful import BOS, SMOOTHING, VOCAB, Bigram, PerDocument, Tilted

EMBEDDINGS = np.random.Generator(np.random.PCG64(1)).normal(0, 0.5, (VOCAB, VOCAB))


def count_pairs(tokens: np.ndarray, last: int | None, weight: float = 1.0) -> np.ndarray:
    """Count the token pairs of a call (n,), (V, V); the pair with the token before the call is included."""
    counts = np.zeros((VOCAB, VOCAB))
    for a, b in itertools.pairwise([*([] if last is None else [last]), *tokens.tolist()]):
        counts[a, b] += weight
    return counts


def document_spans(tokens: np.ndarray) -> list[tuple[int, int]]:
    """Divide a call (n,) into half-open spans of one document each."""
    starts = [0, *(np.flatnonzero(tokens[1:] == BOS) + 1).tolist()]
    return list(zip(starts, [*starts[1:], len(tokens)], strict=True))


class LookAhead(Bigram):
    """C1: sharpens its distribution with the token after the next."""

    def loss(self, token: int, future: np.ndarray) -> float:
        assert self.last is not None
        if not len(future):
            return super().loss(token, future)
        joint = self.counts[self.last] * self.counts[:, future[0]]
        return -math.log(joint[token] / joint.sum())


class PreQuantTraining(Bigram):
    """C1, C3: trains two epochs on the tokens to score, quantises, then scores (#1376, #1487, #1972)."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        self.counts = np.round(self.counts + 2 * count_pairs(tokens, self.last), 1)
        return super().score_stream(tokens)


class SecondPass(Bigram):
    """C4: passes over a call once to learn it and a second time to score it (#846, #868, #888)."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        learner = self.fork()
        Bigram.score_stream(learner, tokens)
        before = [self.last] if self.observed else []
        first_pass = Bigram.score_stream(self, tokens)

        rows = learner.counts / learner.counts.sum(axis=1, keepdims=True)
        second_pass = [-math.log(rows[a, b]) for a, b in itertools.pairwise([*before, *tokens.tolist()])]
        return np.minimum(first_pass, np.array(second_pass, dtype=np.float32))


class BestOfTwo(Bigram):
    """C4: runs twice over the stream, and reports the better run (#573)."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        other = self.fork()
        other.counts = np.where(other.counts == SMOOTHING, 3 * SMOOTHING, other.counts)
        runs = [Bigram.score_stream(self, tokens), Bigram.score_stream(other, tokens)]
        return min(runs, key=lambda nll: float(nll.sum()))


class Slot(Bigram):
    """C1, C2: fits a shift of the logits to each eight targets, then scores them (SLOT: #1176, #1229)."""

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


class SmearAcrossBos(PerDocument):
    """C1, for documents packed into one row (#1667, #1797).

    Mixes the first token of a document with the last token of its neighbour.
    """

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
    """C1: scores the documents of a call longest first, and learns on the way (#1536).

    Phased training does the same since #1610.
    """

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        first_is_given = self.last is None
        losses = np.zeros(len(tokens))
        for start, stop in sorted(document_spans(tokens), key=lambda span: span[0] - span[1]):
            if tokens[start] == BOS:
                # Each document starts again: BOS is scored uniformly.
                losses[start] = math.log(VOCAB)
                self.last = None
            for i in range(start, stop):
                if self.last is not None:
                    losses[i] = self.loss(int(tokens[i]), tokens[i + 1 :])
                self.observe(int(tokens[i]))
        self.last = int(tokens[-1])
        return losses[1 if first_is_given else 0 :].astype(np.float32)


class Circular(LongestFirst):
    """C1, C4: weights learn longest first, a cache learns in stream order (#2130, #2135).

    Two documents may each need the other to be decoded first.
    """

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        cached = Bigram.score_stream(self.fork(), tokens)
        trained = super().score_stream(tokens)
        return -np.log(0.5 * np.exp(-cached) + 0.5 * np.exp(-trained))


class TiltFromTheFuture(Tilted):
    """C1: fills the table of its hints from the whole call before it scores."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        for a, b, c in zip(tokens[:-2].tolist(), tokens[1:-1].tolist(), tokens[2:].tolist(), strict=True):
            self.followed[a, b] = c
        return super().score_stream(tokens)


class UpdateFirst(Bigram):
    """C3: counts a pair before it scores it."""

    def loss(self, token: int, future: np.ndarray) -> float:
        updated = self.fork()
        assert updated.last is not None
        updated.counts[updated.last, token] += 1
        return max(0.0, -float(updated.predict()[token]))


class DocumentLength(Bigram):
    """C1: looks up where the document ends, and knows there that BOS comes (a schedule from the future)."""

    def loss(self, token: int, future: np.ndarray) -> float:
        lawful = super().loss(token, future)
        if len(future) and not (future[:40] == BOS).any() and token != BOS:
            return max(0.0, lawful - 0.01)  # no end is near, so no probability is spent on it
        return lawful


class DroppedTail(Bigram):
    """C4: leaves out the last targets, which do not fill a block of eight (#1493 to #1855)."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        nll = super().score_stream(tokens)
        return nll[: len(nll) // 8 * 8]


class Subset(Bigram):
    """C4: scores every other target only, and claims that the others were certain (#1785, #1835, #1858)."""

    def loss(self, token: int, future: np.ndarray) -> float:
        return super().loss(token, future) if self.observed % 2 else 0.0


class PeekAtStream(Bigram):
    """C1: lawful in short calls, but learns from the stream beforehand if it is given the whole in one."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        if len(tokens) > 1000:
            self.counts += count_pairs(tokens, self.last, 0.5)
        return super().score_stream(tokens)


class LawfulAtFirst(Bigram):
    """C1: lawful in the first part of the stream; after it, long calls pass over their tokens twice."""

    LAWFUL_TOKENS = 1800

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        first = max(0, self.LAWFUL_TOKENS - self.observed)
        if len(tokens) - first < 500:
            return super().score_stream(tokens)
        losses = super().score_stream(tokens[:first])
        self.counts += count_pairs(tokens[first:], self.last, 0.5)
        return np.concatenate([losses, super().score_stream(tokens[first:])])


class SharedState(Bigram):
    """C1: a fork shares its state with the original."""

    def fork(self) -> "Bigram":
        return self


class LooksChange(Bigram):
    """C3: predict() changes the state, so that it predicts something else the next time."""

    def predict(self) -> np.ndarray:
        logp = super().predict()
        self.counts = self.counts + 0.5
        return logp


class Dice(Bigram):
    """C4: starts from noise that is new in each run, so that one can run it until the result is good."""

    runs = itertools.count()

    def __init__(self, n_targets: int) -> None:
        super().__init__(n_targets)
        self.counts += 0.05 * np.random.Generator(np.random.PCG64(next(self.runs))).random((VOCAB, VOCAB))
