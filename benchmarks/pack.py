"""What each way to pack one and the same model costs in bytes and in loss.

    python -m benchmarks.pack --preset sprint --train SHARDS --held-out SHARDS --tokenizer FILE --keep FOLDER --results FILE

One model is trained and calibrated, unless FOLDER has its files already, and every variant packs it. First #1493's way: fixed widths and
brotli; its bytes become the budget of all others. Then the same integers with our coder; clips for each class, finer groups of columns and
low-rank corrections on fixed widths; steps and levels at a rate, on a uniform grid and on trellises; and what each of its parts is worth.
Each row says bytes, bits a weight, and bits above the bounds of layers.tsv; the mean square of the errors, their Hessian-weighted size, and
the loss expected from them; and the loss measured on windows of held-out training text with the decoded weights, against the unquantised
ones. Programs that are installed (xz, lrzip with ZPAQ) are run over the plain integers too, for scale.

#1493's way, 8 states and 256 are packed by this process alone, on its device and all cores: their seconds are what pack takes. The others
share the cores, some for each process.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks._held_out import HeldOut
from benchmarks._preset import preset_file
from stages.calibrate.hessians import collect
from stages.calibrate.params import Params as CalibrateInput
from stages.common import bpb, config, environment
from stages.common.clock import Interval
from stages.common.parallel import World, world
from stages.common.progress import Report
from stages.pack.artifact import Packed, pack, unpack
from stages.pack.entropy import codecs
from stages.pack.file import container
from stages.pack.params import PackParams
from stages.pack.params import Params as PackInput
from stages.train.loop import train
from stages.train.params import ModelParams
from stages.train.params import Params as TrainInput

PLAIN: dict[str, Any] = {"quantiser": "sdclip", "codec": "brotli", "damping": 0.01}  # all as in #1493
CLASSES: dict[str, Any] = {
    "attention_clip": 13.0,
    "mlp_clip": 11.5,
    "embedding_bits": 7,
    "embedding_clip": 14.0,
}  # #1855
FINER = {
    "attention_clip": 10.0,
    "mlp_clip": 10.0,
    "embedding_clip": 15.6,
}  # the plain clips at a scale of 0.78, to have somewhere to begin
VARIANTS: dict[str, dict[str, Any]] = {
    "at a rate, 8 states": {"states": 8},
    "the same integers, our coder": PLAIN | {"codec": "adaptive"},  # at the plain file's scale
    "fixed widths, our coder": PLAIN | FINER | {"codec": "adaptive"},
    "fixed widths, clips and bits of #1855": PLAIN
    | {key: 0.8 * value if "clip" in key else value for key, value in CLASSES.items()},
    "fixed widths, attention 13, MLP 11.5": PLAIN | {"attention_clip": 13.0, "mlp_clip": 11.5},
    "fixed widths, one finer group": PLAIN | {"awq_groups": 1},
    "fixed widths, 16 finer groups": PLAIN | {"awq_groups": 16},
    "fixed widths, 3 low-rank corrections": PLAIN | {"lqer_rank": 4, "lqer_tensors": 3},
    "fixed widths, all corrected": PLAIN | {"lqer_rank": 4, "lqer_tensors": 1000},
    "at a rate, uniform grid": {"states": 1},
    "at a rate, 4 states": {"states": 4},
    "at a rate, 32 states": {"states": 32},
    "at a rate, 64 states": {"states": 64},
    "at a rate, 256 states": {"states": 256},
    "8 states, rows alike": {"row_weight": 0.0},
    "256 states, rows alike": {"states": 256, "row_weight": 0.0},
    "8 states, rows by their full importance": {"row_weight": 1.0},
    "8 states, by error and bits": {"rate_weight": 0.1},
    "8 states, damping 0.01": {"damping": 0.01},
    "8 states, 3 low-rank corrections": {"lqer_rank": 4, "lqer_tensors": 3},
    "8 states, all corrected": {"lqer_rank": 2, "lqer_tensors": 1000},
    "8 states, later visits half": {"revisit_weight": 0.5},
    "8 states, first visits only": {"revisit_weight": 0.0},
}
ALONE = (
    "at a rate, 8 states",
    "at a rate, 256 states",
    "256 states, rows alike",
)  # first, with all cores: one is timed, the others are long
CORES_EACH = 4  # of a process: more would wait for the largest tensor
PROGRAMS = {"xz": ["xz", "-9e", "-k"], "lrzip": ["lrzip", "-z", "-L", "9", "-Q"]}
COLUMNS = ("bytes", "bits_per_weight", "above_bound", "above_bound_by_column", "mean_squared_error", "relative_error", "expected_loss",
           "loss", "loss_standard_error", "bpb", "pack_seconds", "decode_seconds")  # fmt: skip


class Inputs(NamedTuple):
    """The parameters, as each stage reads them."""

    train: TrainInput
    calibrate: CalibrateInput
    pack: PackInput


class Done(NamedTuple):
    """A variant that was packed, and how long that took."""

    packed: Packed
    seconds: float
    decode_seconds: float


def weights_and_hessians(
    inputs: Inputs, shards: Path | None, folder: Path, revisit_weights: set[float], here: World
) -> None:
    """Train and calibrate into `folder` what it does not have yet; Hessians once for each weight of later visits."""
    report = Report(is_main=here.is_main)
    missing = [
        path
        for path in (model_file(folder), *(hessian_file(folder, weight) for weight in revisit_weights))
        if not path.exists()
    ]
    if missing and shards is None:
        raise SystemExit(f"{missing[0]} does not exist: name shards to train on with --train")
    if shards is not None and not model_file(folder).exists():
        save_file(train(inputs.train, shards, here, report, Interval()).state, model_file(folder))
        torch.compiler.reset()
    state = load_file(model_file(folder))
    for weight in sorted(revisit_weights):
        if shards is not None and not hessian_file(folder, weight).exists():
            section = dataclasses.replace(inputs.calibrate.calibrate, revisit_weight=weight)
            params = dataclasses.replace(inputs.calibrate, calibrate=section)
            save_file(collect(state, params, shards, here, report, Interval()), hessian_file(folder, weight))


def model_file(folder: Path) -> Path:
    """train's file in the folder."""
    return folder / "model.safetensors"


