"""The verbs of train_gpt.py: train, calibrate and pack in one process under one clock; or, with `eval`, score in a process of its own.

The verbs are the stages' own, called in the same order with the same parameters, so the bytes and the score are the pipeline's. The seed is
not carried: it is the environment variable SEED. Training opens no validation data, scoring no training data.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from stages.calibrate.hessians import collect
from stages.calibrate.params import CalibrateParams
from stages.calibrate.params import Params as CalibrateInput
from stages.common import clock, command, environment
from stages.common.parallel import ParallelParams, World, relaunch_under_torchrun, world
from stages.common.progress import Report
from stages.pack.artifact import pack
from stages.pack.file.decode_process import Decoder
from stages.pack.file.load import Unpacking
from stages.pack.params import PackParams
from stages.scoring.evaluate import TimedScorer, read_stream, score, scorer_of, write_results
from stages.sliding_eval.params import SlidingEvalParams
from stages.sliding_eval.scorer import SlidingScorer
from stages.train.loop import train
from stages.train.model import Model
from stages.train.params import ModelParams, TrainParams
from stages.train.params import Params as TrainInput
from stages.ttt_eval.build import scorer_for
from stages.ttt_eval.params import Params as TttInput
from stages.ttt_eval.params import TttEvalParams

DEFAULT_SEED = 42


@dataclass(frozen=True)
class Claim:
    """The part of the section `submission` that decides what runs."""

    scorer: Literal["sliding_eval", "ttt_eval"]  # what `eval` scores with


@dataclass(frozen=True)
class Params:
    """What train_gpt.py carries, and the seed."""

    seed: int
    parallel: ParallelParams
    model: ModelParams
    train: TrainParams
    calibrate: CalibrateParams
    pack: PackParams
    sliding_eval: SlidingEvalParams
    ttt_eval: TttEvalParams
    submission: Claim

    def __post_init__(self) -> None:
        self.for_train()
        self.for_calibrate()
        self.for_ttt()

    def for_train(self) -> TrainInput:
        """What the train stage would read."""
        return TrainInput(self.seed, self.parallel, self.model, self.train)

    def for_calibrate(self) -> CalibrateInput:
        """What the calibrate stage would read."""
        return CalibrateInput(self.seed, self.parallel, self.model, self.calibrate)

    def for_ttt(self) -> TttInput:
        """What the ttt_eval stage would read."""
        return TttInput(self.parallel, self.sliding_eval, self.ttt_eval)


def eval_options(parser: argparse.ArgumentParser) -> None:
    """The options that only `eval` has."""
    parser.add_argument(
        "--scorer", choices=("sliding_eval", "ttt_eval"), help="instead of the one that the submission claims"
    )


TRAIN = command.Stage(
    name="train_gpt",
    summary="Train, calibrate and pack a model; the seed is SEED. `train_gpt.py eval --help` tells how to score it.",
    params=Params,
    reads={"train": Path("data/train")},
    writes=("model.bin", "metrics.json"),
)
EVAL = command.Stage(
    name="train_gpt",
    summary="Score the validation shards with model.bin.",
    params=Params,
    reads={"model": Path("model.bin"), "val": Path("data/val"), "tokenizer": Path("data/tokenizer.model")},
    writes=("nll.npy", "chunks.tsv", "metrics.json"),
    add_options=eval_options,
)


def main(parameters: dict[str, Any], decoder: Decoder | None) -> None:
    """The command line of train_gpt.py, with the parameters that it carries; a `decoder` is for `eval`."""
    carried = parameters | {"seed": _seed()}
    if decoder:
        command.launch(EVAL, partial(evaluate, decoder), sys.argv[2:], embedded=carried, output=Path("eval"))
    else:
        command.launch(TRAIN, build, sys.argv[1:], embedded=carried, output=Path())


def build(run: command.Run[Params]) -> None:
    """Training shards to model.bin; one clock over everything that reads them."""
    params, shard_folder = run.params, run.path("train")
    relaunch_under_torchrun(params.parallel, sys.argv[0], sys.argv[1:])
    with world(params.parallel, compiles=True) as here:
        state, hessians = _learn(params, shard_folder, here, run)
        if here.is_main:
            packed = pack(_on(here, state), _on(here, hessians), params.model, params.pack, run.report)
            run.write_bytes("model.bin", packed.blob)
            run.write_json("metrics.json", {"bytes_model": len(packed.blob)})
            run.report.log(f"train_gpt: model.bin has {len(packed.blob):,} bytes")
        here.barrier()


def evaluate(decoder: Decoder, run: command.Run[Params]) -> None:
    """model.bin and the validation shards to a ledger and its bits per byte."""
    params = run.params
    name: str = run.arguments.scorer or params.submission.scorer
    files = {option: run.path(option) for option in EVAL.reads}
    relaunch_under_torchrun(params.parallel, sys.argv[0], sys.argv[1:])
    unpacking = Unpacking(files["model"], decoder)
    with world(params.parallel) as here:
        stream = read_stream(
            files["val"], files["tokenizer"], unpacking.params.vocab_size, params.sliding_eval.window
        )

        def make(model: Model, report: Report) -> TimedScorer:
            if name == "sliding_eval":
                return SlidingScorer(model, params.sliding_eval, here, report)
            return scorer_for(
                model, params.sliding_eval, params.ttt_eval, here, stream.table, stream.targets, report
            )

        scorer = scorer_of(unpacking, here, make, run.report)
        pace = clock.Pace(scorer.warm_up_targets)
        nll = score(scorer, stream, pace)
        if here.is_main:
            chunk = getattr(params, name).chunk
            bpb = write_results(run.output, name.removesuffix("_eval"), nll, stream, chunk, run.write_json)
            run.report.log(
                f"train_gpt: {name} scores {bpb!r} bpb over {stream.targets:,} targets, {int(stream.counted_bytes.sum()):,} bytes"
            )
        run.timing |= pace.timing(stream.targets, int(stream.counted_bytes.sum()), here.size) | {
            "hardware": environment.hardware(here.device)
        }


def _learn(
    params: Params, shard_folder: Path, here: World, run: command.Run[Params]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    interval = clock.Interval()
    trained = train(params.for_train(), shard_folder, here, run.report, interval)
    hessians = collect(trained.state, params.for_calibrate(), shard_folder, here, run.report, interval)
    run.timing |= {
        "training_seconds": interval.seconds,
        "hardware": environment.hardware(here.device),
        "ranks": here.size,
    } | trained.measured
    run.report.log(
        f"train_gpt: {len(trained.losses)} steps and {len(hessians)} Hessians in {interval.seconds:.1f} s of training"
    )
    return trained.state, hessians


def _on(here: World, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on this process's device, where the pack stage has them."""
    return {name: tensor.to(here.device) for name, tensor in tensors.items()}


def _seed() -> int:
    """SEED, or the default; exits like any user's error when it is not an integer."""
    text = os.environ.get("SEED", str(DEFAULT_SEED))
    if not text.isascii() or not text.isdigit():
        sys.stderr.write(f"error: train_gpt: SEED is {text!r}, expected an integer of 0 or more\n")
        raise SystemExit(2)
    return int(text)
