"""A low-rank correction of what rounding left of a matrix, as a file holds it (quantise/lqer.py makes it)."""

from typing import NamedTuple

import numpy as np

MAX_RANK = 16  # that a file may declare


class Correction(NamedTuple):
    """A matrix of rank K, the sum of K outer products of integers, each with its step."""

    levels_KN: np.ndarray  # int8: N = R + C, the rows' side and then the columns'
    steps_K: np.ndarray  # float32


def product(correction: Correction, rows: int) -> np.ndarray:
    """The correction as a matrix (R, C), float32: sums in the order of the components, the same on every machine."""
    levels_KN = correction.levels_KN.astype(np.float32)
    total_RC = np.zeros((rows, levels_KN.shape[1] - rows), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for levels_N, step in zip(levels_KN, correction.steps_K, strict=True):
            total_RC += (levels_N[:rows] * step)[:, None] * levels_N[rows:]
    return total_RC
