"""The byte model of #1858, as it is, and fast: counts behind contexts of 0 to 5 bytes, escapes of PPM's method C, no exclusion.

With N the count of a context and U its different successors, a successor seen c times has c / (N + U), and U / (N + U) goes on to the
context shorter by one; below order 0 every byte has 1 / 256. Without exclusion the 256 probabilities sum to less than one. The confidence
is the largest count over N + U of the longest context that was seen. All orders count every byte.

Keys hold order, context and successor whole (at most 7 bytes), so tables never mistake one for another.
"""

import numpy as np
from numba import njit

ORDERS = 5
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
FULL = 0.6  # share of used slots at which a table is doubled
BYTE = np.uint64(8)
KEY, COUNT = 0, 1  # of a successor's slot
DIFFERENT_BITS, LARGEST_BITS = np.uint64(9), np.uint64(27)  # of a context's second word: N, U, largest count
LARGEST_MASK = np.uint64((1 << 27) - 1)


class Tables:
    """What was counted, in two hash tables; a slot is a key, 0 where it is empty, and what is known of it."""

    def __init__(self, bits: int = 16) -> None:
        self.successors = np.zeros((1 << bits, 2), np.uint64)  # (order, context, successor) and its count
        self.contexts = np.zeros((1 << bits, 2), np.uint64)  # (order, context) and N, U, the largest count
        self.used = np.zeros(2, np.int64)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """As compiled functions take them."""
        return self.successors, self.contexts, self.used

    def grow(self) -> None:
        """Twice the slots."""
        self.successors, self.contexts = _doubled(self.successors), _doubled(self.contexts)


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
    """Keys and slots of the contexts before text[end] and of it behind each, shortest first; how many contexts there are."""
    successors, contexts, _ = tables
    longest, held = min(ORDERS, end), np.uint64(0)
    for order in range(longest + 1):
        if order:
            held |= np.uint64(text[end - order]) << np.uint64(8 * (order - 1))
        keys[order] = np.uint64(order + 1) << np.uint64(56) | held << BYTE
        slots[order, 0] = _slot(contexts, keys[order])
        slots[order, 1] = _slot(successors, keys[order] | np.uint64(text[end]))
    return longest + 1


@njit(nogil=True)
def _chance(tables: tuple[np.ndarray, ...], slots: np.ndarray, count: int) -> tuple[float, float]:
    """The probability of the byte that was found, and the confidence before it."""
    successors, contexts, _ = tables
    escape, confidence, found = 1.0, 0.0, False
    for order in range(count - 1, -1, -1):
        known = contexts[slots[order, 0], COUNT]
        if known == 0:
            continue
        different = np.float64((known >> LARGEST_BITS) & np.uint64(511))
        whole = np.float64(known >> (LARGEST_BITS + DIFFERENT_BITS)) + different
        if not found:
            confidence, found = np.float64(known & LARGEST_MASK) / whole, True
        seen = successors[slots[order, 1], COUNT]
        if seen != 0:
            return escape * np.float64(seen) / whole, confidence
        escape *= different / whole
    return escape / 256, confidence


@njit(nogil=True)
def look(tables: tuple[np.ndarray, ...], text: np.ndarray, end: int) -> tuple[float, float]:
    """The probability of text[end], and the confidence before it."""
    slots = np.empty((ORDERS + 1, 2), np.int64)
    return _chance(tables, slots, _find(tables, text, end, np.empty(ORDERS + 1, np.uint64), slots))


@njit(nogil=True)
def _count(
    tables: tuple[np.ndarray, ...],
    text: np.ndarray,
    end: int,
    keys: np.ndarray,
    slots: np.ndarray,
    count: int,
) -> None:
    """Every context before text[end] counts it."""
    successors, contexts, used = tables
    for order in range(count):
        slot, place = slots[order, 0], slots[order, 1]
        if contexts[slot, KEY] != keys[order]:  # it was empty, and a shorter context may have taken it since
            slot = _slot(contexts, keys[order])
        if successors[place, KEY] != keys[order] | np.uint64(text[end]):
            place = _slot(successors, keys[order] | np.uint64(text[end]))
        known, seen = contexts[slot, COUNT], successors[place, COUNT] + np.uint64(1)
        if known == 0:
            contexts[slot, KEY] = keys[order]
            used[1] += 1
        if seen == 1:
            successors[place, KEY] = keys[order] | np.uint64(text[end])
            used[0] += 1
            known += np.uint64(1) << LARGEST_BITS
        successors[place, COUNT] = seen
        known += np.uint64(1) << (LARGEST_BITS + DIFFERENT_BITS)
        contexts[slot, COUNT] = known + np.uint64(1) if seen > known & LARGEST_MASK else known


@njit(nogil=True)
def _follow(
    tables: tuple[np.ndarray, ...],
    text: np.ndarray,
    first: int,
    stop: int,
    probability: np.ndarray,
    confidence: np.ndarray,
) -> int:
    """Predict and count bytes until a table is too full or the stop is reached; where it ended."""
    keys, slots = np.empty(ORDERS + 1, np.uint64), np.empty((ORDERS + 1, 2), np.int64)
    for end in range(first, stop):
        if max(tables[2][0], tables[2][1]) + ORDERS + 1 > FULL * len(tables[0]):
            return end
        count = _find(tables, text, end, keys, slots)
        probability[end], confidence[end] = _chance(tables, slots, count)
        _count(tables, text, end, keys, slots, count)
    return stop


def predict(
    text: np.ndarray, tables: Tables, first: int, stop: int, probability: np.ndarray, confidence: np.ndarray
) -> None:
    """Fill both from `first` to `stop` and let the tables learn those bytes; text (B,) uint8, the others (B,) float64."""
    while (first := _follow(tables.arrays, text, first, stop, probability, confidence)) < stop:
        tables.grow()