def hessian_file(folder: Path, revisit_weight: float) -> Path:
    """calibrate's file in the folder, for a weight of later visits."""
    return folder / f"hessians-{revisit_weight:g}.safetensors"


def packed_file(folder: Path, name: str) -> Path:
    """A variant's model.bin."""
    return folder / f"{'-'.join(name.replace(',', ' ').replace('#', ' ').split())}.bin"


def run(
    name: str,
    params: PackParams,
    model: ModelParams,
    folder: Path,
    revisit_weight: float,
    device: str = "cpu",
) -> Done:
    """Pack the folder's model and leave the file there."""
    state, hessians = (
        load_file(path, device=device) for path in (model_file(folder), hessian_file(folder, revisit_weight))
    )
    started = time.monotonic()
    packed = pack(state, hessians, model, params, Report(is_main=False))
    seconds, started = time.monotonic() - started, time.monotonic()
    unpack(packed.blob)
    decode_seconds = time.monotonic() - started
    packed_file(folder, name).write_bytes(packed.blob)
    return Done(packed, seconds, decode_seconds)


def take_cores(waiting: "multiprocessing.Queue[list[int]]") -> None:
    """Begin a process of the pool: it keeps to cores of its own."""
    cores = waiting.get()
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))


def in_processes(
    variants: dict[str, tuple[PackParams, float]], model: ModelParams, folder: Path
) -> Iterator[tuple[str, Done]]:
    """Every variant as it is done, some at once."""
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[first : first + CORES_EACH] for first in range(0, len(cores), CORES_EACH)]
    context = multiprocessing.get_context("spawn")
    waiting = context.Queue()
    for share in shares:
        waiting.put(share)
    with ProcessPoolExecutor(len(shares), context, take_cores, (waiting,)) as pool:
        started = {
            pool.submit(run, name, of, model, folder, weight): name for name, (of, weight) in variants.items()
        }
        for future in as_completed(started):
            yield started[future], future.result()


