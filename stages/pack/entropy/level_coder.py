"""Entropy coder for matrices of integer levels.

It uses integers only, so that it gives the same bytes on every machine.

A level becomes a few binary decisions, each coded with a learnt probability (binary_coder.py): the
magnitude of its difference to a prediction in unary, then the sign. The probabilities depend on the
magnitude to expect and, on a trellis, on the parity of the level.

Magnitude. Row and column exponents (pack/exponents.py) are known to encoder and decoder, and
trained weights have about one deviation, so most of a level's magnitude is known in advance. The
rest is learnt. The estimate has four factors, of which only the row factor is fixed:

    estimate = column mean                      of normalised magnitudes
             * row factor                       2^(-exponent / 8)
             * observed / expected              sums over the row so far, shrunk (`_shrinkage`)
             * (1 + gain * local deviation)     of the last magnitudes in the row from their estimates

The column mean is corrected in the same way by the last rows' magnitudes in that column.

Rows or columns of one attention head have magnitudes of their own, which the local deviations
follow; how far to trust them is learnt by least squares (`_regression_gain`). There are four
contexts an octave. The probabilities of the two nearest ones are blended. A context starts from a normal
distribution (initial_probabilities.py).

Prediction. Rows of an embedding share a direction (rare tokens have hardly anything else), which
predicts their levels (row_predictor.py). It is used only where it has made the levels of earlier
rows smaller.

Parity. On a trellis the state is known, and the state says whether the level is even or odd
(pack/trellis.py).

Encoding and decoding are one function: both visit the same decisions in the same order, so they
cannot disagree.

Fixed point: _qN names N fractional bits. Sums: q8; relative deviations: q10; predictions: q12;
means and ratios: q16; spreads and sums of products: q20.

Shapes: R rows, C columns, S trellis states, K contexts, U decisions of a magnitude
(initial_probabilities.py), B bytes.
"""

from typing import Any, NamedTuple

import numpy as np

from stages.common.jit import jit_entry, jit_inline, jit_internal
from stages.pack.entropy.binary_coder import (
    BLEND_BITS,
    BLEND_ONE,
    HALF_Q16,
    BinaryCoder,
    Counters,
    code_adaptive_bit,
    code_bit,
    code_raw_bits,
    decoder_state,
    encoder_state,
    final_bytes,
)
from stages.pack.entropy.initial_probabilities import (
    CONTEXTS_PER_OCTAVE,
    MAGNITUDE_CONTEXTS,
    MIN_OCTAVE,
    RAW_BITS_FROM,
    SIGN_CONTEXT,
    UNARY,
    initial_probs,
)
from stages.pack.entropy.records import new_record
from stages.pack.entropy.row_predictor import (
    PREDICTION_BITS,
    Direction,
    clamp_level,
    coefficient,
    initial_direction,
    prediction,
    ridge,
    update_direction,
)
from stages.pack.trellis import build_trellis

MAX_LEVEL = 32767  # largest magnitude of a level
INITIAL_COUNT = 16  # decisions that a context's initial probabilities count for

FRAC_BITS = 16  # fractional bits of factors, means and ratios
SUM_BITS = 8  # fractional bits of sums of magnitudes
SPREAD_BITS = 20  # fractional bits of the spread of ratios from row to row
DEVIATION_BITS = 10  # fractional bits of a relative deviation
SUM_SHIFT = FRAC_BITS - SUM_BITS  # from q16 to q8

INITIAL_RATIO_Q16 = 3 << FRAC_BITS  # of a row's magnitudes to what its columns expect
INITIAL_SPREAD_Q20 = 256_000  # about 1/4: mean relative deviation of this ratio from row to row
SAMPLING_Q16 = 37356  # pi / 2 - 1: squared relative deviation of one normal value's magnitude
HALF_PI_Q14 = 25736  # pi / 2: a normal variance over the square of the mean absolute deviation
MAX_PRIOR_COUNT = 4096  # pseudo-observations given to the mean of earlier rows
RATIO_PRIOR_COUNT = 8  # pseudo-observations of the old ratio when a row updates it

# Rates at which rows update running means, in q16. They fall with the number of rows
# (`_update_matrix`), but not below these.
MIN_RATIO_RATE_Q16 = 4681  # 1/14
MIN_SPREAD_RATE_Q16 = 2048  # 1/32
MIN_MEAN_RATE_Q16 = 256  # 1/256
# Rows that a column's initial mean counts for, if it comes from an exponent and if not.
PRIOR_ROWS_WITH_EXPONENTS = 64
PRIOR_ROWS_WITHOUT_EXPONENTS = 16

