"""Storage forms: the ways in which model.bin stores a tensor.

A form converts a tensor between three representations:

    values     what a quantiser makes, such as levels and steps
    streams    the raw bytes of each stream, before its codec
    weights    float32, as the model uses them

    pack       values --to_streams--> streams --codecs--> model.bin
    load       model.bin --codecs--> streams --from_streams--> values --dequantise--> weights

In the header of a file a form is [kind, number, rank], which says what the streams hold:

    ["float16", 16, 0]      the values
    ["rows", bits, 0]       int8 values row by row; float16 steps, one for each row
    ["groups", bits, 0]     the same, and a byte for each group of 64 columns: 1 where the steps are
                            2^(8 - bits) times finer, so that the values have 8 bits
    ["lattice", states, 0]  int16 levels row by row, which follow a trellis with that number of
                            states; a float32 step; the exponents of the rows, then those of the
                            columns, each a signed byte (exponents.py). The adaptive codec needs
                            the exponents to decode the levels.
    [kind, number, K]       with K > 0, the streams of one of the last three forms, then a low-rank
                            correction (low_rank.py): K rows of int8, each a column of one factor
                            and then a row of the other; K float32 steps

Another form is one more class with the methods of `Form`, and its entry in FORMS. A file can hold
it then; for the stage to write it, a quantiser must make its values (quantise/methods.py).

Uses numpy alone, because the process that decodes has no torch (file/decode_process.py). Weights
are computed by single IEEE 754 operations in the order written here, so they are the same on every
machine.

Shapes: R rows, C columns, K rank of the correction, N = R + C.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np

from stages.pack import low_rank
from stages.pack.entropy import delta_coder
from stages.pack.entropy.codecs import StreamLayout
from stages.pack.exponents import exponents_to_factors
from stages.pack.low_rank import MAX_RANK, Correction
from stages.pack.trellis import STATE_COUNTS

GROUP_COLUMNS = 64  # columns that share one flag in the form "groups" (AWQ-lite, #1908)
MAX_BITS = 8  # of a value that is stored as a byte

# Types of the items in a file, little-endian.
INT8 = np.dtype("int8")
INT16 = np.dtype("<i2")
FLOAT16 = np.dtype("<f2")
FLOAT32 = np.dtype("<f4")

Values = TypeVar("Values")


class FormHeader(NamedTuple):
    """A form in the header of a file."""

    kind: str
    number: int  # bits of a value, or states of the trellis
    rank: int = 0  # K, rank of the low-rank correction; 0 is none


class Form(Protocol[Values]):
    """Protocol of a storage form.

    Forms are immutable. Making an impossible one raises ValueError.
    """

    is_matrix: ClassVar[bool]  # for matrices only

    @property
    def header(self) -> FormHeader:
        """The form in the header of a file; the inverse of `parse_header`."""

    def layouts(self, shape: Sequence[int]) -> tuple[StreamLayout, ...]:
        """Layouts of the streams of a tensor, in the order of the file."""

    def to_streams(self, values: Values) -> tuple[bytes, ...]:
        """Serialise values to raw streams."""

    def from_streams(self, streams: Sequence[bytes], shape: Sequence[int]) -> Values:
        """Read values from raw streams, whose lengths are those of their layouts.

        Raises ValueError for values that the form does not allow.
        """

    def dequantise(self, values: Values) -> np.ndarray:
        """Compute the float32 weights that a reader of the file gets, in the tensor's shape."""


class StoredTensor(NamedTuple):
    """The values of a tensor and the form in which they are stored."""

    form: Form[Any]
    values: Any
    shape: tuple[int, ...]

    def dequantise(self) -> np.ndarray:
        """Compute the float32 weights that a reader of the file gets."""
        return self.form.dequantise(self.values)


