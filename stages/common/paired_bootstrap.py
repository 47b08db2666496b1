"""Two ledgers over one stream compared document by document, which resolves differences far below what the scatter between seeds can."""

import math
from typing import NamedTuple

import numpy as np


class Difference(NamedTuple):
    """bpb of ledger b minus bpb of ledger a, with the paired bootstrap's 95 % interval."""

    bpb: float
    low: float
    high: float


def document_of_target(tokens: np.ndarray, bos: int) -> np.ndarray:
    """The document number of each target, (N-1,) int64; a BOS target belongs to the document that it begins."""
    return np.cumsum(tokens == bos)[1:] - 1


def paired_difference(
    a: np.ndarray,
    b: np.ndarray,
    counted_bytes: np.ndarray,
    documents: np.ndarray,
    resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """bpb(b) - bpb(a) and its interval from resampling documents: both ledgers see the same resample.

    The statistic is a ratio of sums (bits over bytes), so each resample draws documents with replacement and sums both parts.
    """
    count = int(documents.max()) + 1
    bits = np.bincount(
        documents, (b.astype(np.float64) - a.astype(np.float64)) / math.log(2), minlength=count
    )
    size = np.bincount(documents, counted_bytes, minlength=count)
    generator = np.random.Generator(np.random.PCG64(seed))
    drawn = np.empty(resamples)
    for i in range(resamples):
        weight = np.bincount(generator.integers(0, count, count), minlength=count)
        drawn[i] = (weight @ bits) / max(1.0, float(weight @ size))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Difference(float(bits.sum() / size.sum()), float(low), float(high))
