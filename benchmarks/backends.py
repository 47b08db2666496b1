"""One model.bin scored by every way to compute it that is there: ledgers compared pairwise.

    python -m benchmarks.backends --model FILE --val FOLDER --tokenizer FILE --results FILE [--targets N]

Whole windows, one after another, attention within windows (FlashAttention takes no mask of documents). The plain operations run in float32
on the CPU, and on CUDA in float32 and in bfloat16 with each of torch's attention backends; the fused kernels in bfloat16. Any two may be
5e-4 bpb apart at most (#1493's thread has 1.0886 against 1.0810 by SDPA, and gives no reason).
"""

import argparse
import dataclasses
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks._pairs import compared
from benchmarks._streams import beginning
from stages.common import environment
from stages.common.bpb import bits_per_byte
from stages.common.parallel import ParallelParams, World, world
from stages.pack.artifact import unpack
from stages.sliding_eval.params import SlidingEvalParams
from stages.sliding_eval.scorer import SlidingScorer
from stages.train.model import model_for

BATCH_WINDOWS = 8
ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def parallel(device: str, dtype: str, kernels: bool) -> ParallelParams:
    """One process; float32 without TF32."""
    threads = torch.get_num_threads()
    params: dict[str, Any] = {"device": device, "dtype": dtype, "kernels": kernels}
    return ParallelParams(nproc=1, threads=threads, deterministic=False, compile=False, **params)


def ways() -> dict[str, tuple[ParallelParams, SDPBackend | None]]:
    """How the model can be computed on this machine, by name."""
    found: dict[str, tuple[ParallelParams, SDPBackend | None]] = {
        "cpu float32": (parallel("cpu", "float32", False), None)
    }
    if torch.cuda.is_available():
        found["cuda float32"] = (parallel("cuda", "float32", False), None)
        found |= {
            f"cuda bfloat16 {name}": (parallel("cuda", "bfloat16", False), backend)
            for name, backend in ATTENTION.items()
        }
        found["cuda bfloat16 fused kernels"] = (parallel("cuda", "bfloat16", True), None)
    return found


def scored(blob: bytes, here: World, tokens: np.ndarray) -> np.ndarray:
    """The ledger of `tokens` by whole windows."""
    params, state = unpack(blob)
    model = model_for(dataclasses.replace(params, attention="windows"), here)
    model.load_state_dict(state)
    whole = SlidingEvalParams(
        window=params.context, stride=params.context, batch_windows=BATCH_WINDOWS, chunk=params.context
    )
    return SlidingScorer(model, whole, here).score_stream(tokens)


def main() -> None:
    """One line for each way, and the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option in ("model", "val", "tokenizer", "results"):
        parser.add_argument(f"--{option}", type=Path, required=True)
    parser.add_argument("--targets", type=int, default=1 << 40)
    arguments = parser.parse_args()
    stream = beginning(arguments.val, arguments.tokenizer, arguments.targets)
    blob = arguments.model.read_bytes()
    ledgers: dict[str, np.ndarray] = {}
    rows: list[dict[str, Any]] = []
    for name, (params, backend) in ways().items():
        started = time.monotonic()
        with world(params) as here, sdpa_kernel(backend) if backend else nullcontext():
            try:
                ledgers[name] = scored(blob, here, stream.tokens)
            except RuntimeError as error:  # torch has no such kernel here
                rows.append({"way": name, "error": str(error).splitlines()[0]})
                print(json.dumps(rows[-1]), flush=True)
                continue
        bpb = bits_per_byte(ledgers[name], stream.counted_bytes)
        rows.append({"way": name, "bpb": bpb, "seconds": time.monotonic() - started})
        print(json.dumps(rows[-1]), flush=True)
    pairs = compared(ledgers, stream)
    device = torch.device("cuda") if torch.cuda.is_available() else None
    result = {
        "targets": stream.targets,
        "ways": rows,
        "pairs": pairs,
        "largest_bpb": max((abs(p["bpb"]) for p in pairs), default=0.0),
    }
    arguments.results.write_text(
        json.dumps(result | environment.facts(device), indent=2, sort_keys=True) + "\n"
    )
    print("largest difference:", result["largest_bpb"], "bpb")


if __name__ == "__main__":
    main()
