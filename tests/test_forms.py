"""Storage forms: what the file says of them, their streams and back, and one more form made here."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from stages.pack import forms
from stages.pack.entropy.codecs import StreamLayout
from stages.pack.file import container
from stages.pack.file.container import Contents, EncodedTensor
from stages.pack.forms import (
    FORMS,
    Corrected,
    CorrectedForm,
    Float16Form,
    Form,
    FormHeader,
    GroupsForm,
    RowQuantised,
    RowsForm,
    StoredTensor,
    TrellisForm,
    TrellisLevels,
)
from stages.pack.low_rank import Correction
from stages.pack.stats import layers_tsv
from tests.pack_inputs import ENCODER


def examples() -> dict[str, StoredTensor]:
    """A tensor of each form, by the words that layers.tsv has for it."""
    random = np.random.default_rng(0)
    shape = (6, 130)

    # Values of each form.
    steps_R = random.uniform(0.01, 0.02, 6).astype(np.float16)
    extra_bits_C = np.repeat(np.array([0, 3, 0], np.uint8), 64)[:130]
    rows = RowQuantised(random.integers(-15, 16, shape, np.int8), steps_R, np.zeros(130, np.uint8))
    groups = RowQuantised(random.integers(-15, 16, shape, np.int8), steps_R, extra_bits_C)

    trellis = TrellisLevels(
        (2 * random.integers(-9, 10, shape)).astype(np.int16),  # even: the start state again and again
        random.integers(-8, 9, 6, np.int8),
        random.integers(-8, 9, 130, np.int8),
        float(np.float32(0.01)),
    )
    correction = Correction(
        random.integers(-9, 10, (2, 136), np.int8), random.uniform(0, 0.01, 2).astype(np.float32)
    )

    array = random.standard_normal((2, 3, 4)).astype(np.float16)
    return {
        "float16:16": StoredTensor(Float16Form(), array, array.shape),
        "rows:5": StoredTensor(RowsForm(5), rows, shape),
        "groups:5": StoredTensor(GroupsForm(5), groups, shape),
        "lattice:1": StoredTensor(TrellisForm(1), trellis, shape),
        "rows:5+2": StoredTensor(CorrectedForm(RowsForm(5), 2), Corrected(rows, correction), shape),
        "lattice:1+2": StoredTensor(CorrectedForm(TrellisForm(1), 2), Corrected(trellis, correction), shape),
    }


def encoded(name: str, stored: StoredTensor, family: str) -> EncodedTensor:
    form, values, shape = stored
    streams = ENCODER.encode(form.layouts(shape), form.to_streams(values), family, 5)
    return EncodedTensor(name, shape, form, streams)


def same(one: Any, other: Any) -> bool:
    """Equality of values, which are arrays, numbers, or tuples of these."""
    if isinstance(one, tuple):
        return type(one) is type(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return np.array_equal(one, other) and getattr(one, "dtype", None) == getattr(other, "dtype", None)


@pytest.mark.parametrize("family", ["adaptive", "brotli"])
@pytest.mark.parametrize("label", examples())
def test_values_come_back_through_a_file(label: str, family: str) -> None:
    stored = examples()[label]
    form, values, shape = stored
    raw = form.to_streams(values)
    assert [len(stream) for stream in raw] == [layout.raw_bytes for layout in form.layouts(shape)]
    assert same(form.from_streams(raw, shape), values)

    blob = container.serialise(Contents({}, (encoded("a", stored, family),)))
    (tensor,) = container.parse(blob).tensors
    assert tensor.form == form
    weights = container.decode(tensor)
    assert weights.dtype == np.float32
    assert weights.shape == shape
    assert np.array_equal(weights, stored.dequantise())
    assert layers_tsv.stats_of_file((tensor,), len(blob))[0].form == label


@pytest.mark.parametrize("label", examples())
def test_a_header_makes_the_form_that_wrote_it(label: str) -> None:
    form = examples()[label].form
    assert forms.parse_header(list(form.header)) == form
    assert form.header.kind in FORMS


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (["rows", 6], "expected a kind, a number and a rank"),
        ("rows", "expected a kind, a number and a rank"),
        (["cubes", 6, 0], "its kind is unknown; known are float16, rows, groups, lattice"),
        ([["rows"], 6, 0], "its kind is unknown"),
        (["rows", True, 0], "not an integer"),
        (["rows", 6, 1.0], "not an integer"),
        (["rows", 9, 0], "values of 9 bits, expected 2 to 8"),
        (["groups", 8, 0], "values of 8 bits, expected 2 to 7"),
        (["lattice", 3, 0], "a trellis of 3 states"),
        (["float16", 32, 0], "float16 values have 16 bits, not 32"),
        (["float16", 16, 1], "the form float16 takes no correction"),
        (["rows", 6, 17], "a correction of rank 17, expected 1 to 16"),
        (["rows", 6, -1], "a correction of rank -1, expected 1 to 16"),
    ],
)
def test_impossible_headers_say_why(header: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forms.parse_header(header)


def test_a_correction_has_no_correction() -> None:
    with pytest.raises(ValueError, match="the form rows takes no correction"):
        CorrectedForm(CorrectedForm(RowsForm(6), 1), 1)


@pytest.mark.filterwarnings("error")
def test_overflow_is_an_error_of_the_tensor_without_a_warning() -> None:
    """Alone, and as a base whose infinities meet those of the correction."""
    stored = examples()["lattice:1+2"]
    base: TrellisLevels = stored.values.base
    infinite = base._replace(step=float(np.float32(3e38)))
    huge = Correction(np.full((2, 136), -127, np.int8), np.full(2, 3e38, np.float32))
    tensors = (
        encoded("a", StoredTensor(TrellisForm(1), infinite, stored.shape), "adaptive"),
        encoded("a", stored._replace(values=Corrected(infinite, huge)), "adaptive"),
    )
    for tensor in tensors:
        with pytest.raises(ValueError, match="tensor a: it has values that are not finite"):
            container.decode(tensor)


@dataclasses.dataclass(frozen=True)
class SignForm:
    """A toy: signs of a matrix, times one step, a power of two; a bit a weight, its rows padded to bytes."""

    largest_exponent: int
    kind: ClassVar = "signs"
    is_matrix: ClassVar = True

    def __post_init__(self) -> None:
        if not 0 < self.largest_exponent < 8:
            raise ValueError(f"an exponent up to {self.largest_exponent}")

    @property
    def header(self) -> FormHeader:
        return FormHeader(self.kind, self.largest_exponent)

    def layouts(self, shape: Sequence[int]) -> tuple[StreamLayout, ...]:
        rows, columns = shape
        return StreamLayout(1, rows, -(-columns // 8)), StreamLayout(1, 1, 1)

    def to_streams(self, values: tuple[np.ndarray, int]) -> tuple[bytes, ...]:
        is_negative_RC, exponent = values
        return np.packbits(is_negative_RC, axis=1).tobytes(), bytes([exponent])

    def from_streams(self, streams: Sequence[bytes], shape: Sequence[int]) -> tuple[np.ndarray, int]:
        signs, (exponent,) = streams
        if exponent > self.largest_exponent:
            raise ValueError(f"it has the exponent {exponent}")
        bits = np.frombuffer(signs, np.uint8).reshape(shape[0], -1)
        return np.unpackbits(bits, axis=1, count=shape[1]).astype(bool), exponent

    def dequantise(self, values: tuple[np.ndarray, int]) -> np.ndarray:
        is_negative_RC, exponent = values
        return np.where(is_negative_RC, -1, 1).astype(np.float32) * np.float32(2.0**exponent)


@pytest.mark.parametrize("family", ["adaptive", "brotli"])
def test_another_form_is_one_class(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered, it is encoded, parsed, decoded, corrected and tabulated like all others."""
    random = np.random.default_rng(1)
    values = random.random((5, 11)) < 0.5, 3
    signs: Form[Any] = SignForm(4)
    plain = StoredTensor(signs, values, (5, 11))
    correction = Correction(random.integers(-9, 10, (1, 16), np.int8), np.ones(1, np.float32))
    corrected = StoredTensor(CorrectedForm(signs, 1), Corrected(values, correction), (5, 11))
    contents = Contents({}, (encoded("a", plain, family), encoded("b", corrected, family)))
    with pytest.raises(ValueError, match="tensor a is stored in an impossible form: its kind is unknown"):
        container.serialise(contents)

    monkeypatch.setitem(FORMS, SignForm.kind, SignForm)
    blob = container.serialise(contents)
    parsed = container.parse(blob)
    assert parsed == contents
    for tensor, stored in zip(parsed.tensors, (plain, corrected), strict=True):
        assert np.array_equal(container.decode(tensor), stored.dequantise())
    assert set(np.unique(container.decode(parsed.tensors[0]))) == {-8.0, 8.0}
    rows = layers_tsv.stats_of_file(parsed.tensors, len(blob))
    assert [row.form for row in rows] == ["signs:4", "signs:4+1", ""]

    # Its own errors name the tensor.
    beyond = encoded("a", plain._replace(values=(values[0], 5)), family)
    with pytest.raises(ValueError, match="damaged model file: tensor a: it has the exponent 5"):
        container.decode(beyond)
    with pytest.raises(ValueError, match="impossible form: an exponent up to 9"):
        container.serialise(Contents({}, (dataclasses.replace(beyond, form=_unchecked(9)),)))


def _unchecked(number: int) -> SignForm:
    """A form that cannot be made, as a forger may write it into a header."""
    form = SignForm(4)
    object.__setattr__(form, "largest_exponent", number)
    return form
