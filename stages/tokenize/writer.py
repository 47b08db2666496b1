"""One side's shards, written as its documents come, and what the manifest says about them.

A document is never cut: it begins a new shard where it does not fit into the open one, so that each of our shards begins with BOS.
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
class ShardFacts:
    """A shard's line in the manifest."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    sha256: str = ""


@dataclass
class Totals:
    """What one side's documents add up to."""

    documents: int = 0
    tokens: int = 0  # BOS included
    bytes: int = 0  # counted by the challenge's rule
    source_bytes: int = 0  # of the texts as given
    document_bytes: int = 0  # of decode(encode(text))
    changed_documents: int = 0  # by a tokenizer that is not lossless
    empty_documents: int = 0  # left out: they have no token
    uncounted_leading_spaces: int = 0  # bytes of documents that the rule does not count


@dataclass
class SideWriter:
    """Writes `folder`/`folder name`_000000.bin and so on; use as a context manager, then read `facts`, `totals`, `hashes`."""

    folder: Path
    shard_tokens: int
    totals: Totals = field(default_factory=Totals)
    facts: dict[str, ShardFacts] = field(default_factory=dict)
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
        source_bytes = len(encoded.source.text.encode("utf-8"))
        if len(encoded.tokens) == 1:
            self.totals.empty_documents += 1
            return
        self._write(encoded.tokens, encoded.source.name)
        self.hashes.append(duplicates.hash64(encoded.tokens))
        shard, totals = self._open_facts, self.totals
        shard.documents += 1
        shard.tokens += len(encoded.tokens)
        shard.bytes += encoded.counted
        totals.documents += 1
        totals.tokens += len(encoded.tokens)
        totals.bytes += encoded.counted
        totals.source_bytes += source_bytes
        totals.document_bytes += len(encoded.text.encode("utf-8"))
        totals.changed_documents += encoded.text != encoded.source.text
        totals.uncounted_leading_spaces += encoded.leading_space

    @property
    def _open_facts(self) -> ShardFacts:
        return next(reversed(self.facts.values()))

    def _write(self, tokens: np.ndarray, name: str) -> None:
        if len(tokens) > self.shard_tokens:
            raise ValueError(
                f"{name}: {len(tokens)} tokens do not fit a shard of tokenize.shard_tokens ({self.shard_tokens}); raise it"
            )
        if self._file is None or self._open_facts.tokens + len(tokens) > self.shard_tokens:
            self._close()
            path = self.folder / f"{self.folder.name}_{len(self.facts):06d}.bin"
            self._file = path.open("wb")
            self._file.write(shards.header(0))  # the count is known when the shard is closed
            self.facts[f"{self.folder.name}/{path.name}"] = ShardFacts()
        self._file.write(tokens.astype("<u2", copy=False).tobytes())

    def _close(self) -> None:
        if self._file is None:
            return
        self._file.seek(0)
        self._file.write(shards.header(self._open_facts.tokens))
        self._file.close()
        self._file = None


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_manifest(facts: dict[str, ShardFacts], folder: Path) -> dict[str, Any]:
    """The shards' lines of the manifest, with the hash of each file below `folder`."""
    return {name: asdict(shard) | {"sha256": file_hash(folder / name)} for name, shard in facts.items()}
