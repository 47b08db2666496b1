"""Bytes and loss of one model, packed in many ways.

    python -m benchmarks.pack --preset sprint --train SHARDS --held-out SHARDS --tokenizer FILE \\
        --keep FOLDER --results FILE

One model is trained and calibrated, unless FOLDER has its files already, and every variant packs it. The
first is #1493's way, fixed widths and brotli; its bytes are the budget of all others. They are the same
integers with our coder; clips for each class, finer groups of columns and low-rank corrections on fixed
widths; steps and levels at a rate, on a uniform grid and on trellises; and trellises with one part changed.

A row has bytes, bits a weight, and bits above the bounds of layers.tsv; the mean square of the errors,
their Hessian-weighted size, and the loss that is expected from them; and the loss that is measured on
windows of held-out training text, against the unquantised weights. Programs that are installed (xz, lrzip
with ZPAQ) compress the plain integers too, for comparison.

#1493's way and the variants of ALONE are packed by this process, on its device and all cores; their
seconds are those of the stage. The others share the cores, CORES_EACH for each process.
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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks._command import command_line, write_results
from benchmarks._held_out import HeldOut
from benchmarks._preset import preset_file
from stages.calibrate.hessians import collect_hessians
from stages.calibrate.params import Params as CalibrateInput
from stages.common import bpb, config, environment
from stages.common.clock import Interval
from stages.common.concurrency import run_in_background
from stages.common.parallel import World, distributed
from stages.common.progress import Logger
from stages.pack.artifact import Packed, pack, unpack
from stages.pack.entropy import codecs
from stages.pack.file import container
from stages.pack.file.stream_encoder import InProcessEncoder
from stages.pack.forms import RowsForm
from stages.pack.params import PackParams
from stages.pack.params import Params as PackInput
from stages.pack.quantise.methods import QUANTISERS
from stages.train.loop import train
from stages.train.params import ModelParams
from stages.train.params import Params as TrainInput

PLAIN: dict[str, Any] = {"quantiser": "sdclip", "codec": "brotli", "damping": 0.01}  # as in #1493
# Clips and bits of #1855, the clips times 0.8.
CLASSES = {
    "attention_clip": 0.8 * 13.0,
    "mlp_clip": 0.8 * 11.5,
    "embedding_bits": 7,
    "embedding_clip": 0.8 * 14.0,
}
# The plain clips times 0.78, from where the search for the budget begins.
FINER = {"attention_clip": 10.0, "mlp_clip": 10.0, "embedding_clip": 15.6}
VARIANTS: dict[str, dict[str, Any]] = {
    "at a rate, 8 states": {"states": 8},
    "the same integers, our coder": PLAIN | {"codec": "adaptive"},  # at the plain file's coarseness
    "fixed widths, our coder": PLAIN | FINER | {"codec": "adaptive"},
    "fixed widths, clips and bits of #1855": PLAIN | CLASSES,
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
# Packed first and with all cores: the first is timed, the others take long.
ALONE = ("at a rate, 8 states", "at a rate, 256 states", "256 states, rows alike")
CORES_EACH = 4  # of a process: more would wait for the largest tensor
PROGRAMS = {"xz": ["xz", "-9e", "-k"], "lrzip": ["lrzip", "-z", "-L", "9", "-Q"]}
COLUMNS = (
    *("bytes", "bits_per_weight", "above_bound", "above_bound_by_column"),
    *("mean_squared_error", "relative_error", "expected_loss", "loss", "loss_standard_error", "bpb"),
    *("pack_seconds", "decode_seconds"),
)


class Inputs(NamedTuple):
    """The parameters, as each stage reads them."""

    train: TrainInput
    calibrate: CalibrateInput
    pack: PackInput


class Done(NamedTuple):
    """A packed variant, and the seconds of packing and decoding."""

    packed: Packed
    seconds: float
    decode_seconds: float


def weights_and_hessians(
    inputs: Inputs, shards: Path | None, folder: Path, revisit_weights: set[float], world: World
) -> None:
    """Train and calibrate unless `folder` has the files; Hessians for each weight of later visits."""
    logger = Logger(is_main=world.is_main)
    hessians = {weight: hessian_file(folder, weight) for weight in sorted(revisit_weights)}
    missing = [path for path in (model_file(folder), *hessians.values()) if not path.exists()]
    if not missing:
        return
    if shards is None:
        raise SystemExit(f"{missing[0]} does not exist: name shards to train on with --train")

    if model_file(folder) in missing:
        save_file(train(inputs.train, shards, world, logger, Interval()).state, model_file(folder))
        torch.compiler.reset()
    state = load_file(model_file(folder))
    for weight, path in hessians.items():
        if path in missing:
            section = dataclasses.replace(inputs.calibrate.calibrate, revisit_weight=weight)
            params = dataclasses.replace(inputs.calibrate, calibrate=section)
            save_file(collect_hessians(state, params, shards, world, logger, Interval()), path)


def model_file(folder: Path) -> Path:
    """The weights that train writes, in `folder`."""
    return folder / "model.safetensors"


def hessian_file(folder: Path, revisit_weight: float) -> Path:
    """The Hessians that calibrate writes with a weight of later visits, in `folder`."""
    return folder / f"hessians-{revisit_weight:g}.safetensors"


def packed_file(folder: Path, name: str) -> Path:
    """The model.bin of a variant, in `folder`."""
    return folder / f"{'-'.join(name.replace(',', ' ').replace('#', ' ').split())}.bin"


def run(
    name: str,
    params: PackParams,
    model: ModelParams,
    folder: Path,
    revisit_weight: float,
    device: str = "cpu",
) -> Done:
    """Pack the model of `folder` and write the variant's file there."""
    state = load_file(model_file(folder), device=device)
    hessians = load_file(hessian_file(folder, revisit_weight), device=device)
    started = time.monotonic()
    run_in_background(partial(codecs.compile_ahead, params.codec))
    run_in_background(QUANTISERS[params.quantiser].compile_ahead)
    packed = pack(state, hessians, model, params, InProcessEncoder(), Logger(is_main=False))
    encoded = time.monotonic()
    unpack(packed.blob)
    decoded = time.monotonic()
    packed_file(folder, name).write_bytes(packed.blob)
    return Done(packed, encoded - started, decoded - encoded)


