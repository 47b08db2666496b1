"""model.bin from a state and its Hessians, and back.

The bytes depend on the weights, the Hessians, the parameters and the kind of processor, never on the number of threads
(common/concurrency.py). The budget decides one number only, the quantiser's scale (quantise/fit_budget.py, quantise/methods.py).
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
from stages.common.concurrency import beside, in_threads, usable_cores
from stages.common.parallel import World
from stages.common.progress import Report
from stages.pack.entropy import codecs
from stages.pack.file import container, tensors
from stages.pack.file.container import Contents, Entry, Form, Stream
from stages.pack.file.load import check_shapes, model_params
from stages.pack.params import PackParams
from stages.pack.quantise import fit_budget, lqer, tensor_kinds, trellis_quantiser
from stages.pack.quantise.methods import QUANTISERS, Quantiser, Result, hessian_of, threads_for
from stages.pack.stats import tensor_stats
from stages.train.model import Model, model_for
from stages.train.params import ModelParams

FLOAT16 = Form("float16", 16)


class Packed(NamedTuple):
    """The file, the figures of each tensor, and the quantiser's scale (of clip widths: 1 = as the parameters say)."""

    blob: bytes
    rows: list[tensor_stats.Row]
    scale: float


class Attempt(NamedTuple):
    """The whole model at one scale: the file, its entries, and the quantised matrices before they became bytes."""

    blob: bytes
    entries: tuple[Entry, ...]
    results: dict[str, Result]


def pack(
    state: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    model_params: ModelParams,
    pack_params: PackParams,
    report: Report,
    encode: Callable[..., tuple[Stream, ...]] | None = None,
) -> Packed:
    """Quantise and encode `state` within the byte budget, on the device where its tensors lie; `encode` is another's encoder
    (file/encode_process.py).

    A ValueError names the tensor that does not fit the model's parameters, has no Hessian or one that is not positive definite, or is not
    finite; and gives both figures when no scale brings the file under the budget.
    """
    check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, model_params)
    make = QUANTISERS[pack_params.quantiser]
    if encode is None:
        beside(functools.partial(codecs.compile_ahead, pack_params.codec))
    family, quality = pack_params.codec, pack_params.brotli_quality
    encode = functools.partial(encode or container.encode_streams, family=family, quality=quality)
    if make.on_cpu:
        beside(trellis_quantiser.compile_ahead)
        state, hessians = ({name: tensor.cpu() for name, tensor in of.items()} for of in (state, hessians))
    matrices = {
        name: tensor.detach()
        for name, tensor in sorted(state.items())
        if tensor_kinds.kind_of(name) != "rest"
    }
    rest = {name: half(tensor, name) for name, tensor in sorted(state.items()) if name not in matrices}
    with exact_operations():
        quantiser = make(matrices, hessians, pack_params, report)

        def attempt(scale: float) -> Attempt:
            results, encoded = _quantise(
                matrices, quantiser, scale, None if pack_params.lqer_rank else encode, report
            )
            if pack_params.lqer_rank:
                results |= lqer.corrected(results, matrices, hessians, quantiser.known, pack_params)
            coded: dict[str, np.ndarray | Result] = {**rest, **results}
            encoded |= _encode({name: of for name, of in coded.items() if name not in encoded}, encode)
            entries = tuple(entry for _, entry in sorted(encoded.items()))
            blob = container.write(Contents(dataclasses.asdict(model_params), entries))
            report.log(
                f"pack: {len(blob):,} bytes at scale {scale:g}, {pack_params.model_budget_bytes:,} allowed"
            )
            return Attempt(blob, entries, results)

        allowed, weights = pack_params.model_budget_bytes, sum(tensor.numel() for tensor in matrices.values())
        scales = quantiser.scales(8.0 * (allowed - sum(half.nbytes for half in rest.values())))
        scale, best = fit_budget.fill(attempt, lambda tried: len(tried.blob), allowed, weights, scales)
        rows = _measure(best, state, hessians)
    return Packed(best.blob, [*rows, tensor_stats.container_row(rows, len(best.blob))], scale)


