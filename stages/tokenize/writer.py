"""Writes one side's shards while its documents arrive, and collects their entries of the manifest.

A document is never cut: one that does not fit into the open shard begins the next, so that each of
our shards begins with BOS.
"""

import hashlib
from array import array
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from stages.common import shards
from stages.tokenize import duplicates
from stages.tokenize.encode import Encoded


@dataclass
class ShardSummary:
    """A shard's entry in the manifest; the hash is filled in by `as_manifest`."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0  # counted by the challenge's rule
    sha256: str = ""


@dataclass
class SideTotals:
    """Sums over one side's documents."""

    documents: int = 0
    tokens: int = 0  # BOS included
    bytes: int = 0  # counted by the challenge's rule
    source_bytes: int = 0  # of the given texts
    document_bytes: int = 0  # of decode(encode(text))
    changed_documents: int = 0  # by a tokenizer that is not lossless
    empty_documents: int = 0  # left out, because they have no token
    uncounted_leading_spaces: int = 0  # bytes of documents that the rule does not count


@dataclass
class SideWriter:
    """Writes `folder`/`folder name`_000000.bin and so on.

    Use as a context manager; afterwards `shards`, `totals` and `hashes` describe the side.
    """

    folder: Path
    shard_tokens: int
    totals: SideTotals = field(default_factory=SideTotals)
    shards: dict[str, ShardSummary] = field(default_factory=dict)
    hashes: "array[int]" = field(default_factory=lambda: array("Q"))
    _file: IO[bytes] | None = None

    def __enter__(self) -> "SideWriter":
        self.folder.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def add(self, encoded: Encoded) -> None:
        """Append a document, unless it is empty."""
        if len(encoded.tokens) == 1:
            self.totals.empty_documents += 1
            return
        self._write(encoded.tokens, encoded.source.name)
        self.hashes.append(duplicates.document_hash(encoded.tokens))

        shard = self._open_shard
        shard.documents += 1
        shard.tokens += len(encoded.tokens)
        shard.bytes += encoded.counted_bytes

        totals = self.totals
        totals.documents += 1
        totals.tokens += len(encoded.tokens)
        totals.bytes += encoded.counted_bytes
        totals.source_bytes += len(encoded.source.text.encode("utf-8"))
        totals.document_bytes += len(encoded.text.encode("utf-8"))
        totals.changed_documents += encoded.text != encoded.source.text
        totals.uncounted_leading_spaces += encoded.leading_space

    @property
    def _open_shard(self) -> ShardSummary:
        return next(reversed(self.shards.values()))

    def _write(self, tokens: np.ndarray, name: str) -> None:
        """Write a document's tokens (n,), to a new shard if the open one has no room."""
        if len(tokens) > self.shard_tokens:
            raise ValueError(
                f"{name}: {len(tokens)} tokens do not fit a shard of tokenize.shard_tokens "
                f"({self.shard_tokens}); raise it"
            )
        if self._file is None or self._open_shard.tokens + len(tokens) > self.shard_tokens:
            self._close()
            path = self.folder / f"{self.folder.name}_{len(self.shards):06d}.bin"
            self._file = path.open("wb")
            self._file.write(shards.header(0))  # the count is known when the shard is closed
            self.shards[f"{self.folder.name}/{path.name}"] = ShardSummary()
        self._file.write(tokens.astype("<u2", copy=False).tobytes())

    def _close(self) -> None:
        if self._file is None:
            return
        self._file.seek(0)
        self._file.write(shards.header(self._open_shard.tokens))
        self._file.close()
        self._file = None


def file_hash(path: Path) -> str:
    """Compute the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_manifest(summaries: dict[str, ShardSummary], folder: Path) -> dict[str, Any]:
    """Make the shards' entries of the manifest, with the hash of each file below `folder`."""
    return {
        name: asdict(summary) | {"sha256": file_hash(folder / name)} for name, summary in summaries.items()
    }
