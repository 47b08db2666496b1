"""Paired bootstrap over documents: compares two ledgers of the same validation stream.

It detects differences far smaller than the scatter between seeds.
"""

import math
from typing import NamedTuple

import numpy as np


class Difference(NamedTuple):
    """Bits per byte of ledger b minus those of ledger a, with their 95 % interval."""

    bpb: float
    low: float
    high: float


def document_of_target(tokens: np.ndarray, bos: int) -> np.ndarray:
    """Index of the document of each target, (N-1,) int64, from the stream's tokens (N,).

    A target that is BOS belongs to the document that it begins.
    """
    return np.cumsum(tokens == bos)[1:] - 1


def paired_difference(
    a: np.ndarray,
    b: np.ndarray,
    counted_bytes: np.ndarray,
    documents: np.ndarray,
    resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """Compute bpb(b) - bpb(a) and its interval by resampling documents, the same ones for both ledgers.

    `a` and `b` are ledgers (N-1,), `counted_bytes` (N-1,) the bytes of their targets, and
    `documents` (N-1,) the document of each. The statistic is a ratio of sums, bits over bytes, so
    each resample draws documents with replacement and sums both.
    """
    # Sums by document.
    count = int(documents.max()) + 1
    difference_nats = b.astype(np.float64) - a.astype(np.float64)
    bits = np.bincount(documents, difference_nats / math.log(2), minlength=count)
    size = np.bincount(documents, counted_bytes, minlength=count)

    # How often each document is drawn; a resample without bytes counts as one byte.
    generator = np.random.Generator(np.random.PCG64(seed))
    resampled = np.empty(resamples)
    for i in range(resamples):
        weight = np.bincount(generator.integers(0, count, count), minlength=count)
        resampled[i] = (weight @ bits) / max(1.0, float(weight @ size))

    low, high = np.quantile(resampled, (0.025, 0.975))
    return Difference(float(bits.sum() / size.sum()), float(low), float(high))