MAX_EIGHTHS = 64  # a factor is at most this many eighths of an octave from the median one
ROOTS_Q16 = np.array([65536, 71468, 77936, 84990, 92682, 101070, 110218, 120194], np.int64)  # 2^(i / 8)

# Limits that keep every product below 2^63, whatever the exponents are.
MAX_MEAN_Q16 = 1 << 26
MAX_RATIO_Q16 = 1 << 31
MAX_SUM_Q8 = 1 << 36
MAX_ESTIMATE_Q16 = MAX_LEVEL << FRAC_BITS

WINDOW_BITS = 4  # local means are over about the last 2^4 columns or rows, with exponential decay
SUBSAMPLE = 8  # one column in 8 enters the regression of magnitudes on local deviations
RIDGE_Q20 = 1 << 22  # added to that regression's sum of squares
DECAY_SHIFT = 7  # its sums decay by 1/128 a row

# np.int64(0) instead of 0: numba gives a literal a type of its own, and would compile what it is
# passed to twice.
ZERO: Any = np.int64(0)


class MatrixState:
    """Record: state of the model for the matrix as a whole."""

    ratio_q16: int  # a row's magnitudes over what its columns expect: running mean over rows
    spread_q20: int  # mean relative deviation of that ratio from row to row
    row_cov_q20: int  # regression on the deviation of the last columns: sum of products
    row_var_q20: int  # sum of squares
    column_cov_q20: int  # regression on the deviation of the last rows: the same
    column_var_q20: int
    expected_total_q16: int  # sum over columns of the expected normalised magnitudes


class RowState:
    """Record: state of the model for the row that is being coded."""

    shrinkage_sign: int  # 1: large magnitudes make larger ones likely; -1: the reverse (`_shrinkage`)
    observed_q8: int  # sum of magnitudes, pseudo-observations included
    expected_q8: int  # sum of the magnitudes expected from the columns' means
    recent_observed_q16: int  # the same two over the last columns, by exponential decay
    recent_expected_q16: int
    gain_q10: int  # how far the deviation of the last columns is trusted

    is_predicted: int  # 1: levels are coded as differences to the prediction
    coefficient_q8: int  # of the shared direction in this row: fitted to the levels so far
    dot_q8: int  # sum of direction * level
    norm_q8: int  # sum of direction^2, and the ridge

    total_magnitude_q8: int  # plain sums over the row
    total_expected_q8: int
    total_saved_q12: int  # by how much the prediction made levels smaller


class MagnitudeModel(NamedTuple):
    """The model of magnitudes. Columns are normalised: divided by their row's ratio and factor."""

    row_factor_q16_R: np.ndarray  # int64, as all others
    mean_q16_C: np.ndarray  # running mean of each column
    recent_mean_q16_C: np.ndarray  # the same over the last rows
    expected_q16_C: np.ndarray  # the mean, corrected by the last rows as far as they are trusted
    magnitude_C: np.ndarray  # of the differences in the row that is being coded
    has_exponents: bool  # the columns' initial means come from exponents
    matrix: MatrixState
    row: RowState


class Coding(NamedTuple):
    """Binary coder, counters and trellis."""

    next_S2: np.ndarray
    stride: int
    counters: Counters
    coder: BinaryCoder


class Expectation(NamedTuple):
    """The magnitude that is expected of one level, from coarse to fine."""

    by_column_q16: int  # column's expectation times the row's factor
    by_row_q16: int  # times the ratio of the row so far
    deviation_q10: int  # relative deviation of the last columns from their expectations by row
    estimate_q16: int  # `by_row_q16`, corrected by that deviation


class Prediction(NamedTuple):
    """The predicted level of one column."""

    exact_q12: int
    level: int  # the nearest level; on a trellis the nearest even one, so that differences keep parity
    remainder_q12: int  # exact_q12 - level


