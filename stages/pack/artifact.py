"""model.bin from a state and its Hessians, and back.

The bytes depend on the weights, the Hessians, the parameters and the kind of processor, never on the number of threads (workers.py). The
budget decides one thing only, the factor on all clip widths (budget.py).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from stages.calibrate.hessians import hessian_name
from stages.config import build
from stages.pack import budget, codec, container, gptq, roles, table, tensors
from stages.pack.container import Contents, Entry, Stream
from stages.pack.gptq import Feedback, Quantised
from stages.pack.params import PackParams
from stages.pack.workers import exact_operations, in_threads, usable_cores
from stages.parallel import World
from stages.report import Report
from stages.train.model import Model, model_for
from stages.train.params import ModelParams

CODEC = "brotli"
MAX_SIZE = 1 << 24  # of an integer among the model's parameters that a file may declare
MAX_VISITS = 100_000  # of blocks in one forward pass, likewise


class Packed(NamedTuple):
    """The file, the figures of each tensor, and the factor on the clip widths (1 = as the parameters say)."""

    blob: bytes
    rows: list[table.Row]
    clip_factor: float


class Attempt(NamedTuple):
    """The whole model at one clip factor: the file, its entries, and the same tensors before they became bytes."""

    blob: bytes
    entries: tuple[Entry, ...]
    coded: dict[str, tensors.Coded]


@dataclasses.dataclass(frozen=True)
class _Header:
    model: ModelParams


def pack(
    state: Mapping[str, Tensor], hessians: Mapping[str, Tensor], model_params: ModelParams, pack_params: PackParams, report: Report
) -> Packed:
    """Quantise and encode `state` within the byte budget, on the device where its tensors lie.

    A ValueError names the tensor that does not fit the model's parameters, has no Hessian or one that is not positive definite, or is not
    finite; and gives both figures when no clip factor brings the file under the budget.
    """
    check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, model_params)
    device = state["embedding.weight"].device
    quantised = sorted(name for name in state if roles.kind_of(name) != "rest")
    needed = {name: _hessian(name, state[name], hessians).to(device) for name in quantised}
    with exact_operations():
        known = _feedbacks(needed, pack_params.damping, report)

        def attempt(factor: float) -> Attempt:
            coded = _quantise_all(state, known, pack_params, factor, report)
            entries = _encode_all(coded, pack_params, report)
            blob = container.write(Contents(dataclasses.asdict(model_params), entries))
            report.log(f"pack: {len(blob):,} bytes at clip factor {factor:g}, {pack_params.model_budget_bytes:,} allowed")
            return Attempt(blob, entries, coded)

        weights = sum(state[name].numel() for name in quantised)
        factor, best = budget.fit(attempt, lambda tried: len(tried.blob), pack_params.model_budget_bytes, weights)
        rows = [
            table.with_errors(row, state[row.name], tensors.decoded(best.coded[row.name]), needed.get(row.name)) if row.weights else row
            for row in table.rows_of(best.entries, len(best.blob))
        ]
    return Packed(best.blob, rows, factor)


def unpack(blob: bytes) -> tuple[ModelParams, dict[str, Tensor]]:
    """The model's parameters and its float32 weights; a ValueError for a file that is damaged or not lawful."""
    contents = container.read(blob)
    params = _model_params(contents)
    try:
        check_shapes({entry.name: entry.shape for entry in contents.entries}, params)
    except ValueError as error:
        raise ValueError(f"damaged model file: {error}") from error
    state = in_threads(_decode, contents.entries, lambda entry: entry.payload_bytes, usable_cores())
    return params, {entry.name: tensor for entry, tensor in zip(contents.entries, state, strict=True)}


def load_model(path: Path, world: World) -> Model:
    """The model in a file, on the world's device and in its manner of computing."""
    params, state = unpack(path.read_bytes())
    model = model_for(params, world)
    model.load_state_dict(state)
    return model


def check_shapes(shapes: Mapping[str, tuple[int, ...]], params: ModelParams) -> None:
    """A ValueError unless `shapes` are the names and shapes of a model with `params`; allocates nothing."""
    if params.layers > len(shapes):
        raise ValueError(f"{len(shapes)} tensors are too few for the {params.layers} blocks of model.layers")
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in Model(params).state_dict().items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if shapes.get(name) != expected.get(name):
            seen, wanted = (f"has shape {of[name]}" if name in of else "is absent" for of in (shapes, expected))
            raise ValueError(f"tensor {name} {seen}, and {wanted} in a model with these parameters (section model)")


