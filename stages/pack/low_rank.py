"""A low-rank correction of a quantised matrix, as a file stores it (quantise/lqer.py computes it).

Shapes: R rows, C columns, K rank, N = R + C.
"""

from typing import NamedTuple

import numpy as np

MAX_RANK = 16  # largest rank that parameters or a file may ask for


class Correction(NamedTuple):
    """A matrix of rank K: the sum of K outer products of integer vectors, each with a step."""

    levels_KN: np.ndarray  # int8: R levels of the column vector, then C levels of the row vector
    steps_K: np.ndarray  # float32; of the column vector


def correction_matrix(correction: Correction, rows: int) -> np.ndarray:
    """Multiply out a correction of a matrix with R = `rows`; returns (R, C) float32.

    The K products are added in order, so that the sums are the same on every machine. An overflow
    gives an infinity, without a warning.
    """
    levels_KN = correction.levels_KN.astype(np.float32)
    total_RC = np.zeros((rows, levels_KN.shape[1] - rows), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for levels_N, step in zip(levels_KN, correction.steps_K, strict=True):
            total_RC += (levels_N[:rows] * step)[:, None] * levels_N[rows:]
    return total_RC
