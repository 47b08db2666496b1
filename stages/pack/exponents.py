"""Factors of a matrix's rows and columns: powers of 2^(1/8), stored as signed bytes.

A factor is 2^(exponent / 8). The exponents of a matrix cost next to nothing once coded.
"""

import numpy as np

EXPONENTS_PER_OCTAVE = 8
MAX_EXPONENT = 127  # exponents are signed bytes
# 2^(i / 8). Written out, because a library's power function may differ from machine to machine in
# the last bit.
ROOTS = np.array(
    [1.0, 1.0905077, 1.1892071, 1.2968396, 1.4142135, 1.5422108, 1.6817929, 1.8340081], np.float32
)


def exponents_to_factors(exponents: np.ndarray) -> np.ndarray:
    """Powers 2^(e / 8) of integer exponents (any shape), float32; the same on every machine.

    >>> exponents_to_factors(np.array([0, 8, -16, 4]))
    array([1.       , 2.       , 0.25     , 1.4142135], dtype=float32)
    """
    wide = exponents.astype(np.int32)
    return np.ldexp(ROOTS[wide % EXPONENTS_PER_OCTAVE], wide // EXPONENTS_PER_OCTAVE)


def factors_to_exponents(factors: np.ndarray) -> np.ndarray:
    """Exponents of the powers of 2^(1/8) nearest to positive factors (any shape), int8."""
    exponents = np.rint(EXPONENTS_PER_OCTAVE * np.log2(factors))
    return np.clip(exponents, -MAX_EXPONENT, MAX_EXPONENT).astype(np.int8)
