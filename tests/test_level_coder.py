"""The arithmetic coder: round trips, one stream for each matrix, rates near the entropy, a golden stream."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.pack.entropy import level_coder
from stages.pack.entropy.binary_coder import PROB_ONE
from stages.pack.entropy.initial_probabilities import MAGNITUDE_CONTEXTS, initial_probs
from stages.pack.entropy.level_coder import MAX_LEVEL
from stages.pack.trellis import STATE_COUNTS, build_trellis

GOLDEN = {
    1: "479be0c42a1f10f04d797c6b9f78b5f263a7ff0ef423f084957e7af9800a4a47",
    8: "60fa0b12f6339c52ffd364422a51b602a50cc57f7a2d1610c4a9f5a084856a4d",
}
INITIAL_PROBS = {
    1: "607dfb887a0ecd44bfb3f7a3d5e2a582dea6b5347fd6f5592c558af75b87fece",
    2: "c4ddf18771837d095b53c1da3d959718bc5b700e530bc6c8f275535be094e7fd",
}
SHAPES = [(0, 0), (0, 7), (7, 0), (1, 1), (1, 40), (40, 1), (5, 9)]


def nearest_levels(values_RC: np.ndarray, states: int) -> np.ndarray:
    """The nearest levels (int16, at most +-MAX_LEVEL) that the trellis allows after the levels before."""
    code = build_trellis(states)
    levels_RC, state_R = np.zeros(values_RC.shape, np.int16), np.zeros(len(values_RC), np.int64)
    for column in range(values_RC.shape[1]):
        odd_R = state_R % 2 if states > 1 else 0
        most = (MAX_LEVEL - odd_R) // code.stride
        least = -((MAX_LEVEL + odd_R) // code.stride)
        k_R = np.rint((values_RC[:, column] - odd_R) / code.stride).clip(least, most).astype(np.int64)
        levels_RC[:, column] = code.stride * k_R + odd_R
        state_R = code.next_S2[state_R, k_R % 2]
    return levels_RC


def encode(levels_RC: np.ndarray, states: int) -> bytes:
    """The stream of a matrix of whose scales nothing is known beforehand."""
    rows, columns = levels_RC.shape
    return level_coder.encode(levels_RC, np.zeros(rows, np.int8), np.zeros(columns, np.int8), states)


def decode(payload: bytes, rows: int, columns: int, states: int) -> np.ndarray:
    """The matrix of such a stream."""
    return level_coder.decode(payload, np.zeros(rows, np.int8), np.zeros(columns, np.int8), states)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Levels of random walks, from nearly all zeros to nearly all at the limit, and the number of states."""
    states = draw(st.sampled_from(STATE_COUNTS))
    shape = draw(st.integers(0, 12)), draw(st.integers(0, 40))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    # Cauchy values have outliers that go through every escape of a magnitude's code.
    values_RC = generator.standard_normal(shape) if draw(st.booleans()) else generator.standard_cauchy(shape)
    octaves_of_rows, octaves_of_columns = draw(st.sampled_from([0, 10])), draw(st.sampled_from([0, 10]))
    values_RC *= 2.0 ** -generator.uniform(0, octaves_of_rows, (shape[0], 1)) * 2.0 ** -generator.uniform(
        0, octaves_of_columns, shape[1]
    )
    return nearest_levels(values_RC * 10 ** draw(st.floats(-2, 3.5)), states), states


def comes_back(levels_RC: np.ndarray, states: int) -> bytes:
    """The stream of a matrix, after a look at what must always hold of it."""
    before = levels_RC.copy()
    payload = encode(levels_RC, states)
    assert encode(levels_RC, states) == payload
    decoded_RC = decode(payload, len(levels_RC), levels_RC.shape[1], states)
    assert decoded_RC.dtype == np.int16
    assert np.array_equal(decoded_RC, before)
    assert np.array_equal(levels_RC, before)
    return payload


def is_refused_or_canonical(payload: bytes, shape: tuple[int, int], states: int) -> None:
    """Decode arbitrary bytes: an error, or a matrix whose one stream they are; never a crash."""
    try:
        levels_RC = decode(payload, *shape, states)
    except ValueError:
        return
    assert levels_RC.shape == shape
    assert encode(levels_RC, states) == payload


