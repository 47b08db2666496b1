"""A stream divided into documents, and documents into groups that are scored as one batch.

A document's targets are all its tokens but its BOS, and then the BOS of the next document, which
its own tokens predict.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class StreamDocument(NamedTuple):
    """A document as far as it is known, and which of its targets are to be scored."""

    tokens: np.ndarray  # (M + 1,) int64: its BOS, then its M targets
    first_target: int  # first target to score; earlier ones were scored in an earlier call
    offset: int  # where the score of target 0 would be among this call's; negative if it was scored earlier
    is_open: bool  # more targets may follow in a later call

    @property
    def n_targets(self) -> int:
        """The number of known targets, M."""
        return len(self.tokens) - 1

    def n_chunks(self, size: int) -> int:
        """Chunks with a known target."""
        return -(-self.n_targets // size)

    def n_trained_chunks(self, size: int) -> int:
        """Chunks to train on: whole ones after which more targets follow, or may follow."""
        return (self.n_targets if self.is_open else self.n_targets - 1) // size


def split_documents(open_tokens: np.ndarray, tokens: np.ndarray, bos: int) -> list[StreamDocument]:
    """Divide a stream into documents: the open one's tokens (its BOS first), then `tokens`.

    The last document is open.

    >>> documents = split_documents(np.array([1, 7]), np.array([8, 1, 9, 9]), bos=1)
    >>> [(len(d.tokens), d.first_target, d.offset) for d in documents]
    [(4, 1, -1), (3, 0, 2)]
    """
    whole = np.concatenate((open_tokens, tokens))
    starts = [0, *(len(open_tokens) + np.flatnonzero(tokens == bos)).tolist()]
    documents = []
    for number, start in enumerate(starts):
        is_open = number == len(starts) - 1
        end = len(whole) if is_open else starts[number + 1] + 1
        first_target = len(open_tokens) - 1 if number == 0 else 0
        offset = start - len(open_tokens) + 1
        documents.append(StreamDocument(whole[start:end], first_target, offset, is_open))
    return documents


def group_documents(
    documents: Sequence[StreamDocument], rank: int, ranks: int, size: int
) -> list[list[StreamDocument]]:
    """One rank's documents in groups of `size` and of similar length, so that padding is little.

    The longest come first. Lengths decide how documents are batched and nothing about their scores:
    no document's score depends on another.
    """
    ordered = sorted(documents, key=lambda document: (-document.n_targets, not document.is_open))
    own = ordered[rank::ranks]
    return [own[i : i + size] for i in range(0, len(own), size)]


def pad_rows(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Rows of different lengths as one array (rows, length) int64, filled up with zeros."""
    padded = np.zeros((len(rows), length), dtype=np.int64)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded
