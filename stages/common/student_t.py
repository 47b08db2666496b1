"""Student's t distribution and Welch's one-sided t test of a mean over seeds.

Welch's degrees of freedom need not be whole, so the tail is computed from the incomplete beta
function.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

RELATIVE_PRECISION = 1e-15  # of the continued fraction
TINY = 1e-300  # in place of a zero denominator, which Lentz's method must not divide by
MAX_TERMS = 10_000  # the fraction converges within a few hundred terms for any sensible argument


class SeedStatistics(NamedTuple):
    """Mean score over the seeds of one result, and its scatter."""

    mean: float
    deviation: float | None  # sample deviation; None where it is not stated: the mean is then taken as exact
    seeds: int | None


def seed_statistics(values: Sequence[float]) -> SeedStatistics:
    """Mean and sample deviation of one score per seed; the deviation of a single seed is not known."""
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    deviation = math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else None
    return SeedStatistics(mean, deviation, len(values))


def welch(ours: SeedStatistics, theirs: SeedStatistics, margin: float) -> float:
    """One-sided p-value of "ours is not better than theirs by more than `margin`"; lower is better.

    Where their deviation is not known their mean is taken as exact, and the test is the one-sample
    t test.
    """
    if ours.deviation is None or ours.seeds is None:
        raise ValueError("a claim needs the deviation of at least two seeds")

    # Variance of each side's mean, with its degrees of freedom.
    variances = [(ours.deviation**2 / ours.seeds, ours.seeds - 1)]
    if theirs.deviation is not None and theirs.seeds is not None and theirs.seeds > 1:
        variances.append((theirs.deviation**2 / theirs.seeds, theirs.seeds - 1))

    total = sum(variance for variance, _ in variances)
    excess = theirs.mean - ours.mean - margin
    if total == 0:
        return 0.0 if excess > 0 else 1.0
    degrees = total**2 / sum(variance**2 / own_degrees for variance, own_degrees in variances)
    return upper_tail(excess / math.sqrt(total), degrees)


def upper_tail(t: float, degrees: float) -> float:
    """P(T > t).

    One degree of freedom gives Cauchy's distribution, a quarter of which is above 1:

    >>> round(upper_tail(1.0, 1), 12), upper_tail(0.0, 5)
    (0.25, 0.5)
    """
    if not degrees > 0:
        raise ValueError(f"{degrees} degrees of freedom; a deviation needs at least two seeds")
    if math.isinf(t):
        return 0.0 if t > 0 else 1.0
    tail = 0.5 * incomplete_beta(degrees / (degrees + t * t), degrees / 2, 0.5)
    return tail if t >= 0 else 1.0 - tail


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b) by its continued fraction (DLMF 8.17.22).

    The fraction converges fast below the distribution's mean; above it, I_x(a, b) = 1 - I_{1-x}(b,
    a).
    """
    if x <= 0.0 or x >= 1.0:
        return min(1.0, max(0.0, x))
    if x > (a + 1) / (a + b + 2):
        return 1.0 - incomplete_beta(1.0 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) / (a * _continued_fraction(x, a, b))


def _continued_fraction(x: float, a: float, b: float) -> float:
    """1 + d1 / (1 + d2 / (1 + ...)), by Lentz's method."""
    value = 1.0
    c = 1.0
    d = 0.0
    for term in range(1, MAX_TERMS):
        half = term // 2
        if term % 2:
            factor = -(a + half) * (a + b + half) * x / ((a + 2 * half) * (a + 2 * half + 1))
        else:
            factor = half * (b - half) * x / ((a + 2 * half - 1) * (a + 2 * half))

        d = 1.0 / _nonzero(1.0 + factor * d)
        c = _nonzero(1.0 + factor / c)
        value *= c * d
        if abs(c * d - 1.0) < RELATIVE_PRECISION:
            return value
    raise AssertionError(f"no convergence at x {x}, a {a}, b {b}")


def _nonzero(value: float) -> float:
    return value if abs(value) > TINY else TINY
