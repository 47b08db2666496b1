"""Precision of a scorer's arithmetic, which sets every tolerance of the audit; test for a systematic shift.

A scorer declares its precision by name (attribute `precision`; float32 without it). Two losses of one
target, computed in batches of other shapes, differ by round-off. Each difference may be as large as
`loss_tolerance`, but round-off has no sign, so that the mean of n differences tends to zero. A mean that
does not is a gain at every target, too small to be seen at one of them.

*Test of the mean* (`measure_shift`). Suppose that the differences are symmetric about a lawful bias of
at most m (`mean_tolerance`), and that the sums S_b of B blocks of consecutive differences, less m each,
are independent. By Efron (1969) and Hoeffding (1963), for symmetric independent variables of any size

    P(sum of S_b > x sqrt(sum of S_b^2)) <= exp(-x^2 / 2),

because the signs are fair coins once the sizes are known. With x^2 = 2 ln(2 / alpha) a lawful scorer is
convicted with probability alpha = 1e-6 at most, whatever the distribution of its round-off. In terms of
the mean and the variance v of the block means: convicted if |mean| > m + x sqrt(v / (B - x^2)), which
needs B > x^2 = 29. By the same inequality a shift of

    m + x sqrt(v / (B - x^2)) + y sqrt(v / (B - y^2)),    y^2 = 2 ln 100,

is convicted with probability 0.99 or more: `Shift.detectable`. Blocks instead of single differences
allow for round-off that is common to neighbouring targets, at a loss of a seventh of the power.

*Sizes*, from lawful distributions over V ids (torch log_softmax of 2,000 random logits on a CPU):

| | V | log of the sum: largest | mean | one loss: largest |
|---|---:|---:|---:|---:|
| float32 | 8,192 | 1.5e-6 | 4.5e-7 | 3.9e-6 |
| float32 | 65,536 | 5.0e-6 | 2.6e-6 | 5.3e-6 |
| bfloat16 log-probabilities | 8,192 | 3.1e-3 | 1.8e-4 | 0.031 |
| bfloat16 logits and log-probabilities | 65,536 | 0.032 | - | 0.085 |
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stages.common.scorer import Scorer

FALSE_ALARM = 1.0e-6  # largest probability that round-off is taken for a systematic shift
MISSED = 0.01  # largest probability that a shift of `detectable` is not convicted
MAX_BLOCKS = 128  # of consecutive differences, in the test of their mean
DEFAULT = "float32"


@dataclass(frozen=True)
class Precision:
    """Tolerances of one kind of arithmetic, in nats."""

    name: str
    rounding: float  # between two losses of one scorer after the same tokens, computed in other batches
    loss_tolerance: float  # between two ways to compute one loss: ledger, score_stream, predict
    mean_tolerance: float  # lawful bias m of the mean difference; twice as much is convicted
    sum_tolerance: float  # of the log of a sum of probabilities above 0; a sum below one is lawful
    mean_sum_tolerance: float  # lawful mean of the logs of many sums


# Arithmetic in float64; but losses are float32 numbers, whose spacing is 4e-6 from 32 nats on.
FLOAT64 = Precision(
    "float64",
    rounding=4.0e-6,
    loss_tolerance=1.0e-5,
    mean_tolerance=1.0e-7,
    sum_tolerance=1.0e-9,
    mean_sum_tolerance=1.0e-9,
)
# One loss: sums in other batches differ by 1e-5 at most, and networks add to that over their layers.
# A sum over 65,536 ids is off by 5e-6, and in one direction.
FLOAT32 = Precision(
    "float32",
    rounding=1.0e-5,
    loss_tolerance=1.0e-4,
    mean_tolerance=5.0e-7,
    sum_tolerance=1.0e-5,
    mean_sum_tolerance=5.0e-6,
)
# One loss: 0.29 at most over 14,592 targets of this project's scorers. A log-probability between -16
# and -8 is rounded by up to 2^-5, all of them perhaps in one direction; the mean is above zero because
# exp is convex: half the variance of the rounding.
BFLOAT16 = Precision(
    "bfloat16",
    rounding=0.5,
    loss_tolerance=0.5,
    mean_tolerance=5.0e-5,
    sum_tolerance=0.04,
    mean_sum_tolerance=2.5e-4,
)
PRECISIONS = {precision.name: precision for precision in (FLOAT64, FLOAT32, BFLOAT16)}


class Shift(NamedTuple):
    """Mean of many differences, and how far from zero it may be."""

    mean: float
    bound: float  # largest lawful mean, either way; infinite for too few differences
    detectable: float  # smallest shift that is convicted with probability 1 - MISSED

    @property
    def is_systematic(self) -> bool:
        """True if round-off does not explain the mean."""
        return not abs(self.mean) <= self.bound

    @property
    def is_gain(self) -> bool:
        """True if round-off does not explain the mean, and it is above zero."""
        return not self.mean <= self.bound


def of_scorer(scorer: Scorer) -> Precision:
    """Look up the declared precision of a scorer; ValueError for a name that is unknown."""
    return by_name(str(getattr(scorer, "precision", DEFAULT)))


def by_name(name: str) -> Precision:
    """Look up a precision; ValueError for a name that is unknown."""
    if name not in PRECISIONS:
        raise ValueError(f"precision {name!r} is not known: expected {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def coarser(one: Precision, other: Precision) -> Precision:
    """Return the precision with the larger tolerances."""
    return max(one, other, key=lambda precision: precision.loss_tolerance)


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Subtract losses or log-probabilities of equal shape, float64.

    Equal infinities do not differ; NaN differs from everything, by infinity.
    """
    first = np.asarray(one, dtype=np.float64)
    second = np.asarray(other, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        different = np.where(first == second, 0.0, first - second)
    return np.where(np.isnan(different), np.inf, different)


def measure_shift(differences: np.ndarray, tolerance: float) -> Shift:
    """Test the mean of differences (n,) against round-off with a lawful bias of `tolerance`.

    At most one of MAX_BLOCKS parts of the differences, the last ones, is left out to make equal blocks.
    """
    size = -(-len(differences) // MAX_BLOCKS)
    count = len(differences) // size if size else 0
    blocks = differences[: count * size].reshape(count, max(1, size)).mean(axis=1)
    if not np.isfinite(blocks).all():
        return Shift(math.inf, tolerance, math.inf)

    # Halfwidths of the mean under fair signs; the mean of too few blocks may be anything.
    mean = float(blocks.mean()) if count else 0.0
    variance = float(blocks.var()) if count else 0.0
    false_alarm = _halfwidth(variance, count, 2 * math.log(2 / FALSE_ALARM))
    missed = _halfwidth(variance, count, 2 * math.log(1 / MISSED))
    return Shift(mean, tolerance + false_alarm, tolerance + false_alarm + missed)


def _halfwidth(variance: float, count: int, squared: float) -> float:
    """Bound of a mean of `count` blocks, sqrt(squared) self-normalised deviations from its centre."""
    return math.sqrt(variance * squared / (count - squared)) if count > squared else math.inf
