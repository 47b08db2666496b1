"""pack: the averaged weights and their Hessians to model.bin, the counted weights."""

import dataclasses
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stages import command
from stages.clock import hardware
from stages.pack import layers
from stages.pack.artifact import compile_ahead, device_for, pack
from stages.pack.params import Params
from stages.parallel import world

STAGE = command.Stage(
    name="pack",
    summary="Quantise the weights with GPTQ and encode them within the byte budget.",
    params=Params,
    reads={"model": Path("artifacts/train/model.safetensors"), "hessians": Path("artifacts/calibrate/hessians.safetensors")},
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
    compile_ahead(params.pack)
    # Always one process: the tensors are few and the file is one, so that parallel.nproc is none of this stage's business.
    with world(dataclasses.replace(params.parallel, nproc=1)) as here:
        started = time.monotonic()
        device = device_for(params.pack, here.device)
        state, hessians = load(model_file, device), load(hessian_file, device)
        packed = pack(state, hessians, params.model, params.pack, run.report)
        run.write_bytes("model.bin", packed.blob)
        run.write_text("layers.tsv", layers.tsv(packed.rows))
        run.write_json("metrics.json", layers.metrics(packed.rows, packed.scale))
        run.timing |= {"seconds": time.monotonic() - started, "hardware": hardware(here.device)}


if __name__ == "__main__":
    command.launch(STAGE, main)
