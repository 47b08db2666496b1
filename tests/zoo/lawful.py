"""Small lawful scorers, one for each kind that the challenge has seen.

The cheats are made from them, and the audit must let them pass whatever positions it draws. The
vocabulary has V = 32 ids.
"""

import copy
import itertools

import numpy as np
import torch

VOCAB = 32
BOS = 1
SMOOTHING = 0.1  # pseudo-count of every pair of tokens
# The bytes of each id: many pieces are the beginning of others, which is why an END event is needed.
# "_" is a space.
SPELT = """
    a b c _ ab ba ac ca bc cb abc cab _a _b _c _ab _ba _ac _ca _bc _cb _abc _cab aa bb cc _aa aba _aba bab
"""
PIECES = [b"", b"", *(piece.replace("_", " ").encode() for piece in SPELT.split())]
LETTERS = b"abc "
NO_LETTER = 4  # index of "no letter before", after those of LETTERS
assert len(PIECES) == VOCAB


class Bigram:
    """Adaptive bigram: p(b | a) = (count of ab + s) / (count of a + V s), counts over the observed prefix."""

    def __init__(self, n_targets: int) -> None:
        self.n_targets = n_targets
        self.counts = np.full((VOCAB, VOCAB), SMOOTHING)
        self.last: int | None = None
        self.observed = 0  # tokens

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
        self.observed += 1

    def learn(self, last: int, token: int) -> None:
        """Update the counts with a pair of tokens, after it was scored."""
        self.counts[last, token] += 1

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        losses = []
        for i, token in enumerate(tokens.tolist()):
            if self.last is not None:
                losses.append(self.loss(token, tokens[i + 1 :]))
            self.observe(token)
        return np.array(losses, dtype=np.float32)

    def loss(self, token: int, future: np.ndarray) -> float:
        """Score the next token, in nats; only cheats use the tokens after it, `future` (n,)."""
        return max(0.0, -float(self.predict()[token]))


class Fixed(Bigram):
    """Fixed distribution that nothing changes (track A)."""

    def __init__(self, n_targets: int) -> None:
        super().__init__(n_targets)
        self.counts = np.random.Generator(np.random.PCG64(5)).gamma(0.3, size=(VOCAB, VOCAB)) + SMOOTHING

    def learn(self, last: int, token: int) -> None:
        pass


class PerDocument(Bigram):
    """Starts again at each document, and declares it."""

    scope = "document"

    def learn(self, last: int, token: int) -> None:
        super().learn(last, token)
        if token == BOS:
            self.counts = np.full((VOCAB, VOCAB), SMOOTHING)


class Chunked(Bigram):
    """Score-first training in chunks: the pairs of a chunk are learnt when the chunk is over (#549)."""

    CHUNK = 48

    def __init__(self, n_targets: int) -> None:
        super().__init__(n_targets)
        self.pending = np.zeros((VOCAB, VOCAB))

    def learn(self, last: int, token: int) -> None:
        self.pending[last, token] += 1
        if self.observed % self.CHUNK == 0:
            self.counts = self.counts + 2 * self.pending
            self.pending = np.zeros((VOCAB, VOCAB))


