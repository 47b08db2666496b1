"""The two ways to quantise a model's matrices: #1493's clip widths, and steps at one level of cost for a whole budget.

A quantiser knows the weights, Hessians and importances; one number, its scale, decides how coarse everything is, and so the bytes. It
says which tensors are to be quantised together, which does not depend on the number of threads: each batch is one thread's
(common/concurrency.py).
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from stages.calibrate.hessians import hessian_name, importance_name
from stages.common.concurrency import in_threads, usable_cores
from stages.common.progress import Report
from stages.pack.file.container import GROUP_COLUMNS, Form
from stages.pack.file.tensors import Corrected, Quantised, decoded
from stages.pack.params import PackParams
from stages.pack.quantise import gptq, tensor_kinds, trellis_quantiser
from stages.pack.quantise.fit_budget import Scales
from stages.pack.quantise.gptq import Feedback
from stages.pack.quantise.trellis_quantiser import Lattice

# Of a matrix's rows: their importances are taken to lie within this factor of the mean. Rows that calibration hardly saw, as those of
# rare tokens, are not known to matter that little.
IMPORTANCE_RANGE = 64.0
# Rates and steps of an estimate: distortion over the squared distance of a state's levels, and what coding takes above the bound, with
# exponents. At record size the first attempt should come within a hundredth of the budget, so that the second is the last.
NOISE, OVERHEAD_BITS = {1: 0.088, 2: 0.067}, {1: 0.33, 2: 0.145}
FEWEST_BITS = 0.02  # that a value costs however coarse its step
MOST_BITS = 12.0  # of a value on average: finer steps would say nothing more, and a small model may leave some of a budget unused
MOST_STEPS = 8192.0  # from zero to the largest weight of a column
DEVIATIONS_PER_OCTAVE = 8

WIDEST = 8.0  # factor on the clip widths, beyond which hardly anything but zeros is left
COARSEST = 2.0**60
BATCH_WEIGHTS = 1 << 21  # that a thread of a CPU works on together, so that there is work for all of them


class Result(NamedTuple):
    """A quantised matrix, and what rate and distortion are measured by."""

    coded: Quantised | Lattice | Corrected
    form: Form
    entered_RC: np.ndarray  # float32: the values after feedback that entered the quantiser, in its units
    rounded_RC: np.ndarray  # float32: what it made of them
    scale_C: np.ndarray  # float32: both times this are weights, up to a factor for each row


class Quantiser(Protocol):
    """A way to quantise."""

    on_cpu: ClassVar[
        bool
    ]  # whether it is the search of trellis_quantiser.py: no work for a GPU, and the bytes shall not depend on one
    known: Mapping[str, Feedback]  # GPTQ's of each matrix
    batches: Sequence[Sequence[str]]  # names of the matrices, those together that are quantised together

    def __init__(
        self, state: Mapping[str, Tensor], hessians: Mapping[str, Tensor], params: PackParams, report: Report
    ) -> None: ...

    def quantise(self, names: Sequence[str], scale: float) -> list[Result]:
        """The matrices of one batch, at a scale."""

    def scales(self, bits: float) -> Scales:
        """The range of its scale, and where to begin when all matrices together may take so many bits."""


def hessian_of(name: str, weight: Tensor, hessians: Mapping[str, Tensor]) -> Tensor:
    """The Hessian of a matrix; a ValueError names it when there is none of its size."""
    source, columns = hessian_name(name), weight.shape[1]
    if source not in hessians:
        raise ValueError(
            f"{name}: its Hessian {source} is not among the {len(hessians)} given; run `dvc repro calibrate`"
        )
    if hessians[source].shape != (columns, columns):
        shape = tuple(hessians[source].shape)
        raise ValueError(
            f"{name}: its Hessian has shape {shape}, expected ({columns}, {columns}); run `dvc repro calibrate`"
        )
    return hessians[source]


class SDClip:
    """Steps proportional to a row's standard deviation, a fixed number of bits (#1394, #1493).

    The scale multiplies all clip widths. It is never below 1: finer steps would clip what the parameters say shall not be clipped.
    """

    on_cpu: ClassVar = False

    def __init__(
        self, state: Mapping[str, Tensor], hessians: Mapping[str, Tensor], params: PackParams, report: Report
    ) -> None:
        self.state, self.params = state, params
        found = {name: hessian_of(name, tensor, hessians).to(tensor.device) for name, tensor in state.items()}
        self.known: Mapping[str, Feedback] = _feedback(found, params.damping, True, report)
        self.batches: Sequence[Sequence[str]] = _batches(
            list(state), lambda name: (tensor_kinds.kind_of(name), state[name].shape), state
        )
        self.finer = _finer_columns(state, found, params)

    def quantise(self, names: Sequence[str], scale: float) -> list[Result]:
        """GPTQ with the grid of the tensors' role."""
        grid = tensor_kinds.grid(tensor_kinds.kind_of(names[0]), self.params, scale)
        weights = torch.stack([self.state[name].detach() for name in names])
        steps = torch.stack(
            [
                gptq.row_steps(weight, grid.clip, grid.qmax, name)
                for weight, name in zip(weights, names, strict=True)
            ]
        )
        finer = torch.stack([self.finer[name] for name in names])
        known = [self.known[name] for name in names]
        values, entered = gptq.quantise(weights, known, steps, finer, grid.qmax, self.params.block_columns)
        return [self._result(grid, *of) for of in zip(values, steps, finer, entered, strict=True)]

    def scales(self, bits: float) -> Scales:
        """From the clip widths of the parameters on."""
        return Scales(1.0, 1.0, WIDEST)

    def _result(self, grid: tensor_kinds.Grid, *of: Tensor) -> Result:
        values_RC, steps_R, finer_C, entered_RC = (tensor.cpu().numpy() for tensor in of)
        coded = Quantised(values_RC, steps_R, finer_C)
        form = Form("groups" if finer_C.any() else "rows", grid.bits)
        return Result(coded, form, entered_RC, decoded(coded), np.ones(len(finer_C), np.float32))


