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


class Tables:
    """What was counted: successors of contexts, and for each context how many, how many different, and the largest count."""

    def __init__(self, bits: int = 16) -> None:
        self.keys = np.zeros(1 << bits, np.uint64)  # of (order, context, successor); 0 is empty
        self.counts = np.zeros(1 << bits, np.uint32)
        self.context_keys = np.zeros(1 << bits, np.uint64)  # of (order, context)
        self.contexts = np.zeros((1 << bits, 3), np.uint32)  # N, U, largest
        self.used = np.zeros(2, np.int64)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """As compiled functions take them."""
        return self.keys, self.counts, self.context_keys, self.contexts, self.used

    def grow(self) -> None:
        """Twice the slots."""
        keys, counts, context_keys, contexts, used = self.arrays
        self.__init__((2 * len(keys)).bit_length() - 1)  # type: ignore[misc]
        self.used[:] = used
        for old, new, held, to in ((keys, self.keys, counts, self.counts), (context_keys, self.context_keys, contexts, self.contexts)):
            _move(old, new, slots := np.empty(len(old), np.int64))
            filled = old != 0
            to[slots[filled]] = held[filled]


@njit(nogil=True)
def _slot(keys: np.ndarray, key: np.uint64) -> int:
    """The slot of a key, or the empty one where it belongs."""
    mask = np.uint64(len(keys) - 1)
    hashed = key * MULTIPLIER
    slot = (hashed ^ (hashed >> np.uint64(32))) & mask
    while keys[slot] != 0 and keys[slot] != key:
        slot = (slot + np.uint64(1)) & mask
    return np.int64(slot)


@njit(nogil=True)
def _move(old: np.ndarray, new: np.ndarray, slots: np.ndarray) -> None:
    for i in range(len(old)):
        if old[i] != 0:
            slots[i] = _slot(new, old[i])
            new[slots[i]] = old[i]


@njit(nogil=True)
def _contexts(text: np.ndarray, end: int, keys: np.ndarray) -> int:
    """The keys of the contexts before `end`, shortest first; how many there are."""
    longest, held = min(ORDERS, end), np.uint64(0)
    for order in range(longest + 1):
        if order:
            held |= np.uint64(text[end - order]) << np.uint64(8 * (order - 1))
        keys[order] = np.uint64(order + 1) << np.uint64(56) | held << BYTE
    return longest + 1


@njit(nogil=True)
def look(tables: tuple[np.ndarray, ...], text: np.ndarray, end: int, keys: np.ndarray) -> tuple[float, float]:
    """The probability of text[end], and the confidence before it."""
    successors, counts, context_keys, contexts, _ = tables
    probability, escape, confidence, found = 0.0, 1.0, 0.0, False
    for order in range(_contexts(text, end, keys) - 1, -1, -1):
        slot = _slot(context_keys, keys[order])
        if context_keys[slot] == 0:
            continue
        whole = np.float64(contexts[slot, 0]) + np.float64(contexts[slot, 1])
        if not found:
            confidence, found = contexts[slot, 2] / whole, True
        place = _slot(successors, keys[order] | np.uint64(text[end]))
        if successors[place] != 0:
            return escape * counts[place] / whole, confidence
        escape *= contexts[slot, 1] / whole
    probability = escape / 256
    return probability, confidence


@njit(nogil=True)
def _count(tables: tuple[np.ndarray, ...], text: np.ndarray, end: int, keys: np.ndarray) -> None:
    """Every context before text[end] counts it."""
    successors, counts, context_keys, contexts, used = tables
    for order in range(_contexts(text, end, keys)):
        slot, place = _slot(context_keys, keys[order]), _slot(successors, keys[order] | np.uint64(text[end]))
        if context_keys[slot] == 0:
            context_keys[slot] = keys[order]
            used[1] += 1
        if successors[place] == 0:
            successors[place] = keys[order] | np.uint64(text[end])
            contexts[slot, 1] += np.uint32(1)
            used[0] += 1
        counts[place] += np.uint32(1)
        contexts[slot, 0] += np.uint32(1)
        contexts[slot, 2] = max(contexts[slot, 2], counts[place])


@njit(nogil=True)
def _follow(
    tables: tuple[np.ndarray, ...], text: np.ndarray, first: int, stop: int, probability: np.ndarray, confidence: np.ndarray
) -> int:
    """Predict and count bytes until a table is too full or the stop is reached; where it ended."""
    keys = np.empty(ORDERS + 1, np.uint64)
    for end in range(first, stop):
        if max(tables[4][0], tables[4][1]) + ORDERS + 1 > FULL * len(tables[0]):
            return end
        probability[end], confidence[end] = look(tables, text, end, keys)
        _count(tables, text, end, keys)
    return stop


def predict(text: np.ndarray, tables: Tables, first: int, stop: int, probability: np.ndarray, confidence: np.ndarray) -> None:
    """Fill both from `first` to `stop` and let the tables learn those bytes; text (B,) uint8, the others (B,) float64."""
    while (first := _follow(tables.arrays, text, first, stop, probability, confidence)) < stop:
        tables.grow()
