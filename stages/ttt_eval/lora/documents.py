"""A stream as documents, each of which is scored by itself, and which of them lie side by side.

A document's targets reach up to and including the BOS of the next one, which its own tokens predict.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Document(NamedTuple):
    """A document as far as it is known, and what is asked of it."""

    tokens: np.ndarray  # (M + 1,) int64: its BOS, then its M targets
    first: int  # the first target to score
    place: int  # where the score of target 0 stands among those asked for; negative when it was scored before
    is_open: bool  # whether more targets may follow

    @property
    def targets(self) -> int:
        """The number of known targets, M."""
        return len(self.tokens) - 1

    def chunks(self, size: int) -> int:
        """Chunks with a known target."""
        return -(-self.targets // size)

    def trained(self, size: int) -> int:
        """Chunks that are trained on: whole ones that more targets follow, or may follow."""
        return (self.targets if self.is_open else self.targets - 1) // size


def split(known: np.ndarray, tokens: np.ndarray, bos: int) -> list[Document]:
    """The open document's `known` tokens (its BOS first), and what follows them, as documents; the last one is open.

    >>> [(len(d.tokens), d.first, d.place) for d in split(np.array([1, 7]), np.array([8, 1, 9, 9]), bos=1)]
    [(4, 1, -1), (3, 0, 2)]
    """
    whole = np.concatenate((known, tokens))
    starts = [0, *(len(known) + np.flatnonzero(tokens == bos)).tolist()]
    documents = []
    for number, start in enumerate(starts):
        is_open = number == len(starts) - 1
        end = len(whole) if is_open else starts[number + 1] + 1
        first = len(known) - 1 if number == 0 else 0
        documents.append(Document(whole[start:end], first, start - len(known) + 1, is_open))
    return documents


def groups(documents: Sequence[Document], rank: int, ranks: int, size: int) -> list[list[Document]]:
    """One rank's documents, in groups of `size` of similar length, longest first, so that little of a batch is padding.

    Lengths decide how documents are batched and nothing about their scores: no document sees another.
    """
    ordered = sorted(documents, key=lambda document: (-document.targets, not document.is_open))
    mine = ordered[rank::ranks]
    return [mine[i : i + size] for i in range(0, len(mine), size)]


def table(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Rows of different lengths as one array (rows, length) int64, zeros behind each."""
    filled = np.zeros((len(rows), length), dtype=np.int64)
    for row, values in zip(filled, rows, strict=True):
        row[: len(values)] = values
    return filled
