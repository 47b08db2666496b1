"""The stage train: shards to the averaged weights of a model, within a budget of steps or seconds."""

import argparse
import sys
from pathlib import Path

from safetensors.torch import save_file

from stages.common.clock import Interval
from stages.common.environment import gpu_driver_version, hardware
from stages.common.parallel import distributed
from stages.common.stage import Run, Stage
from stages.common.torchrun import relaunch_under_torchrun
from stages.train.loop import TrainResult, train
from stages.train.params import Params
from stages.train.schedule import read_replay


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that only this stage has."""
    parser.add_argument(
        "--replay",
        type=Path,
        metavar="FILE",
        help="repeat the run of this schedule.json step for step, whatever the budget",
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path(".scratch"),
        metavar="DIR",
        help="folder of the checkpoints from which a killed run is resumed",
    )


STAGE = Stage(
    name="train",
    summary="Train a model on the shards of a folder; the moving average of its weights is the result.",
    params=Params,
    reads={"train": Path("artifacts/tokenize/train")},
    writes=("model.safetensors", "loss.tsv", "schedule.json", "metrics.json"),
    add_options=add_options,
)


def loss_table(trained: TrainResult) -> str:
    """The content of loss.tsv: one row for each step, counted from 1."""
    rows = ["step\tloss\tlr_multiplier\tlooped"]
    for step, (loss, schedule) in enumerate(zip(trained.losses, trained.schedule, strict=True), start=1):
        rows.append(f"{step}\t{loss:.6f}\t{schedule.lr_multiplier:.6f}\t{int(schedule.looped)}")
    return "\n".join(rows) + "\n"


def main(run: Run[Params]) -> None:
    """Load the shards, train, write weights, losses, schedule and metrics."""
    params = run.params
    replay = read_replay(run.arguments.replay) if run.arguments.replay else None
    shard_folder = run.path("train")
    relaunch_under_torchrun(params.parallel, "stages.train", sys.argv[1:])
    with distributed(params.parallel, compiles=True) as world:
        clock = Interval()
        trained = train(params, shard_folder, world, run.logger, clock, replay, run.arguments.scratch)

        # Weights, losses and schedule.
        if world.is_main:
            save_file(trained.state, run.output / "model.safetensors")
            run.write_text("loss.tsv", loss_table(trained))
            fractions = [schedule.budget_spent for schedule in trained.schedule]
            run.write_json("schedule.json", {"budget": params.train.budget, "fractions": fractions})

            # Metrics; `train_loss` is the mean over the last twentieth of the steps.
            tail = trained.losses[-max(1, len(trained.losses) // 20) :]
            run.write_json(
                "metrics.json",
                {
                    "train_loss": sum(tail) / len(tail),
                    "train_steps": len(trained.losses),
                    "train_tokens": trained.tokens,
                    "parameters": sum(tensor.numel() for tensor in trained.state.values()),
                },
            )

        # Measured values.
        run.timing |= {
            "training_seconds": clock.seconds,
            "hardware": hardware(world.device),
            "driver": gpu_driver_version(),
            "ranks": world.size,
        } | trained.timing
        run.logger.log(
            f"train: {len(trained.losses)} steps in {clock.seconds:.1f} s,"
            f" {trained.timing['tokens_per_second']:,.0f} tokens/s"
        )
