"""Predict from a measured rate whether an evaluation will keep to its budget: `python -m tools.plan TIMING ...`.

TIMING is the timing.json of an evaluation of any stream on any number of devices (artifacts/ttt_eval/timing.json); its start and its rate
are taken to hold for others of the same kind. Exit code 0: within the budget; 1: over it; 2: a user's error.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.audit.params import AuditParams
from stages.common import clock, config, shards
from stages.common.cli_errors import refusing

OFFICIAL_TARGETS = (
    40_540_160  # of the challenge's validation set with SP8192, as the records count them (#1493)
)
NEEDED = ("startup_seconds", "warm_up_targets", "targets_per_second", "ranks")


@dataclass(frozen=True)
class Params:
    """What is read of params.yaml."""

    audit: AuditParams


def measured(path: Path) -> dict[str, Any]:
    """The figures of a timing.json; a ValueError when it is none of an evaluation."""
    try:
        timing = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    missing = (
        [key for key in NEEDED if not isinstance(timing.get(key), (int, float))]
        if isinstance(timing, dict)
        else list(NEEDED)
    )
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(missing)}: expected the timing.json of sliding_eval or ttt_eval"
        )
    return {key: timing[key] for key in NEEDED}


def plan(path: Path, targets: int, processes: int, budget_seconds: float) -> tuple[str, bool]:
    """A sentence, and whether the budget holds."""
    timing = measured(path)
    seconds = clock.projected_seconds(timing, targets, processes)
    if seconds is None:
        raise ValueError(
            f"{path} holds no rate: the whole stream was warm-up; measure on more than {timing['warm_up_targets']:,} targets"
        )
    rate = timing["targets_per_second"] / timing["ranks"]
    holds = seconds <= budget_seconds
    sentence = (
        f"{path}: {timing['startup_seconds']:.1f} s to start, then {targets:,} targets on {processes} x {rate:,.0f} a second:"
        f" {seconds:.1f} s of {budget_seconds:g}, {'within' if holds else 'OVER'} the budget"
    )
    return sentence, holds


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.plan",
        description="Say from a measured rate whether an evaluation will keep to its budget.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("timing", nargs="+", type=Path, metavar="TIMING", help="timing.json of an evaluation")
    parser.add_argument("--targets", type=int, default=OFFICIAL_TARGETS, metavar="N", help="targets to score")
    parser.add_argument("--val", type=Path, metavar="DIR", help="shards to score, instead of --targets")
    parser.add_argument(
        "--processes",
        type=int,
        default=clock.OFFICIAL_PROCESSES,
        metavar="N",
        help="devices of the measured kind",
    )
    parser.add_argument(
        "--params",
        type=Path,
        default=Path("params.yaml"),
        metavar="FILE",
        help="has audit.evaluation_budget_seconds",
    )
    arguments = parser.parse_args(argv)
    with refusing("plan"):
        budget = config.load(arguments.params, Params, []).audit.evaluation_budget_seconds
        targets = (
            sum(map(shards.count, shards.find(arguments.val))) - 1 if arguments.val else arguments.targets
        )
        if targets < 1 or arguments.processes < 1:
            raise ValueError(
                f"{targets} targets on {arguments.processes} devices: expected at least one of each"
            )
        plans = [plan(path, targets, arguments.processes, budget) for path in arguments.timing]
    print("\n".join(sentence for sentence, _ in plans))
    raise SystemExit(0 if all(holds for _, holds in plans) else 1)


if __name__ == "__main__":
    main()
