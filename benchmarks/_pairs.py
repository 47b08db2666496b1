"""Pairwise comparison of ledgers of one stream."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from stages.common import paired_bootstrap
from stages.scoring.stream import ValidationStream


def compared(ledgers: Mapping[str, np.ndarray], stream: ValidationStream) -> list[dict[str, Any]]:
    """Differences of every pair of ledgers, which are losses in nats, (N,), by name.

    `bpb` is the difference in bits per byte, `low` and `high` its 95 % interval over documents,
    `largest_nats` the largest difference of one token.
    """
    documents = paired_bootstrap.document_of_target(stream.tokens, stream.table.bos)
    rows = []
    for a, b in itertools.combinations(ledgers, 2):
        difference = paired_bootstrap.paired_difference(
            ledgers[a], ledgers[b], stream.counted_bytes, documents
        )
        largest = float(np.abs(ledgers[a].astype(np.float64) - ledgers[b]).max())
        interval = {"bpb": difference.bpb, "low": difference.low, "high": difference.high}
        rows.append({"a": a, "b": b, "largest_nats": largest} | interval)
    return rows
