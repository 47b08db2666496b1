"""Break down the difference of two ledgers of one stream, by document length and position in the document."""

from typing import Any, NamedTuple

import numpy as np

from stages.common import paired_bootstrap
from stages.common.paired_bootstrap import Difference
from stages.scoring.stream import ValidationStream

BUCKET_EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096)  # tokens; each bucket ends before the next edge


class Bucket(NamedTuple):
    """A group of targets, and bpb of ledger b minus bpb of ledger a within it."""

    label: str
    documents: int
    bytes: int
    difference: Difference  # bpb within the bucket
    contribution: float  # to the whole difference in bpb; the contributions of all buckets add up to it


class Comparison(NamedTuple):
    """Comparison of two ledgers, in total and by bucket."""

    whole: Difference
    documents: int
    by_length: list[Bucket]
    by_position: list[Bucket]
    running_difference: np.ndarray  # (N-1,) float64: of the targets so far, over all bytes; ends at `whole`


def compare_ledgers(a: np.ndarray, b: np.ndarray, stream: ValidationStream) -> Comparison:
    """Compare bpb(b) with bpb(a), paired by document; the ledgers are (N-1,) float32, in nats."""
    documents = paired_bootstrap.document_of_target(stream.tokens, stream.table.bos)
    starts = np.flatnonzero(stream.tokens == stream.table.bos)
    position = np.arange(1, len(stream.tokens)) - starts[documents]
    length = np.diff(starts, append=len(stream.tokens))[documents]
    bits = (b.astype(np.float64) - a.astype(np.float64)) / np.log(2)
    return Comparison(
        whole=paired_bootstrap.paired_difference(a, b, stream.counted_bytes, documents),
        documents=len(starts),
        by_length=_buckets(length, a, b, stream.counted_bytes, documents),
        by_position=_buckets(position, a, b, stream.counted_bytes, documents),
        running_difference=np.cumsum(bits) / stream.counted_bytes.sum(),
    )


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return the figures, without the running difference."""
    return {
        "difference": comparison.whole._asdict(),
        "documents": comparison.documents,
        "by_length": [_bucket_as_json(bucket) for bucket in comparison.by_length],
        "by_position": [_bucket_as_json(bucket) for bucket in comparison.by_position],
    }


def _bucket_as_json(bucket: Bucket) -> dict[str, Any]:
    return bucket._asdict() | {"difference": bucket.difference._asdict()}


def _buckets(
    value: np.ndarray, a: np.ndarray, b: np.ndarray, counted_bytes: np.ndarray, documents: np.ndarray
) -> list[Bucket]:
    """Group the targets by `value`; all arrays are (N-1,). Buckets without a byte of text are left out."""
    buckets = []
    total_bytes = int(counted_bytes.sum())
    for low, high in zip(BUCKET_EDGES, [*BUCKET_EDGES[1:], np.iinfo(np.int64).max], strict=True):
        inside = np.flatnonzero((value >= low) & (value < high))
        size = int(counted_bytes[inside].sum())
        if not size:
            continue

        # Renumber the documents of this bucket from 0, since the bootstrap draws from all numbers.
        present, renumbered = np.unique(documents[inside], return_inverse=True)
        difference = paired_bootstrap.paired_difference(
            a[inside], b[inside], counted_bytes[inside], renumbered
        )
        label = f"{low} to {high - 1}" if high <= BUCKET_EDGES[-1] else f"{low} or more"
        contribution = difference.bpb * size / total_bytes
        buckets.append(Bucket(label, len(present), size, difference, contribution))
    return buckets
