"""An entropy coder for matrices of integer levels; integers only, so that it gives the same bytes on every machine.

A level is a few binary decisions, each coded with a probability that the decisions before it have taught (arithmetic.py): the magnitude of
its difference to what was predicted in unary, then its sign. What is known of the level chooses the probabilities.

Its scale. The exponents of rows and columns (lattice.py) are known to both sides, and trained weights have about one scale, so that most of
a level's is known before the first is coded. What is left is learnt: the columns' means of magnitudes, and how far a row's lie above them.
The estimate's quarter of an octave is the context; what is first believed of a context is a normal distribution (prior.py).

Its mean. Rows of an embedding share a direction (those of rare tokens have hardly anything else). One direction is learnt by Oja's rule
(1982) from the rows that are done, and the row's share in it by least squares from the row's levels so far. Where that has not paid in the
rows before, as in all other matrices, nothing is predicted.

Its parity. On a trellis the state is known, and with it whether the level is even or odd (trellis.py).

Coding and decoding are one function: they must visit the same decisions in the same order, and so they cannot disagree.

Shapes: R rows, C columns, S states, K contexts, U decisions of a magnitude (prior.py).
"""

import numpy as np
from numba import njit

from stages.pack.arithmetic import HALF, code, code_number, ending, learn, to_read, to_write
from stages.pack.prior import RAW_BITS_FROM, SCALES, SCALES_PER_OCTAVE, SIGNS, SMALLEST, UNARY, first_chances
from stages.pack.trellis import trellis

LARGEST = 32767  # magnitude of a level
CONFIDENCE = 12  # decisions that what is first believed of a context counts for

POINT = 16  # bits behind the point: of factors, means and ratios
SUM_POINT = 8  # of sums of magnitudes
FIRST_RATIO = 3 << POINT  # of a row's magnitudes to what its columns expect
FIRST_SPREAD = 6000  # squared relative deviation of these ratios from row to row, of 65,536
SAMPLING = 37356  # that of the mean of one normal value's magnitude: pi / 2 - 1 of 65,536
ROW_DECAY = 9  # a row's sums forget by 1/512
FARTHEST = 64  # eighths of octaves of a factor from the middle one
ROOTS = np.array([65536, 71468, 77936, 84990, 92682, 101070, 110218, 120194], np.int64)  # 2^(i/8), of 65,536
LARGEST_MEAN, LARGEST_RATIO = 1 << 26, 1 << 31  # so that no product overflows, whatever the exponents are

PREDICTION_POINT = 12
MOST = 4095 << PREDICTION_POINT  # of what is predicted; larger levels are taken for this
FIRST_DIRECTION = 1 << (PREDICTION_POINT - 2)
RATIO, SPREAD, NOISE, POWER, WEIGHT, USEFUL = range(6)  # of what is known of rows
# Of residuals' squares (of 256), of shares' squares (of 65,536), and what all shares' squares count for at first: directions learn slowly.
FIRST_FACTS = np.array([FIRST_RATIO, FIRST_SPREAD, 256, 6000, 2_000_000, 0], np.int64)


def encode(levels_RC: np.ndarray, rows_R: np.ndarray, columns_C: np.ndarray, states: int) -> bytes:
    """The bytes of int16 levels within LARGEST; on a trellis of several states each level must be one that its state allows.

    The exponents of rows and columns are int8; a decoder needs the same.
    """
    capacity = levels_RC.size + 64
    while True:
        buffer, registers = np.zeros(capacity, np.uint8), to_write()
        if not _run_from_start(levels_RC, rows_R, columns_C, states, registers, buffer, False):
            raise ValueError(f"a level is beyond {LARGEST}, which is the most that can be coded")
        written = int(registers[-1])
        if written <= capacity:
            return buffer[:written].tobytes() + ending(registers)
        capacity = written + 64  # nothing was written beyond the buffer, but counted: again, with room for all of it