class Cached(Bigram):
    """Hashed cache of token pairs, normalised over the vocabulary and mixed in with a fixed weight."""

    def __init__(self, n_targets: int, buckets: int = 1 << 10, weight: float = 0.4) -> None:
        super().__init__(n_targets)
        self.buckets = buckets
        self.weight = weight
        self.cache = np.full((min(buckets, 1 << 10), VOCAB), SMOOTHING)
        self.before = 0  # the token before the last

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
    """Tilts to the token h that followed the last two tokens before.

    p'(v) = p(v) exp(b [v = h]) / Z with Z = 1 + p(h) (exp(b) - 1).
    """

    BOOST = 1.0  # b

    def __init__(self, n_targets: int) -> None:
        super().__init__(n_targets)
        self.before = 0  # the token before the last
        self.followed: dict[tuple[int, int], int] = {}

    def hint(self) -> int | None:
        return self.followed.get((self.before, self.last or 0))

    def predict(self) -> np.ndarray:
        logp = super().predict()
        hint = self.hint()
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
    """The pieces as a tree of bytes with M nodes.

    Node 0 is the root; an edge with a letter leads to each other node.
    """

    def __init__(self, pieces: list[bytes]) -> None:
        prefixes = {piece[:size] for piece in pieces for size in range(len(piece) + 1)}
        nodes = sorted(prefixes, key=lambda node: (len(node), node))
        number = {node: i for i, node in enumerate(nodes)}
        inner = nodes[1:]

        self.node_of = np.array([number[piece] for piece in pieces])  # (V,): where each piece ends
        self.parent = np.array([0, *(number[node[:-1]] for node in inner)])  # (M,)
        # Index of the letter on the edge to each node, and of the letter on the edge before it, (M,).
        self.letter = np.array([0, *(LETTERS.index(node[-1:]) for node in inner)])
        self.letter_before = np.array(
            [NO_LETTER, *(LETTERS.index(node[-2:-1]) if len(node) > 1 else NO_LETTER for node in inner)]
        )

        # Incidence matrices: (M, V) pieces at or below a node, (V, M) nodes on the path to a piece, (M,
        # V) piece ends at a node.
        below = [[piece.startswith(node) for piece in pieces] for node in nodes]
        path = [[len(node) > 0 and piece.startswith(node) for node in nodes] for piece in pieces]
        self.below = np.array(below, dtype=np.float64)
        self.path = np.array(path, dtype=np.float64)
        self.ends = np.zeros((len(nodes), len(pieces)))
        self.ends[self.node_of, np.arange(len(pieces))] = 1


TRIE = Trie(PIECES)


