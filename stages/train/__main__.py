"""train: shards to the averaged weights of a model, within a budget of steps or seconds."""

import argparse
import sys
from pathlib import Path

from safetensors.torch import save_file

from stages.common import command
from stages.common.clock import Interval
from stages.common.environment import driver, hardware
from stages.common.parallel import relaunch_under_torchrun, world
from stages.train.loop import Trained, train
from stages.train.params import Params
from stages.train.schedule import read_fractions


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that only train has."""
    parser.add_argument(
        "--replay",
        type=Path,
        metavar="FILE",
        help="a schedule.json to repeat step for step, whatever the budget",
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path(".scratch"),
        metavar="DIR",
        help="where checkpoints for resuming live",
    )


STAGE = command.Stage(
    name="train",
    summary="Train a model on the shards of a folder; the moving average of its weights is the result.",
    params=Params,
    reads={"train": Path("artifacts/tokenize/train")},
    writes=("model.safetensors", "loss.tsv", "schedule.json", "metrics.json"),
    add_options=add_options,
)


def loss_table(trained: Trained) -> str:
    """loss.tsv: one row for each step."""
    rows = ["step\tloss\tlr_multiplier\tlooped"]
    for step, (loss, now) in enumerate(zip(trained.losses, trained.schedule, strict=True), start=1):
        rows.append(f"{step}\t{loss:.6f}\t{now.lr_multiplier:.6f}\t{int(now.looped)}")
    return "\n".join(rows) + "\n"


def main(run: command.Run[Params]) -> None:
    """Load the shards, train, write weights, losses, schedule and metrics."""
    params = run.params
    replay = read_fractions(run.arguments.replay) if run.arguments.replay else None
    shard_folder = run.path("train")
    relaunch_under_torchrun(params.parallel, "stages.train", sys.argv[1:])
    with world(params.parallel, compiles=True) as here:
        clock = Interval()
        trained = train(params, shard_folder, here, run.report, clock, replay, run.arguments.scratch)
        if here.is_main:
            save_file(trained.state, run.output / "model.safetensors")
            run.write_text("loss.tsv", loss_table(trained))
            fractions = [now.fraction for now in trained.schedule]
            run.write_json("schedule.json", {"budget": params.train.budget, "fractions": fractions})
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
        facts = {"hardware": hardware(here.device), "driver": driver(), "ranks": here.size}
        run.timing |= {"training_seconds": clock.seconds} | facts | trained.measured
        run.report.log(
            f"train: {len(trained.losses)} steps in {clock.seconds:.1f} s, {trained.measured['tokens_per_second']:,.0f} tokens/s"
        )


if __name__ == "__main__":
    command.launch(STAGE, main)
