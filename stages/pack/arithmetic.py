"""An arithmetic coder of binary decisions; integers only, so that it gives the same bytes on every machine.

It is the carryless one of PAQ (Mahoney 2002) with 40 bits of interval and 16 of probability. Probabilities are counters that adapt by 1/n,
and by 1/1024 in the end. Coding and decoding are one function, which is told each decision or finds it out.
"""

from typing import Any

import numpy as np
from numba import njit

INTERVAL_BITS = 40
INTERVAL_MASK = (1 << INTERVAL_BITS) - 1
OUT_SHIFT = INTERVAL_BITS - 8
LOW, HIGH, CODE, POSITION = 0, 1, 2, 3  # of the registers

PROBABILITY_BITS = 22  # of a counter; the coder takes the upper 16
ONE = 1 << PROBABILITY_BITS
HALF: Any = np.int64(32768)  # of 65,536; a plain constant would have the functions it is given to compiled anew
MOST_CERTAIN = 24  # of 65,536: a decision never costs less than 0.0005 bits nor more than 11.4
COUNT_LIMIT = 1023
FLUSH_BYTES = 5  # that a decoder has read ahead


@njit(nogil=True)
def code(bit: int, probability: int, registers: np.ndarray, buffer: np.ndarray, decoding: bool) -> int:
    """Code or decode one decision whose being 1 has `probability` of 65,536."""
    low, high = registers[LOW], registers[HIGH]
    middle = low + ((high - low) >> 16) * probability
    if decoding:
        bit = 1 if registers[CODE] <= middle else 0
    if bit:
        high = middle
    else:
        low = middle + 1
    while (low ^ high) >> OUT_SHIFT == 0:
        position = registers[POSITION]
        if decoding:
            following = np.int64(buffer[position]) if position < len(buffer) else np.int64(0)
            registers[CODE] = ((registers[CODE] << 8) & INTERVAL_MASK) | following
        elif position < len(buffer):
            buffer[position] = high >> OUT_SHIFT
        registers[POSITION] = position + 1
        low = (low << 8) & INTERVAL_MASK
        high = ((high << 8) & INTERVAL_MASK) | 255
    registers[LOW], registers[HIGH] = low, high
    return bit


@njit(nogil=True)
def learn(
    bit: int, chances: np.ndarray, counts: np.ndarray, context: int, place: int, registers: np.ndarray, buffer: np.ndarray, decoding: bool
) -> int:
    """Code or decode one decision with a counter's probability, and let the counter learn it."""
    chance = chances[context, place]
    probability = min(max(chance >> (PROBABILITY_BITS - 16), MOST_CERTAIN), 65536 - MOST_CERTAIN)
    bit = code(bit, probability, registers, buffer, decoding)
    count = counts[context, place]
    target = ONE - 1 if bit else 0
    chances[context, place] = chance + 2 * (target - chance) // (2 * count + 3)
    if count < COUNT_LIMIT:
        counts[context, place] = count + 1
    return bit


@njit(nogil=True)
def code_number(number: int, digits: int, registers: np.ndarray, buffer: np.ndarray, decoding: bool) -> int:
    """Code or decode so many binary digits as they are."""
    value = 0
    for place in range(digits - 1, -1, -1):
        value = 2 * value + code((number >> place) & 1, HALF, registers, buffer, decoding)
    return value


def to_write() -> np.ndarray:
    """Registers at the start of coding."""
    return np.array([0, INTERVAL_MASK, 0, 0], np.int64)


def to_read(payload: bytes) -> np.ndarray:
    """Registers at the start of decoding."""
    first = payload[:FLUSH_BYTES].ljust(FLUSH_BYTES, b"\0")
    return np.array([0, INTERVAL_MASK, int.from_bytes(first, "big"), FLUSH_BYTES], np.int64)


def ending(registers: np.ndarray) -> bytes:
    """The last bytes of a stream: the fewest that lie in the interval however they go on with zeros."""
    low, high = int(registers[LOW]), int(registers[HIGH])
    for count in range(FLUSH_BYTES + 1):
        shift = INTERVAL_BITS - 8 * count
        value = high >> shift << shift
        if value >= low:
            return (value >> shift).to_bytes(count, "big")
    raise AssertionError("an interval holds its own end")
