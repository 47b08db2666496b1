"""Two methods to quantise a model's matrices.

    rate      every error is equally expensive (RateDistortionQuantiser)
    sdclip    the clip widths of #1493 (SDClipQuantiser)

A quantiser is built from weights, Hessians and importances. One number, its coarseness, then
decides how coarse all matrices are, and so how many bytes they take (fit_budget.py). A quantiser
names batches of matrices that are processed together, one batch a thread (common/concurrency.py).
Batches do not depend on the number of threads, so results do not.

Shapes: R rows, C columns, D entries of a histogram.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from stages.calibrate.hessians import hessian_name, importance_name
from stages.common.concurrency import thread_map, usable_cores
from stages.common.progress import Logger
from stages.pack.exponents import EXPONENTS_PER_OCTAVE, exponents_to_factors, factors_to_exponents
from stages.pack.forms import GROUP_COLUMNS, GroupsForm, RowQuantised, RowsForm, StoredTensor, TrellisForm
from stages.pack.params import PackParams
from stages.pack.quantise import gptq, tensor_kinds, trellis_quantiser
from stages.pack.quantise.fit_budget import CoarsenessRange
from stages.pack.quantise.gptq import GPTQFactors
from stages.pack.quantise.trellis_quantiser import ColumnFeedback, ScaledMatrix

# A row's importance is clipped to within this factor of the matrix's mean. Rows that calibration
# hardly saw, such as those of rare tokens, may matter more than was measured.
IMPORTANCE_RANGE = 64.0

# The rate model of `predicted_bits`, by stride of the trellis (1: uniform grid). Fitted at record
# size: the first attempt misses the budget by at most 1 %.
DISTORTION = {1: 0.088, 2: 0.067}  # mean squared error over the squared distance of a state's levels
OVERHEAD_BITS = {1: 0.33, 2: 0.145}  # bits a value above the rate-distortion bound, with exponents
MIN_BITS = 0.02  # bits a value at any coarseness
LOG2_COARSENESS_LIMIT = 60.0

# Mean bits a value at the finest coarseness. A small model may leave some of the budget unused.
MAX_BITS = 12.0
MAX_PREDICTED_LEVEL = 8192.0  # largest of a column, before feedback; beyond, its step is made coarser
DEVIATIONS_PER_OCTAVE = 8  # resolution of the histogram of deviations

MAX_CLIP_FACTOR = 8.0  # on the clip widths of SDClip; beyond, hardly anything but zeros is left
BATCH_WEIGHTS = 1 << 21  # largest batch on a CPU, in weights, so that all threads have work
TINY = 1e-30  # floor of arguments of a logarithm


class QuantisedMatrix(NamedTuple):
    """A quantised matrix, and the arrays by which rate and distortion are measured."""

    stored: StoredTensor
    pre_quantised_RC: np.ndarray  # float32: weights after feedback, in the quantiser's units
    quantised_RC: np.ndarray  # float32: the values they were rounded to, in the same units
    column_factor_C: np.ndarray  # float32: both arrays times this are weights, up to a factor for each row


class Quantiser(Protocol):
    """Protocol of a method."""

    on_cpu: ClassVar[bool]  # runs on the CPU even if there is a GPU, so that bytes do not depend on one
    gptq_factors: Mapping[str, GPTQFactors]  # by name of the matrix
    batches: Sequence[Sequence[str]]  # names of the matrices that `quantise` takes together

    def __init__(
        self,
        state: Mapping[str, Tensor],
        calibration: Mapping[str, Tensor],
        params: PackParams,
        logger: Logger,
    ) -> None: ...

    @staticmethod
    def compile_ahead() -> None:
        """Compile the functions that it calls, which takes seconds."""

    def quantise(self, names: Sequence[str], coarseness: float) -> list[QuantisedMatrix]:
        """Quantise the matrices of one batch."""

    def coarseness_range(self, bits: float) -> CoarsenessRange:
        """Range of the coarseness.

        `first` is where all matrices together are predicted to take `bits` bits.
        """


class SDClipQuantiser:
    """GPTQ on uniform grids with a fixed number of bits (#1394, #1493).

    A row's step is proportional to its deviation. The coarseness multiplies all clip widths. It is
    never below 1: finer steps would clip values that the parameters say are not to be clipped.
    """

    on_cpu: ClassVar = False

    def __init__(
        self,
        state: Mapping[str, Tensor],
        calibration: Mapping[str, Tensor],
        params: PackParams,
        logger: Logger,
    ) -> None:
        self.state = state
        self.params = params
        by_matrix = {
            name: hessian_of(name, tensor, calibration).to(tensor.device) for name, tensor in state.items()
        }
        self.gptq_factors: Mapping[str, GPTQFactors] = _factorise(
            by_matrix, params.damping, logger, act_order=True
        )
        self.batches: Sequence[Sequence[str]] = _batches(
            list(state), lambda name: (tensor_kinds.kind_of(name), state[name].shape), state
        )
        self.extra_bits = _extra_bits(state, by_matrix, params)

    @staticmethod
    def compile_ahead() -> None:
        """Do nothing: torch's operations are compiled already."""

    def quantise(self, names: Sequence[str], coarseness: float) -> list[QuantisedMatrix]:
        """Quantise matrices of one kind and shape with the grid of their kind."""
        grid = tensor_kinds.uniform_grid(tensor_kinds.kind_of(names[0]), self.params, coarseness)

        # Stack the batch.
        weights_BRC = torch.stack([self.state[name].detach() for name in names])
        steps_BR = torch.stack(
            [
                gptq.row_steps(weight_RC, grid.clip, grid.qmax, name)
                for weight_RC, name in zip(weights_BRC, names, strict=True)
            ]
        )
        extra_bits_BC = torch.stack([self.extra_bits[name] for name in names])
        factors = [self.gptq_factors[name] for name in names]
        integers_BRC, pre_quantised_BRC = gptq.quantise(
            weights_BRC, factors, steps_BR, extra_bits_BC, grid.qmax, self.params.block_columns
        )

        # One result for each matrix, on the CPU.
        results = []
        for parts in zip(integers_BRC, steps_BR, extra_bits_BC, pre_quantised_BRC, strict=True):
            integers_RC, steps_R, extra_bits_C, pre_quantised_RC = (part.cpu().numpy() for part in parts)
            form = GroupsForm(grid.bits) if extra_bits_C.any() else RowsForm(grid.bits)
            values = RowQuantised(integers_RC, steps_R, extra_bits_C)
            stored = StoredTensor(form, values, integers_RC.shape)
            column_factor_C = np.ones(len(extra_bits_C), np.float32)
            results.append(QuantisedMatrix(stored, pre_quantised_RC, stored.dequantise(), column_factor_C))
        return results

    def coarseness_range(self, bits: float) -> CoarsenessRange:
        """From the clip widths of the parameters, whatever the bits, to MAX_CLIP_FACTOR times these."""
        return CoarsenessRange(1.0, 1.0, MAX_CLIP_FACTOR)


def _extra_bits(
    state: Mapping[str, Tensor], hessians: Mapping[str, Tensor], params: PackParams
) -> dict[str, Tensor]:
    """AWQ-lite (#1908): extra bits of each column beyond its grid's, (C,) uint8, by name of the matrix.

    The `awq_groups` groups of columns with the largest sum of rms(input) * mean |weight|, in the
    whole model, get values of 8 bits. #1908 stores a second step for each of their rows. Here it is
    the first step divided by a power of two, which needs no storage.
    """
    extra_bits = {}
    ranking: list[tuple[float, str, int]] = []  # -salience, name, index of the group
    for name, tensor in state.items():
        extra_bits[name] = torch.zeros(tensor.shape[1], dtype=torch.uint8, device=tensor.device)
        if params.awq_groups and _grid_bits(name, params) < 8:
            rms_C = hessians[name].diagonal().double().sqrt()
            salience_C = rms_C * tensor.detach().abs().double().mean(0)
            for index, group in enumerate(salience_C.split(GROUP_COLUMNS)):
                ranking.append((-float(group.sum()), name, index))

    for _, name, index in sorted(ranking)[: params.awq_groups]:
        group_columns = slice(index * GROUP_COLUMNS, (index + 1) * GROUP_COLUMNS)
        extra_bits[name][group_columns] = 8 - _grid_bits(name, params)
    return extra_bits


def _grid_bits(name: str, params: PackParams) -> int:
    return tensor_kinds.uniform_grid(tensor_kinds.kind_of(name), params, 1.0).bits


class PreparedMatrix(NamedTuple):
    """A matrix as RateDistortionQuantiser needs it at every coarseness."""

    scaled: ScaledMatrix
    max_scaled_C: np.ndarray  # float32: largest magnitudes of the scaled weights
    unit_step: float  # the matrix's step at coarseness 1


class DeviationHistogram(NamedTuple):
    """Number of weights by standard deviation, in units of their steps at coarseness 1."""

    log2_deviation_D: np.ndarray  # float64
    count_D: np.ndarray  # int64


class RateDistortionQuantiser:
    """Trellis-coded quantisation: every weight's error is equally expensive (trellis_quantiser.py).

    The coarseness is the step of a weight whose error costs one.
    """

    on_cpu: ClassVar = True

    def __init__(
        self,
        state: Mapping[str, Tensor],
        calibration: Mapping[str, Tensor],
        params: PackParams,
        logger: Logger,
    ) -> None:
        self.params = params
        by_matrix = {name: hessian_of(name, tensor, calibration) for name, tensor in state.items()}
        self.gptq_factors: Mapping[str, GPTQFactors] = _factorise(
            by_matrix, params.damping, logger, act_order=False
        )
        self.batches: Sequence[Sequence[str]] = [[name] for name in state]

        # Feedback in units of steps, once for all matrices with the same input.
        by_input = {hessian_name(name): name for name in state}
        feedback = thread_map(
            lambda name: _column_feedback(self.gptq_factors[name]),
            list(by_input.values()),
            lambda name: by_matrix[name].numel(),
            usable_cores(),
        )
        feedback_by_input = dict(zip(by_input, feedback, strict=True))

        def prepare(name: str) -> PreparedMatrix:
            importance_R = importance_of(name, state[name], calibration, params.row_weight)
            columns = feedback_by_input[hessian_name(name)]
            return _prepare(name, state[name], importance_R, self.gptq_factors[name], columns)

        prepared = thread_map(prepare, list(state), lambda name: state[name].numel(), usable_cores())
        self.matrices = dict(zip(state, prepared, strict=True))

    @staticmethod
    def compile_ahead() -> None:
        """Compile the search for levels."""
        trellis_quantiser.compile_ahead()

    def quantise(self, names: Sequence[str], coarseness: float) -> list[QuantisedMatrix]:
        """Search the levels of each matrix."""
        return [self._quantise(self.matrices[name], coarseness) for name in names]

    def coarseness_range(self, bits: float) -> CoarsenessRange:
        """From MAX_BITS bits a value on, beginning where `bits` bits in all are predicted."""
        histogram = _deviation_histogram(list(self.matrices.values()))
        finest = self._coarseness_for(MAX_BITS * histogram.count_D.sum(), histogram)
        first = max(finest, self._coarseness_for(bits, histogram))
        return CoarsenessRange(first, finest, 2.0**LOG2_COARSENESS_LIMIT)

    def _quantise(self, matrix: PreparedMatrix, coarseness: float) -> QuantisedMatrix:
        scaled = matrix.scaled
        step = matrix.unit_step * coarseness

        # Coarser steps for columns whose levels would not fit 16 bits; no column needs a step that
        # fine.
        too_fine_C = np.maximum(1.0, matrix.max_scaled_C / (step * MAX_PREDICTED_LEVEL))
        eighths_C = np.ceil(EXPONENTS_PER_OCTAVE * np.log2(too_fine_C))
        if eighths_C.any():
            scaled = trellis_quantiser.coarsened(scaled, eighths_C)

        states = self.params.states
        found = trellis_quantiser.quantise_matrix(scaled, step, states, self.params.rate_weight)
        return QuantisedMatrix(
            stored=StoredTensor(TrellisForm(states), found.matrix, found.matrix.levels_RC.shape),
            pre_quantised_RC=found.pre_quantised_RC,
            quantised_RC=found.matrix.levels_RC.astype(np.float32),
            column_factor_C=exponents_to_factors(scaled.columns.exponents_C),
        )

    def _coarseness_for(self, bits: float, histogram: DeviationHistogram) -> float:
        """The coarseness at which all weights together are predicted to take `bits` bits, by bisection."""
        low = -LOG2_COARSENESS_LIMIT
        high = LOG2_COARSENESS_LIMIT
        while high - low > 1e-3:
            middle = (low + high) / 2
            predicted_D = predicted_bits(histogram.log2_deviation_D - middle, self.params.states)
            if (predicted_D * histogram.count_D).sum() > bits:
                low = middle
            else:
                high = middle
        return float(2.0**high)


def predicted_bits(log2_deviation_D: np.ndarray, states: int) -> np.ndarray:
    """Predict the bits a value (D,) of normal values, from log2 of their deviation in units of their step.

    With r the ratio of variance to distortion: log2(1 + r) / 2, which is near the rate-distortion
    bound, and an overhead, which vanishes with r.
    """
    stride = min(2, states)
    ratio_D = 2.0 ** (2 * log2_deviation_D) / (DISTORTION[stride] * stride**2)
    return np.maximum(MIN_BITS, np.log2(1 + ratio_D) / 2 + OVERHEAD_BITS[stride] * np.minimum(1, ratio_D))


def _column_feedback(factors: GPTQFactors) -> ColumnFeedback:
    """Feedback in units of steps that are proportional to U's diagonal."""
    relative_C = factors.upper_CC.diagonal().double().numpy() / _mean_diagonal(factors)
    exponents_C = factors_to_exponents(relative_C)
    return trellis_quantiser.column_feedback(factors.upper_CC.numpy(), exponents_C)


def _mean_diagonal(factors: GPTQFactors) -> float:
    """Geometric mean of U's diagonal."""
    return float(np.exp(np.log(factors.upper_CC.diagonal().double().numpy()).mean()))


def _prepare(
    name: str, weight_RC: Tensor, importance_R: np.ndarray, factors: GPTQFactors, columns: ColumnFeedback
) -> PreparedMatrix:
    """Divide a matrix by the factors of its rows and columns.

    A row's step is proportional to 1 / sqrt(importance).
    """
    if not bool(torch.isfinite(weight_RC).all()):
        raise ValueError(f"{name}: its weights are not finite")
    alive_RC = weight_RC.detach().float().cpu().masked_fill(factors.dead_C, 0.0).numpy()
    mean_importance = float(importance_R.mean())
    row_exponents_R = factors_to_exponents(np.sqrt(mean_importance / importance_R))
    scaled = trellis_quantiser.scale_matrix(alive_RC, importance_R, row_exponents_R, columns)
    max_scaled_C = np.abs(scaled.scaled_RC).max(0, initial=0.0)
    return PreparedMatrix(scaled, max_scaled_C, _mean_diagonal(factors) / mean_importance**0.5)


def _deviation_histogram(matrices: Sequence[PreparedMatrix]) -> DeviationHistogram:
    """Count the weights of all matrices by their deviation, modelled as a product of row and column."""

    def count(matrix: PreparedMatrix) -> tuple[int, np.ndarray]:
        """Lowest deviation, in eighths of octaves, and the counts from there on."""
        variance_R, variance_C = trellis_quantiser.row_column_variances(matrix.scaled.scaled_RC)
        log2_R1 = (np.log2(np.maximum(variance_R, TINY)) / 2)[:, None]
        log2_C = np.log2(np.maximum(variance_C, TINY)) / 2
        octaves_RC = log2_R1 + log2_C - np.log2(matrix.unit_step)
        eighths_RC = np.rint(DEVIATIONS_PER_OCTAVE * octaves_RC).astype(np.int64)
        lowest = int(eighths_RC.min(initial=0))
        return lowest, np.bincount((eighths_RC - lowest).ravel())

    counted = thread_map(count, matrices, lambda matrix: matrix.scaled.scaled_RC.size, usable_cores())
    totals: dict[int, int] = {}
    for lowest, counts in counted:
        for eighths, number in enumerate(counts.tolist(), lowest):
            totals[eighths] = totals.get(eighths, 0) + number
    eighths_D = sorted(totals)
    return DeviationHistogram(
        np.array(eighths_D) / DEVIATIONS_PER_OCTAVE, np.array([totals[eighths] for eighths in eighths_D])
    )


def hessian_of(name: str, weight: Tensor, calibration: Mapping[str, Tensor]) -> Tensor:
    """Look up the Hessian (C, C) of a matrix (R, C); a ValueError names it when there is none of its size."""
    source = hessian_name(name)
    columns = weight.shape[1]
    if source not in calibration:
        raise ValueError(
            f"{name}: its Hessian {source} is not among the {len(calibration)} given;"
            " run `dvc repro calibrate`"
        )
    if calibration[source].shape != (columns, columns):
        shape = tuple(calibration[source].shape)
        raise ValueError(
            f"{name}: its Hessian has shape {shape}, expected ({columns}, {columns});"
            " run `dvc repro calibrate`"
        )
    return calibration[source]


def importance_of(
    name: str, weight_RC: Tensor, calibration: Mapping[str, Tensor], row_weight: float
) -> np.ndarray:
    """Row weights of the quantiser's loss, (R,) float64.

    mean(g) * clip(g / mean(g), 1/64, 64)^row_weight. g is the mean squared gradient with respect to
    the row of weights, divided by trace(H): approximately that with respect to the row's output.
    """
    source = importance_name(name)
    hessian_CC = hessian_of(name, weight_RC, calibration)
    if source not in calibration or calibration[source].shape != weight_RC.shape[:1]:
        raise ValueError(
            f"{name}: the importance of its rows, {source}, is not in the calibration's output;"
            " run `dvc repro calibrate`"
        )
    trace = max(float(hessian_CC.diagonal().double().sum()), trellis_quantiser.TINY)
    squares_R = calibration[source].double().cpu().numpy() / trace
    mean = float(squares_R.mean())
    if not (np.isfinite(mean) and mean > 0):
        raise ValueError(
            f"{name}: the importance of its rows has mean {mean}; no gradient reached it in calibration"
        )
    return mean * np.clip(squares_R / mean, 1 / IMPORTANCE_RANGE, IMPORTANCE_RANGE) ** row_weight


def _factorise(
    hessians: Mapping[str, Tensor], damping: float, logger: Logger, *, act_order: bool
) -> dict[str, GPTQFactors]:
    """GPTQ's factors by name of the matrix. Matrices with the same input share them."""
    by_input = {hessian_name(name): hessian for name, hessian in sorted(hessians.items())}
    batches = _batches(list(by_input), lambda source: by_input[source].shape, by_input)
    with logger.progress("Hessians", len(by_input)) as progress:

        def factorise_batch(sources: Sequence[str]) -> list[GPTQFactors]:
            stacked = torch.stack([by_input[source] for source in sources])
            factors = gptq.factorise(stacked, damping, sources, act_order=act_order)
            progress.advance(len(sources), sources[0])
            return factors

        def work(sources: Sequence[str]) -> int:
            return len(sources) * len(by_input[sources[0]]) ** 3

        factorised = thread_map(factorise_batch, batches, work, threads_for(hessians.values()))

    factors_by_input: dict[str, GPTQFactors] = {}
    for sources, factors in zip(batches, factorised, strict=True):
        factors_by_input |= zip(sources, factors, strict=True)
    return {name: factors_by_input[hessian_name(name)] for name in hessians}


def _batches(
    names: Sequence[str], key: Callable[[str], Hashable], tensors: Mapping[str, Tensor]
) -> list[list[str]]:
    """Batch names with the same key.

    On a CPU a batch has one tensor, or several of BATCH_WEIGHTS together at most.
    """
    by_key: dict[Hashable, list[str]] = {}
    for name in names:
        by_key.setdefault(key(name), []).append(name)

    batches = []
    for group in by_key.values():
        tensor = tensors[group[0]]
        size = max(1, BATCH_WEIGHTS // tensor.numel()) if tensor.device.type == "cpu" else len(group)
        batches += [group[first : first + size] for first in range(0, len(group), size)]
    return batches


def threads_for(tensors: Iterable[Tensor]) -> int:
    """All cores for work on a CPU, one thread for work on a GPU."""
    return usable_cores() if all(tensor.device.type == "cpu" for tensor in tensors) else 1


QUANTISERS: dict[str, type[Quantiser]] = {"rate": RateDistortionQuantiser, "sdclip": SDClipQuantiser}
