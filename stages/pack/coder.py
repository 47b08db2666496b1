"""An adaptive arithmetic coder for matrices of integer levels; integers only, so that it gives the same bytes on every machine.

A level is a few binary decisions, each coded with a probability that the decisions before it have taught: its magnitude in unary, then its
sign. What is known of the level's scale chooses the probabilities. A row's scale is learnt along the row and a column's down the column,
so the estimate of a magnitude is the column's, times how far this row's magnitudes lay above their columns' so far; steps of a quarter of
an octave tell contexts apart. On a trellis the state is known too, and with it whether the level is even or odd (trellis.py).

Coding and decoding are one function: they must visit the same decisions in the same order, and so they cannot disagree. The arithmetic
coder is the carryless one of PAQ (Mahoney 2002) with 40 bits of interval and 16 of probability; probabilities are counters that adapt by
1/n, and by 1/1024 in the end.

Shapes: R rows, C columns, S states.
"""

import numpy as np
from numba import njit

from stages.pack.trellis import trellis

INTERVAL_BITS = 40
INTERVAL_MASK = (1 << INTERVAL_BITS) - 1
OUT_SHIFT = INTERVAL_BITS - 8
LOW, HIGH, CODE, POSITION = 0, 1, 2, 3  # of the registers

PROBABILITY_BITS = 22  # of a counter; the coder takes the upper 16
ONE = 1 << PROBABILITY_BITS
MOST_CERTAIN = 24  # of 65,536: a decision never costs less than 0.0005 bits nor more than 11.4
COUNT_LIMIT = 1023

SCALES = 56  # contexts of the estimated magnitude, four in an octave
UNARY = 24  # decisions of a magnitude's unary part; what is longer goes on in Elias's gamma code
RAW_SHIFT = 2  # a magnitude that is expected above 2^(RAW_SHIFT+1) has its lowest bits coded as they are
FRACTION = 8  # bits behind the point of a mean magnitude
FIRST_MEAN = 3 << FRACTION
ROW_DECAY, COLUMN_DECAY = 7, 7  # means forget by 1/128
LARGEST = 32767  # magnitude of a level
FLUSH_BYTES = 5  # that a decoder has read ahead


@njit(nogil=True)
def _code(bit: int, probability: int, registers: np.ndarray, buffer: np.ndarray, decoding: bool) -> int:
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
def _learn(
    bit: int, chances: np.ndarray, counts: np.ndarray, context: int, place: int, registers: np.ndarray, buffer: np.ndarray, decoding: bool
) -> int:
    """Code or decode one decision with a counter's probability, and let the counter learn it."""
    chance = chances[context, place]
    probability = min(max(chance >> (PROBABILITY_BITS - 16), MOST_CERTAIN), 65536 - MOST_CERTAIN)
    bit = _code(bit, probability, registers, buffer, decoding)
    count = counts[context, place]
    target = ONE - 1 if bit else 0
    chances[context, place] = chance + 2 * (target - chance) // (2 * count + 3)
    if count < COUNT_LIMIT:
        counts[context, place] = count + 1
    return bit


@njit(nogil=True)
def _eighths_of_octaves(value: int) -> int:
    """About 8 log2(value), linear between powers of two; value >= 1."""
    octaves = 0
    while value >> (octaves + 1):
        octaves += 1
    rest = value - (1 << octaves)
    return 8 * octaves + (rest >> (octaves - 3) if octaves >= 3 else rest << (3 - octaves))