def figures(done: Done, losses: np.ndarray, base: np.ndarray, bits_a_nat: float) -> dict[str, Any]:
    """One row of the table; `bits_a_nat` turns nats a token into bits a byte."""
    rows = [row for row in done.packed.rows if row.expected_loss is not None]
    weights = sum(row.weights for row in rows)
    difference = losses - base

    def mean(key: str) -> float:
        return float(sum(getattr(row, key) * row.weights for row in rows) / weights)

    return {
        "bytes": len(done.packed.blob),
        "scale": done.packed.scale,
        "bits_per_weight": 8 * sum(row.bytes for row in rows) / weights,
        **{
            key: mean(key)
            for key in ("above_bound", "above_bound_by_column", "mean_squared_error", "relative_error")
        },
        "expected_loss": sum(row.expected_loss or 0.0 for row in rows),
        "loss": float(difference.mean()),
        "loss_standard_error": float(difference.std(ddof=1) / len(difference) ** 0.5),
        "bpb": float(losses.mean()) * bits_a_nat,
        "pack_seconds": done.seconds,
        "decode_seconds": done.decode_seconds,
    }


def by_programs(raw: bytes) -> dict[str, int]:
    """Bytes by each of the programs that are installed, and by brotli."""
    found = {}
    for name, command in PROGRAMS.items():
        if shutil.which(command[0]) is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "raw").write_bytes(raw)
            subprocess.run(
                [*command, "raw"],
                cwd=folder,
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            found[name] = sum(path.stat().st_size for path in Path(folder).iterdir() if path.name != "raw")
    return found | {"brotli": len(codecs.deflate(raw, 11)), "integers": len(raw)}


def outside(blob: bytes) -> dict[str, int]:
    """Bytes of the quantised integers by programs that are installed, one file for all tensors."""
    entries = [entry for entry in container.read(blob).entries if entry.form.kind == "rows"]
    return by_programs(b"".join(container.decode_streams(entry)[0] for entry in entries))


def statistics(state: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Of the trained weights, by matrix: deviation, kurtosis, and how far the deviations of rows and columns lie apart (in octaves)."""
    found = {}
    for name, weight in sorted(state.items()):
        if weight.dim() == 2 and min(weight.shape) > 2:
            normal = (weight.double() - weight.double().mean()) / weight.double().std()
            spread = [float(weight.double().std(dim).clamp_min(1e-12).log2().std()) for dim in (1, 0)]
            found[name] = {
                "std": float(weight.std()),
                "kurtosis": float(normal.pow(4).mean()),
                "rows": spread[0],
                "columns": spread[1],
            }
    return found


def table(variants: dict[str, dict[str, Any]]) -> str:
    """The rows for a document."""
    lines = [["", *COLUMNS], ["---", *["---:"] * len(COLUMNS)]]
    for name, row in variants.items():
        lines.append([name, *(f"{row[key]:,}" if key == "bytes" else f"{row[key]:.4g}" for key in COLUMNS)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--preset", required=True)
    made.add_argument(
        "--train",
        type=Path,
        help="shards to train and calibrate on, unless --keep has the model and its Hessians",
    )
    made.add_argument(
        "--held-out",
        type=Path,
        required=True,
        help="shards of training text that the model was not trained on",
    )
    made.add_argument(
        "--tokenizer",
        type=Path,
        help="SentencePiece model of the shards, for bits a byte (else they are bits a token)",
    )
    made.add_argument("--windows", type=int, default=512)
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    made.add_argument(
        "--variant",
        action="append",
        metavar="NAME",
        choices=list(VARIANTS),
        help="these only, and the plain way",
    )
    made.add_argument(
        "--keep",
        type=Path,
        metavar="FOLDER",
        help="model, Hessians and packed files stay there, and are used again",
    )
    made.add_argument("--results", type=Path, required=True)
    return made


def compare(arguments: argparse.Namespace, inputs: Inputs, folder: Path, here: World) -> None:
    """Pack every variant, score each, and write the results as they come."""
    chosen = {name: dict(VARIANTS[name]) for name in VARIANTS if name in (arguments.variant or VARIANTS)}
    usual = inputs.calibrate.calibrate.revisit_weight
    revisits = {name: changes.pop("revisit_weight", usual) for name, changes in chosen.items()}
    weights_and_hessians(inputs, arguments.train, folder, {usual, *revisits.values()}, here)
    state = load_file(model_file(folder))
    model, device = inputs.pack.model, str(here.device)
    held_out = HeldOut(arguments.held_out, arguments.windows, model, here)
    bytes_a_token = (
        held_out.bytes_a_token(bpb.byte_table(bpb.load_tokenizer(arguments.tokenizer)))
        if arguments.tokenizer
        else 1.0
    )
    bits_a_nat = 1 / np.log(2) / bytes_a_token
    base = held_out.losses(state)
    result: dict[str, Any] = {
        "unquantised_nats": float(base.mean()),
        "unquantised_bpb": float(base.mean()) * bits_a_nat,
        "bytes_a_token": bytes_a_token,
        "variants": {},
        "changes": arguments.set,
        "preset": arguments.preset,
        "weights": statistics(state),
    }

    def record(name: str, done: Done, changes: dict[str, Any]) -> None:
        losses = held_out.losses(unpack(done.packed.blob)[1])
        result["variants"][name] = figures(done, losses, base, bits_a_nat) | {"changes": changes}
        print(name, json.dumps(result["variants"][name]), flush=True)
        arguments.results.write_text(
            json.dumps(result | environment.facts(here.device), indent=2, sort_keys=True) + "\n"
        )

    plain = run("plain", dataclasses.replace(inputs.pack.pack, **PLAIN), model, folder, usual, device)
    record("fixed widths, brotli", plain, PLAIN)
    budget = {"budget_bytes": len(plain.packed.blob) + inputs.pack.pack.code_reserve_bytes}
    if "the same integers, our coder" in chosen:
        clips = ("attention_clip", "mlp_clip", "embedding_clip")
        same = {key: plain.packed.scale * getattr(inputs.pack.pack, key) for key in clips}
        chosen["the same integers, our coder"] |= same | {
            "budget_bytes": 2 * inputs.pack.pack.budget_bytes
        }  # so that the scale stays 1
    params = {
        name: dataclasses.replace(inputs.pack.pack, **(budget | changes)) for name, changes in chosen.items()
    }
    for name in (name for name in ALONE if name in params):
        record(name, run(name, params[name], model, folder, revisits[name], device), chosen[name])
    others = {name: (of, revisits[name]) for name, of in params.items() if name not in ALONE}
    for name, done in in_processes(others, model, folder):
        record(name, done, chosen[name])
    result["outside"] = outside(plain.packed.blob)
    arguments.results.write_text(
        json.dumps(result | environment.facts(here.device), indent=2, sort_keys=True) + "\n"
    )
    print(table({name: result["variants"][name] for name in ("fixed widths, brotli", *chosen)}))


def main() -> None:
    arguments = parser().parse_args()
    with preset_file(arguments.preset) as file:
        changes = arguments.set
        inputs = Inputs(
            config.load(file, TrainInput, changes),
            config.load(file, CalibrateInput, changes),
            config.load(file, PackInput, changes),
        )
    with (
        tempfile.TemporaryDirectory() as made,
        world(dataclasses.replace(inputs.pack.parallel, nproc=1), compiles=True) as here,
    ):
        folder = arguments.keep or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        compare(arguments, inputs, folder, here)


if __name__ == "__main__":
    main()
