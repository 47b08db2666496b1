"""One tensor between its three forms: coded (integers and their steps, or float16), raw streams of bytes, and the float32 of a model.

Of numpy alone, since the process that decodes has no torch (decode_process.py). A weight is made by single operations of IEEE 754, in an
order that is written down here, and so is the same on every machine.
"""

import math
from typing import NamedTuple

import numpy as np

from stages.pack import low_rank as correction
from stages.pack.file.container import GROUP_COLUMNS, Entry, Form, decode_streams
from stages.pack.low_rank import Correction
from stages.pack.quantise import trellis_quantiser
from stages.pack.quantise.trellis_quantiser import Lattice

INT8, INT16, FLOAT16, FLOAT32 = np.dtype("int8"), np.dtype("<i2"), np.dtype("<f2"), np.dtype("<f4")


class Quantised(NamedTuple):
    """A matrix as integers, one step for each row, and by what power of two the steps of a column are finer."""

    values_RC: np.ndarray  # int8
    steps_R: np.ndarray  # float16
    finer_C: np.ndarray  # uint8: 0 almost everywhere


class Corrected(NamedTuple):
    """A quantised matrix and what is added to it."""

    coded: Quantised | Lattice
    correction: Correction


def largest_value(bits: int) -> int:
    """31 for six bits, 127 for eight."""
    return (1 << (bits - 1)) - 1


def decoded(coded: Quantised | Lattice | Corrected | np.ndarray) -> np.ndarray:
    """The float32 weights that a reader of the file gets; of an array, which is float16, itself."""
    if isinstance(coded, Corrected):
        base = decoded(coded.coded)
        return base + correction.product(coded.correction, len(base))
    if isinstance(coded, Lattice):
        return trellis_quantiser.weights(coded)
    if isinstance(coded, Quantised):
        times_C = np.ldexp(np.float32(1), coded.finer_C.astype(np.int32))
        return coded.values_RC.astype(np.float32) * (coded.steps_R.astype(np.float32)[:, None] / times_C)
    return coded.astype(np.float32)


def decode(entry: Entry) -> np.ndarray:
    """The float32 weights of one tensor of a file; a ValueError when it is damaged."""
    return _weights(entry.form, entry.shape, decode_streams(entry), entry.name)


def raw_streams(coded: Quantised | Lattice | Corrected | np.ndarray) -> tuple[bytes, ...]:
    """The bytes of each stream, in the order of container.layouts."""
    if isinstance(coded, Corrected):
        levels_KN, steps_K = coded.correction
        return *raw_streams(coded.coded), _raw(levels_KN, INT8), _raw(steps_K, FLOAT32)
    if isinstance(coded, Lattice):
        step = np.array(coded.step, FLOAT32).tobytes()
        return _raw(coded.levels_RC, INT16), step, coded.rows_R.tobytes(), coded.columns_C.tobytes()
    if isinstance(coded, Quantised):
        groups = (_raw(coded.finer_C[::GROUP_COLUMNS] > 0, INT8),) if coded.finer_C.any() else ()
        return _raw(coded.values_RC, INT8), _raw(coded.steps_R, FLOAT16), *groups
    return (_raw(coded, FLOAT16),)


def _weights(form: Form, shape: tuple[int, ...], streams: tuple[bytes, ...], name: str) -> np.ndarray:
    """`decoded` of what the streams hold; a ValueError for integers beyond the bit width, or values that are not finite."""
    if form.rank:
        base = _weights(form._replace(rank=0), shape, streams[:-2], name)
        steps_K = _finite(_array(streams[-1], FLOAT32, (form.rank,)), name)
        return base + correction.product(
            Correction(_array(streams[-2], INT8, (form.rank, sum(shape))), steps_K), len(base)
        )
    if form.kind == "lattice":
        return _finite(decoded(_lattice(form.size, shape, streams, name)), name)
    if form.kind == "float16":
        return decoded(_finite(_array(streams[0], FLOAT16, shape), name))
    values, steps = _array(streams[0], INT8, shape), _array(streams[1], FLOAT16, shape[:1])
    finer_C = _finer(form, shape, streams, name)
    most_C = largest_value(form.size) << finer_C.astype(np.int16)
    if (np.abs(values.astype(np.int16)) > most_C).any():
        raise ValueError(
            f"damaged model file: tensor {name} has integers beyond {most_C.max()}, the largest of {form.size} bits"
        )
    return decoded(Quantised(values, _finite(steps, name), finer_C))


def _finer(form: Form, shape: tuple[int, ...], streams: tuple[bytes, ...], name: str) -> np.ndarray:
    """By what power of two the steps of each column are finer, (C,) uint8."""
    if form.kind == "rows":
        return np.zeros(shape[1], np.uint8)
    groups = np.frombuffer(streams[2], np.uint8)
    if not np.isin(groups, (0, 1)).all():
        raise ValueError(
            f"damaged model file: tensor {name} has groups of columns that are neither fine nor coarse"
        )
    return np.repeat(groups * np.uint8(8 - form.size), GROUP_COLUMNS)[: shape[1]]


def _lattice(states: int, shape: tuple[int, ...], streams: tuple[bytes, ...], name: str) -> Lattice:
    (step,) = np.frombuffer(streams[1], FLOAT32)
    if not (math.isfinite(step) and step > 0):
        raise ValueError(f"damaged model file: tensor {name} has the step {step}")
    rows_R, columns_C = (np.frombuffer(stream, INT8) for stream in streams[2:])
    return Lattice(_array(streams[0], INT16, shape), rows_R, columns_C, float(step), states)


def _raw(values: np.ndarray, dtype: np.dtype) -> bytes:
    return values.astype(dtype, copy=False).tobytes()


def _array(raw: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(raw, dtype).astype(dtype.newbyteorder("="), copy=False).reshape(shape)


def _finite(values: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError(f"damaged model file: tensor {name} has values that are not finite")
    return values
