"""Stage pack: turns the averaged weights and their Hessians into model.bin, the counted weights."""

import dataclasses
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stages.common.concurrency import run_in_background
from stages.common.environment import hardware
from stages.common.parallel import ParallelParams, distributed
from stages.common.stage import Run, Stage
from stages.pack.artifact import pack
from stages.pack.file.stream_encoder import StreamEncoder
from stages.pack.params import Params
from stages.pack.quantise.methods import QUANTISERS
from stages.pack.stats import layers_tsv

STAGE = Stage(
    name="pack",
    summary="Quantise the weights with GPTQ and encode them within the byte budget.",
    params=Params,
    reads={
        "model": Path("artifacts/train/model.safetensors"),
        "hessians": Path("artifacts/calibrate/hessians.safetensors"),
    },
    writes=("model.bin", "layers.tsv", "metrics.json"),
)


def load(path: Path, device: torch.device) -> dict[str, Tensor]:
    """Load the tensors of a safetensors file; raises ValueError when it is damaged."""
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def main(run: Run[Params], encoder: StreamEncoder) -> None:
    """Load weights and Hessians, pack them, write the file, its table and its metrics."""
    params = run.params
    model_file = run.path("model")
    hessian_file = run.path("hessians")
    with distributed(parallel_for(params)) as world:
        run_in_background(QUANTISERS[params.pack.quantiser].compile_ahead)  # while the files are read

        started = time.monotonic()
        state = load(model_file, world.device)
        hessians = load(hessian_file, world.device)
        packed = pack(state, hessians, params.model, params.pack, encoder, run.logger)

        run.write_bytes("model.bin", packed.blob)
        run.write_text("layers.tsv", layers_tsv.to_tsv(packed.stats))
        run.write_json("metrics.json", layers_tsv.metrics(packed.stats, packed.coarseness))
        run.timing |= {"seconds": time.monotonic() - started, "hardware": hardware(world.device)}


def parallel_for(params: Params) -> ParallelParams:
    """Adapt `parallel`: one process, and no GPU for a quantiser that works on the CPU.

    The tensors are few and the result is one file, so more processes would not help.
    """
    alone = dataclasses.replace(params.parallel, nproc=1)
    if QUANTISERS[params.pack.quantiser].on_cpu:
        return dataclasses.replace(alone, device="cpu", dtype="float32")
    return alone
