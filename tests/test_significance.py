"""B16: Student's law against tables, Welch's test, and what a claim of seeds must have."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.audit.checks import significance
from stages.common.student_t import SeedStatistics, seed_statistics, upper_tail, welch
from tests.zoo import bookkeeping


def runs(*nats: float, config: str = "a") -> list[dict[str, Any]]:
    return [{"seed": seed, "nats": value, "config": config} for seed, value in enumerate(nats)]


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [
        (6.965, 2, 0.01),
        (2.920, 2, 0.05),
        (4.541, 3, 0.01),
        (2.228, 10, 0.025),
        (0.0, 5, 0.5),
        (-2.920, 2, 0.95),
    ],
)
def test_the_upper_tail_is_that_of_the_tables(t: float, freedom: int, p: float) -> None:
    assert upper_tail(t, freedom) == pytest.approx(p, abs=2e-5)


def test_welch_is_the_plain_test_against_a_figure_and_wider_against_a_sample() -> None:
    ours = seed_statistics([2.480, 2.481, 2.482])
    exact = welch(ours, SeedStatistics(2.5, None, None), 0.005)
    assert exact == pytest.approx(upper_tail((0.019 - 0.005) / (0.001 / 3**0.5), 2))
    sampled = welch(ours, seed_statistics([2.499, 2.500, 2.501]), 0.005)
    assert sampled == pytest.approx(upper_tail(0.014 / (0.001 * (2 / 3) ** 0.5), 4))
    assert welch(seed_statistics([2.4] * 3), seed_statistics([2.5]), 0.005) == 0.0


def test_a_claim_needs_three_seeds_of_one_configuration_and_a_gain() -> None:
    assert significance.check_seeds(runs(2.480, 2.481, 2.482), [2.5]).outcome == "pass"
    assert significance.check_seeds(runs(2.494, 2.496, 2.4955), [2.5]).outcome == "fail"
    assert significance.check_seeds(runs(2.480, 2.481), [2.5]).outcome == "cannot tell"
    assert significance.check_seeds(runs(2.480, 2.481, 2.482), []).outcome == "cannot tell"
    mixed = [*runs(2.480, 2.481), {"seed": 7, "nats": 2.482, "config": "b"}]
    assert "2 configurations" in significance.check_seeds(mixed, [2.5]).evidence
    twice = [*runs(2.480, 2.481), *runs(2.482)]
    assert "counted twice" in significance.check_seeds(twice, [2.5]).evidence
    unstated = [{"seed": seed, "nats": 2.48} for seed in range(3)]
    assert significance.check_seeds(unstated, [2.5]).outcome == "fail"


@pytest.mark.parametrize(
    "seeds", [(1, 1.0, 2), (1, True, 2), (1, "1", 2), ("1", "2", "3"), (1, 2, None), (1, 1, 2)]
)
def test_a_seed_is_an_integer_of_its_own(seeds: tuple[Any, ...]) -> None:
    claimed = [run | {"seed": seed} for run, seed in zip(runs(2.480, 2.481, 2.482), seeds, strict=True)]
    verdict = significance.check_seeds(claimed, [2.5])
    assert verdict.outcome == "fail"
    assert "not an integer" in verdict.evidence or "counted twice" in verdict.evidence


def test_runs_are_told_apart_by_their_ledgers(tmp_path: Path) -> None:
    (lawful,) = bookkeeping.lawful_seeds(tmp_path, b"")
    assert lawful.outcome == "pass"
    assert "a ledger of its own" in lawful.evidence
    without = significance.check_seeds(runs(2.480, 2.481, 2.482), [2.5])
    assert "not shown" in without.evidence

    # One ledger for two seeds: the same file, the same hash, nearly the same losses.
    ledgers = bookkeeping.seed_ledgers()
    for twin in (ledgers[0].copy(), ledgers[0] * np.float32(1.0005)):
        repeated = bookkeeping.seed_runs((1, 2, 3), [*ledgers[:2], twin])
        assert "one run" in significance.check_seeds(repeated, [2.5]).evidence
    stated = [
        run | {"ledger_sha256": digest} for run, digest in zip(runs(2.48, 2.481, 2.482), "aAb", strict=True)
    ]
    assert "one run" in significance.check_seeds(stated, [2.5]).evidence
    stated[1]["ledger_sha256"] = "c"
    assert "states the hash" in significance.check_seeds(stated, [2.5]).evidence


def test_a_seeds_loss_follows_from_its_ledger_per_target_or_per_byte() -> None:
    ledgers = bookkeeping.seed_ledgers()
    claimed = bookkeeping.seed_runs((1, 2, 3), ledgers)
    assert significance.check_seeds(claimed, [2.5], 4000, 10_000).outcome == "pass"
    per_byte = [run | {"nats": round(run["nats"] * 4000 / 10_000, 4)} for run in claimed]
    assert significance.check_seeds(per_byte, [1.0], 4000, 10_000).outcome == "pass"
    assert "its ledger has" in significance.check_seeds(per_byte, [1.0], 4000).evidence
    assert "expected (4001,)" in significance.check_seeds(claimed, [2.5], 4001).evidence
    broken = ledgers[0].copy()
    broken[7] = np.nan
    assert (
        "no numbers"
        in significance.check_seeds([claimed[0] | {"ledger": broken}, *claimed[1:]], [2.5]).evidence
    )

    # What is stated may be rounded; the test uses the ledgers' means.
    edge = [run | {"nats": run["nats"] - 0.00004} for run in claimed]
    assert significance.check_seeds(edge, [2.5]).saw == significance.check_seeds(claimed, [2.5]).saw
