"""An entropy coder for matrices of integer levels; integers only, so that it gives the same bytes on every machine.

A level is a few binary decisions, each coded with a probability that the decisions before it have taught (binary_coder.py): the magnitude
of its difference to what was predicted in unary, then its sign. What is known of the level chooses the probabilities.

Its scale. The exponents of rows and columns (pack/quantise/trellis_quantiser.py) are known to both sides, and trained weights have about
one scale, so that most of a level's is known before the first is coded. What is left is learnt: the columns' means of magnitudes, and how
far a row's lie above them. Rows or columns of one attention head have scales of their own where they meet the others, so that the last
magnitudes in the row and in the column may tell more: how far they are believed is learnt by least squares. The estimate lies between two
contexts, four of which are in an octave; what is first believed of a context is a normal distribution (initial_probabilities.py).

Its mean. Rows of an embedding share a direction (those of rare tokens have hardly anything else), which predicts their levels
(row_predictor.py). Where that has not paid in the rows before, as in all other matrices, nothing is predicted.

Its parity. On a trellis the state is known, and with it whether the level is even or odd (pack/trellis.py).

Coding and decoding are one function: they must visit the same decisions in the same order, and so they cannot disagree.

Shapes: R rows, C columns, S states, K contexts, U decisions of a magnitude (initial_probabilities.py).
"""

from typing import NamedTuple

import numpy as np

from stages.common.jit import inlined, inner, outer
from stages.pack.entropy.binary_coder import (
    HALF,
    PART_BITS,
    WHOLE,
    Counters,
    Stream,
    code,
    code_number,
    ending,
    learn,
    to_read,
    to_write,
)
from stages.pack.entropy.initial_probabilities import (
    RAW_BITS_FROM,
    SCALES,
    SCALES_PER_OCTAVE,
    SIGNS,
    SMALLEST,
    UNARY,
    first_chances,
)
from stages.pack.entropy.row_predictor import (
    PREDICTION_POINT,
    USEFUL,
    Direction,
    bounded,
    direction,
    doubt,
    learn_direction,
    predicted,
    share_of,
)
from stages.pack.trellis import trellis

LARGEST = 32767  # magnitude of a level
CONFIDENCE = 16  # decisions that what is first believed of a context counts for

POINT = 16  # bits behind the point: of factors, means and ratios
SUM_POINT = 8  # of sums of magnitudes
FIRST_RATIO = 3 << POINT  # of a row's magnitudes to what its columns expect
FIRST_SPREAD = 256_000  # mean relative deviation of these ratios from row to row, of 2^SPREAD_POINT
SPREAD_POINT = 20
SAMPLING = 37356  # squared relative deviation of one normal value's magnitude: pi / 2 - 1 of 65,536
HALF_PI = 25736  # of 2^14: a normal value's squared deviation to the square of its mean absolute one
MOST_COUNTS = 4096  # of magnitudes, that what other rows were stands for
RATIO_RATE, SPREAD_RATE = (
    4681,
    2048,
)  # of 65,536, in the end: by how much a row moves the ratio and its spread
MEAN_RATE = 256  # and a column's mean
ROWS_KNOWN, ROWS_UNKNOWN = (
    64,
    16,
)  # that a column's mean counts for at first, where exponents are known and where they are not
FARTHEST = 64  # eighths of octaves of a factor from the middle one
ROOTS = np.array([65536, 71468, 77936, 84990, 92682, 101070, 110218, 120194], np.int64)  # 2^(i/8), of 65,536
LARGEST_MEAN, LARGEST_RATIO, LARGEST_SUM = (
    1 << 26,
    1 << 31,
    1 << 36,
)  # so that no product overflows, whatever the exponents are
LARGEST_ESTIMATE = LARGEST << POINT
NEAR = 4  # of what is near, about the last 2^4 columns or rows count
RESOLUTION = 10  # bits of a relative deviation
SELDOM = 8  # one column in so many is looked at for whether what is near can be believed
DOUBT = 1 << 22  # squares of deviations that what is near must outweigh, so as to be believed
MEMORY = 7  # these squares are forgotten by 1/128 a row
# Of what is known of rows, of what is near in a row and in a column, and the sum of what is expected of the columns.
RATIO, SPREAD, ALONG, ALONG_SQUARES, DOWN, DOWN_SQUARES, TOTAL = range(7)
EXPECTED, SIZES, SAVED = range(
    3
)  # sums over a row: what its columns expected, its magnitudes, what predicting has saved


