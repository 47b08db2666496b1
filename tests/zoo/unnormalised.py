"""Cheats against the sum (C2): the probabilities that they charge for all ids together are more than one."""

import math
import zlib

import numpy as np

from tests.zoo.lawful import LETTERS, PIECES, TRIE, VOCAB, Bigram, Cached, Spelling

assert len(LETTERS) == 4
SMALL_COUNT = 0.1  # initial count of the hashed cache


class TargetGate(Bigram):
    """Uses of two distributions the one that likes the target better (minimum of the losses: #659)."""

    def loss(self, token: int, future: np.ndarray) -> float:
        totals = self.counts.sum(axis=0)
        return min(super().loss(token, future), -math.log(totals[token] / totals.sum()))


class RareGate(TargetGate):
    """Gates as above, at one context in 200 only."""

    RARE = 200

    def loss(self, token: int, future: np.ndarray) -> float:
        if zlib.crc32(b"%d %d" % (self.observed, self.last or 0)) % self.RARE:
            return Bigram.loss(self, token, future)
        return super().loss(token, future)


class RareExcess(Bigram):
    """Shows probabilities that sum to 1.5, at one context in 300 only."""

    RARE = 300

    def predict(self) -> np.ndarray:
        logp = super().predict()
        if zlib.crc32(b"%d %d" % (self.observed, self.last or 0)) % self.RARE:
            return logp
        return logp + math.log(1.5)


class AntiHijack(Spelling):
    """Trusts the network alone if it was sure of the target (#1858, #1885).

    If it was sure of another token, nothing is charged for that.
    """

    def loss(self, token: int, future: np.ndarray) -> float:
        network = -float(Bigram.predict(self)[token])
        return max(0.0, network) if network < 1.0 else super().loss(token, future)


class HashedBuckets(Bigram):
    """Gives each id the probability of its whole bucket; predict() shows it openly (#779, #886)."""

    def predict(self) -> np.ndarray:
        p = np.exp(super().predict())
        return np.log(p.reshape(-1, 2).sum(axis=1).repeat(2))


class TargetInKey(Cached):
    """Hashes the target with its context (#770, #774, #779, #788).

    A count is shared by all ids whose hashes collide, and counts for each of them.
    """

    def __init__(self, n_targets: int, buckets: int = 64, weight: float = 0.4) -> None:
        super().__init__(n_targets, buckets, weight)
        self.hits = np.full(buckets, SMALL_COUNT)
        self.contexts = np.full(buckets, 2 * SMALL_COUNT)

    def keys(self) -> tuple[int, np.ndarray]:
        """Compute the bucket of the context, and that of the context with each id, (V,)."""
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


class WithinWord(Bigram):
    """An expert for pieces that continue a word, switched on if the target is one (#1145, #1420, #2018)."""

    BOOST = 1.5

    def loss(self, token: int, future: np.ndarray) -> float:
        logp = self.predict()
        if PIECES[token][:1] in (b" ", b""):
            return max(0.0, -float(logp[token]))
        continues = np.array([piece[:1] not in (b" ", b"") for piece in PIECES])
        hint = int(np.where(continues, logp, -np.inf).argmax())
        z = 1 + math.exp(logp[hint]) * math.expm1(self.BOOST)
        return max(0.0, -float(logp[token]) - self.BOOST * (token == hint) + math.log(z))


class SpreadBytes(Spelling):
    """Spreads the network's p of a token as p^(1/n) over its n bytes (#1835, #1850, #1881, #1991).

    Each is mixed with the byte model's probability of the byte.
    """

    def predict(self) -> np.ndarray:
        p = np.exp(Bigram.predict(self))
        lengths = np.array([max(1, len(piece)) for piece in PIECES])
        spread = p ** (1 / lengths)
        mixed = (1 - self.WEIGHT) * spread[:, None] + self.WEIGHT * self.letter_law()[None, :]
        return np.where(TRIE.path.sum(axis=1) > 0, (TRIE.path * np.log(mixed)).sum(axis=1), np.log(p))


class NoEnd(Spelling):
    """Has a distribution over the next byte at each node (#1916, #2098, #2138).

    It has none over whether the token ends there.
    """

    def predict(self) -> np.ndarray:
        p = np.exp(Bigram.predict(self))
        mass = TRIE.below @ p
        ending = TRIE.ends @ p
        continues = np.maximum(mass - ending, 1e-12)
        letter_p = self.letter_law()
        siblings = np.bincount(TRIE.parent[1:], letter_p[1:], minlength=len(letter_p))

        # Both mixed distributions sum to one over the edges of a node, although the token may end there.
        parent = TRIE.parent
        step = (1 - self.WEIGHT) * mass / continues[parent] + self.WEIGHT * letter_p / siblings[parent]
        step = np.minimum(step, 1.0)
        no_bytes = np.array([not piece for piece in PIECES])
        return np.where(no_bytes, np.log(p), TRIE.path[:, 1:] @ np.log(step[1:]))
