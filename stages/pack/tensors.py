"""One tensor between its three forms: coded (integers and their steps, or float16), raw streams of bytes, and the float32 of a model."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.pack import correction, gptq, lattice
from stages.pack.container import GROUP_COLUMNS, Form
from stages.pack.correction import Correction
from stages.pack.gptq import Quantised
from stages.pack.lattice import Lattice
from stages.pack.roles import largest_value

INT8, INT16, FLOAT16, FLOAT32 = np.dtype("int8"), np.dtype("<i2"), np.dtype("<f2"), np.dtype("<f4")


class Corrected(NamedTuple):
    """A quantised matrix and what is added to it."""

    coded: Quantised | Lattice
    correction: Correction


Coded = Quantised | Lattice | Corrected | Tensor  # a matrix with a step for each row, one on scaled axes, either corrected; or float16


def half(tensor: Tensor, name: str) -> Tensor:
    """`tensor` in float16; a ValueError when a value is not finite there."""
    converted = tensor.detach().half()
    if not bool(torch.isfinite(converted).all()):
        raise ValueError(f"{name}: a value is not a finite float16 (65504 is the largest)")
    return converted


def decoded(coded: Coded) -> Tensor:
    """The float32 weights that a reader of the file gets."""
    if isinstance(coded, Corrected):
        base = decoded(coded.coded)
        return base + correction.product(coded.correction, len(base))
    if isinstance(coded, Lattice):
        return torch.from_numpy(lattice.weights(coded))
    return gptq.dequantise(coded) if isinstance(coded, Quantised) else coded.float()


def raw_streams(coded: Coded) -> tuple[bytes, ...]:
    """The bytes of each stream, in the order of container.layouts."""
    if isinstance(coded, Corrected):
        levels_KN, steps_K = coded.correction
        return *raw_streams(coded.coded), _raw(levels_KN, INT8), _raw(steps_K, FLOAT32)
    if isinstance(coded, Lattice):
        step = np.array(coded.step, FLOAT32).tobytes()
        return coded.levels_RC.astype(INT16).tobytes(), step, coded.rows_R.tobytes(), coded.columns_C.tobytes()
    if isinstance(coded, Quantised):
        groups = (_raw(coded.finer_C[::GROUP_COLUMNS] > 0, INT8),) if bool(coded.finer_C.any()) else ()
        return _raw(coded.values_RC, INT8), _raw(coded.steps_R, FLOAT16), *groups
    return (_raw(coded, FLOAT16),)


def from_raw(form: Form, shape: tuple[int, ...], streams: tuple[bytes, ...], name: str) -> Coded:
    """The inverse of raw_streams; a ValueError for integers beyond the bit width, or values that are not finite."""
    if form.kind == "float16":
        return _finite(_tensor(streams[0], FLOAT16, shape), name)
    if form.rank:
        coded = from_raw(form._replace(rank=0), shape, streams[:-2], name)
        assert isinstance(coded, (Quantised, Lattice)), "only what is quantised can be corrected"
        levels_KN = _tensor(streams[-2], INT8, (form.rank, sum(shape)))
        return Corrected(coded, Correction(levels_KN, _finite(_tensor(streams[-1], FLOAT32, (form.rank,)), name)))
    if form.kind == "lattice":
        return _lattice(form.size, shape, streams, name)
    values, steps = _tensor(streams[0], INT8, shape), _tensor(streams[1], FLOAT16, shape[:1])
    finer_C = _finer(form, shape, streams, name)
    most_C = largest_value(form.size) << finer_C.int()
    if bool((values.abs().int() > most_C).any()) or bool((values == -128).any()):  # -128 has no magnitude in int8
        raise ValueError(f"damaged model file: tensor {name} has integers beyond {int(most_C.max())}, the largest of {form.size} bits")
    return Quantised(values, _finite(steps, name), finer_C)


def _finer(form: Form, shape: tuple[int, ...], streams: tuple[bytes, ...], name: str) -> Tensor:
    """By what power of two the steps of each column are finer, (C,) uint8."""
    if form.kind == "rows":
        return torch.zeros(shape[1], dtype=torch.uint8)
    groups = np.frombuffer(streams[2], np.uint8)
    if not np.isin(groups, (0, 1)).all():
        raise ValueError(f"damaged model file: tensor {name} has groups of columns that are neither fine nor coarse")
    return torch.from_numpy(np.repeat(groups * np.uint8(8 - form.size), GROUP_COLUMNS)[: shape[1]])


def _lattice(states: int, shape: tuple[int, ...], streams: tuple[bytes, ...], name: str) -> Lattice:
    levels, (step,) = np.frombuffer(streams[0], INT16).astype(np.int16).reshape(shape), np.frombuffer(streams[1], FLOAT32)
    if not (math.isfinite(step) and step > 0):
        raise ValueError(f"damaged model file: tensor {name} has the step {step}")
    read = Lattice(levels, np.frombuffer(streams[2], INT8), np.frombuffer(streams[3], INT8), float(step), states)
    if not np.isfinite(lattice.weights(read)).all():
        raise ValueError(f"damaged model file: tensor {name} has values that are not finite")
    return read


def _raw(tensor: Tensor, dtype: np.dtype) -> bytes:
    return tensor.cpu().numpy().astype(dtype, copy=False).tobytes()


def _tensor(raw: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.frombuffer(raw, dtype).astype(dtype.newbyteorder("=")).reshape(shape))


def _finite(tensor: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"damaged model file: tensor {name} has values that are not finite")
    return tensor
