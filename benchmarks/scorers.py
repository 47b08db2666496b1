"""Ways to score one packed model: seconds of each as a process, and their ledgers compared in pairs.

    python -m benchmarks.scorers --params FILE --model FILE --val FOLDER --tokenizer FILE \\
        --ledgers FOLDER --results FILE [--only NAME ...]

Every way is a stage with changed parameters; the names are the keys of WAYS. Each process compiles its
kernels into an empty cache, and its seconds are counted from its start to its end. Ledgers stay in
FOLDER, so that ways may be run in several calls: each call writes the results of all ledgers that exist.
Pairs are compared over documents.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks._command import command_line, write_results
from benchmarks._pairs import compared
from stages.common import environment, ledger
from stages.common.bpb import bits_per_byte
from stages.scoring.stream import ValidationStream, open_validation_stream

TTT = "ttt_eval"
PLAIN = ("ttt_eval.tilt_rate=0.0", "ttt_eval.mixer_rate=0.0")
TILT = ("ttt_eval.tilt_rate=0.05", "ttt_eval.mixer_rate=0.0")
BOTH = ("ttt_eval.tilt_rate=0.05", "ttt_eval.mixer_rate=0.001")
LORA = ("ttt_eval.kind=lora", "ttt_eval.lora.documents=48")
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "windows": ("sliding_eval", ("sliding_eval.stride=WINDOW",)),  # contexts of 0 to WINDOW tokens
    "sliding": ("sliding_eval", ()),
    "sgd": (TTT, PLAIN),
    "sgd + tilt": (TTT, TILT),
    "sgd + tilt + mixture": (TTT, BOTH),
    "tilt": (TTT, (*TILT, "ttt_eval.epochs=0")),
    "tilt + mixture": (TTT, (*BOTH, "ttt_eval.epochs=0")),
    "sgd, confidence": (TTT, (*PLAIN, "ttt_eval.weight_by_surprise=true")),
    "sgd, matrices": (TTT, (*PLAIN, "ttt_eval.trained=matrices")),
    "sgd, vectors": (TTT, (*PLAIN, "ttt_eval.trained=vectors")),
    "lora": (TTT, (*PLAIN, *LORA)),
    "lora, rate 0": (TTT, (*PLAIN, *LORA, "ttt_eval.lora.lr=0")),  # the effect of the contexts alone
    "lora, chunk 32": (TTT, (*PLAIN, *LORA, "ttt_eval.lora.chunk=32")),
    "lora, confidence": (TTT, (*PLAIN, *LORA, "ttt_eval.weight_by_surprise=true")),
    "lora + tilt": (TTT, (*TILT, *LORA)),
    "lora + tilt + mixture": (TTT, (*BOTH, *LORA)),
}


def run(name: str, arguments: argparse.Namespace, window: str, output: Path) -> None:
    """Score in one process, which writes its files to `output`."""
    stage, changes = WAYS[name]
    command = [sys.executable, "-m", f"stages.{stage}", "--output", str(output)]
    for option in ("params", "model", "val", "tokenizer"):
        command += [f"--{option}", str(getattr(arguments, option))]
    if stage == TTT:
        command += ["--sliding", str(arguments.ledgers / "sliding" / "nll.npy")]
    for change in (*changes, *arguments.set):
        command += ["--set", change.replace("WINDOW", window)]

    with tempfile.TemporaryDirectory() as cache:
        caches = {"TRITON_CACHE_DIR": f"{cache}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        subprocess.run(command, check=True, env=os.environ | caches)


def figures(folder: Path, stream: ValidationStream) -> dict[str, Any]:
    """The bpb of one way and its times, from its folder."""
    timing = json.loads((folder / "timing.json").read_text())
    kept = ("process_seconds", "startup_seconds", "targets_per_second", "projected_seconds_8gpu")
    nll = ledger.read(folder / "nll.npy", stream.targets)
    return {"bpb": bits_per_byte(nll, stream.counted_bytes)} | {key: timing[key] for key in kept}


def main() -> None:
    """Print one line for each way as it ends, and write the JSON file."""
    parser = command_line(__doc__)
    for option in ("params", "model", "val", "tokenizer", "ledgers", "results"):
        parser.add_argument(f"--{option}", type=Path, required=True)
    parser.add_argument(
        "--only", nargs="*", choices=WAYS, default=list(WAYS), help="no name: compare the ledgers that exist"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()

    stream = open_validation_stream(arguments.val, arguments.tokenizer)
    window = str(yaml.safe_load(arguments.params.read_text())["sliding_eval"]["window"])
    for name in arguments.only:
        run(name, arguments, window, arguments.ledgers / name)
        print(name, json.dumps(figures(arguments.ledgers / name, stream)), flush=True)

    # Compare all ledgers that exist, of this call and of earlier ones.
    there = [name for name in WAYS if (arguments.ledgers / name / "timing.json").exists()]
    ways = {name: figures(arguments.ledgers / name, stream) for name in there}
    ledgers = {name: ledger.read(arguments.ledgers / name / "nll.npy", stream.targets) for name in there}
    device = torch.device("cuda") if torch.cuda.is_available() else None
    result = {"changes": arguments.set, "ways": ways, "pairs": compared(ledgers, stream)}
    write_results(arguments.results, result | environment.run_environment(device))


if __name__ == "__main__":
    main()
