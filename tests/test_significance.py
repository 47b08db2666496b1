"""B16: Student's law against tables, Welch's test, and what a claim of seeds must have."""

from typing import Any

import pytest

from stages.audit.checks import significance
from stages.common.student_t import SeedStatistics, seed_statistics, upper_tail, welch


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
