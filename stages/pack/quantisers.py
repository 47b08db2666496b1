"""The two ways to quantise a model's matrices: #1493's clip widths, and steps at one level of cost for a whole budget.

A quantiser knows the weights, Hessians and importances; one number, its scale, decides how coarse everything is, and so the bytes. It
quantises a tensor at a time, on one thread (workers.py).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from stages.calibrate.hessians import hessian_name, importance_name
from stages.pack import gptq, lattice, roles
from stages.pack.container import Form
from stages.pack.gptq import Quantised
from stages.pack.lattice import Lattice
from stages.pack.params import PackParams
from stages.pack.workers import in_threads, usable_cores
from stages.report import Report

# Of a matrix's rows: their importances are taken to lie within this factor of the mean. Rows that calibration hardly saw, as those of
# rare tokens, are not known to matter that little.
IMPORTANCE_RANGE = 64.0
# Rates and steps of an estimate: distortion over the squared distance of a state's levels, and what coding takes above the bound.
NOISE, OVERHEAD_BITS = {1: 0.088, 2: 0.067}, {1: 0.26, 2: 0.09}
FEWEST_BITS = 0.02  # that a value costs however coarse its step
MOST_BITS = 12.0  # of a value on average: finer steps would say nothing more, and a small model may leave some of a budget unused
MOST_STEPS = 8192.0  # from zero to the largest weight of a column
DEVIATIONS_PER_OCTAVE = 8

T = TypeVar("T")


class Result(NamedTuple):
    """A quantised matrix, and what rate and distortion are measured by."""

    coded: Quantised | Lattice
    form: Form
    entered_RC: np.ndarray  # float32: the values after feedback that entered the quantiser, in its units
    rounded_RC: np.ndarray  # float32: what it made of them
    scale_C: np.ndarray  # float32: both times this are weights, up to a factor for each row


class Quantiser(Protocol):
    """A way to quantise."""

    def quantise(self, name: str, scale: float) -> Result:
        """The matrix of that name, at a scale."""


def hessian_of(name: str, weight: Tensor, hessians: Mapping[str, Tensor]) -> Tensor:
    """The Hessian of a matrix; a ValueError names it when there is none of its size."""
    source, columns = hessian_name(name), weight.shape[1]
    if source not in hessians:
        raise ValueError(f"{name}: its Hessian {source} is not among the {len(hessians)} given; run `dvc repro calibrate`")
    if hessians[source].shape != (columns, columns):
        shape = tuple(hessians[source].shape)
        raise ValueError(f"{name}: its Hessian has shape {shape}, expected ({columns}, {columns}); run `dvc repro calibrate`")
    return hessians[source]


class SDClip:
    """Steps proportional to a row's standard deviation, a fixed number of bits (#1394, #1493); the scale multiplies all clip widths."""

    def __init__(self, state: Mapping[str, Tensor], hessians: Mapping[str, Tensor], params: PackParams, report: Report) -> None:
        self.state, self.params = state, params
        found = {name: hessian_of(name, tensor, hessians).to(tensor.device) for name, tensor in state.items()}
        self.known = _by_source(found, lambda hessian, source: gptq.feedback(hessian, params.damping, source), report)

    def quantise(self, name: str, scale: float) -> Result:
        """GPTQ with the grid of the tensor's role."""
        weight, grid = self.state[name].detach(), roles.grid(roles.kind_of(name), self.params, scale)
        steps = gptq.row_steps(weight, grid.clip, grid.qmax, name)
        values, entered = gptq.quantise(weight, self.known[name], steps, grid.qmax, self.params.block_columns)
        coded = Quantised(values, steps)
        ones = np.ones(weight.shape[1], np.float32)
        return Result(coded, Form("rows", grid.bits), entered.cpu().numpy(), gptq.dequantise(coded).cpu().numpy(), ones)


class _Inputs(NamedTuple):
    """What is known of a Hessian."""

    dead_C: Tensor
    columns: lattice.Columns
    centre: float  # geometric mean of U's diagonal


class _Known(NamedTuple):
    """What of a matrix does not change with the scale."""

    axes: lattice.Axes
    largest_C: np.ndarray  # magnitudes of the scaled weights
    unit: float  # the matrix's step at scale 1


