"""Where the bytes of model.bin go, and what quantisation cost: the figures of each tensor.

Errors, with D the difference of original and decoded weights: its mean square; the relative error of the layer's outputs on the
calibration data, tr(D H D^T) / tr(W H W^T), which is what GPTQ lowers; and the loss to expect from it, half of sum_r g_r D_r H D_r^T in
nats a token, with g the measured importance of the rows (pack/quantise/methods.py).

Rates are held against two bounds, in bits a weight, both from the values that entered the quantiser and their squared differences to what
came out. The first takes a row for normal values of one variance: the mean over rows of max(0, log2(variance / distortion) / 2), in units
of weights. The second is stricter where columns differ in scale: a variance for each value, the product of its row's and its column's, and
the distortion in units of steps, which is what a quantiser with a step for each column keeps even.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from stages.pack.file.container import Entry
from stages.pack.quantise import gptq, tensor_kinds
from stages.pack.quantise.trellis_quantiser import TINY, variances

CONTAINER = (
    "container"  # the last row: everything that is no tensor's, so that the column adds up to the file
)


class Row(NamedTuple):
    """The figures of one tensor; None is unknown from what there is."""

    name: str
    kind: str
    shape: tuple[int, ...]
    form: str
    bytes: int
    weights: int
    above_bound: float | None = None  # bits a weight
    above_bound_by_column: float | None = None
    mean_squared_error: float | None = None
    relative_error: float | None = None
    expected_loss: float | None = None  # nats a token

    @property
    def bits_per_weight(self) -> float | None:
        """All the tensor's bytes, steps included, over its weights."""
        return 8 * self.bytes / self.weights if self.weights else None


def row_of(entry: Entry) -> Row:
    """What the file says of one tensor."""
    form = f"{entry.form.kind}:{entry.form.size}" + (f"+{entry.form.rank}" if entry.form.rank else "")
    return Row(
        entry.name,
        tensor_kinds.kind_of(entry.name),
        entry.shape,
        form,
        entry.payload_bytes,
        math.prod(entry.shape),
    )


def container_row(rows: Sequence[Row], file_bytes: int) -> Row:
    """What no tensor takes of the file."""
    return Row(CONTAINER, CONTAINER, (), "", file_bytes - sum(row.bytes for row in rows), 0)


def with_errors(
    row: Row, weight: Tensor, decoded: Tensor, hessian: Tensor | None = None, importance: Tensor | None = None
) -> Row:
    """The row with the errors of its tensor; without a Hessian there is no relative one, without importance no expected loss."""
    difference = decoded - weight.detach().float()
    mean_squared = float(difference.double().square().mean()) if row.weights else 0.0
    relative = expected = None
    if hessian is not None:
        scale = float(gptq.costs(weight.detach().float(), hessian).sum())
        costs_R = gptq.costs(difference, hessian)
        relative = float(costs_R.sum()) / scale if scale > 0 else 0.0
        inputs = float(hessian.diagonal().double().sum())
        if importance is not None and inputs > 0:
            expected = float((importance.to(costs_R) * costs_R).sum()) / inputs / 2
    return row._replace(mean_squared_error=mean_squared, relative_error=relative, expected_loss=expected)


def with_bounds(row: Row, entered_RC: np.ndarray, rounded_RC: np.ndarray, scale_C: np.ndarray) -> Row:
    """The row with what its rate lies above both bounds."""
    if not row.weights:
        return row
    entered, error = entered_RC.astype(np.float64), (entered_RC - rounded_RC).astype(np.float64)
    by_row = _bits((entered * scale_C).var(1), ((error * scale_C) ** 2).mean(1))
    down_R, across_C = variances(entered)
    by_column = _bits(down_R[:, None] * across_C, (error**2).mean(1)[:, None])
    bits = 8 * row.bytes / row.weights
    return row._replace(
        above_bound=bits - float(by_row.mean()), above_bound_by_column=bits - float(by_column.mean())
    )


def _bits(variance: np.ndarray, distortion: np.ndarray) -> np.ndarray:
    """The rate-distortion function of normal values, in bits."""
    return np.maximum(0.0, np.log2(np.maximum(variance, TINY) / np.maximum(distortion, TINY)) / 2)
