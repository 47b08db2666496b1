"""Packs weights and Hessians into model.bin, and unpacks the file again.

    pack    prepare: split the tensors into matrices and the rest, make the quantiser
            search:  quantise and encode the model, ever closer to the byte budget
            report:  measure every tensor of the best file
    unpack  parse and decode the file

The bytes depend on the weights, the Hessians and the parameters, never on the number of threads
(common/concurrency.py). With `sdclip` also on whether it runs on a CPU or a GPU, and on the kind of
GPU. The budget decides one number only, the quantiser's coarseness (quantise/fit_budget.py).
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.calibrate.hessians import importance_name
from stages.common.concurrency import thread_map, usable_cores
from stages.common.parallel import World
from stages.common.progress import Logger
from stages.pack.file import container
from stages.pack.file.container import Contents, EncodedTensor
from stages.pack.file.load import check_shapes, params_from_header
from stages.pack.file.stream_encoder import StreamEncoder
from stages.pack.forms import Float16Form, StoredTensor
from stages.pack.params import PackParams
from stages.pack.quantise import fit_budget, lqer, tensor_kinds
from stages.pack.quantise.methods import QUANTISERS, QuantisedMatrix, Quantiser, hessian_of, threads_for
from stages.pack.stats import tensor_stats
from stages.pack.stats.tensor_stats import TensorStats
from stages.train.model import Model, build_model
from stages.train.params import ModelParams


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
    rest: Mapping[str, StoredTensor]  # all others, float16
    quantiser: Quantiser
    encoder: StreamEncoder
    logger: Logger


def pack(
    state: Mapping[str, Tensor],
    calibration: Mapping[str, Tensor],
    model_params: ModelParams,
    pack_params: PackParams,
    encoder: StreamEncoder,
    logger: Logger,
) -> Packed:
    """Quantise and encode a model within the byte budget.

    The quantiser `rate` works on the CPU, `sdclip` on the device of the tensors. `state` holds the
    weights by name, `calibration` the Hessians and importances (calibrate/hessians.py). Nothing is
    compiled ahead: a caller can start that earlier (`codecs.compile_ahead` for an encoder in this
    process, `Quantiser.compile_ahead`).

    Raises ValueError, which names the tensor, when

        a tensor does not fit the model's parameters;
        a value is not finite;
        a Hessian is missing or not positive definite, or an importance is missing or zero.

    Raises ValueError, which gives both sizes, when no coarseness brings the file under the budget.
    """
    with single_threaded_exact_float32():
        job = _prepare(state, calibration, model_params, pack_params, encoder, logger)
        coarseness, best = _search(job)
        stats = _report(job, best)
    return Packed(best.blob, stats, coarseness)


def unpack(blob: bytes) -> tuple[ModelParams, dict[str, Tensor]]:
    """Decode a file to the model's parameters and float32 weights.

    Raises ValueError when it is damaged or invalid.
    """
    contents = container.parse(blob)
    params = params_from_header(contents.model, contents.shapes)
    weights = thread_map(
        container.decode, contents.tensors, lambda tensor: tensor.payload_bytes, usable_cores()
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


def _prepare(
    state: Mapping[str, Tensor],
    calibration: Mapping[str, Tensor],
    model_params: ModelParams,
    pack_params: PackParams,
    encoder: StreamEncoder,
    logger: Logger,
) -> PackJob:
    """Split the tensors into matrices, which are quantised, and the rest, and make the quantiser."""
    check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, model_params)
    quantiser_type = QUANTISERS[pack_params.quantiser]
    if quantiser_type.on_cpu:
        state = {name: tensor.cpu() for name, tensor in state.items()}
        calibration = {name: tensor.cpu() for name, tensor in calibration.items()}

    matrices = {}
    rest = {}
    for name in sorted(state):
        if tensor_kinds.kind_of(name) == "rest":
            values = to_float16(state[name], name)
            rest[name] = StoredTensor(Float16Form(), values, values.shape)
        else:
            matrices[name] = state[name].detach()
    quantiser = quantiser_type(matrices, calibration, pack_params, logger)
    return PackJob(model_params, pack_params, state, calibration, matrices, rest, quantiser, encoder, logger)


def _search(job: PackJob) -> tuple[float, Candidate]:
    """Find the coarseness that fills the budget; returns it and the model that it gives."""
    # The search begins with the bits that the rest leaves to the matrices.
    allowed = job.pack_params.model_budget_bytes
    rest_bytes = sum(stored.values.nbytes for stored in job.rest.values())
    return fit_budget.fit_to_budget(
        functools.partial(_attempt, job),
        lambda candidate: len(candidate.blob),
        allowed,
        sum(tensor.numel() for tensor in job.matrices.values()),
        job.quantiser.coarseness_range(8.0 * (allowed - rest_bytes)),
    )


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

    unencoded = {**job.rest, **{name: matrix.stored for name, matrix in quantised.items()}}
    encoded |= _encode_all(job, {name: unencoded[name] for name in unencoded if name not in encoded})

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
                encoded = {name: _encode(job, name, matrix.stored) for name, matrix in quantised.items()}
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


def _encode_all(job: PackJob, unencoded: Mapping[str, StoredTensor]) -> dict[str, EncodedTensor]:
    """Encode tensors, one at a time on each core."""
    names = list(unencoded)
    encoded = thread_map(
        lambda name: _encode(job, name, unencoded[name]),
        names,
        lambda name: math.prod(unencoded[name].shape),
        usable_cores(),
    )
    return dict(zip(names, encoded, strict=True))


def _encode(job: PackJob, name: str, stored: StoredTensor) -> EncodedTensor:
    """Encode one tensor."""
    form, values, shape = stored
    streams = job.encoder.encode(
        form.layouts(shape), form.to_streams(values), job.pack_params.codec, job.pack_params.brotli_quality
    )
    return EncodedTensor(name, shape, form, streams)


def _report(job: PackJob, best: Candidate) -> list[TensorStats]:
    """Measure every tensor of the file, in its order, and last the container."""

    def measure_tensor(tensor: EncodedTensor) -> TensorStats:
        stats = tensor_stats.stored_stats(tensor)
        weight = job.state[tensor.name].detach()
        if tensor.name not in best.quantised:
            return tensor_stats.with_errors(stats, weight, weight.half().float())

        matrix = best.quantised[tensor.name]
        dequantised = torch.from_numpy(matrix.stored.dequantise()).to(weight.device)
        hessian = hessian_of(tensor.name, weight, job.calibration).to(weight.device)
        importance = job.calibration.get(importance_name(tensor.name))
        stats = tensor_stats.with_errors(stats, weight, dequantised, hessian, importance)
        return tensor_stats.with_bounds(
            stats, matrix.pre_quantised_RC, matrix.quantised_RC, matrix.column_factor_C
        )

    stats = thread_map(
        measure_tensor,
        best.tensors,
        lambda tensor: job.state[tensor.name].numel(),
        threads_for(job.state.values()),
    )
    return [*stats, tensor_stats.container_stats(stats, len(best.blob))]
