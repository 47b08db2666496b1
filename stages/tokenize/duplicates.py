"""documents.u64: the proof that no val document is in train.

The file holds one 64-bit hash for each train document, then one for each val document; each part is
sorted, as little-endian uint64. The manifest says how many of each there are. The hash is the
beginning of sha256 over the document's token ids, BOS included, as little-endian uint16, so that
any reader of the shards can compute it again. Two documents can share a hash by chance; therefore a
hit is confirmed by the full sha256 before it is reported.
"""

import hashlib
from array import array
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stages.common import shards
from stages.tokenize import split

BLOCK_TOKENS = 1 << 22  # tokens read at once, 8 MB


class DocumentRef(NamedTuple):
    """A document of a shard: the position of its BOS there, and its tokens (n,), BOS included."""

    path: Path
    position: int
    tokens: np.ndarray

    def __str__(self) -> str:
        return f"the document at token {self.position} of {self.path}"


class Duplicate(NamedTuple):
    """Two equal documents, one on each side."""

    train: DocumentRef
    val: DocumentRef


def digest(tokens: np.ndarray) -> bytes:
    """Compute the sha256 of a document's tokens (n,), BOS included."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype="<u2").tobytes()).digest()


def document_hash(tokens: np.ndarray) -> int:
    """Compute the 64-bit hash of a document's tokens (n,) that documents.u64 holds."""
    return split.first_64_bits(digest(tokens))


def sorted_hashes(hashes: "array[int]") -> np.ndarray:
    """Sort the hashes of one side; returns (documents,) uint64."""
    return np.sort(np.frombuffer(hashes, dtype=np.uint64)) if hashes else np.empty(0, dtype=np.uint64)


def write_hashes(path: Path, train: np.ndarray, val: np.ndarray) -> None:
    """Write documents.u64 from the sorted hashes of both sides, (documents,) uint64 each."""
    with path.open("wb") as file:
        for hashes in (train, val):
            file.write(hashes.astype("<u8", copy=False).tobytes())


def read_hashes(path: Path, train_documents: int, val_documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Read documents.u64: the hashes of train and of val, (documents,) uint64.

    The counts are the manifest's.

    Raises ValueError when the length or the order is wrong.
    """
    expected = 8 * (train_documents + val_documents)
    if path.stat().st_size != expected:
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes, expected {expected} for {train_documents} train "
            f"and {val_documents} val documents"
        )
    hashes = np.fromfile(path, dtype="<u8").astype(np.uint64, copy=False)
    train = hashes[:train_documents]
    val = hashes[train_documents:]
    for side, part in (("train", train), ("val", val)):
        if np.any(part[1:] < part[:-1]):
            raise ValueError(f"{path}: the hashes of {side} are not sorted; run tokenize again")
    return train, val


def common_hashes(train: np.ndarray, val: np.ndarray) -> np.ndarray:
    """Intersect two sorted arrays of hashes, (documents,) each; returns every common hash once."""
    index = np.searchsorted(train, val)
    found = index < len(train)
    found[found] = train[index[found]] == val[found]
    return np.unique(val[found])


def first_duplicate(train_folder: Path, val_folder: Path, bos: int, hits: np.ndarray) -> Duplicate | None:
    """Find the first train document whose tokens equal a val document's.

    Returns None when all hits are collisions of the 64-bit hash.
    """
    if len(hits) == 0:
        return None
    wanted = {int(hit) for hit in hits}
    val_by_digest: dict[bytes, DocumentRef] = {}
    for document in documents(shards.find(val_folder), bos):
        full = digest(document.tokens)
        if split.first_64_bits(full) in wanted:
            val_by_digest.setdefault(full, document)

    for document in documents(shards.find(train_folder), bos):
        match = val_by_digest.get(digest(document.tokens))
        if match is not None:
            return Duplicate(document, match)
    return None


def documents(paths: list[Path], bos: int) -> Iterator[DocumentRef]:
    """Yield the documents of a stream of shards; a document may continue in the next shard.

    Shards are read in blocks, so that memory holds one block and one document.
    """
    parts: list[np.ndarray] = []  # of the open document; it began at `position` of `path`
    path = Path()
    position = 0
    for shard in paths:
        tokens = shards.view(shard)
        for block_start in range(0, len(tokens), BLOCK_TOKENS):
            block = np.array(tokens[block_start : block_start + BLOCK_TOKENS])
            starts = np.flatnonzero(block == bos).tolist()

            # The stream must begin with BOS; later blocks may continue the open document.
            if not parts and starts[:1] != [0]:
                raise ValueError(
                    f"{shard}: the first token is {block[0]}, expected BOS ({bos}); "
                    "every document begins with it"
                )

            # The tokens before the first BOS end the open document; each BOS closes one and opens
            # the next.
            parts.append(block[: starts[0] if starts else len(block)])
            for start, end in pairwise([*starts, len(block)]):
                if any(len(part) for part in parts):
                    yield DocumentRef(path, position, np.concatenate(parts))
                parts = [block[start:end]]
                path = shard
                position = block_start + start

    # The end of the stream closes the last document.
    if parts:
        yield DocumentRef(path, position, np.concatenate(parts))
