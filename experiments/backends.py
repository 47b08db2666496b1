"""Losses of one model.bin by every backend that can compute it, compared in pairs.

    python -m experiments.backends --model FILE --val FOLDER --tokenizer FILE --results FILE [--targets N]

The stream is scored in whole windows, with attention within windows, since FlashAttention takes no mask of
documents. The plain operations run in float32 on the CPU, and on CUDA in float32 and, with each of torch's
attention backends, in bfloat16; the fused kernels run in bfloat16. The question came from #1493's thread,
which has 1.0886 instead of 1.0810 bpb by SDPA and gives no reason. Expected: no two differ by 5e-4 bpb.
"""

import dataclasses
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks._command import command_line, write_results
from benchmarks._pairs import compared
from benchmarks._streams import beginning
from stages.common import environment
from stages.common.bpb import bits_per_byte
from stages.common.parallel import ParallelParams, World, distributed
from stages.pack.artifact import unpack
from stages.sliding_eval.params import SlidingEvalParams
from stages.sliding_eval.scorer import SlidingScorer
from stages.train.model import build_model

BATCH_WINDOWS = 8
ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def parallel(device: str, dtype: str, kernels: bool) -> ParallelParams:
    """Parameters of one process; float32 without TF32."""
    threads = torch.get_num_threads()
    params: dict[str, Any] = {"device": device, "dtype": dtype, "kernels": kernels}
    return ParallelParams(nproc=1, threads=threads, deterministic=False, compile=False, **params)


def ways() -> dict[str, tuple[ParallelParams, SDPBackend | None]]:
    """Backends of this machine by name, with torch's attention backend where one is chosen."""
    found: dict[str, tuple[ParallelParams, SDPBackend | None]] = {}
    found["cpu float32"] = (parallel("cpu", "float32", False), None)
    if torch.cuda.is_available():
        found["cuda float32"] = (parallel("cuda", "float32", False), None)
        for name, backend in ATTENTION.items():
            found[f"cuda bfloat16 {name}"] = (parallel("cuda", "bfloat16", False), backend)
        found["cuda bfloat16 fused kernels"] = (parallel("cuda", "bfloat16", True), None)
    return found


def scored(blob: bytes, world: World, tokens: np.ndarray) -> np.ndarray:
    """Losses of `tokens` (N + 1,) by whole windows, nats (N,)."""
    params, state = unpack(blob)
    model = build_model(dataclasses.replace(params, attention="windows"), world)
    model.load_state_dict(state)
    whole = SlidingEvalParams(
        window=params.context, stride=params.context, batch_windows=BATCH_WINDOWS, chunk=params.context
    )
    return SlidingScorer(model, whole, world).score_stream(tokens)


def main() -> None:
    """Print one line for each backend, and write the JSON file."""
    parser = command_line(__doc__)
    for option in ("model", "val", "tokenizer", "results"):
        parser.add_argument(f"--{option}", type=Path, required=True)
    parser.add_argument("--targets", type=int, default=1 << 40, help="the first ones (default: all)")
    arguments = parser.parse_args()

    stream = beginning(arguments.val, arguments.tokenizer, arguments.targets)
    blob = arguments.model.read_bytes()
    ledgers: dict[str, np.ndarray] = {}
    rows: list[dict[str, Any]] = []

    for name, (params, backend) in ways().items():
        started = time.monotonic()
        with distributed(params) as world, sdpa_kernel(backend) if backend else nullcontext():
            try:
                ledgers[name] = scored(blob, world, stream.tokens)
            except RuntimeError as error:  # torch does not have this kernel here
                rows.append({"way": name, "error": str(error).splitlines()[0]})
            else:
                bpb = bits_per_byte(ledgers[name], stream.counted_bytes)
                rows.append({"way": name, "bpb": bpb, "seconds": time.monotonic() - started})
        print(json.dumps(rows[-1]), flush=True)

    pairs = compared(ledgers, stream)
    largest = max((abs(pair["bpb"]) for pair in pairs), default=0.0)
    device = torch.device("cuda") if torch.cuda.is_available() else None
    result = {"targets": stream.targets, "ways": rows, "pairs": pairs, "largest_bpb": largest}
    write_results(arguments.results, result | environment.run_environment(device))
    print("largest difference:", largest, "bpb")


if __name__ == "__main__":
    main()
