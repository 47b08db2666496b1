"""Pairs of GPU runs that must agree, which continuous integration has no machine for.

    python -m benchmarks.gpu_check --text FOLDER --tokenizer FOLDER --results FILE

The stages run on CUDA with the record's architecture at a small batch. Each pair must agree within a
stated bound: losses of one and two ranks, of fused kernels and plain operations, of recorded and eager
passes; ledgers of one and two ranks, fused and plain; model.bin of the bundle and of the stages. Exits 1
if a pair does not agree. With one GPU the pairs of two ranks are left out, and the result says so.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._command import command_line, write_results
from stages.common import challenge, environment

SMALL = [
    "train.budget=steps",
    "train.steps=30",
    "train.batch_tokens=65536",
    "train.micro_batch_tokens=32768",
    "calibrate.tokens=131072",
    "calibrate.importance_tokens=65536",
    "calibrate.micro_batch_tokens=32768",
    "parallel.compile=false",
]
DETERMINISTIC = ("parallel.deterministic=true",)
PLAIN = ("parallel.kernels=false",)
TWO_RANKS = ("parallel.nproc=2",)


class Check:
    """Runs stages below one folder, and collects pairs of figures."""

    def __init__(self, folder: Path, params: Path) -> None:
        self.folder = folder
        self.params = params
        self.pairs: list[dict[str, Any]] = []

    def run(self, stage: str, output: str, *inputs: Any, changes: tuple[str, ...] = ()) -> Path:
        """Run a stage with SMALL and `changes`; returns its output folder."""
        words = [sys.executable, "-m", f"stages.{stage}", "--params", self.params]
        words += ["--output", self.folder / output, *inputs]
        for change in (*SMALL, *changes):
            words += ["--set", change]
        subprocess.run([str(word) for word in words], check=True)
        return self.folder / output

    def agree(self, name: str, difference: float, bound: float) -> None:
        """Record and print a pair's largest difference."""
        agrees = difference <= bound
        self.pairs.append({"what": name, "largest_difference": difference, "bound": bound, "agree": agrees})
        print(f"{'ok  ' if agrees else 'FAIL'} {name}: {difference:.3g} (bound {bound:g})", flush=True)


def losses_apart(one: Path, other: Path) -> float:
    """The largest difference of a step's loss, nats, between two outputs of train."""
    return float(np.abs(_losses(one) - _losses(other)).max())


def _losses(folder: Path) -> np.ndarray:
    with (folder / "loss.tsv").open() as table:
        return np.array([float(row["loss"]) for row in csv.DictReader(table, delimiter="\t")])


def metrics_apart(one: Path, other: Path, name: str) -> float:
    """The difference of a metric between two outputs of a stage."""
    values = [json.loads((folder / "metrics.json").read_text())[name] for folder in (one, other)]
    return abs(float(values[0]) - float(values[1]))