def _hessian(name: str, weight: Tensor, hessians: Mapping[str, Tensor]) -> Tensor:
    source, columns = hessian_name(name), weight.shape[1]
    if source not in hessians:
        raise ValueError(f"{name}: its Hessian {source} is not among the {len(hessians)} given; run `dvc repro calibrate`")
    if hessians[source].shape != (columns, columns):
        shape = tuple(hessians[source].shape)
        raise ValueError(f"{name}: its Hessian has shape {shape}, expected ({columns}, {columns}); run `dvc repro calibrate`")
    return hessians[source]


def _feedbacks(needed: Mapping[str, Tensor], damping: float, report: Report) -> dict[str, Feedback]:
    """What GPTQ needs of each matrix's Hessian; it is the same at every clip factor, and matrices with one input share it."""
    sources = sorted({hessian_name(name) for name in needed})
    with report.progress("Hessians", len(sources)) as progress:

        def factor(source: str) -> Feedback:
            known = gptq.feedback(needed[source], damping, source)
            progress.advance(1, source)
            return known

        known = in_threads(factor, sources, lambda source: needed[source].numel(), _threads(needed))
    by_source = dict(zip(sources, known, strict=True))
    return {name: by_source[hessian_name(name)] for name in needed}


def _quantise_all(
    state: Mapping[str, Tensor], known: Mapping[str, Feedback], params: PackParams, clip_factor: float, report: Report
) -> dict[str, tensors.Coded]:
    """Every tensor, by name, as integers and steps or as float16, whichever its role says."""
    names = sorted(state)
    with report.progress("GPTQ", sum(tensor.numel() for tensor in state.values())) as progress:

        def quantise(name: str) -> tensors.Coded:
            weight, kind = state[name].detach(), roles.kind_of(name)
            if kind == "rest":
                return tensors.half(weight, name)
            grid = roles.grid(kind, params, clip_factor)
            steps = gptq.row_steps(weight, grid.clip, grid.qmax, name)
            values = gptq.quantise(weight, known[name], steps, grid.qmax, params.block_columns)
            progress.advance(weight.numel(), name)
            return Quantised(values, steps)

        coded = in_threads(quantise, names, lambda name: state[name].numel(), _threads(state))
    return dict(zip(names, coded, strict=True))


def _encode_all(coded: Mapping[str, tensors.Coded], params: PackParams, report: Report) -> tuple[Entry, ...]:
    """The entries of the file, in the order of their names."""
    raw = {name: tensors.raw_streams(tensor) for name, tensor in sorted(coded.items())}
    with report.progress("brotli", sum(len(stream) for streams in raw.values() for stream in streams)) as progress:

        def encode(name: str) -> Entry:
            tensor, kind = coded[name], roles.kind_of(name)
            shape = tuple((tensor.values_RC if isinstance(tensor, Quantised) else tensor).shape)
            layouts = container.layouts(kind, shape)
            streams = tuple(
                Stream(CODEC, codec.encode(CODEC, stream, layout.item_bytes, params.brotli_quality))
                for stream, layout in zip(raw[name], layouts, strict=True)
            )
            progress.advance(sum(map(len, raw[name])), name)
            return Entry(name, shape, kind, roles.bits_of(kind, params), streams)

        return tuple(in_threads(encode, list(raw), lambda name: len(raw[name][0]), usable_cores()))


def _decode(entry: Entry) -> Tensor:
    streams = container.decode_streams(entry)
    return tensors.decoded(tensors.from_raw(entry.kind, entry.shape, entry.bits, streams, entry.name))


def _model_params(contents: Contents) -> ModelParams:
    """The model's parameters in a header, within what the file's tensors could possibly need."""
    try:
        params = build({"model": contents.model}, _Header).model
    except ValueError as error:
        raise ValueError(f"damaged model file: {error}") from error
    if any(type(value) is int and value > MAX_SIZE for value in contents.model.values()):
        raise ValueError(f"damaged model file: a parameter of the model is above {MAX_SIZE}")
    if params.layers + params.loops * (params.loop_last + 1 - params.loop_first) > MAX_VISITS:
        raise ValueError(f"damaged model file: its model visits more than {MAX_VISITS} blocks")
    return params


def _threads(tensors_by_name: Mapping[str, Tensor]) -> int:
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors_by_name.values())
    return usable_cores() if on_cpu else 1
