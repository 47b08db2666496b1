"""Trellis-coded quantisation: which levels a value may take depends on the levels before it.

Levels are the integers, in units of a step. They fall into four cosets D0..D3 by their remainder
modulo 4. A trellis of S states walks along a row. In an even state the next level is even (D0 or
D2), in an odd state odd (D1 or D3); which of the two cosets it is from decides the next state. A
value is thus coded among levels two steps apart, while the path as a whole may come closer to the
values than any such grid. Of the 0.25 bit that a uniform grid needs above the rate-distortion
bound, 8 states win back 0.16.

    state s, level l = 2k + (s mod 2); branch b = k mod 2; next state = f(s, b)

Sources: Marcellin and Fischer 1990; entropy-coded: Fischer and Wang 1992, Marcellin 1994. VVC's
dependent quantisation is the same idea. The codes are Ungerboeck's for amplitude modulation (1982,
table I), given by two parity-check polynomials. One state is the uniform grid: b is the parity of
the level, and every level may follow every other.

Shapes: S states.
"""

import functools
from typing import NamedTuple

import numpy as np

# Parity checks (h0, h1) over GF(2) by number of states, constant term lowest. With z0 and z1 the
# two bits of a coset: sum of h0_i z0(t-i) + h1_i z1(t-i) = 0.
UNGERBOECK_CHECKS = {
    4: (0o5, 0o2),
    8: (0o13, 0o4),
    16: (0o23, 0o4),
    32: (0o45, 0o10),
    64: (0o103, 0o24),
    128: (0o235, 0o126),
    256: (0o515, 0o362),
}
STATE_COUNTS = (1, *UNGERBOECK_CHECKS)


class Trellis(NamedTuple):
    """Transition tables of a trellis."""

    next_S2: np.ndarray  # int64: the state after branch 0 and after branch 1
    incoming_S2: np.ndarray  # int64: the two transitions into a state, each as 2 * state before + branch
    stride: int  # distance between the levels that a state allows: 2, or 1 on the uniform grid

    @property
    def states(self) -> int:
        """S."""
        return len(self.next_S2)


@functools.cache
def build_trellis(states: int) -> Trellis:
    """Build the trellis of S states; a ValueError when there is no code of that size."""
    if states not in STATE_COUNTS:
        raise ValueError(f"no trellis of {states} states; known are {', '.join(map(str, STATE_COUNTS))}")
    if states == 1:
        return Trellis(np.zeros((1, 2), np.int64), np.array([[0, 1]]), 1)

    # The parity check as a shift register. Bit 0 of the state is the next z0; both bits of a coset
    # feed back where their polynomials have a term.
    h0, h1 = UNGERBOECK_CHECKS[states]
    state_S1 = np.arange(states, dtype=np.int64)[:, None]
    branch_2 = np.arange(2)
    next_S2 = (state_S1 >> 1) ^ (h0 >> 1) * (state_S1 & 1) ^ (h1 >> 1) * branch_2

    # Every state is the end of two transitions: sorted by their end, they are pairs.
    incoming_S2 = np.argsort(next_S2, axis=None, kind="stable").reshape(states, 2)
    return Trellis(next_S2, incoming_S2, 2)
