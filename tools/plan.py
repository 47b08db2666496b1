"""Predict from a measured rate if an evaluation keeps to its time budget.

In `python -m tools.plan TIMING ...`, TIMING is the timing.json that an evaluation wrote
(artifacts/ttt_eval/timing.json), for any stream and any number of devices. Its start-up time and
its rate are assumed to hold for other devices of the same kind. Exit code 0: within the budget; 1:
over it; 2: user error.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stages.audit.params import AuditParams
from stages.common import challenge, clock, config, shards
from stages.common.cli_errors import user_errors
from stages.common.json_object import read_json_object
from tools import require_file

REQUIRED_KEYS = ("startup_seconds", "warm_up_targets", "targets_per_second", "ranks")


@dataclass(frozen=True)
class Params:
    """Sections of params.yaml that are read."""

    audit: AuditParams


class Prediction(NamedTuple):
    """Predicted evaluation: one sentence, and if it is within the budget."""

    sentence: str
    within_budget: bool


def read_timing(path: Path) -> dict[str, Any]:
    """Return the REQUIRED_KEYS of a timing.json; ValueError if it is not that of an evaluation."""
    remedy = "run `dvc repro ttt_eval` first, or name another"
    timing = read_json_object(require_file(path, remedy))
    missing = [key for key in REQUIRED_KEYS if not isinstance(timing.get(key), (int, float))]
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(missing)}: expected the timing.json of sliding_eval or ttt_eval"
        )
    return {key: timing[key] for key in REQUIRED_KEYS}


def predict(path: Path, targets: int, processes: int, budget_seconds: float) -> Prediction:
    """Predict the seconds for `targets` on `processes` devices of the kind that was measured."""
    timing = read_timing(path)
    seconds = clock.projected_seconds(timing, targets, processes)
    if seconds is None:
        raise ValueError(
            f"{path} holds no rate: the whole stream was warm-up;"
            f" measure on more than {timing['warm_up_targets']:,} targets"
        )

    rate_per_device = timing["targets_per_second"] / timing["ranks"]
    within_budget = seconds <= budget_seconds
    sentence = (
        f"{path}: {timing['startup_seconds']:.1f} s to start,"
        f" then {targets:,} targets on {processes} x {rate_per_device:,.0f} a second:"
        f" {seconds:.1f} s of {budget_seconds:g}, {'within' if within_budget else 'OVER'} the budget"
    )
    return Prediction(sentence, within_budget)


def main(argv: list[str] | None = None) -> None:
    """Print a prediction for each TIMING; exits with 1 if one is over the budget."""
    arguments = _parser().parse_args(argv)
    with user_errors("plan"):
        budget = config.load(arguments.params, Params, []).audit.evaluation_budget_seconds
        targets = arguments.targets
        if arguments.val:
            targets = sum(map(shards.count, shards.find(arguments.val))) - 1
        if targets < 1 or arguments.processes < 1:
            raise ValueError(
                f"{targets} targets on {arguments.processes} devices: expected at least one of each"
            )
        predictions = [predict(path, targets, arguments.processes, budget) for path in arguments.timing]

    for prediction in predictions:
        print(prediction.sentence)
    raise SystemExit(0 if all(prediction.within_budget for prediction in predictions) else 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.plan",
        description="Predict from a measured rate if an evaluation keeps to its time budget.",
    )
    add = parser.add_argument

    # The measured evaluation, and the targets of the one to predict.
    add("timing", nargs="+", type=Path, metavar="TIMING", help="timing.json of an evaluation")
    add(
        "--targets",
        type=int,
        default=challenge.VALIDATION_TARGETS,
        metavar="N",
        help="targets to score (default: %(default)s)",
    )
    add("--val", type=Path, metavar="DIR", help="shards to score, instead of --targets")

    # Devices of the evaluation to predict.
    add(
        "--processes",
        type=int,
        default=challenge.GPUS,
        metavar="N",
        help="number of devices, of the kind that was measured (default: %(default)s)",
    )

    # The budget.
    add(
        "--params",
        type=Path,
        default=Path("params.yaml"),
        metavar="FILE",
        help="parameter file; its audit.evaluation_budget_seconds is the budget (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    main()