class _Scales(NamedTuple):
    """What is known of magnitudes; compiled code takes it apart."""

    factors_R: np.ndarray
    means_C: np.ndarray
    near_C: np.ndarray  # means of the last rows
    bases_C: np.ndarray  # what is expected: means, as far as what is near lets them be
    known: bool  # whether the columns' means began as their exponents say
    facts: np.ndarray  # RATIO, SPREAD, ...
    sizes_C: np.ndarray  # of the row at hand: magnitudes of its differences
    sums: np.ndarray  # EXPECTED, SIZES, SAVED


class _Coding(NamedTuple):
    """By what decisions are coded."""

    next_S2: np.ndarray
    stride: int
    counters: Counters
    stream: Stream


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
        capacity = (
            written + 64
        )  # nothing was written beyond the buffer, but counted: again, with room for all of it


def decode(payload: bytes, rows_R: np.ndarray, columns_C: np.ndarray, states: int) -> np.ndarray:
    """The levels (R, C), int16; a ValueError when the payload does not hold exactly those."""
    levels_RC, buffer = (
        np.zeros((len(rows_R), len(columns_C)), np.int16),
        np.frombuffer(bytearray(payload), np.uint8),
    )
    registers = to_read(payload)
    ahead = int(registers[-1])
    if not _run_from_start(levels_RC, rows_R, columns_C, states, registers, buffer, True):
        raise ValueError(f"an arithmetic-coded stream holds a level beyond {LARGEST}")
    written, end = int(registers[-1]) - ahead, ending(registers)
    if written > len(payload) or payload[written:] != end:
        raise ValueError(
            f"an arithmetic-coded stream of {len(payload)} bytes does not end where its levels do, at {written + len(end)}"
        )
    return levels_RC


def compile_ahead() -> None:
    """Have coder and decoder compiled, which takes seconds."""
    none = np.zeros(1, np.int8)
    encode(np.zeros((1, 1), np.int16), none, none, 1)


def _run_from_start(
    levels_RC: np.ndarray,
    rows_R: np.ndarray,
    columns_C: np.ndarray,
    states: int,
    registers: np.ndarray,
    buffer: np.ndarray,
    decoding: bool,
) -> bool:
    walk, columns = trellis(states), len(columns_C)
    chances_KU = first_chances(walk.stride).copy()
    counts_KU = np.full(chances_KU.shape, CONFIDENCE * WHOLE, np.int64)
    counts_KU[SIGNS] = 0
    means = _factors(columns_C)
    facts = np.array([FIRST_RATIO, FIRST_SPREAD, 0, 0, 0, 0, means.sum()], np.int64)
    places = facts, np.zeros(columns, np.int64), np.zeros(3, np.int64)
    scales = _Scales(_factors(rows_R), means, means.copy(), means.copy(), bool(columns_C.any()), *places)
    coding = _Coding(
        walk.next_S2, walk.stride, Counters(chances_KU, counts_KU), Stream(registers, buffer, decoding)
    )
    return bool(_run(levels_RC, scales, direction(columns), coding))


