"""Packs weights and Hessians into model.bin, and unpacks the file again.

    pack    prepare: split the tensors into matrices and the rest, make the quantiser
            search:  quantise and encode the model, ever closer to the byte budget
            report:  statistics of every tensor of the best file
    unpack  parse and decode the file

The bytes depend on the weights, the Hessians and the parameters, never on the number of threads
(common/concurrency.py). With `sdclip` also on whether it runs on a CPU or a GPU, and on the kind of
GPU. The budget decides one number only, the quantiser's coarseness (quantise/fit_budget.py).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.calibrate.hessians import importance_name
from stages.common.concurrency import run_in_background, thread_map, usable_cores
from stages.common.parallel import World
from stages.common.progress import Logger
from stages.pack.entropy import codecs
from stages.pack.file import container, tensors
from stages.pack.file.container import Contents, EncodedStream, EncodedTensor, Form
from stages.pack.file.load import check_shapes, params_from_header
from stages.pack.params import PackParams
from stages.pack.quantise import fit_budget, lqer, tensor_kinds, trellis_quantiser
from stages.pack.quantise.methods import QUANTISERS, QuantisedMatrix, Quantiser, hessian_of, threads_for
from stages.pack.stats import tensor_stats
from stages.pack.stats.tensor_stats import TensorStats
from stages.train.model import Model, build_model
from stages.train.params import ModelParams

FLOAT16_FORM = Form("float16", 16)
StreamEncoder = Callable[..., tuple[EncodedStream, ...]]  # with the arguments of container.encode_streams
PackedTensor = np.ndarray | QuantisedMatrix  # a tensor before it becomes bytes; an array is float16


class Packed(NamedTuple):
    """A packed model: the file, its tensors' statistics, and the coarseness of the quantiser.

    The coarseness is in units of the quantiser: a factor on the clip widths (1 is as the parameters
    say), or the step of a weight whose error costs one (quantise/methods.py).
    """

    blob: bytes
    stats: list[TensorStats]
    coarseness: float


class Candidate(NamedTuple):
    """The whole model at one coarseness: the file, its tensors, and the quantised matrices by name."""

    blob: bytes
    tensors: tuple[EncodedTensor, ...]
    quantised: dict[str, QuantisedMatrix]


@dataclasses.dataclass(frozen=True)
class PackJob:
    """Everything that quantising and encoding need, whatever the coarseness."""

    model_params: ModelParams
    pack_params: PackParams
    state: Mapping[str, Tensor]
    calibration: Mapping[str, Tensor]  # Hessians and importances
    matrices: Mapping[str, Tensor]  # the tensors of `state` that are quantised
    rest: Mapping[str, np.ndarray]  # all others, float16
    quantiser: Quantiser
    encode: Callable[[str, PackedTensor], EncodedTensor]
    logger: Logger


def pack(
    state: Mapping[str, Tensor],
    calibration: Mapping[str, Tensor],
    model_params: ModelParams,
    pack_params: PackParams,
    logger: Logger,
    encode_streams: StreamEncoder | None = None,
) -> Packed:
    """Quantise and encode a model within the byte budget.

    The quantiser `rate` works on the CPU, `sdclip` on the device of the tensors. `state` holds the
    weights by name, `calibration` the Hessians and importances (calibrate/hessians.py).
    `encode_streams` encodes in another process (file/encode_process.py); by default this process
    does.

    Raises ValueError, which names the tensor, when

        a tensor does not fit the model's parameters;
        a value is not finite;
        a Hessian is missing or not positive definite, or an importance is missing or zero.

    Raises ValueError, which gives both sizes, when no coarseness brings the file under the budget.
    """
    check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, model_params)

    # Compile in the background while the Hessians are factored.
    quantiser_type = QUANTISERS[pack_params.quantiser]
    if encode_streams is None:
        encode_streams = container.encode_streams
        run_in_background(functools.partial(codecs.compile_ahead, pack_params.codec))
    if quantiser_type.on_cpu:
        run_in_background(trellis_quantiser.compile_ahead)
        state = {name: tensor.cpu() for name, tensor in state.items()}
        calibration = {name: tensor.cpu() for name, tensor in calibration.items()}

    # Split the tensors: matrices are quantised, the rest is rounded to float16.
    names = sorted(state)
    matrices = {name: state[name].detach() for name in names if tensor_kinds.kind_of(name) != "rest"}
    rest = {name: to_float16(state[name], name) for name in names if name not in matrices}
    encode = functools.partial(
        _encode_tensor,
        encode_streams=encode_streams,
        family=pack_params.codec,
        quality=pack_params.brotli_quality,
    )

    with single_threaded_exact_float32():
        quantiser = quantiser_type(matrices, calibration, pack_params, logger)
        job = PackJob(
            model_params, pack_params, state, calibration, matrices, rest, quantiser, encode, logger
        )

        # Search for the coarseness that fills the budget, beginning with the bits that the rest
        # leaves to the matrices.
        allowed = pack_params.model_budget_bytes
        bits_left = 8.0 * (allowed - sum(values.nbytes for values in rest.values()))
        coarseness, best = fit_budget.fit_to_budget(
            functools.partial(_attempt, job),
            lambda candidate: len(candidate.blob),
            allowed,
            sum(tensor.numel() for tensor in matrices.values()),
            quantiser.coarseness_range(bits_left),
        )

        stats = _measure(job, best)
    return Packed(best.blob, [*stats, tensor_stats.container_stats(stats, len(best.blob))], coarseness)


def unpack(blob: bytes) -> tuple[ModelParams, dict[str, Tensor]]:
    """Decode a file to the model's parameters and float32 weights.

    Raises ValueError when it is damaged or invalid.
    """
    contents = container.parse(blob)
    params = params_from_header(contents.model, contents.shapes)
    weights = thread_map(
        tensors.decode, contents.tensors, lambda tensor: tensor.payload_bytes, usable_cores()
    )
    return params, {
        tensor.name: torch.from_numpy(values)
        for tensor, values in zip(contents.tensors, weights, strict=True)
    }


def to_float16(tensor: Tensor, name: str) -> np.ndarray:
    """Round a tensor to float16; raises ValueError when a value is not finite there."""
    converted: np.ndarray = tensor.detach().half().cpu().numpy()
    if not np.isfinite(converted).all():
        raise ValueError(f"{name}: a value is not a finite float16 (65504 is the largest)")
    return converted


def load_model(path: Path, world: World) -> Model:
    """Build the model in a file on the device and in the type that `world` computes with."""
    params, state = unpack(path.read_bytes())
    model = build_model(params, world)
    model.load_state_dict(state)
    return model


@contextlib.contextmanager
def single_threaded_exact_float32() -> Iterator[None]:
    """Context manager: single-threaded torch operations, and CUDA products of float32 without TF32."""
    # thread_map runs tensors side by side; sums on one thread have one order.
    threads = torch.get_num_threads()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = tf32


def _attempt(job: PackJob, coarseness: float) -> Candidate:
    """Quantise and encode the whole model at one coarseness."""
    # A CPU thread that has quantised a batch encodes it as well, unless corrections have to be
    # added in between.
    rank = job.pack_params.lqer_rank
    quantised, encoded = _quantise(job, coarseness, encodes=job.quantiser.on_cpu and not rank)
    if rank:
        quantised |= lqer.add_corrections(
            quantised, job.matrices, job.calibration, job.quantiser.gptq_factors, job.pack_params
        )

    unencoded: dict[str, PackedTensor] = {**job.rest, **quantised}
    encoded |= _encode_all({name: unencoded[name] for name in unencoded if name not in encoded}, job.encode)

    in_order = tuple(encoded[name] for name in sorted(encoded))
    blob = container.serialise(Contents(dataclasses.asdict(job.model_params), in_order))
    job.logger.log(
        f"pack: {len(blob):,} bytes at coarseness {coarseness:g}, "
        f"{job.pack_params.model_budget_bytes:,} allowed"
    )
    return Candidate(blob, in_order, quantised)


def _quantise(
    job: PackJob, coarseness: float, encodes: bool
) -> tuple[dict[str, QuantisedMatrix], dict[str, EncodedTensor]]:
    """Quantise every matrix, a batch at a time on each thread, which also encodes it if `encodes`."""

    def weights_of(names: Sequence[str]) -> int:
        return sum(job.matrices[name].numel() for name in names)

    with job.logger.progress("GPTQ", weights_of(list(job.matrices))) as progress:

        def quantise_batch(
            names: Sequence[str],
        ) -> tuple[dict[str, QuantisedMatrix], dict[str, EncodedTensor]]:
            quantised = dict(zip(names, job.quantiser.quantise(names, coarseness), strict=True))
            encoded = {}
            if encodes:
                encoded = {name: job.encode(name, matrix) for name, matrix in quantised.items()}
            progress.advance(weights_of(names), names[0])
            return quantised, encoded

        batches = thread_map(
            quantise_batch, job.quantiser.batches, weights_of, threads_for(job.matrices.values())
        )

    all_quantised: dict[str, QuantisedMatrix] = {}
    all_encoded: dict[str, EncodedTensor] = {}
    for quantised, encoded in batches:
        all_quantised |= quantised
        all_encoded |= encoded
    return all_quantised, all_encoded


def _encode_all(
    unencoded: Mapping[str, PackedTensor], encode: Callable[[str, PackedTensor], EncodedTensor]
) -> dict[str, EncodedTensor]:
    """Encode tensors, one at a time on each core."""

    def size(name: str) -> int:
        tensor = unencoded[name]
        return tensor.size if isinstance(tensor, np.ndarray) else tensor.pre_quantised_RC.size

    names = list(unencoded)
    encoded = thread_map(lambda name: encode(name, unencoded[name]), names, size, usable_cores())
    return dict(zip(names, encoded, strict=True))


def _encode_tensor(
    name: str, tensor: PackedTensor, *, encode_streams: StreamEncoder, family: str, quality: int
) -> EncodedTensor:
    """Encode one tensor with the codecs of a family; `quality` is brotli's."""
    stored: tensors.StoredValues
    if isinstance(tensor, np.ndarray):
        form, shape, stored = FLOAT16_FORM, tensor.shape, tensor
    else:
        form, shape, stored = tensor.form, tensor.pre_quantised_RC.shape, tensor.stored
    streams = encode_streams(form, shape, tensors.raw_streams(stored), family, quality)
    return EncodedTensor(name, shape, form, streams)


def _measure(job: PackJob, best: Candidate) -> list[TensorStats]:
    """Compute the statistics of every tensor of the file, in its order."""

    def measure_tensor(tensor: EncodedTensor) -> TensorStats:
        stats = tensor_stats.stored_stats(tensor)
        weight = job.state[tensor.name].detach()
        if tensor.name not in best.quantised:
            return tensor_stats.with_errors(stats, weight, weight.half().float())

        matrix = best.quantised[tensor.name]
        dequantised = torch.from_numpy(tensors.dequantised(matrix.stored)).to(weight.device)
        hessian = hessian_of(tensor.name, weight, job.calibration).to(weight.device)
        importance = job.calibration.get(importance_name(tensor.name))
        stats = tensor_stats.with_errors(stats, weight, dequantised, hessian, importance)
        return tensor_stats.with_bounds(
            stats, matrix.pre_quantised_RC, matrix.quantised_RC, matrix.column_factor_C
        )

    return thread_map(
        measure_tensor,
        best.tensors,
        lambda tensor: job.state[tensor.name].numel(),
        threads_for(job.state.values()),
    )
