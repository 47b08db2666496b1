"""Settings of a short training, compared by their loss on held-out training text.

    python -m benchmarks.sprint --train SHARDS --held-out SHARDS --results FILE \\
        --variant "KEY=VALUE ..." [--variant ...] [--set KEY=VALUE]

Each variant is the preset `sprint` with its changes. It is trained in this process on shards that the
stage tokenize wrote. Its averaged weights are scored, looped, on text that they were not trained on:
--held-out by whole windows, and --held-out and every --elsewhere by sliding windows, with the logits
times each of FACTORS. Shards of --elsewhere are of a kind of text that the training text does not
have. All of it is training text: nothing is chosen on validation text.

Several of these processes may share a GPU with one `--turns FILE`: they compile at the same time and
train one after the other.

With a budget of steps, three variants tell how much a difference means: `seed=1` the scatter between
seeds, `parallel.kernels=false` the effect of the kernels, `parallel.deterministic=true` the cost of
determinism.
"""

import argparse
import fcntl
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks._command import command_line, write_results
from benchmarks._held_out import HeldOut, sliding_nats
from benchmarks._preset import train_params
from stages.common import environment
from stages.common.clock import Interval
from stages.common.parallel import World, distributed
from stages.common.progress import Logger
from stages.train.loop import train
from stages.train.params import Params

HELD_OUT_WINDOWS = 512
FACTORS = (1.0, 0.8, 0.85, 0.9, 0.95, 1.05)


class InTurn(Interval):
    """A clock that starts when no other process with the same file is between its start and its release."""

    def __init__(self, turns: Path | None) -> None:
        super().__init__()
        self.file = turns.open("w") if turns else None

    def start(self) -> None:
        """Wait for the turn, then start."""
        if self.file:
            fcntl.flock(self.file, fcntl.LOCK_EX)
        super().start()

    def release(self) -> None:
        """Let another process have its turn."""
        if self.file:
            self.file.close()


def run(params: Params, changes: list[str], arguments: argparse.Namespace, world: World) -> dict[str, Any]:
    """Train one variant and score it; returns its row of the results."""
    torch.compiler.reset()  # torch bounds the number of graphs that it keeps of one function
    interval = InTurn(arguments.turns)
    trained = train(params, arguments.train, world, Logger(is_main=False), interval)
    interval.release()
    if arguments.keep:
        save_file(trained.state, arguments.keep)

    held_out = HeldOut(arguments.held_out, HELD_OUT_WINDOWS, params.model, world)
    losses = held_out.losses(trained.state)
    sliding = {}
    for folder in (arguments.held_out, *arguments.elsewhere):
        sliding[folder.name] = sliding_nats(held_out.model, folder, FACTORS, world)

    row = {
        "changes": changes,
        "held_out_nats": float(losses.mean()),
        "sliding_nats": sliding,
        "steps": len(trained.losses),
        "tokens": trained.tokens,
        "train_nats_last_20": sum(trained.losses[-20:]) / len(trained.losses[-20:]),
        "seconds": interval.seconds,
        "parameters": sum(tensor.numel() for tensor in trained.state.values()),
        "peak_memory_bytes": trained.timing["peak_memory_bytes"],
        "recompilations": trained.timing["recompilations"],
    }

    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Print one line for each variant, and write the JSON file after each."""
    parser = command_line(__doc__)
    parser.add_argument("--preset", default="sprint")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--elsewhere", type=Path, action="append", default=[], metavar="SHARDS")
    parser.add_argument("--variant", action="append", required=True, metavar="CHANGES")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--turns", type=Path, help="a lock file, one for each GPU")
    parser.add_argument("--keep", type=Path, help="file for the last variant's weights (.safetensors)")
    parser.add_argument("--results", type=Path, required=True, help="the JSON file to write")
    arguments = parser.parse_args()

    # All variants are read before the first is run, so that a wrong one is refused at once.
    variants = []
    for variant in arguments.variant:
        changes = variant.split()
        variants.append((train_params(arguments.preset, [*arguments.set, *changes]), changes))

    rows = []
    for params, changes in variants:
        with distributed(params.parallel, compiles=True) as world:
            rows.append(run(params, changes, arguments, world))
            settings = {"preset": arguments.preset, "changes": arguments.set, "variants": rows}
            write_results(arguments.results, settings | environment.run_environment(world.device))


if __name__ == "__main__":
    main()
