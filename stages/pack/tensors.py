"""One tensor between its three forms: coded (integers and steps, or float16), raw streams of bytes, and the float32 that a model uses."""

import numpy as np
import torch
from torch import Tensor

from stages.pack import gptq
from stages.pack.gptq import Quantised
from stages.pack.roles import Kind, largest_value

INT8, FLOAT16 = np.dtype("int8"), np.dtype("<f2")
Coded = Quantised | Tensor  # a quantised matrix, or a float16 tensor


def half(tensor: Tensor, name: str) -> Tensor:
    """`tensor` in float16; a ValueError when a value is not finite there."""
    converted = tensor.detach().half()
    if not bool(torch.isfinite(converted).all()):
        raise ValueError(f"{name}: a value is not a finite float16 (65504 is the largest)")
    return converted


def decoded(coded: Coded) -> Tensor:
    """The float32 weights that a reader of the file gets."""
    return gptq.dequantise(coded) if isinstance(coded, Quantised) else coded.float()


def raw_streams(coded: Coded) -> tuple[bytes, ...]:
    """The bytes of each stream, in the order of container.layouts."""
    if isinstance(coded, Quantised):
        return _raw(coded.values_RC, INT8), _raw(coded.steps_R, FLOAT16)
    return (_raw(coded, FLOAT16),)


def from_raw(kind: Kind, shape: tuple[int, ...], bits: int, streams: tuple[bytes, ...], name: str) -> Coded:
    """The inverse of raw_streams; a ValueError for integers beyond the bit width, or values that are not finite."""
    if kind == "rest":
        return _finite(_tensor(streams[0], FLOAT16, shape), name)
    values, steps = _tensor(streams[0], INT8, shape), _tensor(streams[1], FLOAT16, shape[:1])
    qmax = largest_value(bits)
    if values.numel() and not -qmax <= int(values.min()) <= int(values.max()) <= qmax:
        raise ValueError(f"damaged model file: tensor {name} has integers beyond {qmax}, the largest of {bits} bits")
    return Quantised(values, _finite(steps, name))


def _raw(tensor: Tensor, dtype: np.dtype) -> bytes:
    return tensor.cpu().numpy().astype(dtype, copy=False).tobytes()


def _tensor(raw: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.frombuffer(raw, dtype).astype(dtype.newbyteorder("=")).reshape(shape))


def _finite(tensor: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"damaged model file: tensor {name} has values that are not finite")
    return tensor
