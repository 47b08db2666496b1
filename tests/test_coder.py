"""The arithmetic coder: round trips, one stream for one matrix and no other, rates against the entropy, a golden stream."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.pack.coder import LARGEST, decode, encode
from stages.pack.trellis import STATES, trellis

GOLDEN = {
    1: "84ef3874df7a1e19d9a4c580150907072f0657d96738b8d06b29d803fe93462f",
    8: "fd897c4a187681280ffdbc6bc6ec0479dad81d3ac0c9db5ae4d9d4f76670fa00",
}
SHAPES = [(0, 0), (0, 7), (7, 0), (1, 1), (1, 40), (40, 1), (5, 9)]


def nearest_levels(values_RC: np.ndarray, states: int) -> np.ndarray:
    """Each value's nearest level among those that the trellis allows after the levels before it; int16, at most +-LARGEST."""
    code = trellis(states)
    levels_RC, state_R = np.zeros(values_RC.shape, np.int16), np.zeros(len(values_RC), np.int64)
    for column in range(values_RC.shape[1]):
        odd_R = state_R % 2 if states > 1 else 0
        most = (LARGEST - odd_R) // code.stride
        least = -((LARGEST + odd_R) // code.stride)
        k_R = np.rint((values_RC[:, column] - odd_R) / code.stride).clip(least, most).astype(np.int64)
        levels_RC[:, column] = code.stride * k_R + odd_R
        state_R = code.next_S2[state_R, k_R % 2]
    return levels_RC


@st.composite
def matrices(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Levels of random walks, from nearly all zeros to nearly all at the limit, and the number of states."""
    states = draw(st.sampled_from(STATES))
    shape = draw(st.integers(0, 12)), draw(st.integers(0, 40))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    # Cauchy values have outliers that go through every escape of a magnitude's code.
    values_RC = generator.standard_normal(shape) if draw(st.booleans()) else generator.standard_cauchy(shape)
    octaves_of_rows, octaves_of_columns = draw(st.sampled_from([0, 10])), draw(st.sampled_from([0, 10]))
    values_RC *= 2.0 ** -generator.uniform(0, octaves_of_rows, (shape[0], 1)) * 2.0 ** -generator.uniform(0, octaves_of_columns, shape[1])
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
    """A matrix has one stream: whatever else is decoded is an error, never a crash and never a second spelling."""
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


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("shape", SHAPES)
def test_zeros_of_any_shape_come_back_in_few_bytes(shape: tuple[int, int], states: int) -> None:
    payload = comes_back(np.zeros(shape, np.int16), states)
    assert len(payload) <= (6 if 0 not in shape else 0)


def test_many_zeros_cost_next_to_nothing() -> None:
    assert len(comes_back(np.zeros((300, 1000), np.int16), 1)) < 40


@pytest.mark.parametrize("states", STATES)
def test_the_largest_levels_come_back(states: int) -> None:
    signs_RC = np.random.default_rng(0).choice([-1.0, 1.0], (6, 50))
    for factor_RC in (1, signs_RC, signs_RC * (np.arange(50) % 7 == 0)):  # the last: from zero to the limit and back
        levels_RC = nearest_levels(factor_RC * np.full((6, 50), 40000.0), states)
        assert abs(levels_RC.astype(int)).max() >= LARGEST - 1
        comes_back(levels_RC, states)


@pytest.mark.parametrize("states", STATES)
def test_rows_whose_scales_differ_by_a_thousand_come_back(states: int) -> None:
    generator = np.random.default_rng(1)
    comes_back(nearest_levels(generator.standard_normal((40, 60)) * 2.0 ** (10 * (np.arange(40) % 2))[:, None], states), states)


def test_the_least_int16_is_not_lost_in_silence() -> None:
    """Its magnitude is beyond LARGEST: either it comes back or it is refused."""
    levels_RC = np.array([[5, -32768, 3]], np.int16)
    try:
        payload = encode(levels_RC, 1)
    except (ValueError, AssertionError):
        return
    assert np.array_equal(decode(payload, 1, 3, 1), levels_RC)


@given(st.binary(max_size=60), st.integers(0, 5), st.integers(0, 12), st.sampled_from(STATES))
@settings(max_examples=300, deadline=None)
def test_garbage_is_refused_or_canonical(payload: bytes, rows: int, columns: int, states: int) -> None:
    is_refused_or_canonical(payload, (rows, columns), states)


@given(matrices(), st.data())
@settings(max_examples=100, deadline=None)
def test_a_damaged_stream_is_refused_or_canonical(case: tuple[np.ndarray, int], data: st.DataObject) -> None:
    levels_RC, states = case
    payload = encode(levels_RC, states)
    for cut in {0, len(payload) // 2, max(0, len(payload) - 2), max(0, len(payload) - 1), data.draw(st.integers(0, len(payload)))}:
        is_refused_or_canonical(payload[:cut], levels_RC.shape, states)
    for more in (b"\0", b"\0\0\0\0\0\0", data.draw(st.binary(min_size=1, max_size=9))):
        is_refused_or_canonical(payload + more, levels_RC.shape, states)
    if payload:
        place = data.draw(st.integers(0, len(payload) - 1))
        flipped = payload[place] ^ data.draw(st.integers(1, 255))
        is_refused_or_canonical(payload[:place] + bytes([flipped]) + payload[place + 1 :], levels_RC.shape, states)


@pytest.mark.parametrize(
    ("payload", "columns", "states"), [(b"\x94\xe7", 22, 1), (b"\x11\x0fq+", 17, 4), (b"\x03%", 17, 8), (b"\x80", 32767, 1)]
)
def test_a_stream_that_lacks_its_last_zeros_is_refused(payload: bytes, columns: int, states: int) -> None:
    """A decoder reads zeros behind the end of a stream. So it narrows its interval around a number that ends in zeros, until that is the
    interval's lower end: a stream that ends there has zeros for its last bytes, and without them it looks complete."""
    is_refused_or_canonical(payload, (1, columns), states)


def test_a_level_beyond_the_largest_is_refused() -> None:
    with pytest.raises(ValueError, match="holds a level beyond 32767"):
        decode(b"", 1, 1, 1)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 3)])
def test_a_stream_that_goes_on_says_where_it_should_end(shape: tuple[int, int]) -> None:
    payload = encode(np.zeros(shape, np.int16), 8)
    with pytest.raises(ValueError, match=f"of {len(payload) + 4} bytes does not end where its levels do, at {len(payload)}"):
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
def test_scales_of_rows_and_columns_are_learnt(deviation: float) -> None:
    generator = np.random.default_rng(4)
    factors_RC = 2.0 ** generator.uniform(-3, 3, (400, 1)) * 2.0 ** generator.uniform(-3, 3, 500)
    levels_RC = nearest_levels(deviation * factors_RC * generator.standard_normal((400, 500)), 1)
    assert len(encode(levels_RC, 1)) < 0.9 * order_0_bytes(levels_RC)


@pytest.mark.parametrize("states", GOLDEN)
def test_the_bytes_of_a_fixed_matrix_never_change(states: int) -> None:
    """Artifacts outlive this code: whoever changes the format must notice. The matrix is made of integers alone, as the stream is."""
    code, number = trellis(states), 1
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
    payload = comes_back(levels_RC, states)
    assert hashlib.sha256(payload).hexdigest() == GOLDEN[states]
