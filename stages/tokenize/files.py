"""Documents from files: JSON lines (.jsonl, one document a line) and plain text (.txt, one document a file), each also .gz or .xz.

Everything streams: memory holds one line. A line is therefore read only up to a bound, which no document of at most
`max_bytes` and reasonable other keys can exceed (JSON writes one byte with at most six).
"""

import glob
import gzip
import hashlib
import json
import lzma
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from stages.tokenize import split
from stages.tokenize.split import Document

Advance = Callable[[float], None]
COMPRESSED: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
JSON_ESCAPE_BYTES = 6
LINE_SLACK = 1 << 20


@dataclass(frozen=True)
class Reading:
    """How documents are read: the key of a JSON line, the most bytes a document may have."""

    text_key: str
    max_bytes: int

    @property
    def max_line(self) -> int:
        """Bytes of a JSON line beyond which its document must be too long."""
        return JSON_ESCAPE_BYTES * self.max_bytes + LINE_SLACK


@dataclass(frozen=True)
class Files:
    """The documents of a user's files: val first, so that train can be compared with it; without val files, sides are left open."""

    train: list[Path]
    val: list[Path]
    reading: Reading

    @property
    def total_bytes(self) -> int:
        """Bytes of all files as stored, for the progress report."""
        return sum(path.stat().st_size for path in [*self.val, *self.train])

    def documents(self, advance: Advance) -> Iterator[Document]:
        """Every document; a ValueError when a train document says the same as a val document."""
        seen = array("Q")
        for document in _read_all(self.val, self.reading, advance):
            seen.append(split.content_hash(document.text))
            yield document._replace(side="val")
        val_hashes = np.sort(np.frombuffer(seen, dtype=np.uint64))
        for document in _read_all(self.train, self.reading, advance):
            if self.val:
                self._refuse_if_val(document, val_hashes)
                document = document._replace(side="train")
            yield document

    def train_documents(self, advance: Advance) -> Iterator[Document]:
        """The documents of the train files alone (for the tokenizer, which must not see val)."""
        return _read_all(self.train, self.reading, advance)

    def _refuse_if_val(self, document: Document, val_hashes: np.ndarray) -> None:
        wanted = np.uint64(split.content_hash(document.text))
        place = int(np.searchsorted(val_hashes, wanted))
        if place == len(val_hashes) or val_hashes[place] != wanted:
            return
        full = hashlib.sha256(split.normalised(document.text).encode("utf-8")).digest()
        for other in _read_all(self.val, self.reading, _ignore):
            if hashlib.sha256(split.normalised(other.text).encode("utf-8")).digest() == full:
                raise ValueError(
                    f"{document.name}: this train document is a val document ({other.name}; equal after case folding and keeping "
                    "letters and digits only); remove it from the train files"
                )


def find(folder: Path, pattern: str, key: str) -> list[Path]:
    """The files that match a glob relative to `folder`, in name order; links are followed."""
    found = sorted(glob.glob(pattern, root_dir=folder, recursive=True))  # noqa: PTH207 (pathlib's ** does not follow links)
    paths = [folder / name for name in found if not (folder / name).is_dir()]
    if not paths:
        raise ValueError(
            f"{key}: no file in {folder} matches {pattern!r}; put the text there or link it, or change the pattern"
        )
    return paths


def open_files(folder: Path, train_glob: str, val_glob: str, reading: Reading) -> Files:
    """The files of both globs; a file may not be on both sides."""
    train = find(folder, train_glob, "tokenize.train_glob")
    val = find(folder, val_glob, "tokenize.val_glob") if val_glob else []
    both = sorted(set(train) & set(val))
    if both:
        raise ValueError(
            f"{both[0]} matches both tokenize.train_glob and tokenize.val_glob; a val document must not be in train"
        )
    return Files(train, val, reading)


def read(path: Path, reading: Reading, advance: Advance) -> Iterator[Document]:
    """The documents of one file, each named by file and line."""
    kind = [suffix for suffix in path.suffixes if suffix not in (".gz", ".xz")][-1:]
    if kind not in ([".jsonl"], [".txt"]):
        raise ValueError(f"{path}: unknown kind of file; expected .jsonl or .txt, each also with .gz or .xz")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    documents = 0
    with path.open("rb") as raw:
        told = 0
        try:
            for document in _lines(path, raw, reading) if kind == [".jsonl"] else _whole(path, raw, reading):
                documents += 1
                yield document
                advance(raw.tell() - told)
                told = raw.tell()
        except COMPRESSED as error:
            raise ValueError(
                f"{path}, after document {documents}: truncated or damaged compressed file: {error}"
            ) from error
    if documents == 0:
        raise ValueError(f"{path} holds no documents")


def _read_all(paths: list[Path], reading: Reading, advance: Advance) -> Iterator[Document]:
    for path in paths:
        yield from read(path, reading, advance)


def _ignore(units: float) -> None:
    pass


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    return lzma.LZMAFile(raw) if path.suffix == ".xz" else raw


def _whole(path: Path, raw: IO[bytes], reading: Reading) -> Iterator[Document]:
    content = _decompressed(path, raw).read(reading.max_bytes + 1)
    if len(content) > reading.max_bytes:
        raise ValueError(f"{path}: document above tokenize.max_document_bytes ({reading.max_bytes})")
    yield Document(_decode(content, str(path)), str(path))


def _lines(path: Path, raw: IO[bytes], reading: Reading) -> Iterator[Document]:
    stream = _decompressed(path, raw)
    number = 0
    while line := stream.readline(reading.max_line + 1):
        number += 1
        name = f"{path}, line {number}"
        if len(line) > reading.max_line:
            raise ValueError(
                f"{name}: {reading.max_line} bytes and more, a document above tokenize.max_document_bytes ({reading.max_bytes})"
            )
        if not line.strip():
            continue
        text = _text(_decode(line, name), name, reading.text_key)
        size = _encoded_size(text, name)
        if size > reading.max_bytes:
            raise ValueError(
                f"{name}: {size} bytes, a document above tokenize.max_document_bytes ({reading.max_bytes})"
            )
        yield Document(text, name)


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8: {error.reason} at byte {error.start}") from error


def _text(line: str, name: str, key: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(
            f"{name}: saw a JSON {type(record).__name__}, expected an object with the key {key!r} (tokenize.text_key)"
        )
    if key not in record:
        raise ValueError(
            f"{name}: no key {key!r} (tokenize.text_key); it has {', '.join(map(repr, list(record)[:8])) or 'none'}"
        )
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f"{name}: key {key!r} holds {type(text).__name__}, expected a string")
    return text


def _encoded_size(text: str, name: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"{name}: unpaired surrogate \\u{code:04x} at character {error.start}, which is not text"
        ) from error
