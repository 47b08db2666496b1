"""pack: the averaged weights and their Hessians to model.bin, the counted weights."""

from stages.pack.file.encode_process import Encoder

ENCODER = (
    Encoder() if __name__ == "__main__" else None
)  # at work while what follows is imported: torch takes seconds

import contextlib
import dataclasses
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stages.common import command
from stages.common.concurrency import beside
from stages.common.environment import hardware
from stages.common.parallel import ParallelParams, world
from stages.pack.artifact import pack
from stages.pack.params import Params
from stages.pack.quantise import trellis_quantiser
from stages.pack.quantise.methods import QUANTISERS
from stages.pack.stats import layers_tsv

STAGE = command.Stage(
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
    """The tensors of a safetensors file."""
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def main(run: command.Run[Params]) -> None:
    """Load weights and Hessians, pack, write the file, its table and its metrics."""
    params = run.params
    model_file, hessian_file = run.path("model"), run.path("hessians")
    with ENCODER or contextlib.nullcontext() as encode, world(parallel_for(params)) as here:
        if QUANTISERS[params.pack.quantiser].on_cpu:
            beside(trellis_quantiser.compile_ahead)
        started = time.monotonic()
        state, hessians = load(model_file, here.device), load(hessian_file, here.device)
        packed = pack(state, hessians, params.model, params.pack, run.report, encode)
        run.write_bytes("model.bin", packed.blob)
        run.write_text("layers.tsv", layers_tsv.tsv(packed.rows))
        run.write_json("metrics.json", layers_tsv.metrics(packed.rows, packed.scale))
        run.timing |= {"seconds": time.monotonic() - started, "hardware": hardware(here.device)}


def parallel_for(params: Params) -> ParallelParams:
    """Always one process: the tensors are few and the file is one, so that nproc is no business of this stage. A GPU only if it works."""
    alone = dataclasses.replace(params.parallel, nproc=1)
    return (
        dataclasses.replace(alone, device="cpu", dtype="float32")
        if QUANTISERS[params.pack.quantiser].on_cpu
        else alone
    )


if __name__ == "__main__":
    command.launch(STAGE, main)
