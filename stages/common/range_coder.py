"""Range coder for whole symbols, driven by any probability distributions.

After `cumulative_frequencies` all is integer arithmetic. It is Martin's range coder (1979) with a
64-bit interval and carries that propagate into the bytes already written. The binary coder of
stages/pack has 16-bit probabilities, which a vocabulary of 8,192 ids would use up. Here the
frequencies of a distribution sum to 2^32 at most. The excess of a file over the sum of -log2 p is
bounded by `max_overhead_bits`, whatever the distributions are:

* every id gets a frequency of one and floor(p (2^32 - V)) more: at least the share
  p (2^32 - V) / 2^32 of the total, when the p sum to 1 at most;
* an interval of at least 2^56 is cut into as many equal steps as the total, so less than 2^-24 of
  it is lost;
* the last bytes name a number in the interval, which takes less than eight bits more than the
  interval requires.

Shapes: V ids of the vocabulary.
"""

import math

import numpy as np

TOTAL_FREQUENCY = 1 << 32  # upper bound of the sum of a distribution's frequencies
INTERVAL = 1 << 64
MIN_RANGE = 1 << 56  # a range below this is widened by a byte
FINAL_BITS = 8.0  # bound of the bits that ending a file costs
MAX_LOG_PROBABILITY = 1e-9  # 0 up to rounding; more is an error


def cumulative_frequencies(log_probabilities: np.ndarray) -> np.ndarray:
    """Cumulative frequencies (..., V + 1), int64, of natural log-probabilities (..., V), float64.

    Every frequency is 1 at least. A function of the floats alone: the same floats give the same
    integers. A ValueError for values that are not log-probabilities.
    """
    if not (log_probabilities <= MAX_LOG_PROBABILITY).all():  # NaN fails too
        worst = float(log_probabilities.max())
        raise ValueError(f"a log-probability is {worst}, expected numbers of 0 or less")
    vocab_size = log_probabilities.shape[-1]
    shares = np.exp(log_probabilities)
    shares *= TOTAL_FREQUENCY - vocab_size
    cumulative = np.zeros((*shares.shape[:-1], vocab_size + 1), dtype=np.int64)
    np.cumsum(shares.astype(np.int64) + 1, axis=-1, out=cumulative[..., 1:])
    return cumulative


def max_overhead_bits(symbols: int, vocab_size: int) -> float:
    """Bound of the coded bits above the sum of -log2 p, for distributions that sum to 1."""
    each = math.log1p(vocab_size / (TOTAL_FREQUENCY - vocab_size)) - math.log1p(-TOTAL_FREQUENCY / MIN_RANGE)
    return symbols * each / math.log(2) + FINAL_BITS


class RangeEncoder:
    """Encoder of symbols to bytes."""

    def __init__(self) -> None:
        self.low = 0
        self.range = INTERVAL
        self.written = bytearray()

    def code(self, cumulative: np.ndarray, symbol: int | None) -> int:
        """Encode `symbol` with the cumulative frequencies (V + 1,) of its distribution; returns it."""
        assert symbol is not None
        step = self.range // int(cumulative[-1])
        self.low += step * int(cumulative[symbol])
        self.range = step * int(cumulative[symbol + 1] - cumulative[symbol])
        self._carry()
        while self.range < MIN_RANGE:
            self.written.append(self.low >> 56)
            self.low = (self.low << 8) % INTERVAL
            self.range <<= 8
        return symbol

    def finish(self) -> bytes:
        """All bytes. The last are the fewest that name a number in the interval when zeros follow."""
        for count in range(9):
            shift = 64 - 8 * count
            value = (self.low + self.range - 1) >> shift << shift
            if value >= self.low:
                self.low = value
                self._carry()
                return bytes(self.written) + self.low.to_bytes(8, "big")[:count]
        raise AssertionError("an interval contains its own end")

    def _carry(self) -> None:
        """Propagate an overflow of `low` into the bytes already written."""
        if self.low >= INTERVAL:
            self.low -= INTERVAL
            position = len(self.written) - 1
            while self.written[position] == 255:
                self.written[position] = 0
                position -= 1
            self.written[position] += 1


class RangeDecoder:
    """Decoder of bytes to symbols; bytes after the end read as zeros."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload
        self.position = 8
        self.range = INTERVAL
        self.offset = int.from_bytes(
            payload[:8].ljust(8, b"\0"), "big"
        )  # of the coded number in the interval

    def code(self, cumulative: np.ndarray, symbol: int | None = None) -> int:
        """Decode the next symbol with the cumulative frequencies (V + 1,) of its distribution.

        `symbol` is there so that encoder and decoder have one signature; it must be None.
        """
        assert symbol is None
        total = int(cumulative[-1])
        step = self.range // total
        symbol = int(np.searchsorted(cumulative, min(self.offset // step, total - 1), side="right")) - 1
        self.offset -= step * int(cumulative[symbol])
        self.range = step * int(cumulative[symbol + 1] - cumulative[symbol])
        while self.range < MIN_RANGE:
            following = self.payload[self.position] if self.position < len(self.payload) else 0
            self.offset = self.offset << 8 | following
            self.position += 1
            self.range <<= 8
        return symbol