def order_0_bytes(levels_RC: np.ndarray) -> float:
    """The empirical entropy of the levels, each taken for itself."""
    counts = np.unique(levels_RC, return_counts=True)[1]
    return float(counts @ np.log2(levels_RC.size / counts)) / 8


@given(matrices())
@settings(max_examples=200, deadline=None)
def test_what_was_encoded_is_decoded(case: tuple[np.ndarray, int]) -> None:
    comes_back(*case)


@pytest.mark.parametrize("states", STATE_COUNTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_zeros_of_any_shape_come_back_in_few_bytes(shape: tuple[int, int], states: int) -> None:
    payload = comes_back(np.zeros(shape, np.int16), states)
    assert len(payload) <= (8 if 0 not in shape else 0)


def test_many_zeros_cost_next_to_nothing() -> None:
    assert len(comes_back(np.zeros((300, 1000), np.int16), 1)) < 40


@pytest.mark.parametrize("states", STATE_COUNTS)
def test_the_largest_levels_come_back(states: int) -> None:
    signs_RC = np.random.default_rng(0).choice([-1.0, 1.0], (6, 50))
    for factor_RC in (
        1,
        signs_RC,
        signs_RC * (np.arange(50) % 7 == 0),
    ):  # the last: from zero to the limit and back
        levels_RC = nearest_levels(factor_RC * np.full((6, 50), 40000.0), states)
        assert abs(levels_RC.astype(int)).max() >= MAX_LEVEL - 1
        comes_back(levels_RC, states)


@pytest.mark.parametrize("states", STATE_COUNTS)
def test_rows_whose_scales_differ_by_a_thousand_come_back(states: int) -> None:
    generator = np.random.default_rng(1)
    comes_back(
        nearest_levels(
            generator.standard_normal((40, 60)) * 2.0 ** (10 * (np.arange(40) % 2))[:, None], states
        ),
        states,
    )


def test_the_least_int16_is_not_lost_in_silence() -> None:
    """Its magnitude is beyond MAX_LEVEL: either it comes back or it is refused."""
    levels_RC = np.array([[5, -32768, 3]], np.int16)
    try:
        payload = encode(levels_RC, 1)
    except (ValueError, AssertionError):
        return
    assert np.array_equal(decode(payload, 1, 3, 1), levels_RC)


@given(matrices(), st.integers(0, 2**32), st.integers(1, 128))
@settings(max_examples=200, deadline=None)
def test_whatever_the_exponents_the_levels_come_back(
    case: tuple[np.ndarray, int], seed: int, reach: int
) -> None:
    """Those of a damaged file may be any; they only make the stream longer."""
    levels_RC, states = case
    generator = np.random.default_rng(seed)
    rows_R, columns_C = (generator.integers(-reach, reach, size, np.int8) for size in levels_RC.shape)
    payload = level_coder.encode(levels_RC, rows_R, columns_C, states)
    assert np.array_equal(level_coder.decode(payload, rows_R, columns_C, states), levels_RC)


@pytest.mark.parametrize("states", STATE_COUNTS)
@pytest.mark.parametrize("size", [1.0, 300.0, 40000.0])
def test_rows_along_one_direction_come_back(states: int, size: float) -> None:
    """The prediction at work, up to levels and shares that it must bound."""
    generator = np.random.default_rng(5)
    shares_R = generator.standard_cauchy((60, 1))
    comes_back(
        nearest_levels(
            size * shares_R * generator.standard_normal(50) + generator.standard_normal((60, 50)), states
        ),
        states,
    )


@given(st.binary(max_size=60), st.integers(0, 5), st.integers(0, 12), st.sampled_from(STATE_COUNTS))
@settings(max_examples=300, deadline=None)
def test_garbage_is_refused_or_canonical(payload: bytes, rows: int, columns: int, states: int) -> None:
    is_refused_or_canonical(payload, (rows, columns), states)


@given(matrices(), st.data())
@settings(max_examples=100, deadline=None)
def test_a_damaged_stream_is_refused_or_canonical(case: tuple[np.ndarray, int], data: st.DataObject) -> None:
    levels_RC, states = case
    payload = encode(levels_RC, states)
    for cut in {
        0,
        len(payload) // 2,
        max(0, len(payload) - 2),
        max(0, len(payload) - 1),
        data.draw(st.integers(0, len(payload))),
    }:
        is_refused_or_canonical(payload[:cut], levels_RC.shape, states)
    for more in (b"\0", b"\0\0\0\0\0\0", data.draw(st.binary(min_size=1, max_size=9))):
        is_refused_or_canonical(payload + more, levels_RC.shape, states)
    if payload:
        place = data.draw(st.integers(0, len(payload) - 1))
        flipped = payload[place] ^ data.draw(st.integers(1, 255))
        is_refused_or_canonical(
            payload[:place] + bytes([flipped]) + payload[place + 1 :], levels_RC.shape, states
        )


@pytest.mark.parametrize(
    ("payload", "columns", "states"),
    [(b"\x94\xe7", 22, 1), (b"\x11\x0fq+", 17, 4), (b"\x03%", 17, 8), (b"\x80", 32767, 1)],
)
def test_a_stream_that_lacks_its_last_zeros_is_refused(payload: bytes, columns: int, states: int) -> None:
    """Without the last zeros of its bytes a stream looks complete, since a decoder reads zeros after the end.

    It narrows its interval around a number that ends in zeros, until that number is the lower end: a
    stream that ends there has zeros for its last bytes.
    """
    is_refused_or_canonical(payload, (1, columns), states)


def test_a_level_beyond_the_largest_is_refused() -> None:
    with pytest.raises(ValueError, match="holds a level beyond 32767"):
        decode(b"", 1, 1, 1)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 3)])
