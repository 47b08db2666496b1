"""Command line of train_gpt.py: train, calibrate and pack in one process, or, with `eval`, score in another.

Both call the stages' own functions, in the same order with the same parameters, so the bytes and
the score are those of the pipeline. One clock runs over training and calibration. The seed is not
in the file: it is the environment variable SEED. Training opens no validation data, and scoring no
training data.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from stages.calibrate.hessians import collect_hessians
from stages.calibrate.params import CalibrateParams
from stages.calibrate.params import Params as CalibrateInput
from stages.common import clock, environment
from stages.common.concurrency import run_in_background
from stages.common.parallel import ParallelParams, World, distributed
from stages.common.stage import Run, Stage, launch
from stages.common.torchrun import relaunch_under_torchrun
from stages.pack.artifact import pack
from stages.pack.entropy import codecs
from stages.pack.file.decode_process import DecodeProcess
from stages.pack.file.stream_encoder import InProcessEncoder
from stages.pack.params import PackParams
from stages.pack.quantise.methods import QUANTISERS
from stages.scoring.evaluate import run_evaluation
from stages.sliding_eval.params import SlidingEvalParams
from stages.train.loop import train
from stages.train.params import ModelParams, TrainParams
from stages.train.params import Params as TrainInput
from stages.ttt_eval.build import build_scorer
from stages.ttt_eval.params import Params as TttInput
from stages.ttt_eval.params import ScorerName, TttEvalParams

DEFAULT_SEED = 42


@dataclass(frozen=True)
class EmbeddedParams:
    """Parameters in train_gpt.py, and the seed."""

    seed: int
    scorer: ScorerName
    parallel: ParallelParams
    model: ModelParams
    train: TrainParams
    calibrate: CalibrateParams
    pack: PackParams
    sliding_eval: SlidingEvalParams
    ttt_eval: TttEvalParams

    def __post_init__(self) -> None:
        # Each stage checks its parameters against each other.
        self.for_train()
        self.for_calibrate()
        self.for_ttt()

    def for_train(self) -> TrainInput:
        """Return the parameters of the stage train."""
        return TrainInput(self.seed, self.parallel, self.model, self.train)

    def for_calibrate(self) -> CalibrateInput:
        """Return the parameters of the stage calibrate."""
        return CalibrateInput(self.seed, self.parallel, self.model, self.calibrate)

    def for_ttt(self) -> TttInput:
        """Return the parameters of the stage ttt_eval."""
        return TttInput(self.parallel, self.sliding_eval, self.ttt_eval)


def eval_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that only `eval` has."""
    parser.add_argument(
        "--scorer",
        choices=get_args(ScorerName),
        help="score with this one (default: the one that the submission claims)",
    )


TRAIN = Stage(
    name="train_gpt",
    summary="Train, calibrate and pack a model; the environment variable SEED is the seed."
    " To score it: `train_gpt.py eval --help`.",
    params=EmbeddedParams,
    reads={"train": Path("data/train")},
    writes=("model.bin", "metrics.json"),
)
EVAL = Stage(
    name="train_gpt",
    summary="Score the validation shards with model.bin.",
    params=EmbeddedParams,
    reads={"model": Path("model.bin"), "val": Path("data/val"), "tokenizer": Path("data/tokenizer.model")},
    writes=("nll.npy", "chunks.tsv", "metrics.json"),
    add_options=eval_options,
)


def main(parameters: dict[str, Any], decoder: DecodeProcess | None) -> None:
    """Run the command line. With `decoder`, a process that waits for model.bin, it is that of `eval`."""
    embedded = parameters | {"seed": _seed()}
    if decoder:
        launch(EVAL, partial(evaluate, decoder), sys.argv[2:], embedded=embedded, output=Path("eval"))
    else:
        launch(TRAIN, train_and_pack, sys.argv[1:], embedded=embedded, output=Path())


def train_and_pack(run: Run[EmbeddedParams]) -> None:
    """Make model.bin from training shards."""
    params = run.params
    shard_folder = run.path("train")
    relaunch_under_torchrun(params.parallel, sys.argv[0], sys.argv[1:])
    with distributed(params.parallel, compiles=True) as world:
        state, hessians = _train_and_calibrate(params, shard_folder, world, run)
        if world.is_main:
            # Compile the coder and the search while the Hessians are factored.
            run_in_background(partial(codecs.compile_ahead, params.pack.codec))
            run_in_background(QUANTISERS[params.pack.quantiser].compile_ahead)

            # On the device, as in the stage pack: the results are those of the same arithmetic.
            state = _to_device(world, state)
            hessians = _to_device(world, hessians)
            packed = pack(state, hessians, params.model, params.pack, InProcessEncoder(), run.logger)
            run.write_bytes("model.bin", packed.blob)
            run.write_json("metrics.json", {"bytes_model": len(packed.blob)})
            run.logger.log(f"train_gpt: model.bin has {len(packed.blob):,} bytes")
        world.barrier()


def evaluate(decoder: DecodeProcess, run: Run[EmbeddedParams]) -> None:
    """Score the validation shards with model.bin, and write the ledger and its bits per byte."""
    params = run.params
    name: str = run.arguments.scorer or params.scorer
    run.require_inputs()
    relaunch_under_torchrun(params.parallel, sys.argv[0], sys.argv[1:])
    build = partial(build_scorer, name, params.sliding_eval, params.ttt_eval)
    evaluation = run_evaluation(run, name, build, decoder)
    run.logger.log(
        f"train_gpt: {name} scores {evaluation.bpb!r} bpb"
        f" over {evaluation.stream.targets:,} targets, {evaluation.counted_bytes:,} bytes"
    )


def _train_and_calibrate(
    params: EmbeddedParams, shard_folder: Path, world: World, run: Run[EmbeddedParams]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the trained weights and the Hessians, both by name, measured by one clock."""
    interval = clock.Interval()
    trained = train(params.for_train(), shard_folder, world, run.logger, interval)
    hessians = collect_hessians(
        trained.state, params.for_calibrate(), shard_folder, world, run.logger, interval
    )
    run.timing |= {
        "training_seconds": interval.seconds,
        "hardware": environment.hardware(world.device),
        "ranks": world.size,
    }
    run.timing |= trained.timing
    run.logger.log(
        f"train_gpt: {len(trained.losses)} steps, {len(hessians)} Hessians and importances"
        f" in {interval.seconds:.1f} s of training"
    )
    return trained.state, hessians


def _to_device(world: World, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the device of this process."""
    return {name: tensor.to(world.device) for name, tensor in tensors.items()}


def _seed() -> int:
    """Return SEED or the default; a value that is not an integer is a user error."""
    text = os.environ.get("SEED", str(DEFAULT_SEED))
    if not text.isascii() or not text.isdigit():
        sys.stderr.write(f"error: train_gpt: SEED is {text!r}, expected an integer of 0 or more\n")
        raise SystemExit(2)
    return int(text)
