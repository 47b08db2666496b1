"""Which token came next when the last few tokens were seen before: one hint for each position, from the stream behind it alone.

For contexts of several lengths a table remembers the token that followed, how often it did so since (hits) and how often it lately did not
(misses), as #1514's token expert does for one length; the hint is the longest known context's. Tables are hashed and hold no proof but 16
bits, so a collision makes a hint worse and can make no score unlawful: what a hint is worth is learnt (scorer.py). What is hashed is what
ids say (`ByteTable.codes`), not their numbers: with other names for the ids the same contexts collide.

A slot is 64 bits: check 16, token 16, misses 8, hits 8. Shapes: N tokens, K lengths.
"""

import numpy as np
from numba import njit

LENGTHS = np.array([2, 3, 4, 6, 9, 14])  # tokens of a context, K of them
MOST_HITS, MOST_MISSES = 15, 3
AGREES = 64  # added to the state of a context that names the hint, too
STATES = 2 * AGREES
UNKNOWN = 0  # a state: this context is new
RING = 16  # tokens that are kept; a power of two above the longest context
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, 2^64 over the golden ratio (Knuth 6.4)
CHECK_MASK = np.uint64(0xFFFF)


@njit(nogil=True)
def _slots(ring: np.ndarray, seen: int, bits: int, slots_K: np.ndarray, checks_K: np.ndarray) -> None:
    """Where the contexts that end at the last token seen have their slots; a context that is not complete gets -1."""
    key = np.uint64(0)
    length = 0
    for k in range(len(LENGTHS)):
        while length < LENGTHS[k] and length < seen:
            key = (key ^ ring[(seen - 1 - length) & (RING - 1)]) * MULTIPLIER
            key ^= key >> np.uint64(29)
            length += 1
        hashed = key * MULTIPLIER
        slots_K[k] = np.int64(hashed >> np.uint64(64 - bits)) if length == LENGTHS[k] else -1
        checks_K[k] = (hashed >> np.uint64(8)) & CHECK_MASK | np.uint64(1)  # never 0, which is an empty slot


@njit(nogil=True)
def _look(tables: np.ndarray, slots_K: np.ndarray, checks_K: np.ndarray, states_K: np.ndarray) -> int:
    """The hint, or -1; fills the states."""
    hint = -1
    for k in range(len(LENGTHS) - 1, -1, -1):
        states_K[k] = UNKNOWN
        if slots_K[k] < 0:
            continue
        slot = tables[k, slots_K[k]]
        if slot >> np.uint64(48) != checks_K[k]:
            continue
        token = np.int64((slot >> np.uint64(32)) & CHECK_MASK)
        if hint < 0:
            hint = token
        states_K[k] = (
            np.int64(slot & np.uint64(15)) * 4
            + np.int64((slot >> np.uint64(8)) & np.uint64(3))
            + (AGREES if token == hint else 0)
        )
    return hint


@njit(nogil=True)
def _learn(tables: np.ndarray, slots_K: np.ndarray, checks_K: np.ndarray, token: int) -> None:
    """Tell each context what followed it."""
    for k in range(len(LENGTHS)):
        if slots_K[k] < 0:
            continue
        slot = tables[k, slots_K[k]]
        hits, misses, kept = 1, 0, token
        if slot >> np.uint64(48) == checks_K[k]:
            hits, misses = np.int64(slot & np.uint64(15)), np.int64((slot >> np.uint64(8)) & np.uint64(3))
            kept = np.int64((slot >> np.uint64(32)) & CHECK_MASK)
            if kept == token:
                hits = min(hits + 1, MOST_HITS)
                misses = max(misses - 1, 0) if hits & 3 == 0 else misses
            else:
                hits, misses = hits >> 1, min(misses + 1, MOST_MISSES)
                if hits == 0:
                    hits, kept = 1, token
        tables[k, slots_K[k]] = (
            checks_K[k] << np.uint64(48) | np.uint64(kept) << np.uint64(32) | np.uint64(misses << 8 | hits)
        )


@njit(nogil=True)
def _follow(
    tables: np.ndarray,
    ring: np.ndarray,
    seen: int,
    bits: int,
    codes_V: np.ndarray,
    tokens: np.ndarray,
    hints: np.ndarray,
    states: np.ndarray,
    learn: bool,
) -> int:
    """For each token the hint that stood before it was seen; then it is. Without `learn` nothing is kept: one look ahead."""
    slots_K, checks_K = np.empty(len(LENGTHS), np.int64), np.empty(len(LENGTHS), np.uint64)
    for i in range(len(hints)):
        _slots(ring, seen, bits, slots_K, checks_K)
        hints[i] = _look(tables, slots_K, checks_K, states[i])
        if learn:
            _learn(tables, slots_K, checks_K, np.int64(tokens[i]))
            ring[seen & (RING - 1)] = codes_V[tokens[i]]
            seen += 1
    return seen


class Hints:
    """The tables over an observed prefix of ids with these codes, (V,) uint64; sized for a stream of `n_targets`, a public constant."""

    def __init__(self, codes_V: np.ndarray, n_targets: int) -> None:
        self.codes_V = codes_V
        self.bits = min(24, max(10, (2 * n_targets - 1).bit_length()))
        self.tables = np.zeros((len(LENGTHS), 1 << self.bits), np.uint64)
        self.ring = np.zeros(RING, np.uint64)
        self.seen = 0

    def copy(self) -> "Hints":
        """An independent copy."""
        twin = object.__new__(type(self))
        twin.bits, twin.seen, twin.codes_V = self.bits, self.seen, self.codes_V
        twin.tables, twin.ring = self.tables.copy(), self.ring.copy()
        return twin

    def next(self) -> tuple[int, np.ndarray]:
        """The hint for the token that follows the prefix, -1 for none, and the states of all contexts, (K,) uint8."""
        hints, states = np.empty(1, np.int32), np.empty((1, len(LENGTHS)), np.uint8)
        _follow(
            self.tables,
            self.ring,
            self.seen,
            self.bits,
            self.codes_V,
            np.empty(1, np.uint16),
            hints,
            states,
            False,
        )
        return int(hints[0]), states[0]

    def observe(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Append tokens, (N,); what `next` would have said before each: hints (N,) int32, states (N, K) uint8."""
        hints, states = np.empty(len(tokens), np.int32), np.empty((len(tokens), len(LENGTHS)), np.uint8)
        self.seen = _follow(
            self.tables, self.ring, self.seen, self.bits, self.codes_V, tokens, hints, states, True
        )
        return hints, states
