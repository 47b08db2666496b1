"""Schedule of a run: learning-rate multiplier, Muon momentum and looping of every optimizer step.

Apart from the warm-ups, which count steps, everything follows from one number: the fraction of the
budget that is already spent when the step begins. The list of these fractions therefore describes a
run completely. It is written as `schedule.json`, and `--replay` repeats it step for step, so that a
run whose budget was wall-clock time can be reproduced.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from stages.train.params import TrainParams


class StepSchedule(NamedTuple):
    """The settings of one optimizer step."""

    budget_spent: float  # fraction of the budget, 0 to 1
    lr_multiplier: float  # on the learning rate of every parameter group
    momentum: float  # Muon's
    looped: bool  # whether the looped segment of blocks is repeated


def step_schedule(step: int, budget_spent: float, params: TrainParams) -> StepSchedule:
    """The settings of 0-based `step` when the fraction `budget_spent` of the budget is spent.

    The multiplier rises linearly over the first `warmup_steps`, is 1 until the last `warmdown` of
    the budget, then falls linearly to 0, never below `min_lr`.
    """
    warmup = 1.0
    if params.warmup_steps:
        warmup = min(1.0, (step + 1) / params.warmup_steps)
    warmdown = 1.0
    if params.warmdown > 0:
        warmdown = min(1.0, (1 - budget_spent) / params.warmdown)

    momentum_warmup = 1.0
    if params.muon_momentum_warmup_steps:
        momentum_warmup = min(1.0, step / params.muon_momentum_warmup_steps)
    momentum_rise = params.muon_momentum - params.muon_momentum_start

    return StepSchedule(
        budget_spent,
        lr_multiplier=warmup * max(params.min_lr, warmdown),
        momentum=params.muon_momentum_start + momentum_warmup * momentum_rise,
        looped=budget_spent >= params.loop_from,
    )


def read_replay(path: Path) -> list[float]:
    """Read the fractions of the budget of each step from a schedule.json; a ValueError if it is not one."""
    try:
        fractions = json.loads(path.read_text(encoding="utf-8"))["fractions"]
        valid = isinstance(fractions, list) and all(isinstance(f, float) and 0 <= f <= 1 for f in fractions)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a schedule: {error!r}; give the schedule.json of a run") from error
    if not valid or not fractions:
        raise ValueError(f"{path}: `fractions` must be a list of numbers between 0 and 1")
    return list(fractions)


def budget_tracker(
    params: TrainParams, replay: list[float] | None, elapsed: Callable[[], float]
) -> Callable[[int], float | None]:
    """Return a function from the 0-based step to the fraction of the budget spent, None when the run is over.

    `elapsed` returns the training seconds so far, the same on every rank. It is called under a
    budget of seconds only, where the last step is the first one that ends at or after the budget.
    """
    if replay is not None:
        return lambda step: replay[step] if step < len(replay) else None
    if params.budget == "steps":
        return lambda step: step / params.steps if step < params.steps else None
    training_seconds = params.seconds - params.reserve_seconds

    def by_clock(step: int) -> float | None:
        budget_spent = elapsed() / training_seconds
        return budget_spent if budget_spent < 1 else None

    return by_clock