def test_a_stream_that_goes_on_says_where_it_should_end(shape: tuple[int, int]) -> None:
    payload = encode(np.zeros(shape, np.int16), 8)
    with pytest.raises(
        ValueError, match=f"of {len(payload) + 4} bytes does not end where its levels do, at {len(payload)}"
    ):
        decode(payload + b"more", *shape, 8)


@pytest.mark.parametrize("deviation", [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0])
def test_the_rate_of_normal_values_is_their_entropy(deviation: float) -> None:
    values_RC = deviation * np.random.default_rng(2).standard_normal((400, 500))
    levels_RC = nearest_levels(values_RC, 1)
    assert len(encode(levels_RC, 1)) < 1.005 * order_0_bytes(levels_RC) + 40


@pytest.mark.parametrize("states", [4, 8, 256])
def test_on_a_trellis_the_rate_is_a_bit_below_the_entropy(states: int) -> None:
    """The state tells whether a level is even or odd, which is one bit of its entropy."""
    levels_RC = nearest_levels(5 * np.random.default_rng(3).standard_normal((400, 500)), states)
    assert len(encode(levels_RC, states)) < 1.005 * (order_0_bytes(levels_RC) - levels_RC.size / 8) + 40


@pytest.mark.parametrize("deviation", [0.3, 1.0, 5.0, 20.0])
def test_deviations_of_rows_and_columns_are_learnt(deviation: float) -> None:
    generator = np.random.default_rng(4)
    factors_RC = 2.0 ** generator.uniform(-3, 3, (400, 1)) * 2.0 ** generator.uniform(-3, 3, 500)
    levels_RC = nearest_levels(deviation * factors_RC * generator.standard_normal((400, 500)), 1)
    assert len(encode(levels_RC, 1)) < 0.9 * order_0_bytes(levels_RC)


@pytest.mark.parametrize("states", [1, 8])
def test_known_exponents_spare_the_learning_of_deviations(states: int) -> None:
    """Levels whose deviations are those of the exponents cost about as much as levels of one deviation."""
    generator = np.random.default_rng(6)
    rows_R, columns_C = (generator.integers(-8, 9, size).astype(np.int8) for size in (96, 128))
    factors_RC = 2.0 ** (-rows_R[:, None] / 8.0) * 2.0 ** (-columns_C / 8.0)
    values_RC = 4 * generator.standard_normal((96, 128))
    levels_RC, alike_RC = nearest_levels(factors_RC * values_RC, states), nearest_levels(values_RC, states)
    known, unknown = (
        len(level_coder.encode(levels_RC, rows_R, columns_C, states)),
        len(encode(levels_RC, states)),
    )
    assert known < 0.99 * unknown
    assert known < 1.01 * (len(encode(alike_RC, states)) + levels_RC.size * np.log2(factors_RC).mean() / 8)


