"""Adaptive binary arithmetic coder.

It uses integers only, so that it gives the same bytes on every machine.

It is the carryless coder of PAQ (Mahoney 2002) with a 40-bit interval and 16-bit probabilities. A
probability is an adaptive counter: it moves by 1/n of each error, and by 1/4096 once n is large. A
decision whose context is between two neighbouring contexts is coded with the probability on the
line between their two counters, as in PAQ's secondary estimation (APM), and updates both.

Encoding and decoding are one function: an encoder is given each bit, a decoder returns it.

Fixed point: a suffix _qN says that a number has N fractional bits, e.g. 1 << 22 is 1.0 in q22.

Shapes: K contexts, U binary decisions in each context, B bytes.
"""

from typing import Any, NamedTuple

import numpy as np

from stages.common.jit import jit_inline, jit_internal
from stages.pack.entropy.records import new_record

INTERVAL_BITS = 40
INTERVAL_MASK = (1 << INTERVAL_BITS) - 1
TOP_BYTE_SHIFT = INTERVAL_BITS - 8
FLUSH_BYTES = INTERVAL_BITS // 8  # bytes of the interval, which a decoder reads ahead

PROB_BITS = 22  # fractional bits of a counter's probability; the coder uses the upper 16
PROB_ONE = 1 << PROB_BITS
PROB_MIN = 1 << (PROB_BITS - 16)  # a counter stays this far from 0 and 1: one unit of the coder's 16 bits
# The probability of a coded decision stays this far from 0 and 1 (q16): it costs between 0.0005 and
# 11.4 bits.
CODED_PROB_MIN_Q16 = 24
# 1/2 in q16. Typed: with a plain constant numba would compile the functions that take it a second
# time.
HALF_Q16: Any = np.int64(32768)

BLEND_BITS = 4  # fractional bits of a position between two contexts
BLEND_ONE = 1 << BLEND_BITS
COUNT_LIMIT = 4095  # a counter's count of decisions stops here: its rate is 1/4096 from then on
RATE_BITS = 20
# 1 / (n + 1.5) in q20 for counts n. One division, correctly rounded in IEEE 754: the same on every
# machine.
RATES_Q20 = ((1 << RATE_BITS) / (np.arange(COUNT_LIMIT + 1) + 1.5)).astype(np.int64)
ROUNDING = 1 << (BLEND_BITS + RATE_BITS - 1)  # half a unit of a counter's update before its shift


class CoderState:
    """Record of a coder's registers."""

    low: int  # first number of the interval
    high: int  # last number of the interval
    code: int  # decoder only: the 40 bits of the stream at `position`
    position: int  # bytes written or read so far; counts on beyond the end of the buffer


class BinaryCoder(NamedTuple):
    """An encoder or a decoder of one stream."""

    state: CoderState
    buffer_B: np.ndarray  # uint8: bytes to write or to read
    decoding: bool


class Counters(NamedTuple):
    """Adaptive probabilities."""

    prob_q22_KU: np.ndarray  # int64: probability that a decision is 1
    count_q4_KU: np.ndarray  # int64: decisions this probability is learnt from


@jit_internal
def code_bit(bit: int, prob_q16: int, coder: BinaryCoder) -> int:
    """Encode `bit`, or decode it and ignore the argument; returns the bit.

    `prob_q16` is the probability that it is 1.
    """
    state, buffer_B, decoding = coder
    low = state.low
    high = state.high

    # Cut the interval in proportion to the probabilities: the lower part is 1.
    middle = low + ((high - low) >> 16) * prob_q16
    if decoding:
        bit = 1 if state.code <= middle else 0
    if bit:
        high = middle
    else:
        low = middle + 1

    # Shift out leading bytes on which both ends agree. The stream goes on with zeros after the end
    # of the buffer.
    while (low ^ high) >> TOP_BYTE_SHIFT == 0:
        position = state.position
        if decoding:
            following: Any = np.int64(buffer_B[position]) if position < len(buffer_B) else np.int64(0)
            state.code = ((state.code << 8) & INTERVAL_MASK) | following
        elif position < len(buffer_B):
            buffer_B[position] = high >> TOP_BYTE_SHIFT
        state.position = position + 1
        low = (low << 8) & INTERVAL_MASK
        high = ((high << 8) & INTERVAL_MASK) | 255

    state.low = low
    state.high = high
    return bit


@jit_inline
def code_adaptive_bit(
    bit: int, context: int, blend_q4: int, decision: int, counters: Counters, coder: BinaryCoder
) -> int:
    """Encode or decode one decision by its counters, and update these; returns the bit.

    The probability is interpolated: `blend_q4` of the way from `context` to `context + 1`.
    """
    prob_q22_KU = counters.prob_q22_KU
    prob_q22 = prob_q22_KU[context, decision]
    prob_q22 += ((prob_q22_KU[context + 1, decision] - prob_q22) * blend_q4) >> BLEND_BITS

    prob_q16 = min(max(prob_q22 >> (PROB_BITS - 16), CODED_PROB_MIN_Q16), 65536 - CODED_PROB_MIN_Q16)
    bit = code_bit(bit, prob_q16, coder)

    error_q22 = (PROB_ONE if bit else 0) - prob_q22
    _update_counter(error_q22, BLEND_ONE - blend_q4, context, decision, counters)
    _update_counter(error_q22, blend_q4, context + 1, decision, counters)
    return bit


@jit_internal
def _update_counter(error_q22: int, weight_q4: int, context: int, decision: int, counters: Counters) -> None:
    """Move a counter by its weight in an error, at the rate of its count."""
    prob_q22_KU, count_q4_KU = counters
    count_q4 = count_q4_KU[context, decision]
    step_q22 = (error_q22 * weight_q4 * RATES_Q20[count_q4 >> BLEND_BITS] + ROUNDING) >> (
        BLEND_BITS + RATE_BITS
    )
    prob_q22 = prob_q22_KU[context, decision] + step_q22
    prob_q22_KU[context, decision] = min(max(prob_q22, PROB_MIN), PROB_ONE - PROB_MIN)
    count_q4_KU[context, decision] = min(count_q4 + weight_q4, COUNT_LIMIT << BLEND_BITS)


@jit_internal
def code_raw_bits(number: int, bits: int, coder: BinaryCoder) -> int:
    """Encode or decode the lowest `bits` bits of a number, each with probability 1/2; returns them."""
    value = 0
    for place in range(bits - 1, -1, -1):
        value = 2 * value + code_bit((number >> place) & 1, HALF_Q16, coder)
    return value


def encoder_state() -> CoderState:
    """State at the start of encoding."""
    return new_record(CoderState, high=INTERVAL_MASK)


def decoder_state(payload: bytes) -> CoderState:
    """State at the start of decoding: the first bytes are read already."""
    first = payload[:FLUSH_BYTES].ljust(FLUSH_BYTES, b"\0")
    code = int.from_bytes(first, "big")
    return new_record(CoderState, high=INTERVAL_MASK, code=code, position=FLUSH_BYTES)


def final_bytes(state: CoderState) -> bytes:
    """Last bytes of a stream: the fewest that name a number of the interval when zeros follow."""
    low = int(state.low)
    high = int(state.high)
    for count in range(FLUSH_BYTES + 1):
        shift = INTERVAL_BITS - 8 * count
        value = high >> shift << shift
        if value >= low:
            return (value >> shift).to_bytes(count, "big")
    raise AssertionError("an interval contains its own end")
