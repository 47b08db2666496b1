"""N-gram table: guesses each token as the one that followed the last few tokens before.

The guess depends on the observed prefix alone. For contexts of several lengths the table stores the
token that followed, how often it followed since (hits) and how often lately it did not (misses), as
#1514's token expert does for one length. The guess, called the hint, is that of the longest known
context. Each length has a hash table whose slots contain 16 bits of the context's hash as the only
proof. A collision makes a hint worse and can make no score unlawful, because how far a hint is
trusted is learned (tilt.py). The hashes are of the tokens' text (`ByteTable.text_hashes`), not of
their ids: with ids permuted the same contexts collide.

Shapes: N tokens, K context lengths, V ids.
"""

import copy
from typing import Any, NamedTuple

import numpy as np

from stages.common.jit import jit_entry, jit_inline, jit_internal

CONTEXT_LENGTHS = np.array([2, 3, 4, 6, 9, 14])  # tokens of a context, K of them
RING = 16  # tokens that are kept; a power of two above the longest context
MIN_BITS = 10  # of a table's number of slots
MAX_BITS = 24
MAX_HITS = 15
MAX_MISSES = 3

# State of a context: 4 hits + misses of its slot, plus AGREES_FLAG if it names the hint.
UNKNOWN = 0  # the context is new
AGREES_FLAG = 64
SLOT_STATES = 2 * AGREES_FLAG

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, 2^64 over the golden ratio (Knuth 6.4)
CHECK_MASK = np.uint64(0xFFFF)

# A slot is 64 bits: check 16, token 16, misses 8, hits 8. Shifts to its fields:
CHECK_SHIFT = np.uint64(48)
TOKEN_SHIFT = np.uint64(32)
MISSES_SHIFT = np.uint64(8)


class NgramArrays(NamedTuple):
    """The data of the compiled functions."""

    tables: np.ndarray  # uint64 (K, slots): a hash table for each context length
    ring: np.ndarray  # uint64 (RING,): text hashes of the last tokens
    text_hashes_V: np.ndarray  # uint64
    slot_shift: np.uint64  # from a hash to its slot, its highest bits


class Slot(NamedTuple):
    """The fields of a slot but its check."""

    token: int
    hits: int
    misses: int


@jit_inline
def _unpack(packed: Any) -> Slot:
    token = np.int64((packed >> TOKEN_SHIFT) & CHECK_MASK)
    hits = np.int64(packed & np.uint64(MAX_HITS))
    misses = np.int64((packed >> MISSES_SHIFT) & np.uint64(MAX_MISSES))
    return Slot(token, hits, misses)


@jit_inline
def _pack(check: Any, slot: Slot) -> Any:
    fields = np.uint64(slot.token) << TOKEN_SHIFT | np.uint64(slot.misses << 8 | slot.hits)
    return check << CHECK_SHIFT | fields


@jit_internal
def _hash_contexts(arrays: NgramArrays, n_tokens: int, slots_K: np.ndarray, checks_K: np.ndarray) -> None:
    """Fill the slots and checks of the contexts that end at the last of `n_tokens` tokens.

    The slot of a context longer than the prefix is -1.
    """
    key = np.uint64(0)
    length = 0
    for k in range(len(CONTEXT_LENGTHS)):
        while length < CONTEXT_LENGTHS[k] and length < n_tokens:
            key = (key ^ arrays.ring[(n_tokens - 1 - length) & (RING - 1)]) * MULTIPLIER
            key ^= key >> np.uint64(29)
            length += 1
        hashed = key * MULTIPLIER
        slots_K[k] = np.int64(hashed >> arrays.slot_shift) if length == CONTEXT_LENGTHS[k] else -1
        checks_K[k] = (hashed >> np.uint64(8)) & CHECK_MASK | np.uint64(1)  # never 0, which is an empty slot


@jit_internal
def _look_up(tables: np.ndarray, slots_K: np.ndarray, checks_K: np.ndarray, states_K: np.ndarray) -> int:
    """Return the hint, or -1, and fill the contexts' states."""
    hint = -1
    for k in range(len(CONTEXT_LENGTHS) - 1, -1, -1):  # the longest context first
        states_K[k] = UNKNOWN
        if slots_K[k] < 0:
            continue
        packed = tables[k, slots_K[k]]
        if packed >> CHECK_SHIFT != checks_K[k]:
            continue
        slot = _unpack(packed)
        if hint < 0:
            hint = slot.token
        states_K[k] = slot.hits * 4 + slot.misses + (AGREES_FLAG if slot.token == hint else 0)
    return hint