def pipeline(check: Check, arguments: argparse.Namespace, two: bool) -> None:
    """Compare the stages in other modes with one rank, fused and eager; with two ranks if `two`."""
    # Training.
    data = check.run("tokenize", "tokenize", "--text", arguments.text, "--tokenizer", arguments.tokenizer)
    shards = ("--train", data / "train")
    one = check.run("train", "train", *shards)
    if two:
        pair = check.run("train", "train2", *shards, changes=TWO_RANKS)
        check.agree("losses of 30 steps, two ranks against one, nats", losses_apart(pair, one), 0.05)
    plain = check.run("train", "plain", *shards, changes=PLAIN)
    check.agree("losses, fused kernels against plain operations, nats", losses_apart(plain, one), 0.05)
    recorded = check.run("train", "recorded", *shards, changes=("parallel.compile=true",))
    check.agree("losses, compiled and recorded against eager, nats", losses_apart(recorded, one), 0.05)

    # Deterministic training.
    same = check.run("train", "deterministic", *shards, changes=DETERMINISTIC)
    again = check.run("train", "deterministic2", *shards, changes=DETERMINISTIC)
    check.agree("losses of two deterministic runs", losses_apart(same, again), 0.0)
    check.agree("losses, deterministic against fast, nats", losses_apart(same, one), 0.05)

    # Packing.
    weights = one / "model.safetensors"
    hessians = check.run("calibrate", "calibrate", *shards, "--model", weights) / "hessians.safetensors"
    packed = check.run("pack", "pack", "--model", weights, "--hessians", hessians)

    # Evaluation.
    scored = ["--model", packed / "model.bin", "--val", data / "val", "--tokenizer", data / "tokenizer.model"]
    fused = check.run("sliding_eval", "sliding", *scored)
    unfused = check.run("sliding_eval", "sliding_plain", *scored, changes=PLAIN)
    exact = check.run("sliding_eval", "sliding_float32", *scored, changes=("parallel.dtype=float32",))
    # Both compute in bfloat16. The kernels round less often than the plain operations, which write
    # every intermediate result to memory, so the two have bounds of their own.
    difference = metrics_apart(fused, exact, "sliding_bpb")
    check.agree("sliding bpb, fused kernels against plain operations in float32", difference, 5e-4)
    difference = metrics_apart(unfused, exact, "sliding_bpb")
    check.agree("sliding bpb, plain operations in bfloat16 against float32", difference, 2e-3)

    # Evaluation on two ranks.
    scored_before = ("--sliding", fused / "nll.npy")
    ttt = check.run("ttt_eval", "ttt", *scored, *scored_before)
    if two:
        pair = check.run("sliding_eval", "sliding2", *scored, changes=TWO_RANKS)
        difference = metrics_apart(pair, fused, "sliding_bpb")
        check.agree("sliding bpb, two ranks against one", difference, 5e-4)
        pair = check.run("ttt_eval", "ttt2", *scored, *scored_before, changes=TWO_RANKS)
        check.agree("TTT bpb, two ranks against one", metrics_apart(pair, ttt, "ttt_bpb"), 1e-3)


def bundle(check: Check) -> None:
    """Run train_gpt.py alone, deterministically, and compare its model.bin with the stages'."""
    data = check.folder / "tokenize"
    made = check.run("bundle", "bundle", changes=DETERMINISTIC)
    room = check.folder / "room"
    shutil.rmtree(room, ignore_errors=True)
    shutil.copytree(data / "train", room / "data/train")
    shutil.copytree(data / "val", room / "data/val")
    shutil.copy(data / "tokenizer.model", room / "data")
    shutil.copy(made / "train_gpt.py", room)
    for words in ([], ["eval"]):
        command = [sys.executable, "train_gpt.py", *words]
        subprocess.run(command, cwd=room, check=True, env={**os.environ, "SEED": "42"})

    # The same by the stages, from the weights that `pipeline` trained deterministically.
    weights = ("--model", check.folder / "deterministic/model.safetensors")
    calibration = ("--train", data / "train", *weights)
    hessians = check.run("calibrate", "calibrate_d", *calibration, changes=DETERMINISTIC)
    packing = (*weights, "--hessians", hessians / "hessians.safetensors")
    packed = check.run("pack", "pack_d", *packing, changes=DETERMINISTIC)
    same = (packed / "model.bin").read_bytes() == (room / "model.bin").read_bytes()
    name = "model.bin of the bundle against the stages', deterministic (0 = same bytes)"
    check.agree(name, 0.0 if same else 1.0, 0.0)

    size = (room / "model.bin").stat().st_size + (room / "train_gpt.py").stat().st_size
    check.agree("bytes of both files over the cap", max(0.0, size - challenge.MAX_ARTIFACT_BYTES), 0.0)


def main() -> None:
    """Run all pairs; exits 1 if one does not agree."""
    parser = command_line(__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(".scratch/gpu_check"))
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()

    arguments.output.mkdir(parents=True, exist_ok=True)
    params = arguments.output / "params.yaml"
    subprocess.run([sys.executable, "-m", "tools.preset", "sprint", "--output", str(params)], check=True)
    check = Check(arguments.output.resolve(), params)
    two = torch.cuda.device_count() > 1
    try:
        pipeline(check, arguments, two)
        bundle(check)
    finally:
        result = {"pairs": check.pairs, "two_ranks": two, "changes_to_sprint": SMALL}
        write_results(arguments.results, result | environment.run_environment(torch.device("cuda", 0)))
    sys.exit(0 if all(pair["agree"] for pair in check.pairs) else 1)


if __name__ == "__main__":
    main()
