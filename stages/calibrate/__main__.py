"""calibrate: the averaged weights and training shards to Hessians."""

import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from stages.calibrate.hessians import collect
from stages.calibrate.params import Params
from stages.common import command
from stages.common.clock import Interval
from stages.common.environment import hardware
from stages.common.parallel import relaunch_under_torchrun, world

STAGE = command.Stage(
    name="calibrate",
    summary="Measure the Hessian of every matrix on training windows.",
    params=Params,
    reads={"model": Path("artifacts/train/model.safetensors"), "train": Path("artifacts/tokenize/train")},
    writes=("hessians.safetensors", "metrics.json"),
)


def main(run: command.Run[Params]) -> None:
    """Load the weights, measure, write Hessians and metrics."""
    model_file, shard_folder = run.path("model"), run.path("train")
    relaunch_under_torchrun(run.params.parallel, "stages.calibrate", sys.argv[1:])
    with world(run.params.parallel) as here:
        clock = Interval()
        hessians = collect(load_file(model_file), run.params, shard_folder, here, run.report, clock)
        if here.is_main:
            save_file(hessians, run.output / "hessians.safetensors")
            run.write_json(
                "metrics.json", {"calibration_tokens": run.params.calibrate.tokens, "hessians": len(hessians)}
            )
        run.timing |= {
            "training_seconds": clock.seconds,
            "hardware": hardware(here.device),
            "ranks": here.size,
        }
        run.report.log(
            f"calibrate: {len(hessians)} Hessians from {run.params.calibrate.tokens:,} tokens, data read for {clock.seconds:.1f} s"
        )


if __name__ == "__main__":
    command.launch(STAGE, main)