def _finer_columns(
    state: Mapping[str, Tensor], hessians: Mapping[str, Tensor], params: PackParams
) -> dict[str, Tensor]:
    """AWQ-lite (#1908): by what power of two the steps of each matrix's columns are finer, (C,) uint8.

    The `awq_groups` groups of columns with the largest sum of rms(input) * mean |weight| get values of 8 bits, in the whole model. #1908
    keeps a second step for each of their rows; a power of two of the first says the same for nothing.
    """
    finer = {
        name: torch.zeros(tensor.shape[1], dtype=torch.uint8, device=tensor.device)
        for name, tensor in state.items()
    }
    found: list[tuple[float, str, int]] = []
    for name, tensor in state.items():
        if tensor_kinds.grid(tensor_kinds.kind_of(name), params, 1.0).bits < 8 and params.awq_groups:
            salience_C = hessians[name].diagonal().double().sqrt() * tensor.detach().abs().double().mean(0)
            found += [
                (-float(group.sum()), name, index)
                for index, group in enumerate(salience_C.split(GROUP_COLUMNS))
            ]
    for _, name, index in sorted(found)[: params.awq_groups]:
        bits = tensor_kinds.grid(tensor_kinds.kind_of(name), params, 1.0).bits
        finer[name][index * GROUP_COLUMNS : (index + 1) * GROUP_COLUMNS] = 8 - bits
    return finer


class _Inputs(NamedTuple):
    """What is known of a Hessian."""

    dead_C: Tensor
    columns: trellis_quantiser.Columns
    centre: float  # geometric mean of U's diagonal


class _Matrix(NamedTuple):
    """What of a matrix does not change with the scale."""

    axes: trellis_quantiser.Axes
    largest_C: np.ndarray  # magnitudes of the scaled weights
    unit: float  # the matrix's step at scale 1