def decode(payload: bytes, rows_R: np.ndarray, columns_C: np.ndarray, states: int) -> np.ndarray:
    """The levels (R, C), int16; a ValueError when the payload does not hold exactly those."""
    levels_RC, buffer = np.zeros((len(rows_R), len(columns_C)), np.int16), np.frombuffer(bytearray(payload), np.uint8)
    registers = to_read(payload)
    ahead = int(registers[-1])
    if not _run_from_start(levels_RC, rows_R, columns_C, states, registers, buffer, True):
        raise ValueError(f"an arithmetic-coded stream holds a level beyond {LARGEST}")
    written, end = int(registers[-1]) - ahead, ending(registers)
    if written > len(payload) or payload[written:] != end:
        raise ValueError(f"an arithmetic-coded stream of {len(payload)} bytes does not end where its levels do, at {written + len(end)}")
    return levels_RC


def compile_ahead() -> None:
    """Have coder and decoder compiled, which takes seconds."""
    none = np.zeros(1, np.int8)
    encode(np.zeros((1, 1), np.int16), none, none, 1)


def _run_from_start(
    levels_RC: np.ndarray, rows_R: np.ndarray, columns_C: np.ndarray, states: int, registers: np.ndarray, buffer: np.ndarray, decoding: bool
) -> bool:
    walk = trellis(states)
    chances_KU = first_chances(walk.stride).copy()
    counts_KU = np.full(chances_KU.shape, CONFIDENCE, np.int64)
    counts_KU[SIGNS] = 0
    axes = _factors(rows_R), _factors(columns_C), bool(columns_C.any())
    return bool(_run(levels_RC, *axes, walk.next_S2, walk.stride, chances_KU, counts_KU, registers, buffer, decoding))


