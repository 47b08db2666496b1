"""Token shards in the challenge's format: its scripts read ours, and we read theirs.

A shard is a header of 256 little-endian int32 words (20240520, 1, number of tokens, zeros), and
then the tokens as little-endian uint16. Every document starts with BOS.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_WORDS = 256
HEADER_BYTES = HEADER_WORDS * 4
TOKEN_BYTES = 2
MAX_VOCAB = 1 << 16


def find(folder: Path) -> list[Path]:
    """The shards of a folder in the order of their names; a ValueError when there are none."""
    paths = sorted(folder.glob("*.bin"))
    if not paths:
        raise ValueError(f"{folder} has no shards (*.bin); run tokenize, or name a folder that has some")
    return paths


def count(path: Path) -> int:
    """The number of tokens of a shard, from its header; a ValueError when the file's size does not fit."""
    with path.open("rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES), dtype="<i4")
    if header.size != HEADER_WORDS:
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes, too short for the {HEADER_BYTES} bytes of a shard's header"
        )
    magic, version, tokens = (int(word) for word in header[:3])
    if magic != MAGIC:
        raise ValueError(f"{path}: magic number {magic}, expected {MAGIC}; this is not a token shard")
    if version != VERSION:
        raise ValueError(f"{path}: shard version {version}, expected {VERSION}")
    expected = HEADER_BYTES + TOKEN_BYTES * tokens
    if tokens < 0 or path.stat().st_size != expected:
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes, expected {expected} for the {tokens} tokens of its header"
        )
    return tokens


def view(path: Path) -> np.ndarray:
    """The tokens of a shard, (N,) uint16, memory-mapped: nothing is read before it is used."""
    tokens = count(path)
    if tokens == 0:
        return np.empty(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(tokens,))


def stream(folder: Path) -> np.ndarray:
    """All tokens of a folder's shards in the order of their names, (N,) uint16.

    For a folder of validation shards this is the stream of an evaluation.
    """
    return np.concatenate([view(path) for path in find(folder)]).astype(np.uint16, copy=False)


def check_ids(path: Path, vocab_size: int, block: int = 1 << 22) -> None:
    """Raise ValueError when a shard has an id outside the vocabulary; reads `block` tokens at a time."""
    tokens = view(path)
    for start in range(0, len(tokens), block):
        piece = tokens[start : start + block]
        largest = int(piece.max())
        if largest >= vocab_size:
            position = start + int(piece.argmax())
            raise ValueError(
                f"{path}: token id {largest} at position {position}, but the vocabulary has {vocab_size} ids"
            )


def write(path: Path, tokens: np.ndarray) -> None:
    """Write tokens (N,) as one shard."""
    with path.open("wb") as file:
        file.write(header(len(tokens)))
        file.write(np.ascontiguousarray(tokens, dtype="<u2").tobytes())


def header(tokens: int) -> bytes:
    """The header of a shard with this number of tokens."""
    words = np.zeros(HEADER_WORDS, dtype="<i4")
    words[:3] = MAGIC, VERSION, tokens
    return words.tobytes()


def document_starts(tokens: np.ndarray, bos: int) -> np.ndarray:
    """Positions of BOS in a stream (N,), (D,) int64; a ValueError unless the stream begins with BOS."""
    if len(tokens) == 0 or tokens[0] != bos:
        raise ValueError(f"the stream does not begin with BOS ({bos}); every document must")
    return np.flatnonzero(tokens == bos)


def documents(tokens: np.ndarray, bos: int) -> Iterator[np.ndarray]:
    """Yield the documents of a stream (N,), each with its BOS."""
    starts = document_starts(tokens, bos)
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        yield tokens[start:end]
