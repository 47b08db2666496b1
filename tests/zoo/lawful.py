"""Small lawful scorers, one for each kind that the field has: fixed, adaptive, per document, score-first in chunks, cached, spelt by bytes.

They are what the cheats are made from, and what the audit must let pass whatever it draws.
"""

import copy

import numpy as np

VOCAB = 32
BOS = 1
SMOOTHING = 0.1
# The bytes of each id: many pieces begin others, which is what an END event is for. A space is written "_".
SPELT = """
    a b c _ ab ba ac ca bc cb abc cab _a _b _c _ab _ba _ac _ca _bc _cb _abc _cab aa bb cc _aa aba _aba bab
"""
PIECES = [b"", b"", *(piece.replace("_", " ").encode() for piece in SPELT.split())]
LETTERS = b"abc "
assert len(PIECES) == VOCAB


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
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, (np.ndarray, list, dict)):
                setattr(twin, name, value.copy())
        return twin

    def predict(self) -> np.ndarray:
        assert self.last is not None
        row = self.counts[self.last]
        return np.log(row / row.sum())

    def observe(self, token: int) -> None:
        if self.last is not None:
            self.learn(self.last, token)
        self.last = token
        self.seen += 1

    def learn(self, last: int, token: int) -> None:
        """What is kept of a pair, once it is scored."""
        self.counts[last, token] += 1

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


class Fixed(Bigram):
    """Track A: a law that nothing changes."""

    def __init__(self, n_targets: int) -> None:
        super().__init__(n_targets)
        self.counts = np.random.Generator(np.random.PCG64(5)).gamma(0.3, size=(VOCAB, VOCAB)) + SMOOTHING

    def learn(self, last: int, token: int) -> None:
        pass


class PerDocument(Bigram):
    """Starts anew at each document, and says so."""

    scope = "document"

    def learn(self, last: int, token: int) -> None:
        super().learn(last, token)
        if token == BOS:
            self.counts = np.full((VOCAB, VOCAB), SMOOTHING)


class Chunked(Bigram):
    """Score-first training in chunks: what a chunk taught is used when the chunk is over (#549)."""

    CHUNK = 48

    def __init__(self, n_targets: int) -> None:
        super().__init__(n_targets)
        self.pending = np.zeros((VOCAB, VOCAB))

    def learn(self, last: int, token: int) -> None:
        self.pending[last, token] += 1
        if self.seen % self.CHUNK == 0:
            self.counts = self.counts + 2 * self.pending
            self.pending = np.zeros((VOCAB, VOCAB))


class Cached(Bigram):
    """A hashed cache of pairs of tokens, normalised over the vocabulary and mixed in with a fixed weight."""

    def __init__(self, n_targets: int, buckets: int = 1 << 10, weight: float = 0.4) -> None:
        super().__init__(n_targets)
        self.buckets, self.weight = buckets, weight
        self.cache = np.full((min(buckets, 1 << 10), VOCAB), SMOOTHING)
        self.before = 0

    def bucket(self) -> int:
        return (self.before * 31 + (self.last or 0) * 7) % len(self.cache)

    def predict(self) -> np.ndarray:
        cached = self.cache[self.bucket()]
        return np.log((1 - self.weight) * np.exp(super().predict()) + self.weight * cached / cached.sum())

    def learn(self, last: int, token: int) -> None:
        super().learn(last, token)
        self.cache[self.bucket(), token] += 1
        self.before = last


class Tilted(Bigram):
    """A tilt towards what followed the last two tokens before: p' = p exp(b [v = h]) / Z with Z = 1 + p(h) (exp(b) - 1)."""

    BOOST = 1.0

    def __init__(self, n_targets: int) -> None:
        super().__init__(n_targets)
        self.before = 0
        self.followed: dict[tuple[int, int], int] = {}

    def hint(self) -> int | None:
        return self.followed.get((self.before, self.last or 0))

    def predict(self) -> np.ndarray:
        logp, hint = super().predict(), self.hint()
        if hint is None:
            return logp
        logp -= np.log1p(np.exp(logp[hint]) * np.expm1(self.BOOST))
        logp[hint] += self.BOOST
        return logp

    def learn(self, last: int, token: int) -> None:
        super().learn(last, token)
        self.followed[self.before, last] = token
        self.before = last


class Trie:
    """The pieces as a tree of bytes: node 0 is the root, an edge leads to each other node."""

    def __init__(self, pieces: list[bytes]) -> None:
        nodes = sorted(
            {piece[:size] for piece in pieces for size in range(len(piece) + 1)},
            key=lambda node: (len(node), node),
        )
        number = {node: i for i, node in enumerate(nodes)}
        self.node_of = np.array([number[piece] for piece in pieces])
        self.below = np.array(
            [[piece.startswith(node) for piece in pieces] for node in nodes], dtype=np.float64
        )
        self.parent = np.array([0, *(number[node[:-1]] for node in nodes[1:])])
        self.letter = np.array([0, *(LETTERS.index(node[-1:]) for node in nodes[1:])])
        self.before = np.array(
            [4, *(LETTERS.index(node[-2:-1]) if len(node) > 1 else 4 for node in nodes[1:])]
        )  # 4: what was before
        self.path = np.array(
            [[len(node) > 0 and piece.startswith(node) for node in nodes] for piece in pieces],
            dtype=np.float64,
        )
        self.ends = np.zeros((len(nodes), len(pieces)))
        self.ends[self.node_of, np.arange(len(pieces))] = 1


TRIE = Trie(PIECES)


class Spelling(Bigram):
    """A byte model mixed in over the tree of pieces, END included, so that it is a law over tokens."""

    WEIGHT = 0.5

    def __init__(self, n_targets: int) -> None:
        super().__init__(n_targets)
        self.letters = np.full((5, 4), SMOOTHING)
        self.letter = 4

    def letter_law(self) -> np.ndarray:
        """The byte model's probability of each node's last byte, (nodes,)."""
        law = self.letters / self.letters.sum(axis=1, keepdims=True)
        before = np.where(TRIE.before == 4, self.letter, TRIE.before)
        return law[before, TRIE.letter]

    def predict(self) -> np.ndarray:
        p = np.exp(super().predict())
        mass, ending, a = TRIE.below @ p, TRIE.ends @ p, self.letter_law()
        siblings = np.bincount(TRIE.parent[1:], a[1:], minlength=len(a))
        going_on = 1 - ending / mass
        step = (1 - self.WEIGHT) * mass / mass[TRIE.parent] + self.WEIGHT * going_on[
            TRIE.parent
        ] * a / siblings[TRIE.parent]
        return TRIE.path[:, 1:] @ np.log(step[1:]) + np.log(p / mass[TRIE.node_of])

    def learn(self, last: int, token: int) -> None:
        super().learn(last, token)
        for byte in PIECES[token]:
            self.letters[self.letter, LETTERS.index(byte)] += 1
            self.letter = LETTERS.index(byte)
        self.letter = self.letter if PIECES[token] else 4


LAWFUL = (Bigram, Fixed, PerDocument, Chunked, Cached, Tilted, Spelling)


def stream(length: int = 3000, seed: int = 3) -> np.ndarray:
    """Documents of a sparse random chain, (length,) uint16; each begins with BOS and ends at random."""
    generator = np.random.Generator(np.random.PCG64(seed))
    follows = 2 + generator.integers(0, VOCAB - 2, (VOCAB, 3))
    tokens = [BOS]
    while len(tokens) < length:
        tokens.append(
            BOS if generator.random() < 0.02 else int(follows[tokens[-1], generator.integers(0, 3)])
        )
    return np.array(tokens, dtype=np.uint16)
