"""The tail of Student's t distribution, for degrees of freedom that need not be whole (Welch's are not)."""

import math

PRECISION = 1e-15
TINY = 1e-300  # keeps Lentz's method from dividing by zero
MOST_TERMS = 10_000


def upper_tail(t: float, degrees: float) -> float:
    """P(T > t).

    With one degree of freedom it is Cauchy's distribution, whose quarter lies above 1:

    >>> round(upper_tail(1.0, 1), 12), upper_tail(0.0, 5)
    (0.25, 0.5)
    """
    if not degrees > 0:
        raise ValueError(f"{degrees} degrees of freedom; a deviation needs at least two seeds")
    if math.isinf(t):
        return 0.0 if t > 0 else 1.0
    beyond = 0.5 * incomplete_beta(degrees / (degrees + t * t), degrees / 2, 0.5)
    return beyond if t >= 0 else 1.0 - beyond


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b) by its continued fraction (DLMF 8.17.22), quick below its mean."""
    if x <= 0.0 or x >= 1.0:
        return min(1.0, max(0.0, x))
    if x > (a + 1) / (a + b + 2):
        return 1.0 - incomplete_beta(1.0 - x, b, a)
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(front) / (a * _fraction(x, a, b))


def _fraction(x: float, a: float, b: float) -> float:
    """1 + d1 / (1 + d2 / (1 + ...)), by Lentz's method."""
    value, c, d = 1.0, 1.0, 0.0
    for term in range(1, MOST_TERMS):
        half = term // 2
        if term % 2:
            factor = -(a + half) * (a + b + half) * x / ((a + 2 * half) * (a + 2 * half + 1))
        else:
            factor = half * (b - half) * x / ((a + 2 * half - 1) * (a + 2 * half))
        d = 1.0 / _nonzero(1.0 + factor * d)
        c = _nonzero(1.0 + factor / c)
        value *= c * d
        if abs(c * d - 1.0) < PRECISION:
            return value
    raise AssertionError(f"no convergence at x {x}, a {a}, b {b}")


def _nonzero(value: float) -> float:
    return value if abs(value) > TINY else TINY