class AtRate:
    """Steps that make every weight's error cost the same (trellis_quantiser.py); the scale is the step of a weight whose error costs
    one."""

    on_cpu: ClassVar = True

    def __init__(
        self, state: Mapping[str, Tensor], hessians: Mapping[str, Tensor], params: PackParams, report: Report
    ) -> None:
        self.params = params
        found = {name: hessian_of(name, tensor, hessians) for name, tensor in state.items()}
        self.known: Mapping[str, Feedback] = _feedback(found, params.damping, False, report)
        self.batches: Sequence[Sequence[str]] = [[name] for name in state]
        alike = {hessian_name(name): name for name in state}  # matrices with one input share it
        made = in_threads(
            lambda name: _inputs(self.known[name]),
            list(alike.values()),
            lambda name: found[name].numel(),
            usable_cores(),
        )
        inputs = dict(zip(alike, made, strict=True))

        def matrix(name: str) -> _Matrix:
            return self._matrix(name, state[name], hessians, inputs[hessian_name(name)])

        matrices = in_threads(matrix, list(state), lambda name: state[name].numel(), usable_cores())
        self.matrices = dict(zip(state, matrices, strict=True))

    def quantise(self, names: Sequence[str], scale: float) -> list[Result]:
        """Levels on the trellis."""
        return [self._quantise(name, scale) for name in names]

    def scales(self, bits: float) -> Scales:
        """Beginning where normal values of these deviations would take so many bits."""
        octaves, counts = _deviations(list(self.matrices.values()))
        finest = self._scale_for(MOST_BITS * counts.sum(), octaves, counts)
        return Scales(max(finest, self._scale_for(bits, octaves, counts)), finest, COARSEST)

    def _quantise(self, name: str, scale: float) -> Result:
        axes, largest_C, unit = self.matrices[name]
        # Beyond so many steps a column's values would not fit their 16 bits, and no column needs a step that fine.
        eighths_C = np.ceil(
            trellis_quantiser.PER_OCTAVE * np.log2(np.maximum(1.0, largest_C / (unit * scale * MOST_STEPS)))
        )
        if eighths_C.any():
            axes = trellis_quantiser.widened(axes, eighths_C)
        states = self.params.states
        chosen = trellis_quantiser.choose(axes, unit * scale, states, self.params.rate_weight)
        levels_RC = chosen.lattice.levels_RC.astype(np.float32)
        return Result(
            chosen.lattice,
            Form("lattice", states),
            chosen.entered_RC,
            levels_RC,
            trellis_quantiser.scales(axes.columns.exponents_C),
        )

    def _scale_for(self, bits_total: float, octaves: np.ndarray, counts: np.ndarray) -> float:
        """The scale at which normal values of these deviations would take so many bits."""
        stride = min(2, self.params.states)
        low, high = -60.0, 60.0  # log2 of the scale
        while high - low > 1e-3:
            middle = (low + high) / 2
            ratio = 2.0 ** (2 * (octaves - middle)) / (NOISE[stride] * stride**2)
            bits = np.maximum(
                FEWEST_BITS, np.log2(1 + ratio) / 2 + OVERHEAD_BITS[stride] * np.minimum(1, ratio)
            )
            low, high = (middle, high) if (bits * counts).sum() > bits_total else (low, middle)
        return float(2.0**high)

    def _matrix(self, name: str, weight: Tensor, hessians: Mapping[str, Tensor], inputs: _Inputs) -> _Matrix:
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name}: its weights are not finite")
        importance_R = importance_of(name, weight, hessians, self.params.row_weight)
        mean = float(importance_R.mean())
        alive = weight.detach().float().cpu().masked_fill(inputs.dead_C, 0.0).numpy()
        axes = trellis_quantiser.axes_of(
            alive, importance_R, trellis_quantiser.exponents(np.sqrt(mean / importance_R)), inputs.columns
        )
        return _Matrix(axes, np.abs(axes.scaled_RC).max(0, initial=0.0), inputs.centre / mean**0.5)


