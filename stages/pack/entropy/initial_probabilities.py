"""What the coder believes of magnitudes before it has seen any: in each context of an expected magnitude, a normal distribution.

Shapes: K contexts, U decisions of a magnitude.
"""

import functools
import itertools
from decimal import Context, Decimal, localcontext

import numpy as np

from stages.pack.entropy.binary_coder import ONE

UNARY = 24  # decisions of a magnitude's unary part; what is longer goes on in Elias's gamma code
RAW_BITS_FROM = 3  # log2 of an expected magnitude from which on its lowest bits are coded as they are
SCALES, SCALES_PER_OCTAVE, SMALLEST = (
    56,
    4,
    -6,
)  # contexts of the expected magnitude: four evenly in each octave, from 2^-6 on
RAW_SCALE = SCALES_PER_OCTAVE * (RAW_BITS_FROM - SMALLEST)
SIGNS = 2 * SCALES  # the context of signs, behind those of even and of odd levels
CONTEXTS = SIGNS + 2  # the last is the neighbour of the one before it
RARE = ONE >> 10  # what is at first believed the least chance
TINY = Decimal("1e-10")
PI = Decimal("3.14159265358979323846")


@functools.cache
def first_chances(stride: int) -> np.ndarray:
    """What is believed at first: the chances (K, U) that a magnitude goes on, for normal values; int64 of ONE.

    A level l of values whose mean magnitude is m has a chance in proportion to exp(-l^2 / (pi m^2)). Decimal's functions are rounded
    correctly, and so the table is the same on every machine.
    """
    chances_KU = np.full((CONTEXTS, UNARY), ONE // 2, np.int64)
    with localcontext(Context(prec=30)):
        for scale in range(SCALES):
            octave, quarter = divmod(scale, SCALES_PER_OCTAVE)
            squared = (
                Decimal(2) ** (SMALLEST + octave) * (SCALES_PER_OCTAVE + quarter) / SCALES_PER_OCTAVE
            ) ** 2
            for odd in range(stride):
                # Where the lowest bits are coded as they are, every octave is like the one below it.
                alike = (
                    scale
                    if scale < RAW_SCALE + SCALES_PER_OCTAVE * (stride - 1)
                    else scale - SCALES_PER_OCTAVE
                )
                first = SCALES * odd
                chances_KU[first + scale] = (
                    _chances(squared, stride, odd) if alike == scale else chances_KU[first + alike]
                )
    return chances_KU


def _chances(squared: Decimal, stride: int, odd: int) -> list[int]:
    """The chances (U) that magnitudes odd, odd + stride, ... go on, for normal values with this square of their mean magnitude."""
    power = (-1 / (PI * squared)).exp()
    weight, factor = power**odd, power ** (stride * (stride + 2 * odd))
    weights = [weight if odd else weight / 2]
    for _ in range(3 * UNARY):
        weight, factor = weight * max(factor, TINY), factor * power ** (2 * stride * stride)
        weights.append(weight)
    tails = list(itertools.accumulate(reversed(weights)))[::-1]
    return [min(max(int(ONE * tails[k + 1] / tails[k]), RARE), ONE - RARE) for k in range(UNARY)]
