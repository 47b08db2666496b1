"""What CI cannot run: the stages on CUDA, on one process and on two, eager and compiled, and the bundle.

    python -m benchmarks.gpu_check --text FOLDER --tokenizer FOLDER --results FILE

The record's architecture at a small batch. Everything is a pair that must agree within a stated bound: losses of one and two ranks, of
fused kernels and plain operations, of recorded and eager passes; ledgers of one and two ranks, fused and plain; the bundle's and the
stages' model.bin. Exits 1 if a pair does not. With one GPU the pairs of two ranks are left out, and the result says so.
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

from stages.common import environment

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


class Check:
    """Runs stages below one folder and collects pairs of figures."""

    def __init__(self, folder: Path, params: Path) -> None:
        self.folder, self.params = folder, params
        self.pairs: list[dict[str, Any]] = []

    def run(self, stage: str, output: str, *inputs: Any, changes: tuple[str, ...] = ()) -> Path:
        words = [
            sys.executable,
            "-m",
            f"stages.{stage}",
            "--params",
            self.params,
            "--output",
            self.folder / output,
            *inputs,
        ]
        words += [word for change in (*SMALL, *changes) for word in ("--set", change)]
        subprocess.run([str(word) for word in words], check=True)
        return self.folder / output

    def agree(self, what: str, difference: float, bound: float) -> None:
        self.pairs.append(
            {"what": what, "largest_difference": difference, "bound": bound, "agree": difference <= bound}
        )
        print(
            f"{'ok  ' if difference <= bound else 'FAIL'} {what}: {difference:.3g} (bound {bound:g})",
            flush=True,
        )


def losses(folder: Path) -> np.ndarray:
    with (folder / "loss.tsv").open() as table:
        return np.array([float(row["loss"]) for row in csv.DictReader(table, delimiter="\t")])


def metric(folder: Path, name: str) -> float:
    return float(json.loads((folder / "metrics.json").read_text())[name])


def pipeline(check: Check, arguments: argparse.Namespace, two: bool) -> None:
    """Stages on one rank, and again on two, and with compilation."""
    data = check.run("tokenize", "tokenize", "--text", arguments.text, "--tokenizer", arguments.tokenizer)
    one = check.run("train", "train", "--train", data / "train")
    if two:
        pair = check.run("train", "train2", "--train", data / "train", changes=("parallel.nproc=2",))
        check.agree(
            "losses of 30 steps, two ranks against one, nats",
            float(np.abs(losses(pair) - losses(one)).max()),
            0.05,
        )
    plain = check.run("train", "plain", "--train", data / "train", changes=("parallel.kernels=false",))
    check.agree(
        "losses, fused kernels against plain operations, nats",
        float(np.abs(losses(plain) - losses(one)).max()),
        0.05,
    )
    recorded = check.run("train", "recorded", "--train", data / "train", changes=("parallel.compile=true",))
    check.agree(
        "losses, compiled and recorded against eager, nats",
        float(np.abs(losses(recorded) - losses(one)).max()),
        0.05,
    )
    same = check.run(
        "train", "deterministic", "--train", data / "train", changes=("parallel.deterministic=true",)
    )
    again = check.run(
        "train", "deterministic2", "--train", data / "train", changes=("parallel.deterministic=true",)
    )
    check.agree("losses of two deterministic runs", float(np.abs(losses(same) - losses(again)).max()), 0.0)
    check.agree(
        "losses, deterministic against fast, nats", float(np.abs(losses(same) - losses(one)).max()), 0.05
    )
    hessians = check.run(
        "calibrate", "calibrate", "--train", data / "train", "--model", one / "model.safetensors"
    )
    packed = check.run(
        "pack", "pack", "--model", one / "model.safetensors", "--hessians", hessians / "hessians.safetensors"
    )
    scored = ["--model", packed / "model.bin", "--val", data / "val", "--tokenizer", data / "tokenizer.model"]
    eager = check.run("sliding_eval", "sliding", *scored)
    bpb = metric(eager, "sliding_bpb")
    without = check.run("sliding_eval", "sliding_plain", *scored, changes=("parallel.kernels=false",))
    check.agree(
        "sliding bpb, fused kernels against plain operations", abs(metric(without, "sliding_bpb") - bpb), 5e-4
    )
    float32 = check.run("sliding_eval", "sliding_float32", *scored, changes=("parallel.dtype=float32",))
    check.agree("sliding bpb, float32 against bfloat16", abs(metric(float32, "sliding_bpb") - bpb), 1e-3)
    ttt = check.run("ttt_eval", "ttt", *scored, "--sliding", eager / "nll.npy")
    if two:
        pair = check.run("sliding_eval", "sliding2", *scored, changes=("parallel.nproc=2",))
        check.agree("sliding bpb, two ranks against one", abs(metric(pair, "sliding_bpb") - bpb), 5e-4)
        pair = check.run(
            "ttt_eval", "ttt2", *scored, "--sliding", eager / "nll.npy", changes=("parallel.nproc=2",)
        )
        check.agree(
            "TTT bpb, two ranks against one", abs(metric(pair, "ttt_bpb") - metric(ttt, "ttt_bpb")), 1e-3
        )


def bundle(check: Check) -> None:
    """train_gpt.py alone in an empty folder, in the deterministic mode."""
    made = check.run("bundle", "bundle", changes=("parallel.deterministic=true",))
    room = check.folder / "room"
    shutil.rmtree(room, ignore_errors=True)
    shutil.copytree(check.folder / "tokenize/train", room / "data/train")
    shutil.copytree(check.folder / "tokenize/val", room / "data/val")
    shutil.copy(check.folder / "tokenize/tokenizer.model", room / "data")
    shutil.copy(made / "train_gpt.py", room)
    for words in ([], ["eval"]):
        subprocess.run(
            [sys.executable, "train_gpt.py", *words], cwd=room, check=True, env={**os.environ, "SEED": "42"}
        )
    data = check.folder / "tokenize"
    deterministic = ("parallel.deterministic=true",)
    hessians = check.run(
        "calibrate",
        "calibrate_d",
        "--train",
        data / "train",
        "--model",
        check.folder / "deterministic/model.safetensors",
        changes=deterministic,
    )
    packed = check.run(
        "pack",
        "pack_d",
        "--model",
        check.folder / "deterministic/model.safetensors",
        "--hessians",
        hessians / "hessians.safetensors",
        changes=deterministic,
    )
    same = (packed / "model.bin").read_bytes() == (room / "model.bin").read_bytes()
    check.agree(
        "model.bin of the bundle against the stages', deterministic (0 = same bytes)",
        0.0 if same else 1.0,
        0.0,
    )
    size = (room / "model.bin").stat().st_size + (room / "train_gpt.py").stat().st_size
    check.agree("bytes of both files over the cap", max(0.0, size - 16_000_000), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
        result = {"pairs": check.pairs, "two_ranks": two, "changes_to_sprint": SMALL} | environment.facts(
            torch.device("cuda", 0)
        )
        arguments.results.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    sys.exit(0 if all(pair["agree"] for pair in check.pairs) else 1)


if __name__ == "__main__":
    main()
