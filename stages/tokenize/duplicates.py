"""documents.u64: the proof that no val document is in train.

One 64-bit hash for each document of train, then of val, each part sorted, as little-endian uint64; how many of each stands in the
manifest. The hash is the beginning of sha256 over the document's token ids, BOS included, as little-endian uint16, so a reader of the
shards can make it again. Two documents can share a hash by chance, so a hit is confirmed by the full hash before anybody is accused.
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

BLOCK_TOKENS = 1 << 22


class Located(NamedTuple):
    """A document of a shard: where it begins, and its tokens with BOS."""

    path: Path
    position: int
    tokens: np.ndarray

    def __str__(self) -> str:
        return f"the document at token {self.position} of {self.path}"


class Shared(NamedTuple):
    """A document that is in both train and val."""

    train: Located
    val: Located


def digest(tokens: np.ndarray) -> bytes:
    """sha256 of a document's tokens, BOS included."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype="<u2").tobytes()).digest()


def hash64(tokens: np.ndarray) -> int:
    """The 64 bits that stand for a document in documents.u64."""
    return split.prefix(digest(tokens))


def in_order(hashes: "array[int]") -> np.ndarray:
    """The hashes of one side, sorted, (documents,) uint64."""
    return np.sort(np.frombuffer(hashes, dtype=np.uint64)) if hashes else np.empty(0, dtype=np.uint64)


def write(path: Path, train: np.ndarray, val: np.ndarray) -> None:
    """Write the sorted hashes of both sides."""
    with path.open("wb") as file:
        for hashes in (train, val):
            file.write(hashes.astype("<u8", copy=False).tobytes())


def read(path: Path, train_documents: int, val_documents: int) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of train and of val; the counts come from the manifest."""
    expected = 8 * (train_documents + val_documents)
    if path.stat().st_size != expected:
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes, expected {expected} for {train_documents} train and {val_documents} val documents"
        )
    hashes = np.fromfile(path, dtype="<u8").astype(np.uint64, copy=False)
    train, val = hashes[:train_documents], hashes[train_documents:]
    for side, part in (("train", train), ("val", val)):
        if np.any(part[1:] < part[:-1]):
            raise ValueError(f"{path}: the hashes of {side} are not sorted; run tokenize again")
    return train, val


def common(train: np.ndarray, val: np.ndarray) -> np.ndarray:
    """The hashes that stand in both sorted arrays, each once."""
    place = np.searchsorted(train, val)
    found = place < len(train)
    found[found] = train[place[found]] == val[found]
    return np.unique(val[found])


def confirmed(train_folder: Path, val_folder: Path, bos: int, hits: np.ndarray) -> Shared | None:
    """The first document that really is in both folders' shards, of those whose hash is in `hits`; None when all hits are chance."""
    if len(hits) == 0:
        return None
    wanted = {int(hit) for hit in hits}
    val: dict[bytes, Located] = {}
    for document in documents(shards.find(val_folder), bos):
        full = digest(document.tokens)
        if split.prefix(full) in wanted:
            val.setdefault(full, document)
    for document in documents(shards.find(train_folder), bos):
        match = val.get(digest(document.tokens))
        if match is not None:
            return Shared(document, match)
    return None


def documents(paths: list[Path], bos: int) -> Iterator[Located]:
    """The documents of a stream of shards, in blocks: memory holds a block and a document. A document may go on in the next shard."""
    parts: list[np.ndarray] = []
    path, position = Path(), 0
    for shard in paths:
        tokens = shards.view(shard)
        for block_start in range(0, len(tokens), BLOCK_TOKENS):
            block = np.array(tokens[block_start : block_start + BLOCK_TOKENS])
            starts = np.flatnonzero(block == bos).tolist()
            if not parts and starts[:1] != [0]:
                raise ValueError(
                    f"{shard}: the first token is {block[0]}, expected BOS ({bos}); every document begins with it"
                )
            parts.append(block[: starts[0] if starts else len(block)])
            for start, end in pairwise([*starts, len(block)]):
                if any(len(part) for part in parts):
                    yield Located(path, position, np.concatenate(parts))
                parts, path, position = [block[start:end]], shard, block_start + start
    if parts:
        yield Located(path, position, np.concatenate(parts))