def unpack(blob: bytes) -> tuple[ModelParams, dict[str, Tensor]]:
    """The model's parameters and its float32 weights; a ValueError for a file that is damaged or not lawful."""
    contents = container.read(blob)
    params = model_params(contents.model, contents.shapes)
    state = in_threads(tensors.decode, contents.entries, lambda entry: entry.payload_bytes, usable_cores())
    return params, {
        entry.name: torch.from_numpy(weights) for entry, weights in zip(contents.entries, state, strict=True)
    }


def half(tensor: Tensor, name: str) -> np.ndarray:
    """`tensor` in float16; a ValueError when a value is not finite there."""
    converted: np.ndarray = tensor.detach().half().cpu().numpy()
    if not np.isfinite(converted).all():
        raise ValueError(f"{name}: a value is not a finite float16 (65504 is the largest)")
    return converted


def load_model(path: Path, world: World) -> Model:
    """The model in a file, on the world's device and in its manner of computing."""
    params, state = unpack(path.read_bytes())
    model = model_for(params, world)
    model.load_state_dict(state)
    return model


@contextlib.contextmanager
def exact_operations() -> Iterator[None]:
    """Let each torch operation run on the thread that calls it, and on CUDA multiply float32 as float32 (no TF32); undone at the end."""
    threads, tf32 = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = tf32


def _quantise(
    matrices: Mapping[str, Tensor],
    quantiser: Quantiser,
    scale: float,
    encode: Callable[..., tuple[Stream, ...]] | None,
    report: Report,
) -> tuple[dict[str, Result], dict[str, Entry]]:
    """Every matrix quantised; and encoded by the thread that did it, unless that serves a GPU or `encode` is not given."""
    with report.progress("GPTQ", sum(tensor.numel() for tensor in matrices.values())) as progress:

        def size(names: Sequence[str]) -> int:
            return sum(matrices[name].numel() for name in names)

        def together(names: Sequence[str]) -> tuple[dict[str, Result], dict[str, Entry]]:
            made = dict(zip(names, quantiser.quantise(names, scale), strict=True))
            encoded = (
                {name: _entry(name, result, encode) for name, result in made.items()}
                if encode and quantiser.on_cpu
                else {}
            )
            progress.advance(size(names), names[0])
            return made, encoded

        batches = in_threads(together, quantiser.batches, size, threads_for(matrices.values()))
    results, entries = (
        {name: of for batch in every for name, of in batch.items()} for every in zip(*batches, strict=True)
    )
    return results, entries


def _encode(
    coded: Mapping[str, np.ndarray | Result], encode: Callable[..., tuple[Stream, ...]]
) -> dict[str, Entry]:
    """The entries of float16 tensors and of quantised matrices."""

    def size(name: str) -> int:
        of = coded[name]
        return of.size if isinstance(of, np.ndarray) else of.entered_RC.size

    return dict(
        zip(
            coded,
            in_threads(lambda name: _entry(name, coded[name], encode), list(coded), size, usable_cores()),
            strict=True,
        )
    )


def _entry(name: str, of: np.ndarray | Result, encode: Callable[..., tuple[Stream, ...]]) -> Entry:
    form, shape, coded = (
        (FLOAT16, of.shape, of) if isinstance(of, np.ndarray) else (of.form, of.entered_RC.shape, of.coded)
    )
    return Entry(name, shape, form, encode(form, shape, tensors.raw_streams(coded)))


def _measure(
    best: Attempt, state: Mapping[str, Tensor], hessians: Mapping[str, Tensor]
) -> list[tensor_stats.Row]:
    """The figures of every tensor of the file."""

    def one(entry: Entry) -> tensor_stats.Row:
        row, weight = tensor_stats.row_of(entry), state[entry.name].detach()
        if entry.name not in best.results:
            return tensor_stats.with_errors(row, weight, weight.half().float())
        result = best.results[entry.name]
        decoded = torch.from_numpy(tensors.decoded(result.coded)).to(weight.device)
        hessian = hessian_of(entry.name, weight, hessians).to(weight.device)
        measured = tensor_stats.with_errors(
            row, weight, decoded, hessian, hessians.get(importance_name(entry.name))
        )
        return tensor_stats.with_bounds(measured, result.entered_RC, result.rounded_RC, result.scale_C)

    return in_threads(one, best.entries, lambda entry: state[entry.name].numel(), threads_for(state.values()))
