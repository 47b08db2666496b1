"""Delta coder for a series of numbers: differences to a running mean, coded by the level coder.

It is for exponents and steps of rows and columns, where neighbours may be alike: those of one
attention head are, those of an MLP are not. So the rate of the mean is chosen by trial and stored.
float16 numbers are coded as the integers that their bits are, made monotonic in value: a difference
of such integers is about a difference of logarithms.

    payload   1 byte: k, the mean moves by 2^-k of each difference
              2 bytes: the mean before the first number, little-endian, signed
              the differences as one row of levels (level_coder.py)

Shapes: N numbers.
"""

import numpy as np

from stages.common.jit import jit_entry
from stages.pack.entropy import level_coder

SHIFTS = (1, 2, 3, 4, 6, 8)  # values of k to choose from
MAX_NUMBERS = 1 << 20  # longest series: side information is shorter
FRAC_BITS = 8  # fractional bits of the running mean
MODULUS = 65535  # differences wrap around, to stay in what the level coder takes: -32767 to 32767
MAX_VALUE = 32767
HEADER_BYTES = 3


def encode(raw: bytes, item_bytes: int) -> bytes:
    """Encode int8 or little-endian float16 numbers; a ValueError for the NaN with all bits set."""
    values = _to_integers(raw, item_bytes)
    if len(values) > MAX_NUMBERS or values.min(initial=0) < -MAX_VALUE:
        raise ValueError(
            f"a series of {len(values)} numbers cannot be coded: it has more than {MAX_NUMBERS},"
            " or one is not a number"
        )
    median = int(np.sort(values)[len(values) // 2]) if len(values) else 0
    return min((_encode(values, shift, median) for shift in SHIFTS), key=len)


def decode(payload: bytes, item_bytes: int, count: int) -> bytes:
    """Decode `count` numbers; a ValueError when the payload does not hold exactly those."""
    shift = payload[0] if payload else -1
    if shift not in SHIFTS or len(payload) < HEADER_BYTES or count > MAX_NUMBERS:
        raise ValueError(
            f"a series of {count} numbers in {len(payload)} bytes begins with {shift},"
            f" expected one of {SHIFTS}"
        )
    start = int.from_bytes(payload[1:HEADER_BYTES], "little", signed=True)
    row_N = level_coder.decode(payload[HEADER_BYTES:], *_no_exponents(count), 1)[0]
    values_N = row_N.astype(np.int64)
    _delta(values_N, shift, start, True)
    return _from_integers(values_N, item_bytes)


def compile_ahead() -> None:
    """Compile this module's own function; the level coder has its own `compile_ahead`."""
    _delta(np.zeros(1, np.int64), SHIFTS[0], 0, False)


def _encode(values_N: np.ndarray, shift: int, start: int) -> bytes:
    """The payload at one rate of the mean."""
    differences_N = values_N.copy()
    _delta(differences_N, shift, start, False)
    levels_1N = differences_N[None].astype(np.int16)
    coded = level_coder.encode(levels_1N, *_no_exponents(len(values_N)), 1)
    return bytes([shift]) + start.to_bytes(2, "little", signed=True) + coded


def _no_exponents(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Exponents of one row and of `count` columns, all zero."""
    return np.zeros(1, np.int8), np.zeros(count, np.int8)


def _to_integers(raw: bytes, item_bytes: int) -> np.ndarray:
    """The numbers as (N,) int64, in the order of their values.

    The bits of float16 are a sign and a magnitude; the magnitudes of negative numbers are inverted.
    """
    values_N = np.frombuffer(raw, f"<i{item_bytes}").astype(np.int64)
    return np.where(values_N < 0, -1 - (values_N & MAX_VALUE), values_N) if item_bytes == 2 else values_N


def _from_integers(values_N: np.ndarray, item_bytes: int) -> bytes:
    """The inverse of `_to_integers`; a ValueError for a number that does not fit `item_bytes`."""
    if item_bytes == 2:
        values_N = np.where(values_N < 0, -1 - (values_N & MAX_VALUE), values_N)
    narrow_N = values_N.astype(f"<i{item_bytes}")
    if not np.array_equal(narrow_N, values_N):
        raise ValueError(f"a series holds numbers beyond {item_bytes} bytes")
    return narrow_N.tobytes()


@jit_entry
def _delta(values_N: np.ndarray, shift: int, start: int, inverse: bool) -> None:
    """Replace values by their differences to the running mean, or back if `inverse`; in place."""
    mean_q8 = start << FRAC_BITS
    for index in range(len(values_N)):
        expected = (mean_q8 + (1 << (FRAC_BITS - 1))) >> FRAC_BITS
        before = values_N[index]
        after = (before + (expected if inverse else -expected) + MAX_VALUE) % MODULUS - MAX_VALUE
        values_N[index] = after
        value = after if inverse else before
        mean_q8 += ((value << FRAC_BITS) - mean_q8) >> shift
