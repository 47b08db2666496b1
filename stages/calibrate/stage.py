"""The stage calibrate: averaged weights and training shards to Hessians and importances of rows.

An importance is the mean squared gradient of the loss with respect to a row of weights (diagonal
Fisher).
"""

import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from stages.calibrate.hessians import collect_hessians
from stages.calibrate.params import Params
from stages.common.clock import Interval
from stages.common.environment import hardware
from stages.common.parallel import distributed
from stages.common.stage import Run, Stage
from stages.common.torchrun import relaunch_under_torchrun

STAGE = Stage(
    name="calibrate",
    summary="Measure the Hessian of every matrix and the importance of its rows on training windows.",
    params=Params,
    reads={"model": Path("artifacts/train/model.safetensors"), "train": Path("artifacts/tokenize/train")},
    writes=("hessians.safetensors", "metrics.json"),
)


def main(run: Run[Params]) -> None:
    """Load the weights, measure, write Hessians, importances and metrics."""
    model_file = run.path("model")
    shard_folder = run.path("train")
    relaunch_under_torchrun(run.params.parallel, "stages.calibrate", sys.argv[1:])
    with distributed(run.params.parallel) as world:
        clock = Interval()
        hessians = collect_hessians(load_file(model_file), run.params, shard_folder, world, run.logger, clock)
        if world.is_main:
            save_file(hessians, run.output / "hessians.safetensors")
            metrics = {
                "calibration_tokens": run.params.calibrate.tokens,
                "calibration_tensors": len(hessians),
            }
            run.write_json("metrics.json", metrics)
        run.timing |= {
            "training_seconds": clock.seconds,
            "hardware": hardware(world.device),
            "ranks": world.size,
        }
        run.logger.log(
            f"calibrate: {len(hessians)} Hessians and importances from {run.params.calibrate.tokens:,}"
            f" tokens, data read for {clock.seconds:.1f} s"
        )
