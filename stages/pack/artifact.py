"""model.bin from a state and its Hessians, and back.

The bytes depend on the weights, the Hessians, the parameters and the kind of processor, never on the number of threads (workers.py). The
budget decides one number only, the quantiser's scale (budget.py, quantisers.py).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from stages.calibrate.hessians import importance_name
from stages.config import build
from stages.pack import budget, coder, container, correction, gptq, lattice, roles, table, tensors
from stages.pack.container import Contents, Entry, Form
from stages.pack.params import PackParams
from stages.pack.quantisers import QUANTISERS, Quantiser, Result, hessian_of, importance_of, threads_for
from stages.pack.tensors import Corrected
from stages.pack.workers import beside, exact_operations, in_threads, usable_cores
from stages.parallel import World
from stages.report import Report
from stages.train.model import Model, model_for
from stages.train.params import ModelParams

FLOAT16 = Form("float16", 16)
MAX_SIZE = 1 << 24  # of an integer among the model's parameters that a file may declare
MAX_VISITS = 100_000  # of blocks in one forward pass, likewise


class Packed(NamedTuple):
    """The file, the figures of each tensor, and the quantiser's scale (of clip widths: 1 = as the parameters say)."""

    blob: bytes
    rows: list[table.Row]
    scale: float


class Attempt(NamedTuple):
    """The whole model at one scale: the file, its entries, and the quantised matrices before they became bytes."""

    blob: bytes
    entries: tuple[Entry, ...]
    results: dict[str, Result]


@dataclasses.dataclass(frozen=True)
class _Header:
    model: ModelParams


def pack(
    state: Mapping[str, Tensor], hessians: Mapping[str, Tensor], model_params: ModelParams, pack_params: PackParams, report: Report
) -> Packed:
    """Quantise and encode `state` within the byte budget, on the device where its tensors lie.

    A ValueError names the tensor that does not fit the model's parameters, has no Hessian or one that is not positive definite, or is not
    finite; and gives both figures when no scale brings the file under the budget.
    """
    check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, model_params)
    make = QUANTISERS[pack_params.quantiser]
    beside(*([lattice.compile_ahead] if make.on_cpu else []), *([coder.compile_ahead] if pack_params.codec == "adaptive" else []))
    if make.on_cpu:
        state, hessians = ({name: tensor.cpu() for name, tensor in of.items()} for of in (state, hessians))
    matrices = {name: tensor.detach() for name, tensor in sorted(state.items()) if roles.kind_of(name) != "rest"}
    rest = {name: _as_float16(name, tensor, pack_params) for name, tensor in sorted(state.items()) if name not in matrices}
    with exact_operations():
        quantiser = make(matrices, hessians, pack_params, report)

        def attempt(scale: float) -> Attempt:
            quantised = _quantise_all(matrices, hessians, quantiser, scale, pack_params, report)
            by_name = rest | {name: entry for name, (entry, _) in quantised.items()}
            entries = tuple(by_name[name] for name in sorted(by_name))
            blob = container.write(Contents(dataclasses.asdict(model_params), entries))
            report.log(f"pack: {len(blob):,} bytes at scale {scale:g}, {pack_params.model_budget_bytes:,} allowed")
            return Attempt(blob, entries, {name: result for name, (_, result) in quantised.items()})

        allowed, weights = pack_params.model_budget_bytes, sum(tensor.numel() for tensor in matrices.values())
        scales = quantiser.scales(8.0 * (allowed - sum(entry.payload_bytes for entry in rest.values())))
        scale, best = budget.fill(attempt, lambda tried: len(tried.blob), allowed, weights, scales)
        rows = _measure(best, state, hessians)
    return Packed(best.blob, [*rows, table.container_row(rows, len(best.blob))], scale)


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


