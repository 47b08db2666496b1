"""Ledgers of one stream, compared pairwise."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from stages.common import paired_bootstrap
from stages.scoring.evaluate import Stream


def compared(ledgers: Mapping[str, np.ndarray], stream: Stream) -> list[dict[str, Any]]:
    """Every pair by name: the difference in bpb with its 95 % interval over documents, and the largest of one token in nats."""
    documents = paired_bootstrap.document_of_target(stream.tokens, stream.table.bos)
    rows = []
    for a, b in itertools.combinations(ledgers, 2):
        difference = paired_bootstrap.paired_difference(
            ledgers[a], ledgers[b], stream.counted_bytes, documents
        )
        largest = float(np.abs(ledgers[a].astype(np.float64) - ledgers[b]).max())
        rows.append(
            {
                "a": a,
                "b": b,
                "bpb": difference.bpb,
                "low": difference.low,
                "high": difference.high,
                "largest_nats": largest,
            }
        )
    return rows
