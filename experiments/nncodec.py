"""Our trellis and coder compared with NNCodec's: bits a weight of the same matrices at equal error.

    pip install --target DIR pybind11
    PYTHONPATH=DIR pip install --no-deps --no-build-isolation --target DIR nncodec
    PYTHONPATH=DIR python -m experiments.nncodec --weights FILE [--relative-error X] --results FILE

NNCodec is Fraunhofer HHI's implementation of ISO/IEC 15938-17: a trellis of 8 states and adaptive binary
arithmetic coding. Only its compiled part is used, which works with the numpy of this project. FILE is a
safetensors file, of which all matrices are taken.

NNCodec takes one matrix and one step, and so do we here: no scales of rows or columns, no Hessian. Its
steps are on a grid, so it goes first, with the widest step whose error is within X of a matrix's mean
square; our step is then chosen for the same error. `by error` takes the nearest path through the trellis;
`by error and bits` weighs bits as well, each in its own way. At the end both coders, and programs that
are installed, code the same integers of a uniform step.
"""

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

from benchmarks._command import command_line, write_results
from benchmarks.pack import by_programs
from stages.common import environment
from stages.pack.entropy import codecs, level_coder
from stages.pack.forms import TrellisForm
from stages.pack.quantise import trellis_quantiser

STATES = 8
DENSITY = 4  # log2 of the number of NNCodec's steps in an octave
LONGEST_UNARY = 10  # longest unary code of a level; the package's default
WAYS = {"by error": (0.0, 0.0), "by error and bits": (1.0, 0.1)}  # NNCodec's lambda_scale, our rate_weight


class Coded(NamedTuple):
    """A matrix that was quantised and coded."""

    bytes: int
    squared_error: float  # mean
    levels_RC: np.ndarray


class NNCodec:
    """The compiled part of the package."""

    def __init__(self) -> None:
        try:
            self.library = importlib.import_module("nncodec.extensions.deepCABAC")
        except ImportError:
            how = "`python -m experiments.nncodec --help` says how to install it"
            sys.exit(f"error: nncodec is not installed; {how}")

    def matrix(self, weight_RC: np.ndarray, position: int, weight_of_bits: float) -> Coded:
        """Quantise on the trellis with the step at `position` of the grid, and code."""
        levels_RC = np.zeros(weight_RC.shape, np.int32)
        decoded_RC = np.zeros(weight_RC.shape, np.float32)
        encoder = self.library.Encoder()
        encoder.initCtxModels(LONGEST_UNARY, 0)
        position = encoder.quantLayer(
            weight_RC, levels_RC, 1, DENSITY, position, weight_of_bits, LONGEST_UNARY, 0, 1
        )
        self.library.Decoder().dequantLayer(decoded_RC, levels_RC, DENSITY, position, 0)
        size = len(self.code(levels_RC, on_trellis=True))
        return Coded(size, mean_square(weight_RC - decoded_RC), levels_RC)

    def code(self, levels_RC: np.ndarray, on_trellis: bool) -> bytes:
        """Code integers; they are decoded again, and must be the same."""
        off = (self.library.HdspMode.AlwaysOff, np.zeros(2, np.int8), 0, 0)
        encoder = self.library.Encoder()
        encoder.initCtxModels(LONGEST_UNARY + 1, 1)
        no_rows = np.zeros(len(levels_RC), np.int32)
        encoder.encodeLayer(levels_RC.astype(np.int32), int(on_trellis), 0, 1, 0, 0, no_rows, *off)
        payload = encoder.finish()

        decoder = self.library.Decoder()
        decoder.setStream(payload)
        decoder.initCtxModels(LONGEST_UNARY + 1)
        again_RC = np.zeros(levels_RC.shape, np.int32)
        decoder.decodeLayer(again_RC, int(on_trellis), 0, 1, 0, *off)
        assert np.array_equal(again_RC, levels_RC)
        return payload.tobytes()


def ours(weight_RC: np.ndarray, step: float, weight_of_bits: float, states: int = STATES) -> Coded:
    """Quantise and code a matrix by this project; all factors of rows and columns are 1, and are coded."""
    rows, columns = weight_RC.shape
    flat_R = np.zeros(rows, np.int8)
    flat_C = np.zeros(columns, np.int8)
    no_feedback = trellis_quantiser.column_feedback(np.eye(columns, dtype=np.float32), flat_C)
    scaled = trellis_quantiser.scale_matrix(weight_RC, np.ones(rows, np.float32), flat_R, no_feedback)
    chosen = trellis_quantiser.quantise_matrix(scaled, step, states, weight_of_bits).matrix

    payload = level_coder.encode(chosen.levels_RC, flat_R, flat_C, states)
    assert np.array_equal(level_coder.decode(payload, flat_R, flat_C, states), chosen.levels_RC)
    exponents = codecs.brotli_compress(flat_R.tobytes() + flat_C.tobytes(), 11)
    error = mean_square(weight_RC - TrellisForm(states).dequantise(chosen))
    return Coded(len(payload) + len(exponents), error, chosen.levels_RC)


