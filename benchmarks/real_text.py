"""The whole path on text of your own, through the stages as they are, with a preset and changes to it.

    python -m benchmarks.real_text --preset sprint --text FOLDER --tokenizer FOLDER [--set KEY=VALUE ...] [--output FOLDER]

FOLDER of --text holds train/*.jsonl* and val/*.jsonl*, that of --tokenizer fineweb_8192_bpe.model. Runs the stages as a user would, scores
the unquantised weights too, and gathers metrics and timings in a JSON file. docs/decisions.md says what was run with it and what came out.
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

from stages.common import config
from stages.common.bpb import bits_per_byte
from stages.common.parallel import world
from stages.scoring.evaluate import read_stream, score
from stages.sliding_eval.scorer import SlidingScorer
from stages.train.model import model_for
from stages.train.params import Params as TrainParams
from stages.ttt_eval.params import Params as EvalParams

STAGES = ("tokenize", "train", "calibrate", "pack", "sliding_eval", "ttt_eval", "bundle", "audit")
FIRST_LOSSES = 6


def inputs(stage: str, folder: Path, arguments: argparse.Namespace) -> list[Any]:
    """The stage's input options, with every artifact below `folder`."""
    scored = [
        "--model",
        folder / "pack/model.bin",
        "--val",
        folder / "tokenize/val",
        "--tokenizer",
        folder / "tokenize/tokenizer.model",
    ]
    timings = [
        "--train-timing",
        folder / "train/timing.json",
        "--calibrate-timing",
        folder / "calibrate/timing.json",
    ]
    documents = [
        "--documents",
        folder / "tokenize/documents.u64",
        "--manifest",
        folder / "tokenize/manifest.json",
    ]
    ledgers = ["--sliding", folder / "sliding_eval", "--ttt", folder / "ttt_eval"]
    return {
        "tokenize": ["--text", arguments.text, "--tokenizer", arguments.tokenizer],
        "train": ["--train", folder / "tokenize/train"],
        "calibrate": ["--train", folder / "tokenize/train", "--model", folder / "train/model.safetensors"],
        "pack": [
            "--model",
            folder / "train/model.safetensors",
            "--hessians",
            folder / "calibrate/hessians.safetensors",
        ],
        "sliding_eval": scored,
        "ttt_eval": [*scored, "--sliding", folder / "sliding_eval/nll.npy"],
        "bundle": [],
        "audit": [
            *scored,
            "--code",
            folder / "bundle/train_gpt.py",
            "--train",
            folder / "tokenize/train",
            *documents,
            *ledgers,
            *timings,
        ],
    }[stage]


def run_stage(stage: str, folder: Path, arguments: argparse.Namespace, params: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", f"stages.{stage}", "--params", params, "--output", folder / stage]
    if stage in arguments.stages:
        changes = [word for change in arguments.set for word in ("--set", change)]
        words = [str(word) for word in [*command, *inputs(stage, folder, arguments), *changes]]
        subprocess.run(
            words, check=stage != "audit"
        )  # an audit that convicts is a result, and its metrics stay empty
    found = {}
    for name in ("metrics", "timing"):
        file = folder / stage / f"{name}.json"
        found[name] = json.loads(file.read_text()) if file.exists() else {}
    return found


def unquantised_bpb(folder: Path, params: Path, changes: list[str]) -> float:
    """The sliding bpb of the weights before packing."""
    train, evaluation = (config.load(params, schema, changes) for schema in (TrainParams, EvalParams))
    assert isinstance(train, TrainParams)
    assert isinstance(evaluation, EvalParams)
    stream = read_stream(
        folder / "tokenize/val",
        folder / "tokenize/tokenizer.model",
        train.model.vocab_size,
        train.model.context,
    )
    with world(train.parallel) as here:
        model = model_for(train.model, here)
        model.load_state_dict(load_file(folder / "train/model.safetensors"))
        nll = score(SlidingScorer(model, evaluation.sliding_eval, here), stream)
    return bits_per_byte(nll, stream.counted_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(".scratch/real_text"))
    parser.add_argument("--results", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--unquantised", action="store_true", help="score the weights before packing too")
    parser.add_argument(
        "--stages", nargs="+", default=STAGES, help="run these only; what the others left in --output is used"
    )
    arguments = parser.parse_args()
    started = time.monotonic()
    arguments.output.mkdir(parents=True, exist_ok=True)
    params = arguments.output / "params.yaml"
    subprocess.run(
        [sys.executable, "-m", "tools.preset", arguments.preset, "--output", str(params)], check=True
    )
    stages = {stage: run_stage(stage, arguments.output, arguments, params) for stage in STAGES}
    seconds = time.monotonic() - started
    with (arguments.output / "train/loss.tsv").open() as table:
        first = [float(row["loss"]) for row in list(csv.DictReader(table, delimiter="\t"))[:FIRST_LOSSES]]
    counted = [arguments.output / "pack/model.bin", arguments.output / "bundle/train_gpt.py"]
    result = {
        "preset": arguments.preset,
        "changes": arguments.set,
        "first_losses": first,
        "bytes_total": sum(path.stat().st_size for path in counted),
        "unquantised_sliding_bpb": unquantised_bpb(arguments.output, params, arguments.set)
        if arguments.unquantised
        else None,
        "seconds_of_all_stages": seconds,
        "stages": stages,
    }
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "stages"}))
    for stage in STAGES:
        print(
            stage,
            json.dumps(stages[stage]["metrics"]),
            f"{stages[stage]['timing'].get('process_seconds', 0):.1f} s",
        )


if __name__ == "__main__":
    main()