@dataclass(frozen=True)
class Float16Form:
    """An array of any shape, rounded to float16."""

    bits: int = 16
    kind: ClassVar = "float16"
    is_matrix: ClassVar = False

    def __post_init__(self) -> None:
        if self.bits != 16:
            raise ValueError(f"float16 values have 16 bits, not {self.bits}")

    @property
    def header(self) -> FormHeader:
        """The header; the number is 16."""
        return FormHeader(self.kind, self.bits)

    def layouts(self, shape: Sequence[int]) -> tuple[StreamLayout, ...]:
        """One stream: the values."""
        size = math.prod(shape)
        return (StreamLayout(2, 1, size, kind="series" if size <= delta_coder.MAX_NUMBERS else "bytes"),)

    def to_streams(self, values: np.ndarray) -> tuple[bytes, ...]:
        """Serialise an array."""
        return (_to_bytes(values, FLOAT16),)

    def from_streams(self, streams: Sequence[bytes], shape: Sequence[int]) -> np.ndarray:
        """Read an array."""
        return _from_bytes(streams[0], FLOAT16, shape)

    def dequantise(self, values: np.ndarray) -> np.ndarray:
        """Widen to float32."""
        return values.astype(np.float32)


class RowQuantised(NamedTuple):
    """A matrix as integers on a uniform grid.

    The weight is value * step of its row / 2^(extra bits of its column).
    """

    values_RC: np.ndarray  # int8
    steps_R: np.ndarray  # float16
    extra_bits_C: np.ndarray  # uint8: 0 almost everywhere

    def weights(self) -> np.ndarray:
        """The weights (R, C), float32."""
        finer_C = np.ldexp(np.float32(1), self.extra_bits_C.astype(np.int32))
        return self.values_RC.astype(np.float32) * (self.steps_R.astype(np.float32)[:, None] / finer_C)


@dataclass(frozen=True)
class RowsForm:
    """A matrix of `bits`-bit integers on a uniform grid, with a step for each row."""

    bits: int
    kind: ClassVar = "rows"
    is_matrix: ClassVar = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= MAX_BITS:
            raise ValueError(f"values of {self.bits} bits, expected 2 to {MAX_BITS}")

    @property
    def header(self) -> FormHeader:
        """The header; the number is that of the bits."""
        return FormHeader(self.kind, self.bits)

    def layouts(self, shape: Sequence[int]) -> tuple[StreamLayout, ...]:
        """Two streams: values and steps."""
        rows, columns = shape
        return StreamLayout(1, rows, columns, kind="matrix"), StreamLayout(2, 1, rows, kind="series")

    def to_streams(self, values: RowQuantised) -> tuple[bytes, ...]:
        """Serialise values and steps."""
        return _to_bytes(values.values_RC, INT8), _to_bytes(values.steps_R, FLOAT16)

    def from_streams(self, streams: Sequence[bytes], shape: Sequence[int]) -> RowQuantised:
        """Read values and steps; raises ValueError for integers beyond the bits."""
        return self.with_extra_bits(streams, shape, np.zeros(shape[1], np.uint8))

    def with_extra_bits(
        self, streams: Sequence[bytes], shape: Sequence[int], extra_bits_C: np.ndarray
    ) -> RowQuantised:
        """Read values whose columns have `extra_bits_C` bits beyond the form's; raises ValueError."""
        values_RC = _from_bytes(streams[0], INT8, shape)
        steps_R = _from_bytes(streams[1], FLOAT16, shape[:1])
        largest_C = largest_value(self.bits) << extra_bits_C.astype(np.int16)
        is_beyond_C = (np.abs(values_RC.astype(np.int16)) > largest_C).any(0)
        if is_beyond_C.any():
            column = int(is_beyond_C.argmax())
            raise ValueError(f"it has integers beyond {largest_C[column]}, the largest of column {column}")
        return RowQuantised(values_RC, require_finite(steps_R), extra_bits_C)

    def dequantise(self, values: RowQuantised) -> np.ndarray:
        """Multiply values by their steps."""
        return values.weights()


