"""Cheats against the sum (C2): what they charge for all ids together is more than one."""

import math

import numpy as np

from tests.zoo.lawful import LETTERS, PIECES, TRIE, VOCAB, Bigram, Cached, Spelling


class TargetGate(Bigram):
    """Of two distributions takes the one that the target likes better (min-NLL: #659)."""

    def loss(self, token: int, future: np.ndarray) -> float:
        totals = self.counts.sum(axis=0)
        return min(super().loss(token, future), -math.log(totals[token] / totals.sum()))


class AntiHijack(Spelling):
    """Trusts the network alone where that was sure of what came; who was sure of the rest is never charged (#1858, #1885)."""

    def loss(self, token: int, future: np.ndarray) -> float:
        network = -float(Bigram.predict(self)[token])
        return max(0.0, network) if network < 1.0 else super().loss(token, future)


class HashedBuckets(Bigram):
    """Each id has its bucket's mass instead of its share of it; predict() shows it openly (#779, #886)."""

    def predict(self) -> np.ndarray:
        p = np.exp(super().predict())
        return np.log(p.reshape(-1, 2).sum(axis=1).repeat(2))


class TargetInKey(Cached):
    """The target is hashed with its context, and what collides is counted for all who collide (#770, #774, #779, #788)."""

    def __init__(self, n_targets: int, buckets: int = 64, weight: float = 0.4) -> None:
        super().__init__(n_targets, buckets, weight)
        self.hits = np.full(buckets, SMALL)
        self.contexts = np.full(buckets, 2 * SMALL)

    def keys(self) -> tuple[int, np.ndarray]:
        context = self.before * 31 + (self.last or 0) * 7
        return context % self.buckets, (context * 17 + np.arange(VOCAB) * 13) % self.buckets

    def predict(self) -> np.ndarray:
        context, targets = self.keys()
        share = np.minimum(1.0, self.hits[targets] / self.contexts[context])
        return np.log((1 - self.weight) * np.exp(Bigram.predict(self)) + self.weight * share)

    def learn(self, last: int, token: int) -> None:
        context, targets = self.keys()
        self.hits[targets[token]] += 1
        self.contexts[context] += 1
        super().learn(last, token)


SMALL = 0.1


class WithinWord(Bigram):
    """An expert for what continues a word, switched on when the target does (#1145, #1420, #2018)."""

    def loss(self, token: int, future: np.ndarray) -> float:
        logp = self.predict()
        if PIECES[token][:1] in (b" ", b""):
            return max(0.0, -float(logp[token]))
        continuing = np.array([piece[:1] not in (b" ", b"") for piece in PIECES])
        hint = int(np.where(continuing, logp, -np.inf).argmax())
        z = 1 + math.exp(logp[hint]) * math.expm1(1.5)
        return max(0.0, -float(logp[token]) - 1.5 * (token == hint) + math.log(z))


class SpreadBytes(Spelling):
    """The network's p of a token becomes p^(1/n) for each of its n bytes, mixed with the byte model's (#1835, #1850, #1881, #1991)."""

    def predict(self) -> np.ndarray:
        p = np.exp(Bigram.predict(self))
        lengths = np.array([max(1, len(piece)) for piece in PIECES])
        spread, a = p ** (1 / lengths), self.letter_law()
        mixed = (1 - self.WEIGHT) * spread[:, None] + self.WEIGHT * a[None, :]
        return np.where(TRIE.path.sum(axis=1) > 0, (TRIE.path * np.log(mixed)).sum(axis=1), np.log(p))


class NoEnd(Spelling):
    """A law over the next byte at each node, and none over whether the token ends there (#1916, #2098, #2138)."""

    def predict(self) -> np.ndarray:
        p = np.exp(Bigram.predict(self))
        mass, ending, a = TRIE.below @ p, TRIE.ends @ p, self.letter_law()
        siblings = np.bincount(TRIE.parent[1:], a[1:], minlength=len(a))
        going_on = np.maximum(mass - ending, 1e-12)
        step = (1 - self.WEIGHT) * mass / going_on[TRIE.parent] + self.WEIGHT * a / siblings[TRIE.parent]
        step = np.minimum(step, 1.0)
        silent = np.array([not piece for piece in PIECES])
        return np.where(silent, np.log(p), TRIE.path[:, 1:] @ np.log(step[1:]))


assert len(LETTERS) == 4