class Spelling(Bigram):
    """Byte model mixed in over the tree of pieces.

    The END event is included, so that the mixture is a distribution over tokens.
    """

    WEIGHT = 0.5  # of the byte model

    def __init__(self, n_targets: int) -> None:
        super().__init__(n_targets)
        self.letters = np.full((5, 4), SMOOTHING)  # counts of letter pairs, after NO_LETTER too
        self.letter = NO_LETTER

    def letter_law(self) -> np.ndarray:
        """Compute the byte model's probability of each node's last letter, (M,)."""
        law = self.letters / self.letters.sum(axis=1, keepdims=True)
        before = np.where(TRIE.letter_before == NO_LETTER, self.letter, TRIE.letter_before)
        return law[before, TRIE.letter]

    def predict(self) -> np.ndarray:
        # The bigram's probability of the pieces at or below each node, and of the END event there.
        p = np.exp(super().predict())
        mass = TRIE.below @ p
        continues = 1 - TRIE.ends @ p / mass

        # The byte model's probability of each edge, normalised over the edges of its node.
        letter_p = self.letter_law()
        siblings = np.bincount(TRIE.parent[1:], letter_p[1:], minlength=len(letter_p))

        # Mix the two on each edge; END keeps the bigram's probability.
        parent = TRIE.parent
        bigram_step = (1 - self.WEIGHT) * mass / mass[parent]
        letter_step = self.WEIGHT * continues[parent] * letter_p / siblings[parent]
        step = bigram_step + letter_step
        return TRIE.path[:, 1:] @ np.log(step[1:]) + np.log(p / mass[TRIE.node_of])

    def learn(self, last: int, token: int) -> None:
        super().learn(last, token)
        for byte in PIECES[token]:
            self.letters[self.letter, LETTERS.index(byte)] += 1
            self.letter = LETTERS.index(byte)
        self.letter = self.letter if PIECES[token] else NO_LETTER


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round float64 numbers to the nearest bfloat16."""
    return torch.from_numpy(x).bfloat16().double().numpy()


class BFloat16(Bigram):
    """Returns log-probabilities in bfloat16, which sum to one but for their rounding."""

    precision = "bfloat16"

    def predict(self) -> np.ndarray:
        return round_to_bfloat16(super().predict())


class BFloat16Logits(Bigram):
    """Computes in bfloat16: losses of the fast path and predictions are rounded at different places."""

    precision = "bfloat16"

    def predict(self) -> np.ndarray:
        logits = round_to_bfloat16(super().predict() + 7.0)
        return logits - np.log(np.exp(logits).sum())

    def loss(self, token: int, future: np.ndarray) -> float:
        logits = round_to_bfloat16(Bigram.predict(self) - 3.0)
        return max(0.0, -float(logits[token] - np.log(np.exp(logits).sum())))


class Float32(Bigram):
    """Returns float32 arrays, and its class has no `vocab_size`: the audit must ask the tokenizer."""

    @property
    def vocab_size(self) -> int:
        raise AttributeError("vocab_size")

    def predict(self) -> np.ndarray:
        row = self.counts[self.last or 0].astype(np.float32)
        return np.log(row / row.sum())


class TorchNetwork(Bigram):
    """Network of one layer with random, seeded weights, trained after each token; returns tensors."""

    WIDTH = 16
    RATE = 0.3  # of its gradient descent

    def __init__(self, n_targets: int) -> None:
        super().__init__(n_targets)
        generator = torch.Generator().manual_seed(n_targets)
        self.embedding = torch.randn(VOCAB, self.WIDTH, generator=generator)
        self.head = torch.zeros(VOCAB, self.WIDTH)

    def predict(self) -> torch.Tensor:  # type: ignore[override]
        return torch.log_softmax(self.head @ self.embedding[self.last or 0], dim=0)

    def learn(self, last: int, token: int) -> None:
        # A new tensor, so that forks keep theirs.
        error = -self.predict().exp()
        error[token] += 1
        self.head = self.head + self.RATE * torch.outer(error, self.embedding[last]) / self.WIDTH


class ImpossibleIds(Bigram):
    """Gives an id that never occurs, as pad, the probability zero; the others sum to one."""

    NEVER = 0

    def predict(self) -> np.ndarray:
        row = self.counts[self.last or 0].copy()
        row[self.NEVER] = 0
        with np.errstate(divide="ignore"):
            return np.log(row / row.sum())


class UnevenRounding(Bigram):
    """Losses differ by up to 2e-6 from call to call and from run to run, as sums of atomics do."""

    ROUNDING = 2.0e-6  # nats
    calls = itertools.count()

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        losses = super().score_stream(tokens)
        generator = np.random.Generator(np.random.PCG64(next(self.calls)))
        errors = generator.uniform(-self.ROUNDING, self.ROUNDING, len(losses))
        return np.maximum(losses + errors, 0).astype(np.float32)

    def predict(self) -> np.ndarray:
        generator = np.random.Generator(np.random.PCG64(next(self.calls)))
        return super().predict() + generator.uniform(-self.ROUNDING, self.ROUNDING)


class Confident(Bigram):
    """Trusts its counts far too much: many probabilities are one, and surprises cost 70 nats."""

    POWER = 12.0

    def predict(self) -> np.ndarray:
        logits = self.POWER * super().predict()
        top = logits.max()
        return logits - top - np.log(np.exp(logits - top).sum())


class Leaky(Bigram):
    """Loses bits: its probabilities sum to 0.9."""

    def predict(self) -> np.ndarray:
        return super().predict() + np.log(0.9)


LAWFUL = (
    Bigram,
    Fixed,
    PerDocument,
    Chunked,
    Cached,
    Tilted,
    Spelling,
    BFloat16,
    BFloat16Logits,
    Float32,
    TorchNetwork,
    ImpossibleIds,
    UnevenRounding,
    Confident,
    Leaky,
)


def random_stream(length: int = 3000, seed: int = 3) -> np.ndarray:
    """Draw documents from a sparse random Markov chain, (length,) uint16.

    Each begins with BOS and ends at random.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    successors = 2 + generator.integers(0, VOCAB - 2, (VOCAB, 3))
    tokens = [BOS]
    while len(tokens) < length:
        if generator.random() < 0.02:
            tokens.append(BOS)
        else:
            tokens.append(int(successors[tokens[-1], generator.integers(0, 3)]))
    return np.array(tokens, dtype=np.uint16)
