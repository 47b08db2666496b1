"""Converts a tensor between its three representations.

    stored    RowQuantised, TrellisLevels, Corrected, or a float16 array
    raw       the bytes of each stream before the codec, in the order of container.layouts
    weights   float32, as the model uses them

Uses numpy alone, because the process that decodes has no torch (decode_process.py). Weights are
computed by single IEEE 754 operations in the order written here, so they are the same on every
machine.

Shapes: R rows, C columns, K rank of the correction, N = R + C.
"""

import math
from typing import NamedTuple

import numpy as np

from stages.pack import low_rank
from stages.pack.file.container import GROUP_COLUMNS, EncodedTensor, Form, decode_streams
from stages.pack.low_rank import Correction
from stages.pack.quantise import trellis_quantiser
from stages.pack.quantise.trellis_quantiser import TrellisLevels

# Types of the items in a file, little-endian.
INT8 = np.dtype("int8")
INT16 = np.dtype("<i2")
FLOAT16 = np.dtype("<f2")
FLOAT32 = np.dtype("<f4")


class RowQuantised(NamedTuple):
    """A matrix as integers on a uniform grid.

    The weight is value * step of its row / 2^(extra bits of its column).
    """

    values_RC: np.ndarray  # int8
    steps_R: np.ndarray  # float16
    extra_bits_C: np.ndarray  # uint8: 0 almost everywhere


class Corrected(NamedTuple):
    """A quantised matrix and the low-rank correction that is added to it."""

    base: RowQuantised | TrellisLevels
    correction: Correction


# Values before the codec; an array is a float16 tensor of any shape.
StoredValues = RowQuantised | TrellisLevels | Corrected | np.ndarray


def largest_value(bits: int) -> int:
    """Largest integer of a symmetric signed value: 31 for six bits, 127 for eight."""
    return (1 << (bits - 1)) - 1


def dequantised(stored: StoredValues) -> np.ndarray:
    """Compute the float32 weights that a reader of the file gets, in the tensor's shape."""
    if isinstance(stored, Corrected):
        base_RC = dequantised(stored.base)
        return base_RC + low_rank.correction_matrix(stored.correction, len(base_RC))
    if isinstance(stored, TrellisLevels):
        return trellis_quantiser.dequantise(stored)
    if isinstance(stored, RowQuantised):
        finer_C = np.ldexp(np.float32(1), stored.extra_bits_C.astype(np.int32))
        return stored.values_RC.astype(np.float32) * (stored.steps_R.astype(np.float32)[:, None] / finer_C)
    return stored.astype(np.float32)


def decode(tensor: EncodedTensor) -> np.ndarray:
    """Decode one tensor of a file to float32 weights; raises ValueError when it is damaged."""
    return _weights(tensor.form, tensor.shape, decode_streams(tensor), tensor.name)


def raw_streams(stored: StoredValues) -> tuple[bytes, ...]:
    """Serialise a tensor to the raw bytes of each stream, in the order of container.layouts."""
    if isinstance(stored, Corrected):
        levels_KN, steps_K = stored.correction
        return *raw_streams(stored.base), _to_bytes(levels_KN, INT8), _to_bytes(steps_K, FLOAT32)

    if isinstance(stored, TrellisLevels):
        levels = _to_bytes(stored.levels_RC, INT16)
        step = np.array(stored.step, FLOAT32).tobytes()
        return levels, step, stored.row_exponents_R.tobytes(), stored.column_exponents_C.tobytes()

    if isinstance(stored, RowQuantised):
        streams = _to_bytes(stored.values_RC, INT8), _to_bytes(stored.steps_R, FLOAT16)
        if not stored.extra_bits_C.any():
            return streams
        return *streams, _to_bytes(stored.extra_bits_C[::GROUP_COLUMNS] > 0, INT8)

    return (_to_bytes(stored, FLOAT16),)


def _weights(form: Form, shape: tuple[int, ...], streams: tuple[bytes, ...], name: str) -> np.ndarray:
    """Compute a tensor's float32 weights from its raw streams.

    Raises ValueError for integers beyond their bits and for values that are not finite.
    """
    if form.rank:
        base_RC = _weights(form._replace(rank=0), shape, streams[:-2], name)
        levels_KN = _from_bytes(streams[-2], INT8, (form.rank, sum(shape)))
        steps_K = _finite(_from_bytes(streams[-1], FLOAT32, (form.rank,)), name)
        correction_RC = low_rank.correction_matrix(Correction(levels_KN, steps_K), len(base_RC))
        return _finite(base_RC + correction_RC, name)

    if form.kind == "lattice":
        return _finite(dequantised(_trellis_levels(form.bits_or_states, shape, streams, name)), name)

    if form.kind == "float16":
        return dequantised(_finite(_from_bytes(streams[0], FLOAT16, shape), name))

    values_RC = _from_bytes(streams[0], INT8, shape)
    steps_R = _from_bytes(streams[1], FLOAT16, shape[:1])
    extra_bits_C = _extra_bits(form, shape, streams, name)
    largest_C = largest_value(form.bits_or_states) << extra_bits_C.astype(np.int16)
    if (np.abs(values_RC.astype(np.int16)) > largest_C).any():
        raise ValueError(
            f"damaged model file: tensor {name} has integers beyond {largest_C.max()}, "
            f"the largest of {form.bits_or_states} bits"
        )
    return dequantised(RowQuantised(values_RC, _finite(steps_R, name), extra_bits_C))


def _extra_bits(form: Form, shape: tuple[int, ...], streams: tuple[bytes, ...], name: str) -> np.ndarray:
    """Read how many bits each column has beyond the form's, (C,) uint8.

    All zero except in the form "groups".
    """
    if form.kind == "rows":
        return np.zeros(shape[1], np.uint8)
    is_fine = np.frombuffer(streams[2], np.uint8)
    if not np.isin(is_fine, (0, 1)).all():
        raise ValueError(
            f"damaged model file: tensor {name} has groups of columns that are neither fine nor coarse"
        )
    return np.repeat(is_fine * np.uint8(8 - form.bits_or_states), GROUP_COLUMNS)[: shape[1]]


def _trellis_levels(
    states: int, shape: tuple[int, ...], streams: tuple[bytes, ...], name: str
) -> TrellisLevels:
    (step,) = np.frombuffer(streams[1], FLOAT32)
    if not (math.isfinite(step) and step > 0):
        raise ValueError(f"damaged model file: tensor {name} has the step {step}")
    levels_RC = _from_bytes(streams[0], INT16, shape)
    row_exponents_R, column_exponents_C = (np.frombuffer(stream, INT8) for stream in streams[2:])
    return TrellisLevels(levels_RC, row_exponents_R, column_exponents_C, float(step), states)


def _to_bytes(values: np.ndarray, dtype: np.dtype) -> bytes:
    return values.astype(dtype, copy=False).tobytes()


def _from_bytes(raw: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(raw, dtype).astype(dtype.newbyteorder("="), copy=False).reshape(shape)


def _finite(values: np.ndarray, name: str) -> np.ndarray:
    """Return `values`; raises ValueError unless all are finite."""
    if not np.isfinite(values).all():
        raise ValueError(f"damaged model file: tensor {name} has values that are not finite")
    return values
