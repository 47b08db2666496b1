"""A series of numbers of which neighbours may be alike, as differences to a running mean, for the arithmetic coder.

The exponents and steps of rows and columns are such: those of one attention head lie together, those of an MLP do not. So the mean's rate
is chosen by trial, and stands first in the payload, and the mean's start after it. float16 numbers are taken for the integers that their
bits are in order; a difference of integers is one in the logarithm, about.

    payload   1 byte: k, the mean moves by 2^-k of each difference; 2 bytes: where it starts; the differences (level_coder.py)
"""

import numpy as np

from stages.common.jit import outer
from stages.pack.entropy import level_coder

SHIFTS = (1, 2, 3, 4, 6, 8)  # k
LONGEST = 1 << 20  # numbers: more is no side information
POINT = 8  # bits of the mean behind the point
CIRCLE, HALF = 65535, 32767  # differences are taken around the circle of what the coder can code
LEAD_BYTES = 3


def encode(raw: bytes, item_bytes: int) -> bytes:
    """The payload of a series of int8 or little-endian float16 numbers, which are none with all bits set."""
    values = _integers(raw, item_bytes)
    if len(values) > LONGEST or values.min(initial=0) < -HALF:
        raise ValueError(
            f"a series of {len(values)} numbers cannot be coded: there are more than {LONGEST}, or one is none"
        )
    start = int(np.sort(values)[len(values) // 2]) if len(values) else 0
    return min((_encode(values, shift, start) for shift in SHIFTS), key=len)


def decode(payload: bytes, item_bytes: int, count: int) -> bytes:
    """So many numbers; a ValueError when the payload does not hold exactly those."""
    shift, start = payload[0] if payload else -1, int.from_bytes(payload[1:LEAD_BYTES], "little", signed=True)
    if shift not in SHIFTS or len(payload) < LEAD_BYTES or count > LONGEST:
        raise ValueError(
            f"a series of {count} numbers in {len(payload)} bytes begins with {shift}, expected one of {SHIFTS}"
        )
    values = level_coder.decode(payload[LEAD_BYTES:], np.zeros(1, np.int8), np.zeros(count, np.int8), 1)[
        0
    ].astype(np.int64)
    _follow(values, shift, start, True)
    return _raw(values, item_bytes)


def compile_ahead() -> None:
    """Have what compiled code there is here compiled."""
    _follow(np.zeros(1, np.int64), SHIFTS[0], 0, False)


def _encode(values: np.ndarray, shift: int, start: int) -> bytes:
    differences = values.copy()
    _follow(differences, shift, start, False)
    coded = level_coder.encode(
        differences[None].astype(np.int16), np.zeros(1, np.int8), np.zeros(len(values), np.int8), 1
    )
    return bytes([shift]) + start.to_bytes(2, "little", signed=True) + coded


def _integers(raw: bytes, item_bytes: int) -> np.ndarray:
    values = np.frombuffer(raw, f"<i{item_bytes}").astype(np.int64)
    return np.where(values < 0, -1 - (values & HALF), values) if item_bytes == 2 else values


def _raw(values: np.ndarray, item_bytes: int) -> bytes:
    """The inverse of _integers; a ValueError for what is not of so many bytes."""
    if item_bytes == 2:
        values = np.where(values < 0, -1 - (values & HALF), values)
    narrow = values.astype(f"<i{item_bytes}")
    if not np.array_equal(narrow, values):
        raise ValueError(f"a series holds numbers beyond {item_bytes} bytes")
    return narrow.tobytes()


@outer
def _follow(values: np.ndarray, shift: int, start: int, back: bool) -> None:
    """Differences to the running mean instead of the values, or the values again; in place."""
    mean = start << POINT
    for index in range(len(values)):
        expected = (mean + (1 << (POINT - 1))) >> POINT
        given = values[index]
        made = (given + (expected if back else -expected) + HALF) % CIRCLE - HALF
        values[index] = made
        mean += (((made if back else given) << POINT) - mean) >> shift
