"""Where two ledgers over one stream differ: in all, by the length of documents, by the position within them."""

from typing import Any, NamedTuple

import numpy as np

from stages.common import paired_bootstrap
from stages.common.paired_bootstrap import Difference
from stages.scoring.evaluate import Stream

EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096)  # tokens; each class ends where the next begins


class Part(NamedTuple):
    """A class of targets: what it holds, and what ledger b has less ledger a there."""

    label: str
    documents: int
    bytes: int
    difference: Difference  # bpb within the class
    contribution: float  # of the whole difference in bpb; those of all classes add up to it


class Comparison(NamedTuple):
    """Everything that is said about two ledgers."""

    whole: Difference
    documents: int
    by_length: list[Part]
    by_position: list[Part]
    course: np.ndarray  # (N-1,) float64: the difference of everything scored so far, over all bytes; its end is the whole difference


def compare(a: np.ndarray, b: np.ndarray, stream: Stream) -> Comparison:
    """bpb(b) - bpb(a), paired over documents; ledgers (N-1,) float32."""
    documents = paired_bootstrap.document_of_target(stream.tokens, stream.table.bos)
    starts = np.flatnonzero(stream.tokens == stream.table.bos)
    position = np.arange(1, len(stream.tokens)) - starts[documents]
    length = np.diff(starts, append=len(stream.tokens))[documents]
    bits = (b.astype(np.float64) - a.astype(np.float64)) / np.log(2)
    return Comparison(
        whole=paired_bootstrap.paired_difference(a, b, stream.counted_bytes, documents),
        documents=len(starts),
        by_length=_parts(length, a, b, stream.counted_bytes, documents),
        by_position=_parts(position, a, b, stream.counted_bytes, documents),
        course=np.cumsum(bits) / stream.counted_bytes.sum(),
    )


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The figures, without the course."""
    return {
        "difference": comparison.whole._asdict(),
        "documents": comparison.documents,
        "by_length": [
            part._asdict() | {"difference": part.difference._asdict()} for part in comparison.by_length
        ],
        "by_position": [
            part._asdict() | {"difference": part.difference._asdict()} for part in comparison.by_position
        ],
    }


def _parts(
    value: np.ndarray, a: np.ndarray, b: np.ndarray, counted_bytes: np.ndarray, documents: np.ndarray
) -> list[Part]:
    """The classes of targets by `value`, (N-1,); one without a byte of text is left out."""
    found = []
    total = int(counted_bytes.sum())
    for low, high in zip(EDGES, [*EDGES[1:], np.iinfo(np.int64).max], strict=True):
        inside = np.flatnonzero((value >= low) & (value < high))
        size = int(counted_bytes[inside].sum())
        if not size:
            continue
        present, number = np.unique(
            documents[inside], return_inverse=True
        )  # the bootstrap draws of those alone
        difference = paired_bootstrap.paired_difference(a[inside], b[inside], counted_bytes[inside], number)
        label = f"{low} to {high - 1}" if high <= EDGES[-1] else f"{low} or more"
        found.append(Part(label, len(present), size, difference, difference.bpb * size / total))
    return found