@jit_internal
def _learn(tables: np.ndarray, slots_K: np.ndarray, checks_K: np.ndarray, token: int) -> None:
    """Update each context's slot with the token that followed."""
    for k in range(len(CONTEXT_LENGTHS)):
        if slots_K[k] < 0:
            continue
        packed = tables[k, slots_K[k]]
        slot = _unpack(packed)
        if packed >> CHECK_SHIFT != checks_K[k]:
            slot = Slot(token, 1, 0)  # a new context, or one that loses its slot to this one
        elif slot.token == token:
            # Every fourth hit forgives a miss.
            hits = min(slot.hits + 1, MAX_HITS)
            misses = max(slot.misses - 1, 0) if hits & 3 == 0 else slot.misses
            slot = Slot(token, hits, misses)
        else:
            # A miss halves the hits; without any left, the new token takes the slot.
            hits = slot.hits >> 1
            misses = min(slot.misses + 1, MAX_MISSES)
            slot = Slot(slot.token, hits, misses) if hits > 0 else Slot(token, 1, misses)
        tables[k, slots_K[k]] = _pack(checks_K[k], slot)


@jit_entry(makes_arrays=True)
def _scan(
    arrays: NgramArrays,
    n_tokens: int,
    tokens_N: np.ndarray,
    hints_N: np.ndarray,
    states_NK: np.ndarray,
    learn: bool,
) -> None:
    """Fill the hint and the states before each token, and then observe it.

    Without `learn` nothing is observed; used for one token, the next.
    """
    slots_K = np.empty(len(CONTEXT_LENGTHS), np.int64)
    checks_K = np.empty(len(CONTEXT_LENGTHS), np.uint64)
    for i in range(len(hints_N)):
        _hash_contexts(arrays, n_tokens, slots_K, checks_K)
        hints_N[i] = _look_up(arrays.tables, slots_K, checks_K, states_NK[i])
        if learn:
            _learn(arrays.tables, slots_K, checks_K, np.int64(tokens_N[i]))
            arrays.ring[n_tokens & (RING - 1)] = arrays.text_hashes_V[tokens_N[i]]
            n_tokens += 1


class NgramTable:
    """The hash tables of an observed prefix.

    `text_hashes_V` (V,) uint64 are those of the ids' text; `n_targets`, the length of the stream
    and a public constant, sizes the tables.
    """

    def __init__(self, text_hashes_V: np.ndarray, n_targets: int) -> None:
        bits = min(MAX_BITS, max(MIN_BITS, (2 * n_targets - 1).bit_length()))
        self.arrays = NgramArrays(
            tables=np.zeros((len(CONTEXT_LENGTHS), 1 << bits), np.uint64),
            ring=np.zeros(RING, np.uint64),
            text_hashes_V=text_hashes_V,
            slot_shift=np.uint64(64 - bits),
        )
        self.n_tokens = 0  # observed

    def copy(self) -> "NgramTable":
        """An independent copy."""
        twin = copy.copy(self)
        twin.arrays = self.arrays._replace(tables=self.arrays.tables.copy(), ring=self.arrays.ring.copy())
        return twin

    def peek(self) -> tuple[int, np.ndarray]:
        """The hint for the next token, -1 for none, and the states of all contexts, (K,) uint8."""
        no_token_1 = np.empty(1, np.uint16)
        hints_1 = np.empty(1, np.int32)
        states_1K = np.empty((1, len(CONTEXT_LENGTHS)), np.uint8)
        _scan(self.arrays, self.n_tokens, no_token_1, hints_1, states_1K, False)
        return int(hints_1[0]), states_1K[0]

    def update(self, tokens_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Append tokens, and return what `peek` would have returned before each.

        Hints (N,) int32 and states (N, K) uint8.
        """
        hints_N = np.empty(len(tokens_N), np.int32)
        states_NK = np.empty((len(tokens_N), len(CONTEXT_LENGTHS)), np.uint8)
        _scan(self.arrays, self.n_tokens, tokens_N, hints_N, states_NK, True)
        self.n_tokens += len(tokens_N)
        return hints_N, states_NK