def encode(
    levels_RC: np.ndarray, row_exponents_R: np.ndarray, column_exponents_C: np.ndarray, states: int
) -> bytes:
    """Encode int16 levels within +-MAX_LEVEL; returns the bytes.

    On a trellis each level must be one that its state allows. Exponents are int8; a decoder needs
    the same.
    """
    capacity = levels_RC.size + 64
    while True:
        coder = BinaryCoder(encoder_state(), np.zeros(capacity, np.uint8), False)
        if not _code_matrix(levels_RC, row_exponents_R, column_exponents_C, states, coder):
            raise ValueError(f"a level is beyond {MAX_LEVEL}, which is the most that can be coded")

        # Bytes beyond the buffer's end were counted but not written: start again with enough room.
        written = int(coder.state.position)
        if written <= capacity:
            return coder.buffer_B[:written].tobytes() + final_bytes(coder.state)
        capacity = written + 64


def decode(
    payload: bytes, row_exponents_R: np.ndarray, column_exponents_C: np.ndarray, states: int
) -> np.ndarray:
    """Decode the levels (R, C), int16; a ValueError when the payload does not hold exactly those."""
    levels_RC = np.zeros((len(row_exponents_R), len(column_exponents_C)), np.int16)
    coder = BinaryCoder(decoder_state(payload), np.frombuffer(bytearray(payload), np.uint8), True)
    read_ahead = int(coder.state.position)
    if not _code_matrix(levels_RC, row_exponents_R, column_exponents_C, states, coder):
        raise ValueError(f"an arithmetic-coded stream holds a level beyond {MAX_LEVEL}")

    # A matrix has one stream: the payload must end as the encoder would have ended it.
    written = int(coder.state.position) - read_ahead
    end = final_bytes(coder.state)
    if written > len(payload) or payload[written:] != end:
        raise ValueError(
            f"an arithmetic-coded stream of {len(payload)} bytes does not end where its levels do,"
            f" at {written + len(end)}"
        )
    return levels_RC


def compile_ahead() -> None:
    """Compile encoder and decoder, which takes seconds."""
    zero = np.zeros(1, np.int8)
    encode(np.zeros((1, 1), np.int16), zero, zero, 1)


def _code_matrix(
    levels_RC: np.ndarray,
    row_exponents_R: np.ndarray,
    column_exponents_C: np.ndarray,
    states: int,
    coder: BinaryCoder,
) -> bool:
    """Encode `levels_RC` or fill it, with a fresh model; returns what `_code_rows` does."""
    trellis = build_trellis(states)
    prob_q22_KU = initial_probs(trellis.stride).copy()
    count_q4_KU = np.full(prob_q22_KU.shape, INITIAL_COUNT * BLEND_ONE, np.int64)
    count_q4_KU[SIGN_CONTEXT] = 0

    model = _initial_model(row_exponents_R, column_exponents_C)
    coding = Coding(trellis.next_S2, trellis.stride, Counters(prob_q22_KU, count_q4_KU), coder)
    direction = initial_direction(len(column_exponents_C))
    return bool(_code_rows(levels_RC, model, direction, coding))


def _initial_model(row_exponents_R: np.ndarray, column_exponents_C: np.ndarray) -> MagnitudeModel:
    """The model before the first row: all that is known are the exponents."""
    mean_q16_C = _factors_q16(column_exponents_C)
    matrix = new_record(
        MatrixState,
        ratio_q16=INITIAL_RATIO_Q16,
        spread_q20=INITIAL_SPREAD_Q20,
        expected_total_q16=int(mean_q16_C.sum()),
    )
    return MagnitudeModel(
        row_factor_q16_R=_factors_q16(row_exponents_R),
        mean_q16_C=mean_q16_C,
        recent_mean_q16_C=mean_q16_C.copy(),
        expected_q16_C=mean_q16_C.copy(),
        magnitude_C=np.zeros(len(mean_q16_C), np.int64),
        has_exponents=bool(column_exponents_C.any()),
        matrix=matrix,
        row=new_record(RowState),
    )


