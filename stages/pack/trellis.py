"""Trellis-coded quantisation: which reconstruction levels a value may take depends on the values before it.

All levels are the integers, in units of a step. They fall into four cosets D0..D3, by their remainder modulo 4. A trellis of S states
walks along a row: in an even state the next level is even (D0 or D2), in an odd state odd (D1 or D3), and which of the two it is decides
the next state. A value is thus coded among levels two steps apart, while the path as a whole may come closer to the values than any
such grid: of the 0.25 bit that a uniform grid stays above the rate-distortion bound, 8 states win back 0.16.

    state s, level l = 2k + (s mod 2); branch b = k mod 2; next state = f(s, b)

(Marcellin and Fischer 1990; entropy-coded: Fischer and Wang 1992, Marcellin 1994; VVC's dependent quantisation is the same idea.) The codes
are Ungerboeck's for amplitude modulation (1982, table I), given by two parity-check polynomials. One state is the uniform grid: b is the
parity of the level, and every level may follow every other.
"""

import functools
from typing import NamedTuple

import numpy as np

# Parity checks (h0, h1) over GF(2), constant term lowest: sum of h0_i z0(t-i) + h1_i z1(t-i) = 0, where z0 and z1 are a coset's two bits.
UNGERBOECK = {
    4: (0o5, 0o2),
    8: (0o13, 0o4),
    16: (0o23, 0o4),
    32: (0o45, 0o10),
    64: (0o103, 0o24),
    128: (0o235, 0o126),
    256: (0o515, 0o362),
}
STATES = (1, *UNGERBOECK)


class Trellis(NamedTuple):
    """The tables of a code with S states."""

    next_S2: np.ndarray  # int64: the state after branch 0 and 1
    into_S2: np.ndarray  # int64: the two steps that end in a state, each as 2 * its state + its branch
    stride: int  # between the levels that a state may choose from: 2, and 1 on the uniform grid

    @property
    def states(self) -> int:
        """S."""
        return len(self.next_S2)


@functools.cache
def trellis(states: int) -> Trellis:
    """The code with so many states; a ValueError when there is none."""
    if states not in STATES:
        raise ValueError(f"no trellis of {states} states; known are {', '.join(map(str, STATES))}")
    if states == 1:
        return Trellis(np.zeros((1, 2), np.int64), np.array([[0, 1]]), 1)
    h0, h1 = UNGERBOECK[states]
    # The parity check as a shift register: bit 0 of the state is the coming z0; both bits of a coset feed back where their polynomial says.
    following = [
        [(state >> 1) ^ (h0 >> 1) * (state & 1) ^ (h1 >> 1) * branch for branch in (0, 1)]
        for state in range(states)
    ]
    next_S2 = np.array(following, np.int64)
    into_S2 = np.argsort(next_S2, axis=None, kind="stable").reshape(
        states, 2
    )  # every state is the end of two steps
    return Trellis(next_S2, into_S2, 2)
