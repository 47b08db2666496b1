"""Our trellis and coder beside NNCodec's, on the same matrices at the same mean squared error.

    pip install --target DIR pybind11
    PYTHONPATH=DIR pip install --no-deps --no-build-isolation --target DIR nncodec
    PYTHONPATH=DIR python -m benchmarks.nncodec --weights FILE [--relative-error X] --results FILE

Only its compiled part is used, for which the numpy of this project will do. FILE is a safetensors file; all its matrices count. NNCodec is
Fraunhofer HHI's implementation of ISO/IEC 15938-17: a trellis of 8 states and adaptive binary arithmetic coding. It takes one matrix and
one step, and so do we here: no scales of rows or columns, no Hessian. Its steps come on a grid, so it goes first, with the widest step
whose error is within X of a matrix's mean square; ours is then made to give the same error. `by error` takes the nearest path through the
trellis; `by error and bits` weighs bits too, each in its own way. Last, both coders, and programs that are installed, on one and the same
integers of a uniform step.
"""

import argparse
import importlib
import importlib.metadata
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import load_file

from benchmarks.pack import by_programs
from stages.common import environment
from stages.pack.entropy import codecs, level_coder
from stages.pack.quantise import trellis_quantiser

STATES = 8
DENSITY = 4  # of NNCodec's steps: log2 of how many there are in an octave
LONGEST_UNARY = 10  # the package's own default
WAYS = {"by error": (0.0, 0.0), "by error and bits": (1.0, 0.1)}  # NNCodec's lambda_scale, our rate_weight


class Coded(NamedTuple):
    """A matrix as bytes."""

    bytes: int
    squared_error: float  # mean
    levels_RC: np.ndarray


class NNCodec:
    """The compiled part of the package."""

    def __init__(self) -> None:
        try:
            self.library = importlib.import_module("nncodec.extensions.deepCABAC")
        except ImportError:
            sys.exit(
                "error: nncodec is not installed; `python -m benchmarks.nncodec --help` says how to install it"
            )

    def matrix(self, weight_RC: np.ndarray, position: int, weight_of_bits: float) -> Coded:
        """Quantised on the trellis with the step at `position` of the grid, and coded."""
        levels_RC, decoded_RC = np.zeros(weight_RC.shape, np.int32), np.zeros(weight_RC.shape, np.float32)
        encoder = self.library.Encoder()
        encoder.initCtxModels(LONGEST_UNARY, 0)
        position = encoder.quantLayer(
            weight_RC, levels_RC, 1, DENSITY, position, weight_of_bits, LONGEST_UNARY, 0, 1
        )
        self.library.Decoder().dequantLayer(decoded_RC, levels_RC, DENSITY, position, 0)
        return Coded(
            len(self.code(levels_RC, on_trellis=True)), mean_square(weight_RC - decoded_RC), levels_RC
        )

    def code(self, levels_RC: np.ndarray, on_trellis: bool) -> bytes:
        """The bytes of integers, decoded again to be sure of them."""
        off = (self.library.HdspMode.AlwaysOff, np.zeros(2, np.int8), 0, 0)
        encoder, decoder = self.library.Encoder(), self.library.Decoder()
        encoder.initCtxModels(LONGEST_UNARY + 1, 1)
        encoder.encodeLayer(
            levels_RC.astype(np.int32), int(on_trellis), 0, 1, 0, 0, np.zeros(len(levels_RC), np.int32), *off
        )
        payload = encoder.finish()
        decoder.setStream(payload)
        decoder.initCtxModels(LONGEST_UNARY + 1)
        again_RC = np.zeros(levels_RC.shape, np.int32)
        decoder.decodeLayer(again_RC, int(on_trellis), 0, 1, 0, *off)
        assert np.array_equal(again_RC, levels_RC)
        return payload.tobytes()


def ours(weight_RC: np.ndarray, step: float, weight_of_bits: float, states: int = STATES) -> Coded:
    """The same by this project; the scales of rows and columns are 1, and are coded as such."""
    rows, columns = weight_RC.shape
    flat_R, flat_C = np.zeros(rows, np.int8), np.zeros(columns, np.int8)
    alike = trellis_quantiser.columns_of(np.eye(columns, dtype=np.float32), flat_C)
    chosen = trellis_quantiser.choose(
        trellis_quantiser.axes_of(weight_RC, np.ones(rows, np.float32), flat_R, alike),
        step,
        states,
        weight_of_bits,
    )
    payload = level_coder.encode(chosen.lattice.levels_RC, flat_R, flat_C, states)
    assert np.array_equal(level_coder.decode(payload, flat_R, flat_C, states), chosen.lattice.levels_RC)
    scales = codecs.deflate(flat_R.tobytes() + flat_C.tobytes(), 11)
    return Coded(
        len(payload) + len(scales),
        mean_square(weight_RC - trellis_quantiser.weights(chosen.lattice)),
        chosen.lattice.levels_RC,
    )