def _quantise_all(
    matrices: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    quantiser: Quantiser,
    scale: float,
    params: PackParams,
    report: Report,
) -> dict[str, tuple[Entry, Result]]:
    """Every matrix quantised and encoded."""
    with report.progress("GPTQ", sum(tensor.numel() for tensor in matrices.values())) as progress:

        def together(names: Sequence[str]) -> dict[str, Result]:
            made = dict(zip(names, quantiser.quantise(names, scale), strict=True))
            progress.advance(sum(matrices[name].numel() for name in names), names[0])
            return made

        def size(names: Sequence[str]) -> int:
            return sum(matrices[name].numel() for name in names)

        batches = in_threads(together, quantiser.batches, size, threads_for(matrices.values()))
    results = {name: result for batch in batches for name, result in batch.items()}
    if params.lqer_rank:
        results |= _corrected(matrices, hessians, quantiser, results, params)

    def encoded(name: str) -> Entry:
        return _entry(name, tuple(matrices[name].shape), results[name].form, results[name].coded, params)

    entries = in_threads(encoded, list(matrices), lambda name: matrices[name].numel(), usable_cores())
    return {name: (entry, results[name]) for name, entry in zip(matrices, entries, strict=True)}


def _corrected(
    matrices: Mapping[str, Tensor], hessians: Mapping[str, Tensor], quantiser: Quantiser, results: Mapping[str, Result], params: PackParams
) -> dict[str, Result]:
    """The results, with corrections, of the matrices for which the expected loss falls most for their bytes."""

    def one(name: str) -> tuple[float, str, Result]:
        weight, result, rank = matrices[name].float(), results[name], params.lqer_rank
        importance_R = torch.from_numpy(importance_of(name, weight, hessians, params.row_weight)).to(weight.device)
        error = weight - tensors.decoded(result.coded).to(weight.device)
        made = correction.correct(error, quantiser.known[name], importance_R, rank)
        left = error - correction.product(made, len(weight)).to(weight.device)
        hessian = hessian_of(name, weight, hessians).to(weight.device)
        gain = float((importance_R * (gptq.costs(error, hessian) - gptq.costs(left, hessian))).sum()) / sum(weight.shape)
        assert not isinstance(result.coded, Corrected), "a quantiser corrects nothing itself"
        return gain, name, result._replace(coded=Corrected(result.coded, made), form=result.form._replace(rank=rank))

    found = in_threads(one, list(matrices), lambda name: matrices[name].numel(), threads_for(matrices.values()))
    best = sorted(found, key=lambda of: (-of[0], of[1]))[: params.lqer_tensors]
    return {name: result for gain, name, result in best if gain > 0}


def _measure(best: Attempt, state: Mapping[str, Tensor], hessians: Mapping[str, Tensor]) -> list[table.Row]:
    """The figures of every tensor of the file."""

    def one(entry: Entry) -> table.Row:
        row, weight = table.row_of(entry), state[entry.name].detach()
        if entry.name not in best.results:
            return table.with_errors(row, weight, weight.half().float())
        result = best.results[entry.name]
        decoded, hessian = tensors.decoded(result.coded).to(weight.device), hessian_of(entry.name, weight, hessians).to(weight.device)
        measured = table.with_errors(row, weight, decoded, hessian, hessians.get(importance_name(entry.name)))
        return table.with_bounds(measured, result.entered_RC, result.rounded_RC, result.scale_C)

    return in_threads(one, best.entries, lambda entry: state[entry.name].numel(), threads_for(state.values()))


def _as_float16(name: str, tensor: Tensor, params: PackParams) -> Entry:
    """A tensor that is not quantised."""
    half = tensors.half(tensor, name)
    return _entry(name, tuple(half.shape), FLOAT16, half, params)


def _entry(name: str, shape: tuple[int, ...], form: Form, coded: tensors.Coded, params: PackParams) -> Entry:
    """A tensor's streams: the integers by the codec that the parameters name, what little else there is by brotli."""
    raw = tensors.raw_streams(coded)
    integers = () if form.kind == "float16" else (0, len(raw) - 2) if form.rank else (0,)
    codecs = [params.codec if index in integers else "brotli" for index in range(len(raw))]
    return Entry(name, shape, form, container.encode_streams(form, shape, raw, codecs, params.brotli_quality))


def _decode(entry: Entry) -> Tensor:
    streams = container.decode_streams(entry)
    return tensors.decoded(tensors.from_raw(entry.form, entry.shape, streams, entry.name))


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