def take_cores(waiting: "multiprocessing.Queue[list[int]]") -> None:
    """Give a new process of the pool cores of its own."""
    cores = waiting.get()
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))


def in_processes(
    variants: dict[str, tuple[PackParams, float]], model: ModelParams, folder: Path
) -> Iterator[tuple[str, Done]]:
    """Pack several variants at once; yields each when it is done. A variant has a weight of later visits."""
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[first : first + CORES_EACH] for first in range(0, len(cores), CORES_EACH)]
    context = multiprocessing.get_context("spawn")
    waiting = context.Queue()
    for share in shares:
        waiting.put(share)

    with ProcessPoolExecutor(len(shares), context, take_cores, (waiting,)) as pool:
        started = {}
        for name, (params, weight) in variants.items():
            started[pool.submit(run, name, params, model, folder, weight)] = name
        for future in as_completed(started):
            yield started[future], future.result()


def figures(done: Done, losses: np.ndarray, base: np.ndarray, bits_a_nat: float) -> dict[str, Any]:
    """One row of the results.

    `losses` and `base` are mean nats a token of each window, (windows,), of the packed and of the
    unquantised weights; `bits_a_nat` turns nats a token into bits a byte.
    """
    rows = [row for row in done.packed.stats if row.expected_loss is not None]
    weights = sum(row.weights for row in rows)
    difference = losses - base

    means = {}
    for key in ("above_bound", "above_bound_by_column", "mean_squared_error", "relative_error"):
        means[key] = float(sum(getattr(row, key) * row.weights for row in rows) / weights)

    return {
        "bytes": len(done.packed.blob),
        "coarseness": done.packed.coarseness,
        "bits_per_weight": 8 * sum(row.bytes for row in rows) / weights,
        **means,
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
            subprocess.run([*command, "raw"], cwd=folder, check=True, capture_output=True)
            made = [path for path in Path(folder).iterdir() if path.name != "raw"]
            found[name] = sum(path.stat().st_size for path in made)
    return found | {"brotli": len(codecs.brotli_compress(raw, 11)), "integers": len(raw)}


def outside(blob: bytes) -> dict[str, int]:
    """Bytes of the quantised integers by other programs, which get one file for all tensors."""
    entries = [entry for entry in container.parse(blob).tensors if isinstance(entry.form, RowsForm)]
    return by_programs(b"".join(container.decode_streams(entry)[0] for entry in entries))


def statistics(state: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Deviation and kurtosis of each trained matrix.

    `rows` and `columns` are the spread of the deviations of its rows and columns, in octaves.
    """
    found = {}
    for name, weight in sorted(state.items()):
        if weight.dim() == 2 and min(weight.shape) > 2:
            exact = weight.double()
            normal = (exact - exact.mean()) / exact.std()
            spread = [float(exact.std(dim).clamp_min(1e-12).log2().std()) for dim in (1, 0)]
            found[name] = {
                "std": float(weight.std()),
                "kurtosis": float(normal.pow(4).mean()),
                "rows": spread[0],
                "columns": spread[1],
            }
    return found


def table(variants: dict[str, dict[str, Any]]) -> str:
    """The results as a table for a Markdown page."""
    lines = [["", *COLUMNS], ["---", *["---:"] * len(COLUMNS)]]
    for name, row in variants.items():
        lines.append([name, *(f"{row[key]:,}" if key == "bytes" else f"{row[key]:.4g}" for key in COLUMNS)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = command_line(__doc__)
    made.add_argument("--preset", required=True)
    made.add_argument("--train", type=Path, help="shards to train on, unless --keep has the model")
    made.add_argument(
        "--held-out", type=Path, required=True, help="training shards that the model is not trained on"
    )
    made.add_argument("--tokenizer", type=Path, help="of the shards; without it, bpb is bits a token")
    made.add_argument("--windows", type=int, default=512, help="of held-out text")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    made.add_argument(
        "--variant", action="append", metavar="NAME", choices=list(VARIANTS), help="pack these only"
    )
    made.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="where files are written, and read if they exist"
    )
    made.add_argument("--results", type=Path, required=True)
    return made


def compare(arguments: argparse.Namespace, inputs: Inputs, folder: Path, world: World) -> None:
    """Pack every variant, score each, and write the results after each."""
    # The variants, and the weights of later visits, which are calibrate's and not pack's.
    chosen = {name: dict(VARIANTS[name]) for name in VARIANTS if name in (arguments.variant or VARIANTS)}
    default = inputs.calibrate.calibrate.revisit_weight
    revisits = {name: changes.pop("revisit_weight", default) for name, changes in chosen.items()}
    weights_and_hessians(inputs, arguments.train, folder, {default, *revisits.values()}, world)

    # The unquantised weights.
    state = load_file(model_file(folder))
    model = inputs.pack.model
    held_out = HeldOut(arguments.held_out, arguments.windows, model, world)
    bytes_a_token = 1.0
    if arguments.tokenizer:
        bytes_a_token = held_out.bytes_a_token(bpb.byte_table(bpb.load_tokenizer(arguments.tokenizer)))
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
        write_results(arguments.results, result | environment.run_environment(world.device))

    # The plain way, whose bytes are the budget of the others.
    device = str(world.device)
    section = inputs.pack.pack
    plain = run("plain", dataclasses.replace(section, **PLAIN), model, folder, default, device)
    record("fixed widths, brotli", plain, PLAIN)
    budget = {"budget_bytes": len(plain.packed.blob) + section.code_reserve_bytes}
    same = "the same integers, our coder"
    if same in chosen:
        for key in ("attention_clip", "mlp_clip", "embedding_clip"):
            chosen[same][key] = plain.packed.coarseness * getattr(section, key)
        chosen[same]["budget_bytes"] = 2 * section.budget_bytes  # so that the coarseness stays 1

    # The others: some alone, then several at once.
    params = {}
    for name, changes in chosen.items():
        params[name] = dataclasses.replace(section, **(budget | changes))
    for name in ALONE:
        if name in params:
            record(name, run(name, params[name], model, folder, revisits[name], device), chosen[name])
    others = {name: (params[name], revisits[name]) for name in params if name not in ALONE}
    for name, done in in_processes(others, model, folder):
        record(name, done, chosen[name])

    result["outside"] = outside(plain.packed.blob)
    write_results(arguments.results, result | environment.run_environment(world.device))
    print(table({name: result["variants"][name] for name in ("fixed widths, brotli", *chosen)}))


def main() -> None:
    """Read the parameters, and compare the variants in one process."""
    arguments = parser().parse_args()
    with preset_file(arguments.preset) as file:
        inputs = Inputs(
            config.load(file, TrainInput, arguments.set),
            config.load(file, CalibrateInput, arguments.set),
            config.load(file, PackInput, arguments.set),
        )
    parallel = dataclasses.replace(inputs.pack.parallel, nproc=1)
    with tempfile.TemporaryDirectory() as made, distributed(parallel, compiles=True) as world:
        folder = arguments.keep or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        compare(arguments, inputs, folder, world)


if __name__ == "__main__":
    main()
