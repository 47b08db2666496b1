"""The whole path on text of your own: the stages as they are, with a preset and changes to it.

    python -m benchmarks.real_text --preset sprint --text FOLDER --tokenizer FOLDER \\
        [--set KEY=VALUE ...] [--output FOLDER] --results FILE

The FOLDER of --text holds train/*.jsonl* and val/*.jsonl*, that of --tokenizer the file
fineweb_8192_bpe.model. Runs the stages as a user would, scores the unquantised weights too if it is
asked to, and gathers metrics and timings in a JSON file. docs/decisions.md has the results so far.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks._command import command_line, write_results
from stages.common import config
from stages.common.bpb import bits_per_byte
from stages.common.parallel import distributed
from stages.scoring.evaluate import score
from stages.scoring.stream import open_stream_for_model
from stages.sliding_eval.scorer import SlidingScorer
from stages.train.model import build_model
from stages.train.params import Params as TrainParams
from stages.ttt_eval.params import Params as EvalParams

STAGES = ("tokenize", "train", "calibrate", "pack", "sliding_eval", "ttt_eval", "bundle", "audit")
FIRST_LOSSES = 6  # losses of the first steps that the results show


def inputs(stage: str, folder: Path, arguments: argparse.Namespace) -> list[Any]:
    """The input options of a stage, with every artifact below `folder`."""
    data = folder / "tokenize"
    train = ["--train", data / "train"]
    weights = ["--model", folder / "train/model.safetensors"]
    scored = ["--model", folder / "pack/model.bin", "--val", data / "val"]
    scored += ["--tokenizer", data / "tokenizer.model"]

    # The audit reads what nearly all others wrote.
    audited = [*scored, *train, "--code", folder / "bundle/train_gpt.py"]
    audited += ["--documents", data / "documents.u64", "--manifest", data / "manifest.json"]
    audited += ["--sliding", folder / "sliding_eval", "--ttt", folder / "ttt_eval"]
    audited += ["--train-timing", folder / "train/timing.json"]
    audited += ["--calibrate-timing", folder / "calibrate/timing.json"]
    return {
        "tokenize": ["--text", arguments.text, "--tokenizer", arguments.tokenizer],
        "train": train,
        "calibrate": [*train, *weights],
        "pack": [*weights, "--hessians", folder / "calibrate/hessians.safetensors"],
        "sliding_eval": scored,
        "ttt_eval": [*scored, "--sliding", folder / "sliding_eval/nll.npy"],
        "bundle": [],
        "audit": audited,
    }[stage]


def run_stage(stage: str, folder: Path, arguments: argparse.Namespace, params: Path) -> dict[str, Any]:
    """Metrics and timing of a stage, which is run unless --stages leaves it out."""
    if stage in arguments.stages:
        command = [sys.executable, "-m", f"stages.{stage}", "--params", params, "--output", folder / stage]
        command += inputs(stage, folder, arguments)
        for change in arguments.set:
            command += ["--set", change]
        # An audit that fails is a result; its metrics stay empty.
        subprocess.run([str(word) for word in command], check=stage != "audit")

    found = {}
    for name in ("metrics", "timing"):
        file = folder / stage / f"{name}.json"
        found[name] = json.loads(file.read_text()) if file.exists() else {}
    return found


def unquantised_bpb(folder: Path, params: Path, changes: list[str]) -> float:
    """The bpb of the weights before packing, by sliding windows."""
    train = config.load(params, TrainParams, changes)
    evaluation = config.load(params, EvalParams, changes)
    stream = open_stream_for_model(
        folder / "tokenize/val",
        folder / "tokenize/tokenizer.model",
        train.model.vocab_size,
        train.model.context,
    )
    with distributed(train.parallel) as world:
        model = build_model(train.model, world)
        model.load_state_dict(load_file(folder / "train/model.safetensors"))
        nll = score(SlidingScorer(model, evaluation.sliding_eval, world), stream)
    return bits_per_byte(nll, stream.counted_bytes)


def main() -> None:
    """Run the stages, write the JSON file, and print a line for each stage."""
    parser = command_line(__doc__)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(".scratch/real_text"))
    parser.add_argument("--results", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--unquantised", action="store_true", help="score the weights before packing too")
    only = "run these only; the others' files in --output are used"
    parser.add_argument("--stages", nargs="+", default=STAGES, help=only)
    arguments = parser.parse_args()

    # The stages, one after the other.
    started = time.monotonic()
    folder = arguments.output
    params = folder / "params.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    lay_preset = [sys.executable, "-m", "tools.preset", arguments.preset, "--output", str(params)]
    subprocess.run(lay_preset, check=True)

    stages = {stage: run_stage(stage, folder, arguments, params) for stage in STAGES}
    seconds = time.monotonic() - started

    # Figures that no stage writes.
    unquantised = unquantised_bpb(folder, params, arguments.set) if arguments.unquantised else None
    counted = [folder / "pack/model.bin", folder / "bundle/train_gpt.py"]
    with (folder / "train/loss.tsv").open() as table:
        losses = [float(row["loss"]) for row in csv.DictReader(table, delimiter="\t")]

    result = {
        "preset": arguments.preset,
        "changes": arguments.set,
        "first_losses": losses[:FIRST_LOSSES],
        "bytes_total": sum(path.stat().st_size for path in counted),
        "unquantised_sliding_bpb": unquantised,
        "seconds_of_all_stages": seconds,
    }

    write_results(arguments.results, result | {"stages": stages})
    print(json.dumps(result))
    for stage in STAGES:
        process_seconds = stages[stage]["timing"].get("process_seconds", 0)
        print(stage, json.dumps(stages[stage]["metrics"]), f"{process_seconds:.1f} s")


if __name__ == "__main__":
    main()
