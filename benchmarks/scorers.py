"""Ways to score one packed model: what each takes as a process, and how their ledgers differ, paired over documents.

    python -m benchmarks.scorers --params FILE --model FILE --val FOLDER --tokenizer FILE --ledgers FOLDER --results FILE [--only NAME ...]

Every way is a stage started with changed parameters. Kernels are compiled anew in each process, into an empty cache: seconds are from the
process's start to its end. Ledgers stay in FOLDER, so that ways may be run in several calls; each call writes the results of all that are
there. The names are the keys of WAYS.
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

from benchmarks._pairs import compared
from stages.common import environment, ledger
from stages.common.bpb import bits_per_byte
from stages.scoring.evaluate import Stream, open_stream

TTT = "ttt_eval"
PLAIN = ("ttt_eval.tilt_rate=0.0", "ttt_eval.mixer_rate=0.0")
TILT = ("ttt_eval.tilt_rate=0.05", "ttt_eval.mixer_rate=0.0")
BOTH = ("ttt_eval.tilt_rate=0.05", "ttt_eval.mixer_rate=0.001")
LORA = ("ttt_eval.kind=lora", "ttt_eval.lora.documents=48")
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "windows": (
        "sliding_eval",
        ("sliding_eval.stride=WINDOW",),
    ),  # every target once, its context from none to a whole window
    "sliding": ("sliding_eval", ()),
    "sgd": (TTT, PLAIN),
    "sgd + tilt": (TTT, TILT),
    "sgd + tilt + mixture": (TTT, BOTH),
    "tilt": (TTT, (*TILT, "ttt_eval.epochs=0")),
    "tilt + mixture": (TTT, (*BOTH, "ttt_eval.epochs=0")),
    "sgd, confidence": (TTT, (*PLAIN, "ttt_eval.confidence=true")),
    "sgd, matrices": (TTT, (*PLAIN, "ttt_eval.trained=matrices")),
    "sgd, vectors": (TTT, (*PLAIN, "ttt_eval.trained=vectors")),
    "lora": (TTT, (*PLAIN, *LORA)),
    "lora, rate 0": (TTT, (*PLAIN, *LORA, "ttt_eval.lora.lr=0")),  # what the chunks' contexts alone do
    "lora, chunk 32": (TTT, (*PLAIN, *LORA, "ttt_eval.lora.chunk=32")),
    "lora, confidence": (TTT, (*PLAIN, *LORA, "ttt_eval.confidence=true")),
    "lora + tilt": (TTT, (*TILT, *LORA)),
    "lora + tilt + mixture": (TTT, (*BOTH, *LORA)),
}


def run(name: str, arguments: argparse.Namespace, window: str, output: Path) -> None:
    """Score in one process, whose outputs stay in `output`."""
    stage, changes = WAYS[name]
    files = {
        "--params": arguments.params,
        "--model": arguments.model,
        "--val": arguments.val,
        "--tokenizer": arguments.tokenizer,
    }
    command = [sys.executable, "-m", f"stages.{stage}", "--output", str(output)]
    command += [str(word) for pair in files.items() for word in pair]
    if stage == TTT:
        command += ["--sliding", str(arguments.ledgers / "sliding" / "nll.npy")]
    for change in (*changes, *arguments.set):
        command += ["--set", change.replace("WINDOW", window)]
    with tempfile.TemporaryDirectory() as cache:
        caches = {"TRITON_CACHE_DIR": f"{cache}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        subprocess.run(command, check=True, env=os.environ | caches)


def figures(folder: Path, stream: Stream) -> dict[str, Any]:
    """What one way gave, from its folder."""
    timing = json.loads((folder / "timing.json").read_text())
    kept = ("process_seconds", "startup_seconds", "targets_per_second", "projected_seconds_8gpu")
    nll = ledger.read(folder / "nll.npy", stream.targets)
    return {"bpb": bits_per_byte(nll, stream.counted_bytes)} | {key: timing[key] for key in kept}


def main() -> None:
    """One line for each way as it ends, and the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option in ("params", "model", "val", "tokenizer", "ledgers", "results"):
        parser.add_argument(f"--{option}", type=Path, required=True)
    parser.add_argument(
        "--only", nargs="*", choices=WAYS, default=list(WAYS), help="nothing: compare what is there"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    stream = open_stream(arguments.val, arguments.tokenizer)
    window = _value(arguments.params, "sliding_eval", "window")
    for name in arguments.only:
        run(name, arguments, window, arguments.ledgers / name)
        print(name, json.dumps(figures(arguments.ledgers / name, stream)), flush=True)
    there = [name for name in WAYS if (arguments.ledgers / name / "timing.json").exists()]
    ways = {name: figures(arguments.ledgers / name, stream) for name in there}
    ledgers = {name: ledger.read(arguments.ledgers / name / "nll.npy", stream.targets) for name in there}
    device = torch.device("cuda") if torch.cuda.is_available() else None
    result = {"changes": arguments.set, "ways": ways, "pairs": compared(ledgers, stream)} | environment.facts(
        device
    )
    arguments.results.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")


def _value(params: Path, section: str, key: str) -> str:
    return str(yaml.safe_load(params.read_text())[section][key])


if __name__ == "__main__":
    main()