@njit(nogil=True)
def _run(levels_RC: np.ndarray, next_S2: np.ndarray, stride: int, registers: np.ndarray, buffer: np.ndarray, decoding: bool) -> bool:
    """Code `levels_RC` into the buffer, or fill it from the buffer; False for a level beyond LARGEST, which only a damaged stream holds."""
    rows, columns = levels_RC.shape
    halving = stride - 1  # on a trellis levels of one state are two apart
    chances = np.full((2 * SCALES, UNARY), ONE // 2, np.int64)
    counts = np.zeros((2 * SCALES, UNARY), np.int64)
    means_C = np.full(columns, FIRST_MEAN, np.int64)
    for row in range(rows):
        state = 0
        seen = expected = FIRST_MEAN << 2  # magnitudes of this row so far, and what their columns expected
        decay = min(COLUMN_DECAY, _eighths_of_octaves(row + 2) // 8)  # the first rows weigh more
        for column in range(columns):
            odd = (state & 1) if stride == 2 else 0
            estimate = max(1, (means_C[column] * seen) // expected)
            octaves = _eighths_of_octaves(estimate)
            context = 2 * min(max((octaves >> 1) - 8, 0), SCALES - 1) + odd
            raw_bits = max(0, (octaves >> 3) - FRACTION - halving - RAW_SHIFT)
            level = np.int64(levels_RC[row, column])
            magnitude = abs(level) >> halving

            high_part, length = magnitude >> raw_bits, 0
            while length < UNARY and _learn(1 if length < high_part else 0, chances, counts, context, length, registers, buffer, decoding):
                length += 1
            if length == UNARY:
                rest = high_part - UNARY + 1  # >= 1
                digits = 0
                while digits < 16 and _code(1 if rest >> (digits + 1) else 0, 32768, registers, buffer, decoding):
                    digits += 1
                value = 1
                for place in range(digits - 1, -1, -1):
                    value = 2 * value + _code((rest >> place) & 1, 32768, registers, buffer, decoding)
                length = UNARY - 1 + value
            for place in range(raw_bits - 1, -1, -1):
                length = 2 * length + _code((magnitude >> place) & 1, 32768, registers, buffer, decoding)
            size = (length << halving) + odd
            if size > LARGEST:
                return False
            level = -size if size and not _code(1 if level > 0 else 0, 32768, registers, buffer, decoding) else size
            if decoding:
                levels_RC[row, column] = level

            seen += (size << FRACTION) - (seen >> ROW_DECAY)
            expected = max(1, expected + means_C[column] - (expected >> ROW_DECAY))
            means_C[column] += ((size << FRACTION) - means_C[column]) >> decay
            state = next_S2[state, ((level - odd) >> 1) & 1] if stride == 2 else 0
    return True


def encode(levels_RC: np.ndarray, states: int) -> bytes:
    """The bytes of int16 levels within LARGEST; on a trellis of several states each level must be one that its state allows."""
    code = trellis(states)
    capacity = levels_RC.size + 64
    while True:
        buffer, registers = np.zeros(capacity, np.uint8), np.array([0, INTERVAL_MASK, 0, 0], np.int64)
        if not _run(levels_RC, code.next_S2, code.stride, registers, buffer, False):
            raise ValueError(f"a level is beyond {LARGEST}, which is the most that can be coded")
        written = int(registers[POSITION])
        if written <= capacity:
            return buffer[:written].tobytes() + _shortest_between(int(registers[LOW]), int(registers[HIGH]))
        capacity = written + 64  # nothing was written beyond the buffer, but counted: again, with room for all of it


def decode(payload: bytes, rows: int, columns: int, states: int) -> np.ndarray:
    """The levels (R, C), int16; a ValueError when the payload does not hold exactly those."""
    code = trellis(states)
    levels_RC, buffer = np.zeros((rows, columns), np.int16), np.frombuffer(bytearray(payload), np.uint8)
    first = payload[:FLUSH_BYTES].ljust(FLUSH_BYTES, b"\0")
    registers = np.array([0, INTERVAL_MASK, int.from_bytes(first, "big"), FLUSH_BYTES], np.int64)
    if not _run(levels_RC, code.next_S2, code.stride, registers, buffer, True):
        raise ValueError(f"an arithmetic-coded stream holds a level beyond {LARGEST}")
    written = int(registers[POSITION]) - FLUSH_BYTES
    ending = _shortest_between(int(registers[LOW]), int(registers[HIGH]))
    if written > len(payload) or payload[written:] != ending:
        raise ValueError(f"an arithmetic-coded stream of {len(payload)} bytes does not end where its levels do, at {written + len(ending)}")
    return levels_RC


def _shortest_between(low: int, high: int) -> bytes:
    """The fewest bytes that lie in the interval however they go on with zeros."""
    for count in range(FLUSH_BYTES + 1):
        shift = INTERVAL_BITS - 8 * count
        value = high >> shift << shift
        if value >= low:
            return (value >> shift).to_bytes(count, "big")
    raise AssertionError("an interval holds its own end")
