"""The record's architecture, trained for a few hundred steps on one GPU, through the stages as they are.

    python -m benchmarks.record_short --text FOLDER --tokenizer FOLDER [--steps 300] [--output FOLDER]

FOLDER of --text holds train/*.jsonl* and val/*.jsonl*, that of --tokenizer fineweb_8192_bpe.model. Runs tokenize, train, calibrate, pack,
sliding_eval, ttt_eval and bundle as a user would, with the `sprint` preset under a budget of steps, and gathers their metrics and
timings in benchmarks/results/record_short.json. The question is whether the whole path holds on a GPU: first losses, quality after
packing, bytes of both files. It is no measurement of speed.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

STAGES = ("tokenize", "train", "calibrate", "pack", "sliding_eval", "ttt_eval", "bundle")
RESULTS = Path("benchmarks/results/record_short.json")
FIRST_LOSSES = 6


def run_stage(stage: str, folder: Path, arguments: argparse.Namespace, params: Path) -> dict[str, Any]:
    inputs = {
        "tokenize": ["--text", arguments.text, "--tokenizer", arguments.tokenizer],
        "train": ["--train", folder / "tokenize/train"],
        "calibrate": ["--train", folder / "tokenize/train", "--model", folder / "train/model.safetensors"],
        "pack": ["--model", folder / "train/model.safetensors", "--hessians", folder / "calibrate/hessians.safetensors"],
        "sliding_eval": ["--model", folder / "pack/model.bin", "--val", folder / "tokenize/val"],
        "ttt_eval": ["--model", folder / "pack/model.bin", "--val", folder / "tokenize/val", "--sliding", folder / "sliding_eval/nll.npy"],
        "bundle": [],
    }[stage]
    if stage.endswith("_eval"):
        inputs += ["--tokenizer", folder / "tokenize/tokenizer.model"]
    command = [sys.executable, "-m", f"stages.{stage}", "--params", params, "--output", folder / stage, *inputs, *arguments.override]
    if stage in arguments.stages:
        subprocess.run([str(word) for word in command], check=True)
    metrics = folder / stage / "metrics.json"
    return {
        "metrics": json.loads(metrics.read_text()) if metrics.exists() else {},
        "timing": json.loads((folder / stage / "timing.json").read_text()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path(".scratch/record_short"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--stages", nargs="+", default=STAGES, help="run these only; what the others left in --output is used")
    arguments = parser.parse_args()
    changes = ["train.budget=steps", f"train.steps={arguments.steps}", *arguments.set]
    arguments.override = [word for change in changes for word in ("--set", change)]
    arguments.output.mkdir(parents=True, exist_ok=True)
    params = arguments.output / "params.yaml"
    subprocess.run([sys.executable, "-m", "stages.preset", "sprint", "--output", str(params)], check=True)
    stages = {stage: run_stage(stage, arguments.output, arguments, params) for stage in STAGES}
    with (arguments.output / "train/loss.tsv").open() as table:
        first = [float(row["loss"]) for row in list(csv.DictReader(table, delimiter="\t"))[:FIRST_LOSSES]]
    counted = [arguments.output / "pack/model.bin", arguments.output / "bundle/train_gpt.py"]
    result = {
        "changes_to_sprint": changes,
        "first_losses": first,
        "bytes_total": sum(path.stat().st_size for path in counted),
        "stages": stages,
    }
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    print(json.dumps({key: result[key] for key in ("first_losses", "bytes_total")}))
    for stage in STAGES:
        print(stage, json.dumps(stages[stage]["metrics"]), f"{stages[stage]['timing']['process_seconds']:.1f} s")


if __name__ == "__main__":
    main()
