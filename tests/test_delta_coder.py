"""Series of numbers: round trips, a running mean that pays, damaged payloads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.pack.entropy import codecs, delta_coder
from stages.pack.entropy.codecs import StreamLayout


def layout(item_bytes: int, count: int) -> StreamLayout:
    return StreamLayout(item_bytes, 1, count, kind="series")


def comes_back(raw: bytes, item_bytes: int) -> bytes:
    """The payload of a series, after a look at what must always hold of it."""
    payload = delta_coder.encode(raw, item_bytes)
    assert delta_coder.encode(raw, item_bytes) == payload
    assert delta_coder.decode(payload, item_bytes, len(raw) // item_bytes) == raw
    return payload


@given(st.sampled_from([1, 2]), st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_numbers_come_back(item_bytes: int, raw: bytes) -> None:
    comes_back(
        raw[: len(raw) // item_bytes * item_bytes].replace(b"\xff", b"\xfe") if item_bytes == 2 else raw,
        item_bytes,
    )


@pytest.mark.parametrize(
    "values", [[0.0, -0.0, 65504.0, -65504.0, 6e-8, -6e-8, 1.0], [-65504.0] * 9 + [65504.0] * 9]
)
def test_float16_of_any_size_come_back(values: list[float]) -> None:
    comes_back(np.array(values, "<f2").tobytes(), 2)


def test_the_number_with_all_bits_set_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be coded"):
        delta_coder.encode(b"\0\0\xff\xff", 2)


def test_heads_of_one_scale_cost_less_than_the_same_numbers_in_disorder() -> None:
    """A head's numbers are within a few of its mean; the means are far apart."""
    generator = np.random.default_rng(0)
    values = (np.repeat(generator.integers(-60, 60, 8), 64) + generator.normal(0, 2, 512)).astype(np.int8)
    together, apart = (len(comes_back(of.tobytes(), 1)) for of in (values, generator.permutation(values)))
    entropy = 512 * np.log2(2 * np.sqrt(2 * np.pi * np.e)) / 8
    assert together < 1.35 * entropy
    assert apart > 1.7 * entropy


def test_normal_numbers_cost_their_entropy() -> None:
    steps = (0.01 * np.exp(np.random.default_rng(1).normal(0, 0.1, 2048))).astype("<f2")
    values = steps.view("<i2")
    entropy = 2048 * np.log2(values.std() * np.sqrt(2 * np.pi * np.e)) / 8
    assert (
        len(comes_back(steps.tobytes(), 2))
        < 1.02 * entropy
        < 0.97 * len(codecs.encode("brotli", steps.tobytes(), layout(2, 2048), 11))
    )


@given(st.sampled_from([1, 2]), st.binary(max_size=40), st.integers(0, 9))
@settings(max_examples=300, deadline=None)
def test_garbage_is_refused_or_of_the_length_declared(item_bytes: int, payload: bytes, count: int) -> None:
    try:
        raw = codecs.decode("series", payload, layout(item_bytes, count))
    except ValueError:
        return
    assert len(raw) == item_bytes * count


def test_no_mean_moves_as_a_payload_of_nine_says() -> None:
    payload = delta_coder.encode(bytes(20), 1)
    with pytest.raises(ValueError, match="begins with 9"):
        delta_coder.decode(b"\x09" + payload[1:], 1, 20)


@pytest.mark.parametrize("wrong", [StreamLayout(1, 1, 20), StreamLayout(4, 1, 5)])
def test_what_is_no_series_is_not_decoded_as_one(wrong: StreamLayout) -> None:
    with pytest.raises(ValueError, match="not a series"):
        codecs.decode("series", delta_coder.encode(bytes(20), 1), wrong)


def test_a_series_is_no_longer_than_side_information() -> None:
    with pytest.raises(ValueError, match="a series of 1048577 numbers"):
        delta_coder.decode(delta_coder.encode(bytes(20), 1), 1, delta_coder.MAX_NUMBERS + 1)