def _factors_q16(exponents: np.ndarray) -> np.ndarray:
    """Factors 2^(-e / 8) of int8 exponents e, relative to the median exponent.

    Magnitudes of levels are expected to be proportional to them.
    """
    wide = exponents.astype(np.int64)
    median = int(np.sort(wide)[len(wide) // 2]) if len(wide) else 0
    eighths = np.clip(median - wide, -MAX_EIGHTHS, MAX_EIGHTHS) + MAX_EIGHTHS
    return (ROOTS_Q16[eighths % 8] << (eighths // 8)) >> (MAX_EIGHTHS // 8)


@jit_entry
def _code_rows(levels_RC: np.ndarray, model: MagnitudeModel, direction: Direction, coding: Coding) -> bool:
    """Encode `levels_RC` or fill it; False if a level is beyond MAX_LEVEL.

    Only a damaged stream holds such a level.
    """
    for row in range(len(levels_RC)):
        row_factor_q16 = model.row_factor_q16_R[row]
        if not _code_row(levels_RC[row], row_factor_q16, model, direction, coding):
            return False
        _update_matrix(row, row_factor_q16, model)
        update_direction(row, levels_RC[row], model.row.total_saved_q12, direction)
    return True


@jit_internal
def _code_row(
    levels_C: np.ndarray, row_factor_q16: int, model: MagnitudeModel, direction: Direction, coding: Coding
) -> bool:
    """Code one row; leaves its magnitudes and sums in the model."""
    _begin_row(row_factor_q16, model, direction)
    direction_q12_C = direction.direction_q12_C
    stride = coding.stride
    trellis_state = ZERO
    for column in range(len(levels_C)):
        expectation = _expect(column, row_factor_q16, model)
        predicted = _predict(direction_q12_C[column], stride, model.row)

        # Code the magnitude, then the sign of the difference to the prediction.
        odd = trellis_state & 1 if stride == 2 else 0
        difference = np.int64(levels_C[column]) - predicted.level
        magnitude = _code_magnitude(abs(difference), expectation.estimate_q16, odd, coding)
        if magnitude > 2 * MAX_LEVEL:
            return False
        level = predicted.level + _code_sign(
            magnitude, difference, predicted.remainder_q12, expectation.estimate_q16, coding
        )
        if abs(level) > MAX_LEVEL:
            return False
        if coding.coder.decoding:
            levels_C[column] = level

        _update_row(column, level, magnitude, expectation, predicted, direction_q12_C[column], model)
        trellis_state = coding.next_S2[trellis_state, ((level - odd) >> 1) & 1] if stride == 2 else 0
    return True


@jit_internal
def _begin_row(row_factor_q16: int, model: MagnitudeModel, direction: Direction) -> None:
    """Reset the row's state: the prior of its magnitudes, and the predictor's coefficient."""
    matrix = model.matrix
    row = model.row
    columns = max(len(model.mean_q16_C), 1)

    # Prior: `prior_count` pseudo-observations of the mean expected from earlier rows.
    row.shrinkage_sign, prior_count = _shrinkage(columns, matrix.spread_q20)
    mean_q16 = (matrix.expected_total_q16 // columns * row_factor_q16) >> FRAC_BITS
    mean_q16 = min(max(mean_q16, 1), MAX_MEAN_Q16)
    row.expected_q8 = max((prior_count * mean_q16) >> SUM_SHIFT, 1 << SUM_BITS)
    row.observed_q8 = min(max((row.expected_q8 * matrix.ratio_q16) >> FRAC_BITS, 1), MAX_SUM_Q8)

    row.recent_observed_q16 = 0
    row.recent_expected_q16 = 0
    row.gain_q10 = _regression_gain(matrix.row_cov_q20, matrix.row_var_q20)

    row.is_predicted = direction.stats.saved_q12 > 0
    row.coefficient_q8 = 0
    row.dot_q8 = 0
    row.norm_q8 = ridge(direction.stats)

    row.total_magnitude_q8 = 0
    row.total_expected_q8 = 0
    row.total_saved_q12 = 0


@jit_inline
def _expect(column: int, row_factor_q16: int, model: MagnitudeModel) -> Expectation:
    """Estimate the magnitude of the next level."""
    row = model.row
    by_column_q16 = (model.expected_q16_C[column] * row_factor_q16) >> FRAC_BITS
    by_column_q16 = min(max(by_column_q16, 1), MAX_MEAN_Q16)
    by_row_q16 = max(1, min(by_column_q16 * row.observed_q8 // row.expected_q8, MAX_ESTIMATE_Q16))
    if column == 0:
        row.recent_observed_q16 = by_row_q16 << WINDOW_BITS
        row.recent_expected_q16 = by_row_q16 << WINDOW_BITS

    deviation_q10 = _relative_deviation(row.recent_observed_q16, row.recent_expected_q16)
    correction_q10 = (deviation_q10 * row.gain_q10) >> DEVIATION_BITS
    estimate_q16 = by_row_q16 + ((by_row_q16 * correction_q10) >> DEVIATION_BITS)
    estimate_q16 = max(1, min(estimate_q16, MAX_ESTIMATE_Q16))
    return Expectation(by_column_q16, by_row_q16, deviation_q10, estimate_q16)


@jit_inline
def _predict(direction_q12: int, stride: int, row: RowState) -> Prediction:
    """Predict the next level from the row's coefficient; 0 where that has not paid in earlier rows."""
    exact_q12 = prediction(row.coefficient_q8, direction_q12)
    if not row.is_predicted:
        return Prediction(exact_q12, ZERO, ZERO)
    half_q12 = stride << (PREDICTION_BITS - 1)
    level = ((exact_q12 + half_q12) >> (PREDICTION_BITS + stride - 1)) << (stride - 1)
    return Prediction(exact_q12, level, exact_q12 - (level << PREDICTION_BITS))


@jit_inline
def _update_row(
    column: int,
    level: int,
    magnitude: int,
    expectation: Expectation,
    predicted: Prediction,
    direction_q12: int,
    model: MagnitudeModel,
) -> None:
    """Learn from a coded level; `magnitude` is that of its difference to the prediction."""
    row = model.row
    by_column_q16, by_row_q16, deviation_q10, _ = expectation
    model.magnitude_C[column] = magnitude

    # Regression of the magnitude on the deviation of the columns before it.
    if column % SUBSAMPLE == SUBSAMPLE - 1:
        matrix = model.matrix
        matrix.row_cov_q20 += deviation_q10 * _relative_deviation(magnitude << FRAC_BITS, by_row_q16)
        matrix.row_var_q20 += deviation_q10 * deviation_q10

    # The row's magnitudes: of the last columns, and of all.
    row.recent_observed_q16 += (magnitude << FRAC_BITS) - (row.recent_observed_q16 >> WINDOW_BITS)
    row.recent_expected_q16 += by_row_q16 - (row.recent_expected_q16 >> WINDOW_BITS)
    magnitude_q8 = magnitude << SUM_BITS
    expected_q8 = by_column_q16 >> SUM_SHIFT
    row.observed_q8 = min(max(row.observed_q8 + row.shrinkage_sign * magnitude_q8, 1), MAX_SUM_Q8)
    row.expected_q8 = max(row.expected_q8 + row.shrinkage_sign * expected_q8, 1 << SUM_BITS)
    row.total_magnitude_q8 += magnitude_q8
    row.total_expected_q8 += expected_q8

    # The predictor's coefficient, and what predicting saves.
    level_q12 = level << PREDICTION_BITS
    row.total_saved_q12 += abs(level_q12) - abs(level_q12 - predicted.exact_q12)
    direction_q8 = direction_q12 >> 4
    row.dot_q8 += direction_q8 * clamp_level(level)
    row.norm_q8 += (direction_q8 * direction_q8) >> 8
    row.coefficient_q8 = coefficient(row.dot_q8, row.norm_q8)


@jit_internal
def _shrinkage(columns: int, spread_q20: int) -> tuple[int, int]:
    """Sign and strength (in pseudo-observations) of the shrinkage of a row's mean towards earlier rows.

    The magnitudes of a row are taken to be exchangeable. Their covariance tau is the variance of
    the rows' means less the part of it that sampling explains. The best linear estimate of the next
    magnitude is the mean of those seen so far and SAMPLING / tau prior ones. If tau is negative,
    rows differ by less than sampling alone would make them (their steps were derived from their own
    deviations): a row that has had large magnitudes will then have small ones, and observations are
    subtracted from the prior instead of added.
    """
    spread_q12 = spread_q20 >> (SPREAD_BITS - 12)
    tau_q24 = ((spread_q12 * spread_q12 * HALF_PI_Q14) >> 14) - (SAMPLING_Q16 << 8) // columns
    prior_count = min((SAMPLING_Q16 << 8) // max(abs(tau_q24), 1), MAX_PRIOR_COUNT)
    least_if_negative = (17 * columns) >> 4  # so that the prior is not used up before the row ends
    if tau_q24 >= 0 or least_if_negative > MAX_PRIOR_COUNT:
        return np.int64(1), max(prior_count, 2)
    return np.int64(-1), max(prior_count, least_if_negative)


@jit_internal
def _relative_deviation(observed: int, expected: int) -> int:
    """(observed - expected) / expected in q10, at most 4."""
    return min(((observed - expected) << DEVIATION_BITS) // expected, 4 << DEVIATION_BITS)


@jit_internal
def _regression_gain(cov_q20: int, var_q20: int) -> int:
    """Ridge regression coefficient cov / var in q10, from 0 to 1."""
    return min(max((cov_q20 << DEVIATION_BITS) // (var_q20 + RIDGE_Q20), 0), 1 << DEVIATION_BITS)


@jit_inline
def _code_sign(magnitude: int, difference: int, remainder_q12: int, estimate_q16: int, coding: Coding) -> int:
    """Encode or decode the sign of a difference; returns the difference.

    The sign of `remainder_q12` predicts it. The evidence grows with the remainder and with the
    magnitude. It chooses the context; without any the sign costs one bit.
    """
    if magnitude == 0:
        return 0
    # Remainder * magnitude / estimate^2: 12 + 22 - 32 fractional bits are q2.
    evidence_q2 = ((abs(remainder_q12) * magnitude) << 22) // (estimate_q16 * estimate_q16)
    is_upward = remainder_q12 > 0
    agrees = 1 if (difference > 0) == is_upward else 0
    if evidence_q2:
        decision = min(evidence_q2, UNARY - 1)
        agrees = code_adaptive_bit(
            agrees, np.int64(SIGN_CONTEXT), ZERO, decision, coding.counters, coding.coder
        )
    else:
        agrees = code_bit(agrees, HALF_Q16, coding.coder)
    return magnitude if (agrees == 1) == is_upward else -magnitude


@jit_inline
def _code_magnitude(magnitude: int, estimate_q16: int, odd: int, coding: Coding) -> int:
    """Encode or decode a magnitude; returns it.

    `odd` is its parity, which is known on a trellis, where half of it is coded; 0 without a
    trellis. Of large magnitudes the lowest bits are coded raw; what is left in unary up to UNARY,
    then in Elias's gamma code.
    """
    counters = coding.counters
    coder = coding.coder
    parity_bits = coding.stride - 1
    nearest, blend_q4, octave = _find_context(estimate_q16, parity_bits)
    context = nearest + MAGNITUDE_CONTEXTS * odd
    raw_bits = max(0, octave - parity_bits - RAW_BITS_FROM + 1)
    halved = magnitude >> parity_bits
    high_part = halved >> raw_bits

    value = ZERO
    while value < UNARY and code_adaptive_bit(
        1 if value < high_part else 0, context, blend_q4, value, counters, coder
    ):
        value += 1

    # Gamma code of what is beyond: the number of bits in unary, then the bits below the leading
    # one.
    if value == UNARY:
        rest = high_part - UNARY + 1  # >= 1
        bits = 0
        while bits < 16 and code_bit(1 if rest >> (bits + 1) else 0, HALF_Q16, coder):
            bits += 1
        value = UNARY - 1 + (1 << bits) + code_raw_bits(rest, bits, coder)

    if raw_bits:
        value = (value << raw_bits) + code_raw_bits(halved, raw_bits, coder)
    return (value << parity_bits) + odd


@jit_internal
def _find_context(estimate_q16: int, parity_bits: int) -> tuple[int, int, int]:
    """Locate an expected magnitude among the contexts.

    Returns the context below it, how far it is above that (q4), and its octave (log2).
    """
    octave = np.int64(MIN_OCTAVE)
    above = max(estimate_q16 >> (FRAC_BITS + MIN_OCTAVE), 1)
    while above > 1:
        above >>= 1
        octave += 1

    # The position in the octave: 2 bits for the quarter, 4 for the way to the next.
    position_q6 = max(estimate_q16, 1 << (FRAC_BITS + MIN_OCTAVE)) >> (FRAC_BITS + octave - 2 - BLEND_BITS)
    quarter = (position_q6 >> BLEND_BITS) & (CONTEXTS_PER_OCTAVE - 1)
    blend_q4 = position_q6 & (BLEND_ONE - 1)
    context = CONTEXTS_PER_OCTAVE * (octave - MIN_OCTAVE) + quarter

    if context >= MAGNITUDE_CONTEXTS - 1:
        return np.int64(MAGNITUDE_CONTEXTS - 1), ZERO, octave
    if quarter == CONTEXTS_PER_OCTAVE - 1 and octave >= RAW_BITS_FROM - 1 + parity_bits:
        blend_q4 = ZERO  # the next context has one more raw bit: its counters mean something else
    return context, blend_q4, octave


@jit_internal
def _update_matrix(row: int, row_factor_q16: int, model: MagnitudeModel) -> None:
    """Learn the columns' means and the ratio of rows to columns from a coded row.

    `row` is the number of rows before it.
    """
    matrix = model.matrix
    sums = model.row

    # The ratio, and how much it varies from row to row.
    old_ratio_q16 = matrix.ratio_q16
    observed_q8 = sums.total_magnitude_q8 + ((RATIO_PRIOR_COUNT * old_ratio_q16) >> SUM_SHIFT)
    expected_q8 = sums.total_expected_q8 + (RATIO_PRIOR_COUNT << SUM_BITS)
    ratio_q16 = min(max(1, (observed_q8 << FRAC_BITS) // expected_q8), MAX_RATIO_Q16)
    running_rate_q16 = (2 << FRAC_BITS) // (2 * row + 3)  # 1 / (row + 1.5)
    ratio_rate_q16 = max(running_rate_q16, MIN_RATIO_RATE_Q16)
    matrix.ratio_q16 = max(1, old_ratio_q16 + (((ratio_q16 - old_ratio_q16) * ratio_rate_q16) >> 16))
    if row:
        change_q20 = min((abs(ratio_q16 - old_ratio_q16) << SPREAD_BITS) // old_ratio_q16, 4 << SPREAD_BITS)
        spread_rate_q16 = max(running_rate_q16, MIN_SPREAD_RATE_Q16)
        matrix.spread_q20 += ((change_q20 - matrix.spread_q20) * spread_rate_q16) >> 16

    # Regressions on the last columns and on the last rows.
    matrix.row_cov_q20 -= matrix.row_cov_q20 >> DECAY_SHIFT
    matrix.row_var_q20 -= matrix.row_var_q20 >> DECAY_SHIFT
    matrix.column_cov_q20 -= matrix.column_cov_q20 >> DECAY_SHIFT
    matrix.column_var_q20 -= matrix.column_var_q20 >> DECAY_SHIFT
    gain_q10 = _regression_gain(matrix.column_cov_q20, matrix.column_var_q20)

    # The columns' means, of magnitudes normalised by the row's ratio and factor.
    normaliser_q16 = (np.int64(1) << (2 * FRAC_BITS)) // max((ratio_q16 * row_factor_q16) >> FRAC_BITS, 1)
    prior_rows = PRIOR_ROWS_WITH_EXPONENTS if model.has_exponents else PRIOR_ROWS_WITHOUT_EXPONENTS
    mean_rate_q16 = max(65536 // (row + prior_rows), MIN_MEAN_RATE_Q16)
    mean_q16_C = model.mean_q16_C
    recent_mean_q16_C = model.recent_mean_q16_C
    matrix.expected_total_q16 = 0
    for column in range(len(mean_q16_C)):
        magnitude_q16 = min(model.magnitude_C[column] * normaliser_q16, MAX_MEAN_Q16)
        mean_q16 = mean_q16_C[column]
        recent_q16 = recent_mean_q16_C[column]

        # A diagonal of columns: one in SUBSAMPLE of each row.
        if (column + row) % SUBSAMPLE == SUBSAMPLE - 1:
            deviation_q10 = _relative_deviation(recent_q16, mean_q16)
            matrix.column_cov_q20 += deviation_q10 * _relative_deviation(magnitude_q16, mean_q16)
            matrix.column_var_q20 += deviation_q10 * deviation_q10

        mean_q16 = max(1, mean_q16 + (((magnitude_q16 - mean_q16) * mean_rate_q16 + 32768) >> 16))
        recent_q16 += (magnitude_q16 - recent_q16 + (1 << (WINDOW_BITS - 1))) >> WINDOW_BITS
        expected_q16 = max(1, mean_q16 + (((recent_q16 - mean_q16) * gain_q10) >> DEVIATION_BITS))
        mean_q16_C[column] = mean_q16
        recent_mean_q16_C[column] = recent_q16
        model.expected_q16_C[column] = expected_q16
        matrix.expected_total_q16 += expected_q16
