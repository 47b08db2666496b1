"""The byte model of #1858, compiled: PPM of orders 0 to 5, escape method C, no exclusion.

Let N be the count of a context and U the number of different bytes that followed it. A byte that followed
c times has the probability c / (N + U); U / (N + U) is the probability of an escape to the context that is
shorter by one. After order 0 every byte has 1 / 256. Without exclusion the 256 probabilities sum to less
than one. The confidence is the largest count over N + U, in the longest context seen before. All orders
count every byte.

Counts are in two hash tables, of contexts and of (context, successor). A key holds the order, the context
and the successor whole (at most 7 bytes), so that the tables never mistake one for another.
"""

import numpy as np
from numba import njit

ORDERS = 5
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
FULL = 0.6  # share of used slots at which a table is doubled
BYTE = np.uint64(8)  # bits

# Columns of a slot; key 0 is an empty slot.
KEY = 0
COUNT = 1

# Fields of a context's COUNT, from the highest: N, U (9 bits), the largest count (27 bits).
DIFFERENT_BITS = np.uint64(9)
LARGEST_BITS = np.uint64(27)
LARGEST_MASK = np.uint64((1 << 27) - 1)


class Tables:
    """The two hash tables, which grow by doubling."""

    def __init__(self, bits: int = 16) -> None:
        self.successors = np.zeros((1 << bits, 2), np.uint64)  # (order, context, successor) and its count
        self.contexts = np.zeros((1 << bits, 2), np.uint64)  # (order, context) and N, U, the largest count
        self.used = np.zeros(2, np.int64)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """The tables and the numbers of their used slots, for compiled functions."""
        return self.successors, self.contexts, self.used

    def grow(self) -> None:
        """Double the slots of both."""
        self.successors = _doubled(self.successors)
        self.contexts = _doubled(self.contexts)


@njit(nogil=True)
def _slot(table: np.ndarray, key: np.uint64) -> int:
    """The slot of a key, or the empty one where it belongs."""
    mask = np.uint64(len(table) - 1)
    hashed = key * MULTIPLIER
    slot = (hashed ^ (hashed >> np.uint64(32))) & mask
    while table[slot, KEY] != 0 and table[slot, KEY] != key:
        slot = (slot + np.uint64(1)) & mask
    return np.int64(slot)


@njit(nogil=True)
def _doubled(old: np.ndarray) -> np.ndarray:
    new = np.zeros((2 * len(old), 2), np.uint64)
    for i in range(len(old)):
        if old[i, KEY] != 0:
            new[_slot(new, old[i, KEY])] = old[i]
    return new


@njit(nogil=True)
def _find(
    tables: tuple[np.ndarray, ...], text: np.ndarray, end: int, keys: np.ndarray, slots: np.ndarray
) -> int:
    """Find the contexts before text[end], shortest first; returns their number.

    Writes a context's key to keys[order], and to slots[order] its slot and the slot of its successor
    text[end].
    """
    successors, contexts, _ = tables
    longest = min(ORDERS, end)
    held = np.uint64(0)
    for order in range(longest + 1):
        if order:
            held |= np.uint64(text[end - order]) << np.uint64(8 * (order - 1))
        keys[order] = np.uint64(order + 1) << np.uint64(56) | held << BYTE
        slots[order, 0] = _slot(contexts, keys[order])
        slots[order, 1] = _slot(successors, keys[order] | np.uint64(text[end]))
    return longest + 1


@njit(nogil=True)
def _probability(tables: tuple[np.ndarray, ...], slots: np.ndarray, count: int) -> tuple[float, float]:
    """The probability of the byte that was found, and the confidence before it."""
    successors, contexts, _ = tables
    escape = 1.0
    confidence = 0.0
    found = False
    for order in range(count - 1, -1, -1):
        fields = contexts[slots[order, 0], COUNT]
        if fields == 0:
            continue
        different = np.float64((fields >> LARGEST_BITS) & np.uint64(511))
        whole = np.float64(fields >> (LARGEST_BITS + DIFFERENT_BITS)) + different
        if not found:
            confidence = np.float64(fields & LARGEST_MASK) / whole
            found = True
        successor_count = successors[slots[order, 1], COUNT]
        if successor_count != 0:
            return escape * np.float64(successor_count) / whole, confidence
        escape *= different / whole
    return escape / 256, confidence


@njit(nogil=True)
def look(tables: tuple[np.ndarray, ...], text: np.ndarray, end: int) -> tuple[float, float]:
    """The probability of text[end], and the confidence before it."""
    slots = np.empty((ORDERS + 1, 2), np.int64)
    return _probability(tables, slots, _find(tables, text, end, np.empty(ORDERS + 1, np.uint64), slots))


@njit(nogil=True)
def _count(
    tables: tuple[np.ndarray, ...],
    text: np.ndarray,
    end: int,
    keys: np.ndarray,
    slots: np.ndarray,
    count: int,
) -> None:
    """Count text[end] in each of the `count` contexts before it."""
    successors, contexts, used = tables
    for order in range(count):
        # A slot that was empty may have been taken by a shorter context since it was found.
        successor_key = keys[order] | np.uint64(text[end])
        context_slot = slots[order, 0]
        if contexts[context_slot, KEY] != keys[order]:
            context_slot = _slot(contexts, keys[order])
        successor_slot = slots[order, 1]
        if successors[successor_slot, KEY] != successor_key:
            successor_slot = _slot(successors, successor_key)

        fields = contexts[context_slot, COUNT]
        successor_count = successors[successor_slot, COUNT] + np.uint64(1)
        if fields == 0:
            contexts[context_slot, KEY] = keys[order]
            used[1] += 1
        if successor_count == 1:
            successors[successor_slot, KEY] = successor_key
            used[0] += 1
            fields += np.uint64(1) << LARGEST_BITS

        successors[successor_slot, COUNT] = successor_count
        fields += np.uint64(1) << (LARGEST_BITS + DIFFERENT_BITS)
        is_largest = successor_count > fields & LARGEST_MASK
        contexts[context_slot, COUNT] = fields + np.uint64(1) if is_largest else fields


@njit(nogil=True)
def _predict_until_full(
    tables: tuple[np.ndarray, ...],
    text: np.ndarray,
    first: int,
    stop: int,
    probability: np.ndarray,
    confidence: np.ndarray,
) -> int:
    """Predict and count bytes until a table is too full or `stop` is reached; returns the end."""
    keys = np.empty(ORDERS + 1, np.uint64)
    slots = np.empty((ORDERS + 1, 2), np.int64)
    for end in range(first, stop):
        if max(tables[2][0], tables[2][1]) + ORDERS + 1 > FULL * len(tables[0]):
            return end
        count = _find(tables, text, end, keys, slots)
        probability[end], confidence[end] = _probability(tables, slots, count)
        _count(tables, text, end, keys, slots, count)
    return stop


def predict(
    text: np.ndarray, tables: Tables, first: int, stop: int, probability: np.ndarray, confidence: np.ndarray
) -> None:
    """Predict text[first:stop] byte by byte, and count each byte after its prediction.

    `text` is (B,) uint8; `probability` and `confidence`, (B,) float64, are filled from `first` to `stop`.
    """
    while first < stop:
        first = _predict_until_full(tables.arrays, text, first, stop, probability, confidence)
        if first < stop:
            tables.grow()
