"""Initial probabilities of a magnitude's decisions: those of a normal distribution.

Contexts are expected magnitudes, four to an octave. A magnitude's unary code asks "is it larger
than k?" for k = 0, 1, ...

Shapes: K contexts, U decisions of a magnitude's unary code.
"""

import functools
import itertools
from decimal import Context, Decimal, localcontext

import numpy as np

from stages.pack.entropy.binary_coder import PROB_ONE

UNARY = 24  # decisions of a magnitude's unary part; larger magnitudes continue in Elias's gamma code
RAW_BITS_FROM = 3  # octave of the expected magnitude from which on its lowest bits are coded raw

# Contexts of the expected magnitude: evenly spaced in each octave, from 2^MIN_OCTAVE on.
MAGNITUDE_CONTEXTS = 56
CONTEXTS_PER_OCTAVE = 4
MIN_OCTAVE = -6
FIRST_RAW_CONTEXT = CONTEXTS_PER_OCTAVE * (RAW_BITS_FROM - MIN_OCTAVE)

# Rows of the table: contexts of even magnitudes, of odd ones, of signs, and a neighbour of the last
# for interpolation.
SIGN_CONTEXT = 2 * MAGNITUDE_CONTEXTS
CONTEXTS = SIGN_CONTEXT + 2

MIN_PROB = PROB_ONE >> 10  # no initial probability is closer than 1/1024 to 0 or 1
MIN_FACTOR = Decimal("1e-10")  # floor of the ratio of neighbouring weights: no tail becomes zero
PI = Decimal("3.14159265358979323846")


@functools.cache
def initial_probs(stride: int) -> np.ndarray:
    """Initial probabilities that a magnitude goes on, for normal values; (K, U) int64 in q22.

    `stride` is the distance of the levels that a trellis state allows: 2, or 1 without a trellis. A
    level l of normal values with mean magnitude m has a probability proportional to exp(-l^2 / (pi
    m^2)). Decimal rounds its functions correctly, so the table is the same on every machine.
    """
    probs_KU = np.full((CONTEXTS, UNARY), PROB_ONE // 2, np.int64)
    with localcontext(Context(prec=30)):
        for position in range(MAGNITUDE_CONTEXTS):
            octave, quarter = divmod(position, CONTEXTS_PER_OCTAVE)
            mean = Decimal(2) ** (MIN_OCTAVE + octave) * (CONTEXTS_PER_OCTAVE + quarter) / CONTEXTS_PER_OCTAVE

            # With the lowest bits coded raw, the rest of a magnitude is distributed as in the
            # octave below.
            is_raw = position >= FIRST_RAW_CONTEXT + CONTEXTS_PER_OCTAVE * (stride - 1)
            for odd in range(stride):
                context = MAGNITUDE_CONTEXTS * odd + position
                if is_raw:
                    probs_KU[context] = probs_KU[context - CONTEXTS_PER_OCTAVE]
                else:
                    probs_KU[context] = _normal_probs(mean**2, stride, odd)
    return probs_KU


def _normal_probs(mean_squared: Decimal, stride: int, odd: int) -> list[int]:
    """Probabilities (U,), in q22, that a magnitude goes on beyond odd, odd + stride, ...

    `mean_squared` is the square of the mean magnitude.
    """
    # Weights of the magnitudes; the one of 0 is halved, since all others stand for two levels, +l
    # and -l. Neighbours have the ratio `factor`, which itself shrinks by a constant ratio: exp(-l^2
    # c) is a Gaussian.
    base = (-1 / (PI * mean_squared)).exp()
    weight = base**odd
    factor = base ** (stride * (stride + 2 * odd))
    weights = [weight if odd else weight / 2]
    for _ in range(3 * UNARY):
        weight *= max(factor, MIN_FACTOR)
        factor *= base ** (2 * stride * stride)
        weights.append(weight)

    tails = list(itertools.accumulate(reversed(weights)))[::-1]
    probs = [int(PROB_ONE * tails[k + 1] / tails[k]) for k in range(UNARY)]
    return [min(max(prob, MIN_PROB), PROB_ONE - MIN_PROB) for prob in probs]
