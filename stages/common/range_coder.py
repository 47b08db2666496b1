"""A range coder of whole symbols, driven by probabilities; integers only behind `cumulative`.

Martin's range coder (1979) with 64 bits of interval and carries that run back into the bytes already written. The binary coder of
stages/pack has 16 bits of probability, which a vocabulary of 8,192 ids would use up; here a distribution has 2^32 parts. What a file costs
above the sum of -log2 p is bounded by `overhead_bits`, whatever the distributions:

* every id gets one part and, of the rest, floor(p (2^32 - V)): at least the share p (2^32 - V) / 2^32 when the p sum to 1 at most;
* an interval of at least 2^56 is cut into that many equal steps, so that less than the 2^-24th of it is lost;
* the last bytes name a number in an interval, which takes less than eight bits more than the interval says.
"""

import math

import numpy as np

PARTS = 1 << 32  # of a distribution
INTERVAL = 1 << 64
SMALLEST = 1 << 56  # an interval below this is widened by a byte
ENDING_BITS = 8.0
LARGEST_LOG = 1e-9  # a log-probability above 0 by more than rounding is none


def cumulative(log_probabilities: np.ndarray) -> np.ndarray:
    """Where the parts of each id begin, and the end: (..., V + 1) int64 from natural logs (..., V) float64, every id having a part.

    A function of the floats alone: the same floats give the same integers. A ValueError for what is no log-probability.
    """
    if not (log_probabilities <= LARGEST_LOG).all():  # NaN too
        worst = float(log_probabilities.max())
        raise ValueError(f"a log-probability is {worst}, expected numbers of 0 or less")
    vocab_size = log_probabilities.shape[-1]
    parts = np.exp(log_probabilities)
    parts *= PARTS - vocab_size
    starts = np.zeros((*parts.shape[:-1], vocab_size + 1), dtype=np.int64)
    np.cumsum(parts.astype(np.int64) + 1, axis=-1, out=starts[..., 1:])
    return starts


def overhead_bits(symbols: int, vocab_size: int) -> float:
    """What the coded bits of so many symbols exceed the sum of -log2 p by, at most, when every distribution sums to 1."""
    each = math.log1p(vocab_size / (PARTS - vocab_size)) - math.log1p(-PARTS / SMALLEST)
    return symbols * each / math.log(2) + ENDING_BITS


class Encoder:
    """Symbols to bytes."""

    def __init__(self) -> None:
        self.low, self.range = 0, INTERVAL
        self.written = bytearray()

    def code(self, starts: np.ndarray, symbol: int | None) -> int:
        """Code `symbol` under its distribution, (V + 1,) of `cumulative`, and return it."""
        assert symbol is not None
        step = self.range // int(starts[-1])
        self.low += step * int(starts[symbol])
        self.range = step * int(starts[symbol + 1] - starts[symbol])
        self._carry()
        while self.range < SMALLEST:
            self.written.append(self.low >> 56)
            self.low = (self.low << 8) % INTERVAL
            self.range <<= 8
        return symbol

    def finish(self) -> bytes:
        """All bytes; the last are the fewest that lie in the interval when zeros follow."""
        for count in range(9):
            shift = 64 - 8 * count
            value = (self.low + self.range - 1) >> shift << shift
            if value >= self.low:
                self.low = value
                self._carry()
                return bytes(self.written) + self.low.to_bytes(8, "big")[:count]
        raise AssertionError("an interval holds its own end")

    def _carry(self) -> None:
        if self.low >= INTERVAL:
            self.low -= INTERVAL
            at = len(self.written) - 1
            while self.written[at] == 255:
                self.written[at] = 0
                at -= 1
            self.written[at] += 1


class Decoder:
    """Bytes to symbols; what is missing at the end reads as zeros."""

    def __init__(self, payload: bytes) -> None:
        self.payload, self.position = payload, 8
        self.range = INTERVAL
        self.offset = int.from_bytes(
            payload[:8].ljust(8, b"\0"), "big"
        )  # of the coded number in the interval

    def code(self, starts: np.ndarray, symbol: int | None = None) -> int:
        """The next symbol under its distribution; `symbol`, which an encoder is told, must be None."""
        assert symbol is None
        total = int(starts[-1])
        step = self.range // total
        symbol = int(np.searchsorted(starts, min(self.offset // step, total - 1), side="right")) - 1
        self.offset -= step * int(starts[symbol])
        self.range = step * int(starts[symbol + 1] - starts[symbol])
        while self.range < SMALLEST:
            following = self.payload[self.position] if self.position < len(self.payload) else 0
            self.offset = self.offset << 8 | following
            self.position += 1
            self.range <<= 8
        return symbol