def _factors(exponents: np.ndarray) -> np.ndarray:
    """What magnitudes of levels are expected to be in proportion to: 2^(-e / 8), around the middle exponent."""
    wide = exponents.astype(np.int64)
    middle = int(np.sort(wide)[len(wide) // 2]) if len(wide) else 0
    eighths = np.clip(middle - wide, -FARTHEST, FARTHEST) + FARTHEST
    return (ROOTS[eighths % 8] << (eighths // 8)) >> (FARTHEST // 8)


@outer
def _run(levels_RC: np.ndarray, scales: _Scales, shared: Direction, coding: _Coding) -> bool:
    """Code `levels_RC`, or fill it from the stream; False for a level beyond LARGEST, which only a damaged stream holds."""
    for row in range(len(levels_RC)):
        if not _row(levels_RC[row], scales.factors_R[row], scales, shared, coding):
            return False
        _learn_scales(row, scales.factors_R[row], scales)
        learn_direction(row, levels_RC[row], scales.sums[SAVED], shared)
    return True


@inner
def _row(levels_C: np.ndarray, factor: int, scales: _Scales, shared: Direction, coding: _Coding) -> bool:
    """One row. `sizes_C` become the magnitudes of its differences, `sums` their sums."""
    facts, sizes_C, sums = scales.facts, scales.sizes_C, scales.sums
    stride, useful = coding.stride, shared.facts[USEFUL] > 0
    state = share = np.int64(0)
    columns = max(len(levels_C), 1)
    turn, counts = _prior(columns, facts[SPREAD])
    usually = min(max((facts[TOTAL] // columns * factor) >> POINT, 1), LARGEST_MEAN)
    expected = max((counts * usually) >> (POINT - SUM_POINT), 1 << SUM_POINT)
    seen = min(max((expected * facts[RATIO]) >> POINT, 1), LARGEST_SUM)
    products, squares = np.int64(0), doubt(shared.facts)
    sums[:] = 0
    trust = _trust(facts[ALONG], facts[ALONG_SQUARES])
    near_seen = near_expected = np.int64(0)
    for column in range(len(levels_C)):
        odd = state & 1 if stride == 2 else 0
        base = min(max((scales.bases_C[column] * factor) >> POINT, 1), LARGEST_MEAN)
        usual = max(1, min(base * seen // expected, LARGEST_ESTIMATE))
        if column == 0:
            near_seen = near_expected = usual << NEAR
        deviation = _deviation(near_seen, near_expected)
        estimate = max(
            1, min(usual + ((usual * ((deviation * trust) >> RESOLUTION)) >> RESOLUTION), LARGEST_ESTIMATE)
        )
        along = shared.along_C[column]
        prediction, shift, remainder = predicted(share, along), np.int64(0), np.int64(0)
        if useful:  # the nearest number to it; on a trellis an even one, so that parities stay
            shift = (
                (prediction + (stride << (PREDICTION_POINT - 1))) >> (PREDICTION_POINT + stride - 1)
            ) << (stride - 1)
            remainder = prediction - (shift << PREDICTION_POINT)
        difference = np.int64(levels_C[column]) - shift
        size = _magnitude(abs(difference), estimate, odd, coding)
        if size > 2 * LARGEST:
            return False
        level = shift + _signed(size, difference, remainder, estimate, coding)
        if abs(level) > LARGEST:
            return False
        if coding.stream.decoding:
            levels_C[column] = level

        if column % SELDOM == SELDOM - 1:
            facts[ALONG] += deviation * _deviation(size << POINT, usual)
            facts[ALONG_SQUARES] += deviation * deviation
        near_seen += (size << POINT) - (near_seen >> NEAR)
        near_expected += usual - (near_expected >> NEAR)
        sizes_C[column] = size
        sums[SIZES] += size << SUM_POINT
        sums[EXPECTED] += base >> (POINT - SUM_POINT)
        sums[SAVED] += (abs(level) << PREDICTION_POINT) - abs((level << PREDICTION_POINT) - prediction)
        seen = min(max(seen + turn * (size << SUM_POINT), 1), LARGEST_SUM)
        expected = max(expected + turn * (base >> (POINT - SUM_POINT)), 1 << SUM_POINT)
        products += (along >> 4) * bounded(level)
        squares += ((along >> 4) * (along >> 4)) >> 8
        share = share_of(products, squares)
        state = coding.next_S2[state, ((level - odd) >> 1) & 1] if stride == 2 else 0
    return True


@inner
def _prior(columns: int, spread: int) -> tuple[int, int]:
    """Whether a row's magnitudes count with what other rows were, 1, or against it, -1; and how many usual ones that stands for.

    Magnitudes of a row are taken for exchangeable. Their covariance tau is the variance of rows' means less what sampling makes of it, and
    the best linear estimate of the next one counts SAMPLING / tau usual ones with those seen. Rows whose steps are made of their own
    deviations differ by less than sampling would have it: then tau is negative, and what a row has had more of it will have less of.
    """
    mean = spread >> (SPREAD_POINT - 12)
    tau = ((mean * mean * HALF_PI) >> 14) - (SAMPLING << 8) // columns
    counts = min((SAMPLING << 8) // max(abs(tau), 1), MOST_COUNTS)
    against = (17 * columns) >> 4  # at least, so that something is left at the row's end
    if tau >= 0 or against > MOST_COUNTS:
        return np.int64(1), max(counts, 2)
    return np.int64(-1), max(counts, against)


@inner
def _deviation(seen: int, expected: int) -> int:
    """By how much the one differs from the other, relatively; bounded."""
    return min(((seen - expected) << RESOLUTION) // expected, 4 << RESOLUTION)


@inner
def _trust(products: int, squares: int) -> int:
    """How far a deviation of what is near goes on, by least squares."""
    return min(max((products << RESOLUTION) // (squares + DOUBT), 0), 1 << RESOLUTION)


@inlined
def _signed(size: int, difference: int, remainder: int, estimate: int, coding: _Coding) -> int:
    """Code or decode a difference's sign: likely that of what rounding left of the prediction, the more the larger both are."""
    if size == 0:
        return 0
    likely = ((abs(remainder) * size) << 22) // (estimate * estimate)
    upward = remainder > 0
    same = 1 if (difference > 0) == upward else 0
    if likely:
        same = learn(
            same, np.int64(SIGNS), np.int64(0), min(likely, UNARY - 1), coding.counters, coding.stream
        )
    else:
        same = code(same, HALF, coding.stream)
    return size if (same == 1) == upward else -size


@inlined
def _magnitude(size: int, estimate: int, odd: int, coding: _Coding) -> int:
    """Code or decode a magnitude of which the parity is known on a trellis; `estimate` is what it is expected to be."""
    counters, stream, halving = coding.counters, coding.stream, coding.stride - 1
    scale, part, octave = _place(estimate, halving)
    raw_bits = max(0, octave - halving - RAW_BITS_FROM + 1)
    context, magnitude = scale + SCALES * odd, size >> halving
    high_part, length = magnitude >> raw_bits, np.int64(0)
    while length < UNARY and learn(1 if length < high_part else 0, context, part, length, counters, stream):
        length += 1
    if length == UNARY:
        rest = high_part - UNARY + 1  # >= 1
        digits = 0
        while digits < 16 and code(1 if rest >> (digits + 1) else 0, HALF, stream):
            digits += 1
        length = UNARY - 1 + (1 << digits) + code_number(rest, digits, stream)
    if raw_bits:
        length = (length << raw_bits) + code_number(magnitude, raw_bits, stream)
    return (length << halving) + odd


@inner
def _place(estimate: int, halving: int) -> tuple[int, int, int]:
    """The context below an expected magnitude, how far it lies above that (of WHOLE), and the octave in which it lies."""
    octave = np.int64(SMALLEST)
    above = max(estimate >> (POINT + SMALLEST), 1)
    while above > 1:
        above >>= 1
        octave += 1
    # From here on in units of an octave's WHOLE-th of a quarter.
    fine = max(estimate, 1 << (POINT + SMALLEST)) >> (POINT + octave - 2 - PART_BITS)
    quarter, part = (fine >> PART_BITS) & (SCALES_PER_OCTAVE - 1), fine & (WHOLE - 1)
    scale = SCALES_PER_OCTAVE * (octave - SMALLEST) + quarter
    if scale >= SCALES - 1:
        return np.int64(SCALES - 1), np.int64(0), octave
    if quarter == SCALES_PER_OCTAVE - 1 and octave >= RAW_BITS_FROM - 1 + halving:
        part = np.int64(0)  # the next context has one more raw bit
    return scale, part, octave


@inner
def _learn_scales(row: int, factor: int, scales: _Scales) -> None:
    """What a row's magnitudes say of its columns' means, and of the ratio of rows to columns."""
    _, means_C, near_C, bases_C, known, facts, sizes_C, sums = scales
    before = facts[RATIO]
    ratio = min(
        max(1, ((sums[SIZES] + (before >> 5)) << POINT) // (sums[EXPECTED] + (8 << SUM_POINT))), LARGEST_RATIO
    )
    rate = max(131072 // (2 * row + 3), RATIO_RATE)
    facts[RATIO] = max(1, before + (((ratio - before) * rate) >> 16))
    if row:
        deviation = min((abs(ratio - before) << SPREAD_POINT) // before, 4 << SPREAD_POINT)
        facts[SPREAD] += ((deviation - facts[SPREAD]) * max(131072 // (2 * row + 3), SPREAD_RATE)) >> 16
    scale = (np.int64(1) << (2 * POINT)) // max((ratio * factor) >> POINT, 1)
    rate = max(65536 // (row + (ROWS_KNOWN if known else ROWS_UNKNOWN)), MEAN_RATE)
    facts[ALONG] -= facts[ALONG] >> MEMORY
    facts[ALONG_SQUARES] -= facts[ALONG_SQUARES] >> MEMORY
    facts[DOWN] -= facts[DOWN] >> MEMORY
    facts[DOWN_SQUARES] -= facts[DOWN_SQUARES] >> MEMORY
    trust, facts[TOTAL] = _trust(facts[DOWN], facts[DOWN_SQUARES]), 0
    for column in range(len(sizes_C)):
        size, mean = min(sizes_C[column] * scale, LARGEST_MEAN), means_C[column]
        if (column + row) % SELDOM == SELDOM - 1:
            deviation = _deviation(near_C[column], mean)
            facts[DOWN] += deviation * _deviation(size, mean)
            facts[DOWN_SQUARES] += deviation * deviation
        means_C[column] = max(1, mean + (((size - mean) * rate + 32768) >> 16))
        near_C[column] += (size - near_C[column] + (1 << (NEAR - 1))) >> NEAR
        bases_C[column] = max(
            1, means_C[column] + (((near_C[column] - means_C[column]) * trust) >> RESOLUTION)
        )
        facts[TOTAL] += bases_C[column]