def _deviations(matrices: Sequence[_Matrix]) -> tuple[np.ndarray, np.ndarray]:
    """How many weights have which deviation, as log2 in units of their steps at scale 1."""

    def counted(of: _Matrix) -> tuple[int, np.ndarray]:
        of_R, of_C = (
            np.log2(np.maximum(squares, 1e-30)) / 2
            for squares in trellis_quantiser.variances(of.axes.scaled_RC)
        )
        eighths_RC = np.rint(DEVIATIONS_PER_OCTAVE * (of_R[:, None] + of_C - np.log2(of.unit))).astype(
            np.int64
        )
        least = int(eighths_RC.min(initial=0))
        return least, np.bincount((eighths_RC - least).ravel())

    found: dict[int, int] = {}
    for least, counts in in_threads(counted, matrices, lambda of: of.axes.scaled_RC.size, usable_cores()):
        for value, count in enumerate(counts.tolist(), least):
            found[value] = found.get(value, 0) + count
    return np.array(sorted(found)) / DEVIATIONS_PER_OCTAVE, np.array(
        [found[value] for value in sorted(found)]
    )


def importance_of(name: str, weight: Tensor, hessians: Mapping[str, Tensor], row_weight: float) -> np.ndarray:
    """g of each row to the power `row_weight`: the squared gradient of the loss in its weights over what the inputs contribute to it."""
    source, hessian = importance_name(name), hessian_of(name, weight, hessians)
    if source not in hessians or hessians[source].shape != weight.shape[:1]:
        raise ValueError(
            f"{name}: the importance of its rows, {source}, is not among what calibration gave; run `dvc repro calibrate`"
        )
    squares_R = hessians[source].double().cpu().numpy() / max(
        float(hessian.diagonal().double().sum()), 1e-300
    )
    mean = float(squares_R.mean())
    if not (np.isfinite(mean) and mean > 0):
        raise ValueError(
            f"{name}: the importance of its rows has mean {mean}; no gradient reached it in calibration"
        )
    return mean * np.clip(squares_R / mean, 1 / IMPORTANCE_RANGE, IMPORTANCE_RANGE) ** row_weight


def _inputs(known: Feedback) -> _Inputs:
    diagonal_C = known.upper_CC.diagonal().double().numpy()
    centre = float(np.exp(np.log(diagonal_C).mean()))
    return _Inputs(
        known.dead_C,
        trellis_quantiser.columns_of(
            known.upper_CC.numpy(), trellis_quantiser.exponents(diagonal_C / centre)
        ),
        centre,
    )


def _feedback(
    found: Mapping[str, Tensor], damping: float, act_order: bool, report: Report
) -> dict[str, Feedback]:
    """GPTQ's knowledge of each matrix's Hessian: matrices with one input share it."""
    by_source = {hessian_name(name): hessian for name, hessian in sorted(found.items())}
    batches = _batches(list(by_source), lambda source: by_source[source].shape, by_source)
    with report.progress("Hessians", len(by_source)) as progress:

        def together(sources: Sequence[str]) -> list[Feedback]:
            made = gptq.feedback(
                torch.stack([by_source[source] for source in sources]), damping, sources, act_order
            )
            progress.advance(len(sources), sources[0])
            return made

        def work(sources: Sequence[str]) -> int:
            return len(sources) * len(by_source[sources[0]]) ** 3

        made = in_threads(together, batches, work, threads_for(found.values()))
    known = {
        source: of
        for sources, batch in zip(batches, made, strict=True)
        for source, of in zip(sources, batch, strict=True)
    }
    return {name: known[hessian_name(name)] for name in found}


def _batches(
    names: Sequence[str], key: Callable[[str], Hashable], tensors: Mapping[str, Tensor]
) -> list[list[str]]:
    """Names with one key together; on a CPU BATCH_WEIGHTS at most, or one."""
    by_key: dict[Hashable, list[str]] = {}
    for name in names:
        by_key.setdefault(key(name), []).append(name)
    batches = []
    for alike in by_key.values():
        tensor = tensors[alike[0]]
        most = max(1, BATCH_WEIGHTS // tensor.numel()) if tensor.device.type == "cpu" else len(alike)
        batches += [alike[first : first + most] for first in range(0, len(alike), most)]
    return batches


def threads_for(tensors: Iterable[Tensor]) -> int:
    """All cores for work on the CPU, one for work on a GPU."""
    return usable_cores() if all(tensor.device.type == "cpu" for tensor in tensors) else 1


QUANTISERS: dict[str, type[Quantiser]] = {"rate": AtRate, "sdclip": SDClip}
