"""Statistics of each packed tensor: its bytes in model.bin and the cost of its quantisation.

Errors, with D the difference of dequantised and original weights:

    mean_squared_error   mean of D^2
    relative_error       tr(D H D^T) / tr(W H W^T): squared error of the layer's outputs on the
                         calibration data over their square, which GPTQ minimises
    expected_loss        sum_r g_r D_r H D_r^T / (2 tr H), nats a token: the loss to expect from the
                         error, with g the measured importance of the rows (calibrate/hessians.py)

Rates are compared with two rate-distortion bounds, in bits a weight. Both are computed from the
values that entered the quantiser and their squared difference to its result.

    above_bound            takes each row for normal values of one variance: the mean over rows of
                           max(0, log2(variance / distortion) / 2), in units of weights
    above_bound_by_column  stricter where columns differ in size: a value's variance is the product
                           of its row's and its column's, and distortion is in units of steps, which
                           a quantiser with a step for each column keeps even

Shapes: R rows, C columns.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from stages.pack.file.container import EncodedTensor
from stages.pack.quantise import gptq, tensor_kinds
from stages.pack.quantise.trellis_quantiser import TINY, row_column_variances

CONTAINER = "container"  # name and kind of the last entry: all bytes of the file that belong to no tensor


class TensorStats(NamedTuple):
    """Statistics of one tensor; None where they cannot be computed from what is given."""

    name: str
    kind: str
    shape: tuple[int, ...]
    form: str
    bytes: int
    weights: int
    above_bound: float | None = None  # bits a weight
    above_bound_by_column: float | None = None  # bits a weight
    mean_squared_error: float | None = None
    relative_error: float | None = None
    expected_loss: float | None = None  # nats a token

    @property
    def bits_per_weight(self) -> float | None:
        """All bytes of the tensor, its steps included, over its weights."""
        return 8 * self.bytes / self.weights if self.weights else None


def stored_stats(tensor: EncodedTensor) -> TensorStats:
    """Collect the statistics that the file alone gives."""
    kind_of_form, number, rank = tensor.form.header
    form = f"{kind_of_form}:{number}" + (f"+{rank}" if rank else "")
    kind = tensor_kinds.kind_of(tensor.name)
    weights = math.prod(tensor.shape)
    return TensorStats(tensor.name, kind, tensor.shape, form, tensor.payload_bytes, weights)


def container_stats(stats: Sequence[TensorStats], file_bytes: int) -> TensorStats:
    """Make the entry of the container itself, so that the bytes add up to those of the file."""
    return TensorStats(CONTAINER, CONTAINER, (), "", file_bytes - sum(row.bytes for row in stats), 0)


def with_errors(
    stats: TensorStats,
    weight: Tensor,
    dequantised: Tensor,
    hessian_CC: Tensor | None = None,
    importance_R: Tensor | None = None,
) -> TensorStats:
    """Add the errors of a tensor to its statistics.

    `weight` and `dequantised` have the tensor's shape, which is (R, C) where a Hessian is given.
    Without a Hessian there is no relative error, without importances no expected loss.
    """
    difference = dequantised - weight.detach().float()
    mean_squared = float(difference.double().square().mean()) if stats.weights else 0.0
    relative = expected = None
    if hessian_CC is not None:
        outputs = float(gptq.squared_output_errors(weight.detach().float(), hessian_CC).sum())
        errors_R = gptq.squared_output_errors(difference, hessian_CC)
        relative = float(errors_R.sum()) / outputs if outputs > 0 else 0.0
        trace = float(hessian_CC.diagonal().double().sum())
        if importance_R is not None and trace > 0:
            expected = float((importance_R.to(errors_R) * errors_R).sum()) / trace / 2
    return stats._replace(mean_squared_error=mean_squared, relative_error=relative, expected_loss=expected)


def with_bounds(
    stats: TensorStats, pre_quantised_RC: np.ndarray, quantised_RC: np.ndarray, column_factor_C: np.ndarray
) -> TensorStats:
    """Add the distance of a matrix's rate to both bounds.

    The values before and after quantisation are in units of steps; times their column's factor they
    are weights, up to a factor for each row.
    """
    if not stats.weights:
        return stats
    values_RC = pre_quantised_RC.astype(np.float64)
    errors_RC = (pre_quantised_RC - quantised_RC).astype(np.float64)

    # First bound: one variance for each row, in units of weights.
    bound_R = _normal_rate((values_RC * column_factor_C).var(1), ((errors_RC * column_factor_C) ** 2).mean(1))

    # Second bound: the product of a row's and a column's variance, in units of steps.
    variance_R, variance_C = row_column_variances(values_RC)
    distortion_R = (errors_RC**2).mean(1)
    bound_RC = _normal_rate(variance_R[:, None] * variance_C, distortion_R[:, None])

    bits = 8 * stats.bytes / stats.weights
    return stats._replace(
        above_bound=bits - float(bound_R.mean()), above_bound_by_column=bits - float(bound_RC.mean())
    )


def _normal_rate(variance: np.ndarray, distortion: np.ndarray) -> np.ndarray:
    """Rate-distortion function of normal values, in bits a value; the arguments broadcast."""
    return np.maximum(0.0, np.log2(np.maximum(variance, TINY) / np.maximum(distortion, TINY)) / 2)
