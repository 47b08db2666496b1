"""An arithmetic coder of binary decisions; integers only, so that it gives the same bytes on every machine.

It is the carryless one of PAQ (Mahoney 2002) with 40 bits of interval and 16 of probability. Probabilities are counters that adapt by 1/n,
and by 1/4096 in the end; what lies between two contexts is coded by the line between their counters, as PAQ does in its secondary
estimation, and teaches both. Coding and decoding are one function, which is told each decision or finds it out.

Shapes: K contexts, U decisions.
"""

from typing import Any, NamedTuple

import numpy as np

from stages.common.jit import inlined, inner

INTERVAL_BITS = 40
INTERVAL_MASK = (1 << INTERVAL_BITS) - 1
OUT_SHIFT = INTERVAL_BITS - 8
LOW, HIGH, CODE, POSITION = 0, 1, 2, 3  # of the registers

PROBABILITY_BITS = 22  # of a counter; the coder takes the upper 16
ONE = 1 << PROBABILITY_BITS
HALF: Any = np.int64(
    32768
)  # of 65,536; a plain constant would have the functions it is given to compiled anew
MOST_CERTAIN = 24  # of 65,536: a decision never costs less than 0.0005 bits nor more than 11.4
PART_BITS = 4  # of how far a decision lies from one context to the next
WHOLE = 1 << PART_BITS
COUNT_LIMIT = 4095  # decisions; counts are in WHOLEs of them
RATE_BITS = 20
RATES = ((1 << RATE_BITS) / (np.arange(COUNT_LIMIT + 1) + 1.5)).astype(
    np.int64
)  # one correctly rounded division each: alike everywhere
ROUNDING = 1 << (PART_BITS + RATE_BITS - 1)
LEAST = 1 << (PROBABILITY_BITS - 16)  # of a counter
FLUSH_BYTES = 5  # that a decoder has read ahead


class Stream(NamedTuple):
    """Where decisions go, or come from; compiled code takes it apart."""

    registers: np.ndarray  # int64
    buffer: np.ndarray  # uint8
    decoding: bool


class Counters(NamedTuple):
    """What decisions have taught."""

    chances_KU: np.ndarray  # int64: that a decision is 1, of ONE
    counts_KU: np.ndarray  # int64: how many decisions that is drawn from, of WHOLE


@inner
def code(bit: int, probability: int, stream: Stream) -> int:
    """Code or decode one decision whose being 1 has `probability` of 65,536."""
    registers, buffer, decoding = stream
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


@inlined
def learn(bit: int, context: int, part: int, place: int, counters: Counters, stream: Stream) -> int:
    """Code or decode one decision that lies `part` of WHOLE from one context to the next, and let both counters learn it."""
    chances_KU = counters.chances_KU
    chance = chances_KU[context, place]
    chance += ((chances_KU[context + 1, place] - chance) * part) >> PART_BITS
    bit = code(bit, min(max(chance >> (PROBABILITY_BITS - 16), MOST_CERTAIN), 65536 - MOST_CERTAIN), stream)
    error = (ONE if bit else 0) - chance
    _correct(error, WHOLE - part, context, place, counters)
    _correct(error, part, context + 1, place, counters)
    return bit


@inner
def _correct(error: int, weight: int, context: int, place: int, counters: Counters) -> None:
    """Move a counter by its share in an error."""
    chances_KU, counts_KU = counters
    count = counts_KU[context, place]
    moved = chances_KU[context, place] + (
        (error * weight * RATES[count >> PART_BITS] + ROUNDING) >> (PART_BITS + RATE_BITS)
    )
    chances_KU[context, place] = min(max(moved, LEAST), ONE - LEAST)
    counts_KU[context, place] = min(count + weight, COUNT_LIMIT << PART_BITS)


@inner
def code_number(number: int, digits: int, stream: Stream) -> int:
    """Code or decode so many binary digits as they are."""
    value = 0
    for place in range(digits - 1, -1, -1):
        value = 2 * value + code((number >> place) & 1, HALF, stream)
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