def mean_square(array: np.ndarray) -> float:
    """The mean of squares, summed in float64."""
    return float(np.square(array, dtype=np.float64).mean())


def widest(work: Callable[[int], Coded], most: float) -> Coded:
    """`work` at the largest position of NNCodec's grid whose squared error is at most `most`."""
    low = -38 << DENSITY  # the lowest that the package's 32-bit integers allow
    high = 0  # a step of about 1
    while high - low > 1:
        middle = (low + high) // 2
        if work(middle).squared_error <= most:
            low = middle
        else:
            high = middle
    return work(low)


def matched(work: Callable[[float], Coded], error: float) -> Coded:
    """`work` at the step that gives this squared error, to 0.01 % where the matrix is large enough."""
    low, high = (math.sqrt(12 * error) * factor for factor in (0.05, 4.0))
    for _ in range(30):
        middle = math.sqrt(low * high)
        found = work(middle)
        if abs(found.squared_error / error - 1) < 1e-4:
            break
        if found.squared_error > error:
            high = middle
        else:
            low = middle
    return found


def pair(
    theirs: NNCodec, way: str, name: str, weight_RC: np.ndarray, relative_error: float
) -> tuple[Coded, Coded]:
    """One matrix by NNCodec and by us, with the same error."""
    their_weight, our_weight = WAYS[way]
    most = relative_error * mean_square(weight_RC)
    first = widest(lambda position: theirs.matrix(weight_RC, position, their_weight), most)
    second = matched(lambda step: ours(weight_RC, step, our_weight), first.squared_error)
    bits = [8 * coded.bytes / weight_RC.size for coded in (first, second)]
    print(f"{way}, {name} {weight_RC.shape}: {bits[0]:.4f} and {bits[1]:.4f} bits a weight", flush=True)
    return first, second


def figures(matrices: list[Coded]) -> dict[str, float]:
    """Bits a weight and mean squared error over all matrices together."""
    count = sum(coded.levels_RC.size for coded in matrices)
    error = sum(coded.squared_error * coded.levels_RC.size for coded in matrices) / count
    bits = 8 * sum(coded.bytes for coded in matrices) / count
    return {"bits_per_weight": bits, "mean_squared_error": error}


def compare(weights: dict[str, np.ndarray], relative_error: float) -> dict[str, Any]:
    """The results, less where they were measured; `weights` are float32 matrices (R, C) by name."""
    theirs = NNCodec()
    count = sum(weight_RC.size for weight_RC in weights.values())
    found: dict[str, Any] = {"weights": count, "matrices": len(weights), "relative_error": relative_error}
    for way in WAYS:
        pairs = [pair(theirs, way, name, weight_RC, relative_error) for name, weight_RC in weights.items()]
        found[way] = {
            "nncodec": figures([first for first, _ in pairs]),
            "ours": figures([second for _, second in pairs]),
        }

    # The coders alone, on integers of a uniform step with about the same error.
    levels = []
    for weight_RC in weights.values():
        step = math.sqrt(12 * relative_error * mean_square(weight_RC))
        levels.append(ours(weight_RC, step, 0.0, states=1).levels_RC)
    sizes = sizes_of_integers(levels, theirs)
    found["same integers, bits"] = {name: 8 * size / count for name, size in sizes.items()}
    return found


def sizes_of_integers(levels: list[np.ndarray], theirs: NNCodec) -> dict[str, int]:
    """Bytes of integer matrices by each coder; the programs get one file, with a byte for each integer."""
    assert all(np.abs(levels_RC).max() < 128 for levels_RC in levels)
    our_size = 0
    for levels_RC in levels:
        rows, columns = levels_RC.shape
        our_size += len(level_coder.encode(levels_RC, np.zeros(rows, np.int8), np.zeros(columns, np.int8), 1))
    return {
        "nncodec": sum(len(theirs.code(levels_RC, on_trellis=False)) for levels_RC in levels),
        "ours": our_size,
    } | by_programs(b"".join(levels_RC.astype(np.int8).tobytes() for levels_RC in levels))


def main() -> None:
    """Compare the matrices of a file, and write the JSON file."""
    parser = command_line(__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    meaning = "mean squared error over mean square (default: %(default)s)"
    parser.add_argument("--relative-error", type=float, default=0.0125, help=meaning)
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()

    weights = {}
    for name, tensor in sorted(load_file(arguments.weights).items()):
        if tensor.ndim == 2 and tensor.size >= 4096:
            weights[name] = np.ascontiguousarray(tensor.astype(np.float32))
    result = compare(weights, arguments.relative_error) | environment.run_environment(torch.device("cpu"))
    result["versions"]["nncodec"] = importlib.metadata.version("nncodec")
    write_results(arguments.results, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