class AtRate:
    """Steps that make every weight's error cost the same (lattice.py); the scale is the step of a weight whose error costs one.

    It works on the CPU, wherever the tensors are: the search is no work for a GPU, and so the bytes do not depend on one.
    """

    def __init__(self, state: Mapping[str, Tensor], hessians: Mapping[str, Tensor], params: PackParams, report: Report) -> None:
        self.params = params
        found = {name: hessian_of(name, tensor, hessians).cpu() for name, tensor in state.items()}
        inputs = _by_source(found, lambda hessian, source: _inputs(hessian, params.damping, source), report)
        self.known = {name: self._known(name, state[name], hessians, found[name], inputs[name]) for name in state}

    def quantise(self, name: str, scale: float) -> Result:
        """Levels on the trellis."""
        axes, largest_C, unit = self.known[name]
        # Beyond so many steps a column's values would not fit their 16 bits, and no column needs a step that fine.
        eighths_C = np.ceil(lattice.PER_OCTAVE * np.log2(np.maximum(1.0, largest_C / (unit * scale * MOST_STEPS))))
        if eighths_C.any():
            axes = lattice.widened(axes, eighths_C)
        states = self.params.states
        chosen = lattice.choose(axes, unit * scale, states, self.params.rate_weight)
        levels_RC = chosen.lattice.levels_RC.astype(np.float32)
        return Result(chosen.lattice, Form("lattice", states), chosen.entered_RC, levels_RC, lattice.scales(axes.columns.exponents_C))

    def scale_for(self, bits_total: float) -> float:
        """The scale at which normal values of these deviations would take so many bits."""
        stride = min(2, self.params.states)
        octaves, counts = self._deviations()
        target = min(bits_total, MOST_BITS * counts.sum())
        low, high = -60.0, 60.0  # log2 of the scale
        while high - low > 1e-3:
            middle = (low + high) / 2
            ratio = 2.0 ** (2 * (octaves - middle)) / (NOISE[stride] * stride**2)
            bits = np.maximum(FEWEST_BITS, np.log2(1 + ratio) / 2 + OVERHEAD_BITS[stride] * np.minimum(1, ratio))
            low, high = (middle, high) if (bits * counts).sum() > target else (low, middle)
        return float(2.0**high)

    def _deviations(self) -> tuple[np.ndarray, np.ndarray]:
        """How many weights have which deviation, as log2 in units of their steps at scale 1."""
        found: dict[int, int] = {}
        for axes, _, unit in self.known.values():
            of_R, of_C = (np.log2(np.maximum(of, 1e-30)) / 2 for of in lattice.variances(axes.scaled_RC))
            eighths_RC = np.rint(DEVIATIONS_PER_OCTAVE * (of_R[:, None] + of_C - np.log2(unit))).astype(np.int64)
            least = int(eighths_RC.min(initial=0))
            for value, count in enumerate(np.bincount((eighths_RC - least).ravel())):
                found[value + least] = found.get(value + least, 0) + int(count)
        return np.array(sorted(found)) / DEVIATIONS_PER_OCTAVE, np.array([found[value] for value in sorted(found)])

    def _known(self, name: str, weight: Tensor, hessians: Mapping[str, Tensor], hessian: Tensor, inputs: _Inputs) -> _Known:
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name}: its weights are not finite")
        importance_R = self._importance(name, weight, hessians, hessian)
        mean = float(importance_R.mean())
        alive = weight.detach().float().cpu().masked_fill(inputs.dead_C, 0.0).numpy()
        axes = lattice.axes_of(alive, importance_R, lattice.exponents(np.sqrt(mean / importance_R)), inputs.columns)
        return _Known(axes, np.abs(axes.scaled_RC).max(0, initial=0.0), inputs.centre / mean**0.5)

    def _importance(self, name: str, weight: Tensor, hessians: Mapping[str, Tensor], hessian: Tensor) -> np.ndarray:
        """g of each row: the squared gradient of the loss in the row's weights over what the inputs contribute to it."""
        source = importance_name(name)
        if source not in hessians or hessians[source].shape != weight.shape[:1]:
            raise ValueError(f"{name}: the importance of its rows, {source}, is not among what calibration gave; run `dvc repro calibrate`")
        squares_R = hessians[source].double().cpu().numpy() / max(float(hessian.diagonal().double().sum()), 1e-300)
        mean = float(squares_R.mean())
        if not (np.isfinite(mean) and mean > 0):
            raise ValueError(f"{name}: the importance of its rows has mean {mean}; no gradient reached it in calibration")
        return mean * np.clip(squares_R / mean, 1 / IMPORTANCE_RANGE, IMPORTANCE_RANGE) ** self.params.row_weight


def _inputs(hessian: Tensor, damping: float, source: str) -> _Inputs:
    known = gptq.feedback(hessian, damping, source, act_order=False)
    diagonal_C = known.upper_CC.diagonal().double().numpy()
    centre = float(np.exp(np.log(diagonal_C).mean()))
    return _Inputs(known.dead_C, lattice.columns_of(known.upper_CC.numpy(), lattice.exponents(diagonal_C / centre)), centre)


def _by_source(found: Mapping[str, Tensor], factor: Callable[[Tensor, str], T], report: Report) -> dict[str, T]:
    """What `factor` makes of each distinct Hessian, by matrix: matrices with one input share it."""
    sources = sorted({hessian_name(name) for name in found})
    with report.progress("Hessians", len(sources)) as progress:

        def one(source: str) -> T:
            made = factor(found[source], source)
            progress.advance(1, source)
            return made

        made = dict(zip(sources, in_threads(one, sources, lambda source: found[source].numel(), threads_for(found.values())), strict=True))
    return {name: made[hessian_name(name)] for name in found}


def threads_for(tensors: Iterable[Tensor]) -> int:
    """All cores for work on the CPU, one for work on a GPU."""
    return usable_cores() if all(tensor.device.type == "cpu" for tensor in tensors) else 1