def _factors(exponents: np.ndarray) -> np.ndarray:
    """What magnitudes of levels are expected to be in proportion to: 2^(-e / 8), around the middle exponent."""
    wide = exponents.astype(np.int64)
    middle = int(np.sort(wide)[len(wide) // 2]) if len(wide) else 0
    eighths = np.clip(middle - wide, -FARTHEST, FARTHEST) + FARTHEST
    return (ROOTS[eighths % 8] << (eighths // 8)) >> (FARTHEST // 8)


@njit(nogil=True)
def _run(
    levels_RC: np.ndarray,
    factors_R: np.ndarray,
    means_C: np.ndarray,
    known: bool,
    next_S2: np.ndarray,
    stride: int,
    chances_KU: np.ndarray,
    counts_KU: np.ndarray,
    registers: np.ndarray,
    buffer: np.ndarray,
    decoding: bool,
) -> bool:
    """Code `levels_RC` into the buffer, or fill it from the buffer; False for a level beyond LARGEST, which only a damaged stream holds."""
    rows, columns = levels_RC.shape
    direction_C, sizes_C, facts = np.full(columns, FIRST_DIRECTION, np.int64), np.zeros(columns, np.int64), FIRST_FACTS.copy()
    sums = np.zeros(3, np.int64)
    for row in range(rows):
        if not _row(
            levels_RC[row], factors_R[row], means_C, direction_C, facts, sizes_C, sums,
            next_S2, stride, chances_KU, counts_KU, registers, buffer, decoding,
        ):  # fmt: skip
            return False
        _learn_scales(row, factors_R[row], known, sizes_C, sums, means_C, facts)
        _learn_direction(row, levels_RC[row], sums[2], direction_C, facts)
    return True


@njit(nogil=True)
def _row(
    levels_C: np.ndarray,
    factor: int,
    means_C: np.ndarray,
    direction_C: np.ndarray,
    facts: np.ndarray,
    sizes_C: np.ndarray,
    sums: np.ndarray,
    next_S2: np.ndarray,
    stride: int,
    chances_KU: np.ndarray,
    counts_KU: np.ndarray,
    registers: np.ndarray,
    buffer: np.ndarray,
    decoding: bool,
) -> bool:
    """One row. `sizes_C` become the magnitudes of its differences, `sums` their sum, what their columns expected, what predicting saved."""
    state = share = np.int64(0)
    # As many magnitudes as the spread of the rows' scales is worth stand for what other rows' were.
    prior = min(max(SAMPLING // max(facts[SPREAD], 1), 2), 256)
    seen, expected = max(1, (prior * facts[RATIO]) >> (POINT - SUM_POINT)), prior << SUM_POINT
    products, squares = np.int64(0), _doubt(facts)
    sums[:] = 0
    for column in range(len(levels_C)):
        odd = state & 1 if stride == 2 else 0
        base = min(max((means_C[column] * factor) >> POINT, 1), LARGEST_MEAN)
        estimate = max(1, min(base * seen // expected, np.int64(LARGEST) << POINT))
        along = direction_C[column]
        prediction, shift, remainder = _predicted(share, along), np.int64(0), np.int64(0)
        if facts[USEFUL] > 0:  # the nearest number to it; on a trellis an even one, so that parities stay
            shift = ((prediction + (stride << (PREDICTION_POINT - 1))) >> (PREDICTION_POINT + stride - 1)) << (stride - 1)
            remainder = prediction - (shift << PREDICTION_POINT)
        difference = np.int64(levels_C[column]) - shift
        size = _magnitude(abs(difference), estimate, odd, stride, chances_KU, counts_KU, registers, buffer, decoding)
        if size > 2 * LARGEST:
            return False
        if size:
            difference = _signed(size, difference, remainder, estimate, chances_KU, counts_KU, registers, buffer, decoding)
        level = shift + (difference if size else 0)
        if abs(level) > LARGEST:
            return False
        if decoding:
            levels_C[column] = level

        sizes_C[column] = size
        sums[0] += size << SUM_POINT
        sums[1] += base >> (POINT - SUM_POINT)
        sums[2] += (abs(level) << PREDICTION_POINT) - abs((level << PREDICTION_POINT) - prediction)
        seen += (size << SUM_POINT) - (seen >> ROW_DECAY)
        expected += (base >> (POINT - SUM_POINT)) - (expected >> ROW_DECAY)
        products += (along >> 4) * _bounded(level)
        squares += ((along >> 4) * (along >> 4)) >> 8
        share = _share(products, squares)
        state = next_S2[state, ((level - odd) >> 1) & 1] if stride == 2 else 0
    return True


@njit(nogil=True)
def _bounded(level: int) -> int:
    """A level as directions know it, so that no sum of products overflows."""
    if level > 4095:
        return 4095
    return max(level, -4095)


@njit(nogil=True)
def _predicted(share: int, along: int) -> int:
    return min(max((share * along) >> 8, -MOST), MOST)


@njit(nogil=True)
def _share(products: int, squares: int) -> int:
    """Of a direction in a row, by least squares; of 256."""
    return min(max((products << 8) // squares, -16383), 16383)


@njit(nogil=True)
def _doubt(facts: np.ndarray) -> int:
    """What a row's squares start from, which draws its share to zero: the variance of residuals over that of shares."""
    return min((facts[NOISE] << 16) // (facts[POWER] + 1), np.int64(1) << 40) + 1


@njit(nogil=True)
def _signed(
    size: int,
    difference: int,
    remainder: int,
    estimate: int,
    chances_KU: np.ndarray,
    counts_KU: np.ndarray,
    registers: np.ndarray,
    buffer: np.ndarray,
    decoding: bool,
) -> int:
    """Code or decode a difference's sign: likely that of what rounding left of the prediction, the more the larger both are."""
    likely = ((abs(remainder) * size) << 22) // (estimate * estimate)
    upward = remainder > 0
    same = 1 if (difference > 0) == upward else 0
    if likely:
        same = learn(same, chances_KU, counts_KU, np.int64(SIGNS), min(likely, UNARY - 1), registers, buffer, decoding)
    else:
        same = code(same, HALF, registers, buffer, decoding)
    return size if (same == 1) == upward else -size


@njit(nogil=True)
def _magnitude(
    size: int,
    estimate: int,
    odd: int,
    stride: int,
    chances_KU: np.ndarray,
    counts_KU: np.ndarray,
    registers: np.ndarray,
    buffer: np.ndarray,
    decoding: bool,
) -> int:
    """Code or decode a magnitude of which the parity is known on a trellis; `estimate` is what it is expected to be."""
    halving = stride - 1
    octaves = _eighths_of_octaves(estimate) - 8 * POINT
    scale = min(max((octaves >> 1) - SCALES_PER_OCTAVE * SMALLEST, 0), SCALES - 1)
    raw_bits = max(0, (octaves >> 3) - halving - RAW_BITS_FROM + 1)
    context, magnitude = 2 * scale + odd, size >> halving
    high_part, length = magnitude >> raw_bits, np.int64(0)
    while length < UNARY and learn(1 if length < high_part else 0, chances_KU, counts_KU, context, length, registers, buffer, decoding):
        length += 1
    if length == UNARY:
        rest = high_part - UNARY + 1  # >= 1
        digits = 0
        while digits < 16 and code(1 if rest >> (digits + 1) else 0, HALF, registers, buffer, decoding):
            digits += 1
        length = UNARY - 1 + (1 << digits) + code_number(rest, digits, registers, buffer, decoding)
    length = (length << raw_bits) + code_number(magnitude, raw_bits, registers, buffer, decoding)
    return (length << halving) + odd


@njit(nogil=True)
def _eighths_of_octaves(value: int) -> int:
    """About 8 log2(value), linear between powers of two; value >= 1."""
    octaves = 0
    while value >> (octaves + 1):
        octaves += 1
    rest = value - (1 << octaves)
    return 8 * octaves + (rest >> (octaves - 3) if octaves >= 3 else rest << (3 - octaves))


@njit(nogil=True)
def _learn_scales(
    row: int, factor: int, known: bool, sizes_C: np.ndarray, sums: np.ndarray, means_C: np.ndarray, facts: np.ndarray
) -> None:
    """What a row's magnitudes say of its columns' means, and of the ratio of rows to columns."""
    before = facts[RATIO]
    ratio = min(max(1, ((sums[0] + (before >> 5)) << POINT) // (sums[1] + (8 << SUM_POINT))), LARGEST_RATIO)
    rate = max(131072 // (2 * row + 3), 3277)  # of 65,536: 1/20 in the end
    facts[RATIO] = max(1, before + (((ratio - before) * rate) >> 16))
    if row:
        deviation = min((abs(ratio - before) << 8) // before, 1024)
        facts[SPREAD] += ((deviation * deviation - facts[SPREAD]) * rate) >> 16
    scale = (np.int64(1) << (2 * POINT)) // max((ratio * factor) >> POINT, 1)
    rate = max(65536 // (row + (64 if known else 4)), 256)
    for column in range(len(sizes_C)):
        size = min(sizes_C[column] * scale, LARGEST_MEAN)
        means_C[column] = max(1, means_C[column] + (((size - means_C[column]) * rate + 32768) >> 16))


@njit(nogil=True)
def _learn_direction(row: int, levels_C: np.ndarray, saved: int, direction_C: np.ndarray, facts: np.ndarray) -> None:
    """Oja's rule: the direction turns to what it left of a row, the more the larger the row's share in it is."""
    products, squares = np.int64(0), _doubt(facts)
    for column in range(len(levels_C)):
        along = direction_C[column] >> 4
        products += along * _bounded(np.int64(levels_C[column]))
        squares += (along * along) >> 8
    share = _share(products, squares)
    decay = min(7, _eighths_of_octaves(row + 2) // 8)
    facts[USEFUL] += saved - (facts[USEFUL] >> 6)
    facts[WEIGHT] = min(facts[WEIGHT] + share * share, (facts[POWER] + 1) << 10)
    facts[POWER] += (share * share - facts[POWER]) >> decay
    gain = (share << 20) // facts[WEIGHT]
    noise = np.int64(0)
    for column in range(len(levels_C)):
        along = direction_C[column]
        error = (_bounded(np.int64(levels_C[column])) << PREDICTION_POINT) - _predicted(share, along)
        noise += (error >> 8) * (error >> 8)
        direction_C[column] = min(max(along + ((gain * error + 2048) >> 12), -MOST), MOST)
    facts[NOISE] = max(1, facts[NOISE] + ((noise // max(len(levels_C), 1) - facts[NOISE]) >> decay))