def test_rows_of_equal_deviation_cost_less_than_their_values_in_other_rows() -> None:
    """In a row whose step is made of its own deviation, large values make the others smaller.

    That is worth a quarter of a bit a row at least.
    """
    generator = np.random.default_rng(8)
    values_RC = generator.standard_normal((1000, 128))
    alike_RC = nearest_levels(2.4 * values_RC / values_RC.std(1, keepdims=True), 1)
    assert len(encode(alike_RC, 1)) < len(encode(generator.permuted(alike_RC, axis=0), 1)) - 1000 / 8 / 4


@pytest.mark.parametrize("states", [1, 8])
def test_a_direction_that_rows_share_is_predicted(states: int) -> None:
    """Half of the variance is along it, which is worth half a bit; the magnitudes alone do not show it."""
    generator = np.random.default_rng(7)
    noise_RC = 4 * generator.standard_normal((500, 100))
    along_RC = 4 * generator.standard_normal((500, 1)) * generator.standard_normal(100)
    alone, both = (
        len(encode(nearest_levels(values_RC, states), states))
        for values_RC in (noise_RC, noise_RC + along_RC)
    )
    magnitudes_alone_RC = (noise_RC + along_RC) * generator.choice([-1, 1], noise_RC.shape)
    assert both < 1.03 * alone
    assert both < 0.95 * len(encode(nearest_levels(magnitudes_alone_RC, states), states))


@pytest.mark.parametrize("stride", [1, 2])
def test_the_initial_probabilities_are_of_normal_values(stride: int) -> None:
    probs_KU = initial_probs(stride) / PROB_ONE
    for context in (12, 24, 31, 34):
        deviation = 2.0 ** (context // 4 - 6) * (1 + context % 4 / 4) * (np.pi / 2) ** 0.5
        for odd in range(stride):
            levels = np.arange(-3000, 3001) * stride + odd
            weights = np.exp(-((levels / deviation) ** 2) / 2)
            magnitudes = abs(levels) // stride if stride == 2 else abs(levels)
            at_least = [weights[magnitudes >= k].sum() for k in range(7)]
            for k in range(6):
                if at_least[k] > 1e-6 * at_least[0]:
                    expected = min(max(at_least[k + 1] / at_least[k], 2.0**-10), 1 - 2.0**-10)
                    assert probs_KU[MAGNITUDE_CONTEXTS * odd + context, k] == pytest.approx(
                        expected, abs=1e-6
                    )


@pytest.mark.parametrize("stride", INITIAL_PROBS)
def test_the_initial_probabilities_are_the_same_on_every_machine(stride: int) -> None:
    assert hashlib.sha256(initial_probs(stride).astype("<i8").tobytes()).hexdigest() == INITIAL_PROBS[stride]


@pytest.mark.parametrize("states", GOLDEN)
def test_the_bytes_of_a_fixed_matrix_never_change(states: int) -> None:
    """Artifacts outlive this code, so a change of the format must not go unnoticed.

    The matrix is made of integers alone, as the stream is.
    """
    code, number = build_trellis(states), 1
    levels_RC = np.zeros((48, 64), np.int16)
    for row in range(48):
        state = 0
        for column in range(64):
            number = number * 1103515245 + 12345 & 0x7FFFFFFF
            reach = 1 << (row // 4 + column // 16) % 15  # from 1 to 16,384
            odd = state & 1 if states > 1 else 0
            k = ((number >> 8) % (2 * reach) - reach) // code.stride
            levels_RC[row, column] = code.stride * k + odd
            state = code.next_S2[state, k & 1]
    comes_back(levels_RC, states)
    rows_R, columns_C = -8 * (np.arange(48) // 4).astype(np.int8), -8 * (np.arange(64) // 16).astype(np.int8)
    payload = level_coder.encode(levels_RC, rows_R, columns_C, states) + encode(levels_RC, states)
    assert hashlib.sha256(payload).hexdigest() == GOLDEN[states]