@dataclass(frozen=True)
class GroupsForm:
    """Rows of `bits`-bit integers, but 8 bits and finer steps in some groups of 64 columns."""

    bits: int
    kind: ClassVar = "groups"
    is_matrix: ClassVar = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits < MAX_BITS:
            raise ValueError(f"values of {self.bits} bits, expected 2 to {MAX_BITS - 1}")

    @property
    def header(self) -> FormHeader:
        """The header; the number is that of the bits outside the finer groups."""
        return FormHeader(self.kind, self.bits)

    def layouts(self, shape: Sequence[int]) -> tuple[StreamLayout, ...]:
        """Three streams: values, steps, and the flags of the groups."""
        return *RowsForm(self.bits).layouts(shape), StreamLayout(1, 1, -(-shape[1] // GROUP_COLUMNS))

    def to_streams(self, values: RowQuantised) -> tuple[bytes, ...]:
        """Serialise values, steps and flags."""
        is_fine = values.extra_bits_C[::GROUP_COLUMNS] > 0
        return *RowsForm(self.bits).to_streams(values), _to_bytes(is_fine, INT8)

    def from_streams(self, streams: Sequence[bytes], shape: Sequence[int]) -> RowQuantised:
        """Read values, steps and flags; raises ValueError for integers beyond the bits."""
        is_fine = np.frombuffer(streams[2], np.uint8)
        if not np.isin(is_fine, (0, 1)).all():
            raise ValueError("it has groups of columns that are neither fine nor coarse")
        extra_bits_C = np.repeat(is_fine * np.uint8(MAX_BITS - self.bits), GROUP_COLUMNS)[: shape[1]]
        return RowsForm(self.bits).with_extra_bits(streams, shape, extra_bits_C)

    def dequantise(self, values: RowQuantised) -> np.ndarray:
        """Multiply values by their steps."""
        return values.weights()


class TrellisLevels(NamedTuple):
    """A quantised matrix: a weight is level * step * 2^((row exponent + column exponent) / 8)."""

    levels_RC: np.ndarray  # int16
    row_exponents_R: np.ndarray  # int8
    column_exponents_C: np.ndarray  # int8
    step: float  # representable in float32


@dataclass(frozen=True)
class TrellisForm:
    """A matrix of levels on a trellis of `states` states, with factors of its rows and columns."""

    states: int
    kind: ClassVar = "lattice"  # the name of the trellis in files
    is_matrix: ClassVar = True

    def __post_init__(self) -> None:
        if self.states not in STATE_COUNTS:
            known = ", ".join(map(str, STATE_COUNTS))
            raise ValueError(f"a trellis of {self.states} states, expected one of {known}")

    @property
    def header(self) -> FormHeader:
        """The header; the number is that of the states."""
        return FormHeader(self.kind, self.states)

    def layouts(self, shape: Sequence[int]) -> tuple[StreamLayout, ...]:
        """Four streams: levels, the step, exponents of rows and exponents of columns."""
        rows, columns = shape
        return (
            StreamLayout(2, rows, columns, self.states, kind="matrix", exponent_streams=(2, 3)),
            StreamLayout(4, 1, 1),
            StreamLayout(1, 1, rows, kind="series"),
            StreamLayout(1, 1, columns, kind="series"),
        )

    def to_streams(self, values: TrellisLevels) -> tuple[bytes, ...]:
        """Serialise levels, step and exponents."""
        return (
            _to_bytes(values.levels_RC, INT16),
            np.array(values.step, FLOAT32).tobytes(),
            _to_bytes(values.row_exponents_R, INT8),
            _to_bytes(values.column_exponents_C, INT8),
        )

    def from_streams(self, streams: Sequence[bytes], shape: Sequence[int]) -> TrellisLevels:
        """Read levels, step and exponents; raises ValueError for an impossible step."""
        (step,) = np.frombuffer(streams[1], FLOAT32)
        if not (math.isfinite(step) and step > 0):
            raise ValueError(f"it has the step {step}")
        levels_RC = _from_bytes(streams[0], INT16, shape)
        row_exponents_R = _from_bytes(streams[2], INT8, shape[:1])
        column_exponents_C = _from_bytes(streams[3], INT8, shape[1:])
        return TrellisLevels(levels_RC, row_exponents_R, column_exponents_C, float(step))

    def dequantise(self, values: TrellisLevels) -> np.ndarray:
        """Multiply levels by their steps."""
        column_steps_C = exponents_to_factors(values.column_exponents_C) * np.float32(values.step)
        row_factors_R1 = exponents_to_factors(values.row_exponents_R)[:, None]
        return values.levels_RC.astype(np.float32) * column_steps_C * row_factors_R1


class Corrected(NamedTuple):
    """The values of a quantised matrix, and the low-rank correction that is added to it."""

    base: Any
    correction: Correction


@dataclass(frozen=True)
class CorrectedForm:
    """A matrix in the form `base`, to which a correction of rank `rank` is added."""

    base: Form[Any]
    rank: int  # K
    is_matrix: ClassVar = True

    def __post_init__(self) -> None:
        if not self.base.is_matrix or self.base.header.rank:
            raise ValueError(f"the form {self.base.header.kind} takes no correction")
        if not 1 <= self.rank <= MAX_RANK:
            raise ValueError(f"a correction of rank {self.rank}, expected 1 to {MAX_RANK}")

    @property
    def header(self) -> FormHeader:
        """The header of the base, with the rank."""
        return self.base.header._replace(rank=self.rank)

    def layouts(self, shape: Sequence[int]) -> tuple[StreamLayout, ...]:
        """The streams of the base, and two more: levels and steps of the correction."""
        levels = StreamLayout(1, self.rank, sum(shape), kind="matrix")
        return *self.base.layouts(shape), levels, StreamLayout(4, 1, self.rank)

    def to_streams(self, values: Corrected) -> tuple[bytes, ...]:
        """Serialise the base and the correction."""
        levels_KN, steps_K = values.correction
        return *self.base.to_streams(values.base), _to_bytes(levels_KN, INT8), _to_bytes(steps_K, FLOAT32)

    def from_streams(self, streams: Sequence[bytes], shape: Sequence[int]) -> Corrected:
        """Read the base and the correction."""
        *base_streams, levels, steps = streams
        base = self.base.from_streams(base_streams, shape)
        levels_KN = _from_bytes(levels, INT8, (self.rank, sum(shape)))
        steps_K = require_finite(_from_bytes(steps, FLOAT32, (self.rank,)))
        return Corrected(base, Correction(levels_KN, steps_K))

    def dequantise(self, values: Corrected) -> np.ndarray:
        """Add the correction to the weights of the base."""
        base_RC = self.base.dequantise(values.base)
        correction_RC = low_rank.correction_matrix(values.correction, len(base_RC))
        return base_RC + correction_RC


# Forms without a correction by their kind in the header; each is made from the header's number.
FORMS: dict[str, Callable[[int], Form[Any]]] = {
    form.kind: form for form in (Float16Form, RowsForm, GroupsForm, TrellisForm)
}


def parse_header(header: Any) -> Form[Any]:
    """Make the form that a header describes; a ValueError when there is none."""
    if not isinstance(header, list) or len(header) != 3:
        raise ValueError("expected a kind, a number and a rank")
    kind, number, rank = header
    if not isinstance(kind, str) or kind not in FORMS:
        raise ValueError(f"its kind is unknown; known are {', '.join(FORMS)}")
    if type(number) is not int or type(rank) is not int:
        raise ValueError("its number or its rank is not an integer")
    form = FORMS[kind](number)
    return CorrectedForm(form, rank) if rank else form


def largest_value(bits: int) -> int:
    """Largest integer of a symmetric signed value: 31 for six bits, 127 for eight."""
    return (1 << (bits - 1)) - 1


def require_finite(values: np.ndarray) -> np.ndarray:
    """Return `values`; raises ValueError unless all are finite."""
    if not np.isfinite(values).all():
        raise ValueError("it has values that are not finite")
    return values


def _to_bytes(values: np.ndarray, dtype: np.dtype) -> bytes:
    return values.astype(dtype, copy=False).tobytes()


def _from_bytes(raw: bytes, dtype: np.dtype, shape: Sequence[int]) -> np.ndarray:
    return np.frombuffer(raw, dtype).astype(dtype.newbyteorder("="), copy=False).reshape(shape)
