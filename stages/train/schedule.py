"""What each step is told: learning-rate multiplier, Muon's momentum, and whether blocks are looped.

Everything but the warm-ups follows from one number, the fraction of the budget that is spent, so that a run is described by the
list of its fractions: that list is `schedule.json`, and `--replay` repeats it step for step.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from stages.train.params import TrainParams


class StepSchedule(NamedTuple):
    """The settings of one step."""

    fraction: float
    lr_multiplier: float
    momentum: float
    looped: bool


def settings(step: int, fraction: float, params: TrainParams) -> StepSchedule:
    """The settings of 0-based `step` when `fraction` of the budget is spent.

    The multiplier rises linearly over the first `warmup_steps`, is 1 until the last `warmdown` of the budget, then falls linearly to 0,
    never below `min_lr`.
    """
    rise = min(1.0, (step + 1) / params.warmup_steps) if params.warmup_steps else 1.0
    decay = min(1.0, (1 - fraction) / params.warmdown) if params.warmdown > 0 else 1.0
    warm = min(1.0, step / params.muon_momentum_warmup_steps) if params.muon_momentum_warmup_steps else 1.0
    momentum = params.muon_momentum_start + warm * (params.muon_momentum - params.muon_momentum_start)
    return StepSchedule(fraction, rise * max(params.min_lr, decay), momentum, fraction >= params.loop_from)


def read_fractions(path: Path) -> list[float]:
    """The fractions of a schedule.json."""
    try:
        fractions = json.loads(path.read_text(encoding="utf-8"))["fractions"]
        valid = isinstance(fractions, list) and all(isinstance(f, float) and 0 <= f <= 1 for f in fractions)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a schedule: {error!r}; give the schedule.json of a run") from error
    if not valid or not fractions:
        raise ValueError(f"{path}: `fractions` must be a list of numbers between 0 and 1")
    return list(fractions)


def pacing(
    params: TrainParams, replay: list[float] | None, elapsed: Callable[[], float]
) -> Callable[[int], float | None]:
    """A function from the 0-based step to its fraction, or None when the run is over.

    `elapsed` gives the training seconds so far, agreed between ranks; it is only asked under a budget of seconds, where the last step
    is the first one that ends at or after the budget.
    """
    if replay is not None:
        return lambda step: replay[step] if step < len(replay) else None
    if params.budget == "steps":
        return lambda step: step / params.steps if step < params.steps else None
    budget = params.seconds - params.reserve_seconds

    def by_clock(step: int) -> float | None:
        fraction = elapsed() / budget
        return fraction if fraction < 1 else None

    return by_clock