def mean_square(of: np.ndarray) -> float:
    return float(np.square(of, dtype=np.float64).mean())


def widest(work: Callable[[int], Coded], most: float) -> Coded:
    """`work` at the largest position of NNCodec's grid whose squared error is at most `most`."""
    low, high = -38 << DENSITY, 0  # as far as the package's 32-bit integers go, and a step of about 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if work(middle).squared_error <= most else (low, middle)
    return work(low)


def matched(work: Callable[[float], Coded], error: float) -> Coded:
    """`work` at the step that gives this squared error, to 0.01 % (a small matrix: as near as it comes)."""
    low, high = (math.sqrt(12 * error) * factor for factor in (0.05, 4.0))
    for _ in range(30):
        found = work(middle := math.sqrt(low * high))
        if abs(found.squared_error / error - 1) < 1e-4:
            break
        low, high = (low, middle) if found.squared_error > error else (middle, high)
    return found


def pair(
    theirs: NNCodec, way: str, name: str, weight_RC: np.ndarray, relative_error: float
) -> tuple[Coded, Coded]:
    """One matrix by NNCodec and by us, with the same error."""
    their_weight, our_weight = WAYS[way]
    first = widest(
        lambda at: theirs.matrix(weight_RC, at, their_weight), relative_error * mean_square(weight_RC)
    )
    second = matched(lambda step: ours(weight_RC, step, our_weight), first.squared_error)
    bits = [8 * coded.bytes / weight_RC.size for coded in (first, second)]
    print(f"{way}, {name} {weight_RC.shape}: {bits[0]:.4f} and {bits[1]:.4f} bits a weight", flush=True)
    return first, second


def figures(side: tuple[Coded, ...]) -> dict[str, float]:
    """Over all matrices together."""
    count = sum(coded.levels_RC.size for coded in side)
    error = sum(coded.squared_error * coded.levels_RC.size for coded in side) / count
    return {"bits_per_weight": 8 * sum(coded.bytes for coded in side) / count, "mean_squared_error": error}


def compare(weights: dict[str, np.ndarray], relative_error: float) -> dict[str, Any]:
    """The whole result but for where it was measured."""
    theirs, count = NNCodec(), sum(weight.size for weight in weights.values())
    found: dict[str, Any] = {"weights": count, "matrices": len(weights), "relative_error": relative_error}
    for way in WAYS:
        sides = zip(
            *(pair(theirs, way, name, weight_RC, relative_error) for name, weight_RC in weights.items()),
            strict=True,
        )
        found[way] = {who: figures(side) for who, side in zip(("nncodec", "ours"), sides, strict=True)}
    steps = (math.sqrt(12 * relative_error * mean_square(weight_RC)) for weight_RC in weights.values())
    levels = [
        ours(weight_RC, step, 0.0, states=1).levels_RC
        for weight_RC, step in zip(weights.values(), steps, strict=True)
    ]
    return found | {
        "same integers, bits": {name: 8 * size / count for name, size in on_the_same(levels, theirs).items()}
    }


def on_the_same(levels: list[np.ndarray], theirs: NNCodec) -> dict[str, int]:
    """Bytes of integers by each coder; the programs get one file for all, one byte for each integer."""
    assert all(np.abs(of).max() < 128 for of in levels)
    return {
        "nncodec": sum(len(theirs.code(of, on_trellis=False)) for of in levels),
        "ours": sum(
            len(level_coder.encode(of, np.zeros(len(of), np.int8), np.zeros(of.shape[1], np.int8), 1))
            for of in levels
        ),
    } | by_programs(b"".join(of.astype(np.int8).tobytes() for of in levels))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument(
        "--relative-error",
        type=float,
        default=0.0125,
        help="mean squared error over mean square (default: %(default)s)",
    )
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()
    loaded = {name: of.astype(np.float32) for name, of in load_file(arguments.weights).items()}
    weights = {
        name: np.ascontiguousarray(of)
        for name, of in sorted(loaded.items())
        if of.ndim == 2 and of.size >= 4096
    }
    result = compare(weights, arguments.relative_error) | environment.facts(torch.device("cpu"))
    result["versions"]["nncodec"] = importlib.metadata.version("nncodec")
    arguments.results.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
