"""One direction that the rows of a matrix share, as those of an embedding do: what it predicts of a row, and how it is learnt.

It is learnt by Oja's rule (1982) from the rows that are done, and a row's share in it by least squares from the row's levels so far.
Integers only.

Shapes: C columns.
"""

from typing import NamedTuple

import numpy as np

from stages.common.jit import inner

PREDICTION_POINT = 12  # bits behind the point
MOST = 4095 << PREDICTION_POINT  # of what is predicted; larger levels are taken for this
FIRST_DIRECTION = 1 << (PREDICTION_POINT - 2)
NOISE, POWER, WEIGHT, USEFUL = range(4)  # of what is known
# Of residuals' squares (of 256), of shares' squares (of 65,536), and what all shares' squares count for at first: directions learn slowly.
FIRST_FACTS = np.array([256, 6000, 2_000_000, 0], np.int64)


class Direction(NamedTuple):
    """What is known; compiled code takes it apart."""

    along_C: np.ndarray  # int64
    facts: np.ndarray  # int64: NOISE, POWER, WEIGHT, USEFUL


def direction(columns: int) -> Direction:
    """What is believed at first."""
    return Direction(np.full(columns, FIRST_DIRECTION, np.int64), FIRST_FACTS.copy())


@inner
def bounded(level: int) -> int:
    """A level as directions know it, so that no sum of products overflows."""
    if level > 4095:
        return 4095
    return max(level, -4095)


@inner
def predicted(share: int, along: int) -> int:
    """What a share in the direction, of 256, makes of a column's level."""
    return min(max((share * along) >> 8, -MOST), MOST)


@inner
def share_of(products: int, squares: int) -> int:
    """Of a direction in a row, by least squares; of 256."""
    return min(max((products << 8) // squares, -16383), 16383)


@inner
def doubt(facts: np.ndarray) -> int:
    """What a row's squares start from, which draws its share to zero: the variance of residuals over that of shares."""
    return min((facts[NOISE] << 16) // (facts[POWER] + 1), np.int64(1) << 40) + 1


@inner
def learn_direction(row: int, levels_C: np.ndarray, saved: int, known: Direction) -> None:
    """Oja's rule: the direction turns to what it left of a row, the more the larger the row's share in it is.

    `saved` is by how much the row's levels were larger than their differences to what was predicted.
    """
    along_C, facts = known
    products, squares = np.int64(0), doubt(facts)
    for column in range(len(levels_C)):
        along = along_C[column] >> 4
        products += along * bounded(np.int64(levels_C[column]))
        squares += (along * along) >> 8
    share = share_of(products, squares)
    decay = 0
    while decay < 7 and (row + 2) >> (decay + 1):
        decay += 1
    facts[USEFUL] += saved - (facts[USEFUL] >> 6)
    facts[WEIGHT] = min(facts[WEIGHT] + share * share, (facts[POWER] + 1) << 10)
    facts[POWER] += (share * share - facts[POWER]) >> decay
    gain = (share << 20) // facts[WEIGHT]
    noise = np.int64(0)
    for column in range(len(levels_C)):
        along = along_C[column]
        error = (bounded(np.int64(levels_C[column])) << PREDICTION_POINT) - predicted(share, along)
        noise += (error >> 8) * (error >> 8)
        along_C[column] = min(max(along + ((gain * error + 2048) >> 12), -MOST), MOST)
    facts[NOISE] = max(1, facts[NOISE] + ((noise // max(len(levels_C), 1) - facts[NOISE]) >> decay))
