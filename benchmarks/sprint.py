"""Settings of a short training, compared by their loss on held-out training text.

    python -m benchmarks.sprint --train SHARDS --held-out SHARDS --results FILE --variant "KEY=VALUE ..." [--variant ...] [--set KEY=VALUE]

Each variant is the preset (`sprint`) with its changes, trained in this process from shards of `stages.tokenize`; its averaged weights are
scored, looped, on text that they were not trained on: windows of --held-out whole, and it and every --elsewhere (text of a kind that the
training text has none of) by sliding windows, with logits as they are and times a few factors. All of it is training text: nothing is
chosen on validation text.
Several of these processes may share a GPU with one `--turns FILE`: they compile side by side and train in turns.
With a budget of steps, variants `seed=1`, `parallel.kernels=false` and `parallel.deterministic=true` say how far seeds lie apart, whether
the kernels give the plain path's loss within that, and what determinism costs.
"""

import argparse
import fcntl
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks._held_out import HeldOut, sliding_nats
from benchmarks._preset import train_params
from stages.common import environment
from stages.common.clock import Interval
from stages.common.parallel import World, world
from stages.common.progress import Report
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


def run(params: Params, changes: list[str], arguments: argparse.Namespace, here: World) -> dict[str, Any]:
    """Train one variant and score it."""
    torch.compiler.reset()  # each variant compiles its own; torch bounds how many graphs of one function it keeps
    interval = InTurn(arguments.turns)
    trained = train(params, arguments.train, here, Report(is_main=False), interval)
    interval.release()
    if arguments.keep:
        save_file(trained.state, arguments.keep)
    held_out = HeldOut(arguments.held_out, HELD_OUT_WINDOWS, params.model, here)
    row = {
        "changes": changes,
        "held_out_nats": float(held_out.losses(trained.state).mean()),
        "sliding_nats": {
            folder.name: sliding_nats(held_out.model, folder, FACTORS, here)
            for folder in (arguments.held_out, *arguments.elsewhere)
        },
        "steps": len(trained.losses),
        "tokens": trained.tokens,
        "train_nats_last_20": sum(trained.losses[-20:]) / len(trained.losses[-20:]),
        "seconds": interval.seconds,
        "parameters": sum(tensor.numel() for tensor in trained.state.values()),
        "peak_memory_bytes": trained.measured["peak_memory_bytes"],
        "recompilations": trained.measured["recompilations"],
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """One line for each variant, and the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="sprint")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--elsewhere", type=Path, action="append", default=[], metavar="SHARDS")
    parser.add_argument("--variant", action="append", required=True, metavar="CHANGES")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--turns", type=Path, help="a lock file, one for each GPU")
    parser.add_argument(
        "--keep", type=Path, help="where to leave the weights of the last variant (.safetensors)"
    )
    parser.add_argument(
        "--results", type=Path, required=True, help="the JSON file to write; rows are added as they come"
    )
    arguments = parser.parse_args()
    rows = []
    each = [variant.split() for variant in arguments.variant]
    # All are read, and refused if they must be, before the first is run.
    variants = [(train_params(arguments.preset, [*arguments.set, *changes]), changes) for changes in each]
    for params, changes in variants:
        with world(params.parallel, compiles=True) as here:
            rows.append(run(params, changes, arguments, here))
            result = {
                "preset": arguments.preset,
                "changes": arguments.set,
                "variants": rows,
            } | environment.facts(here.device)
            arguments.results.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
