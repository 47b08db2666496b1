"""Reads documents from a user's files.

A file is JSON lines (.jsonl, one document a line) or plain text (.txt, one document a file); each
may be compressed (.gz, .xz). Everything streams, so that memory holds one line. A line is read
only up to a bound that no document of at most `max_bytes` with other keys of reasonable size can
exceed: JSON writes one byte with at most six.
"""

import glob
import gzip
import json
import lzma
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from stages.tokenize import split
from stages.tokenize.split import TextDocument

# Raised by the decompressors for truncated or damaged files.
COMPRESSION_ERRORS: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
JSON_ESCAPE_BYTES = 6  # longest JSON escape of one byte, \u0000
LINE_SLACK = 1 << 20  # bytes of a JSON line allowed for other keys


@dataclass(frozen=True)
class ReadOptions:
    """The key of a JSON line that holds the document, and its largest size in UTF-8 bytes."""

    text_key: str
    max_bytes: int

    @property
    def max_line(self) -> int:
        """Bytes of a JSON line beyond which its document must be too long."""
        return JSON_ESCAPE_BYTES * self.max_bytes + LINE_SLACK


@dataclass(frozen=True)
class TextFiles:
    """A user's files. Without val files the sides of the documents are left open."""

    train: list[Path]
    val: list[Path]
    options: ReadOptions

    @property
    def total_bytes(self) -> int:
        """Bytes of all files as stored, for progress."""
        return sum(path.stat().st_size for path in [*self.val, *self.train])

    def documents(self) -> Iterator[TextDocument]:
        """Yield every document: val first, so that each train document can be compared with it.

        Raises ValueError when a train document equals a val document after normalisation
        (split.normalised).
        """
        hashes = array("Q")
        for document in _read_files(self.val, self.options):
            hashes.append(split.content_hash(document.text))
            yield document._replace(side="val")

        val_hashes = np.sort(np.frombuffer(hashes, dtype=np.uint64))
        for document in _read_files(self.train, self.options):
            if not self.val:
                yield document
                continue
            self._require_not_in_val(document, val_hashes)
            yield document._replace(side="train")

    def train_documents(self) -> Iterator[TextDocument]:
        """Yield the documents of the train files alone (for the tokenizer, which must not see val)."""
        return _read_files(self.train, self.options)

    def _require_not_in_val(self, document: TextDocument, val_hashes: np.ndarray) -> None:
        """Raise ValueError if the document is in val, whose sorted hashes are (documents,) uint64."""
        wanted = np.uint64(split.content_hash(document.text))
        index = int(np.searchsorted(val_hashes, wanted))
        if index == len(val_hashes) or val_hashes[index] != wanted:
            return

        # Equal 64-bit hashes can be chance: compare the full digest with those of the val
        # documents, read again.
        digest = split.content_digest(document.text)
        for other in _read_files(self.val, self.options):
            if split.content_digest(other.text) == digest:
                raise ValueError(
                    f"{document.name}: this train document is a val document ({other.name}; equal after case "
                    "folding and keeping letters and digits only); remove it from the train files"
                )


def find(folder: Path, pattern: str, key: str) -> list[Path]:
    """List the files that match a glob relative to `folder`, in name order; links are followed.

    Raises ValueError, which names the parameter `key`, when there are none.
    """
    names = sorted(glob.glob(pattern, root_dir=folder, recursive=True))  # noqa: PTH207 (pathlib's ** does not follow links)
    paths = [folder / name for name in names if not (folder / name).is_dir()]
    if not paths:
        raise ValueError(
            f"{key}: no file in {folder} matches {pattern!r}; "
            "put the text there or link it, or change the pattern"
        )
    return paths


def open_files(folder: Path, train_glob: str, val_glob: str, options: ReadOptions) -> TextFiles:
    """Find the files of both globs; raises ValueError when a file is on both sides."""
    train = find(folder, train_glob, "tokenize.train_glob")
    val = find(folder, val_glob, "tokenize.val_glob") if val_glob else []
    both = sorted(set(train) & set(val))
    if both:
        raise ValueError(
            f"{both[0]} matches both tokenize.train_glob and tokenize.val_glob; "
            "a val document must not be in train"
        )
    return TextFiles(train, val, options)


def read_file(path: Path, options: ReadOptions) -> Iterator[TextDocument]:
    """Yield the documents of one file, each named by file and line.

    Their `units` are the stored bytes read for each.
    """
    # The kind of file is its last suffix, that of a compression apart.
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".xz")]
    kind = suffixes[-1] if suffixes else ""
    if kind not in (".jsonl", ".txt"):
        raise ValueError(f"{path}: unknown kind of file; expected .jsonl or .txt, each also with .gz or .xz")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")

    # Progress is counted in bytes of the file as stored, so it follows the position below the
    # decompressor.
    count = 0
    position = 0
    with path.open("rb") as raw:
        documents = _read_jsonl(path, raw, options) if kind == ".jsonl" else _read_txt(path, raw, options)

        # A decompressor notices damage only when it gets there, after earlier documents were yielded.
        try:
            for document in documents:
                count += 1
                previous = position
                position = raw.tell()
                yield document._replace(units=position - previous)
        except COMPRESSION_ERRORS as error:
            raise ValueError(
                f"{path}, after document {count}: truncated or damaged compressed file: {error}"
            ) from error

    if count == 0:
        raise ValueError(f"{path} holds no documents")


def _read_files(paths: list[Path], options: ReadOptions) -> Iterator[TextDocument]:
    for path in paths:
        yield from read_file(path, options)


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    return lzma.LZMAFile(raw) if path.suffix == ".xz" else raw


def _read_txt(path: Path, raw: IO[bytes], options: ReadOptions) -> Iterator[TextDocument]:
    """Yield a plain-text file as one document."""
    content = _decompressed(path, raw).read(options.max_bytes + 1)
    if len(content) > options.max_bytes:
        raise ValueError(f"{path}: document above tokenize.max_document_bytes ({options.max_bytes})")
    yield TextDocument(_decode(content, str(path)), str(path))


def _read_jsonl(path: Path, raw: IO[bytes], options: ReadOptions) -> Iterator[TextDocument]:
    """Yield the document of each JSON line; blank lines are skipped."""
    stream = _decompressed(path, raw)
    number = 0
    while line := stream.readline(options.max_line + 1):
        number += 1
        name = f"{path}, line {number}"
        if len(line) > options.max_line:
            raise ValueError(
                f"{name}: {options.max_line} bytes and more, "
                f"a document above tokenize.max_document_bytes ({options.max_bytes})"
            )
        if not line.strip():
            continue

        text = _parse_line(_decode(line, name), name, options.text_key)
        size = _utf8_size(text, name)
        if size > options.max_bytes:
            raise ValueError(
                f"{name}: {size} bytes, a document above tokenize.max_document_bytes ({options.max_bytes})"
            )
        yield TextDocument(text, name)


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8: {error.reason} at byte {error.start}") from error


def _parse_line(line: str, name: str, key: str) -> str:
    """Parse a JSON line; returns the string under `key`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(
            f"{name}: saw a JSON {type(record).__name__}, "
            f"expected an object with the key {key!r} (tokenize.text_key)"
        )
    if key not in record:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise ValueError(f"{name}: no key {key!r} (tokenize.text_key); it has {keys}")
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f"{name}: key {key!r} holds {type(text).__name__}, expected a string")
    return text


def _utf8_size(text: str, name: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"{name}: unpaired surrogate \\u{code:04x} at character {error.start}, which is not text"
        ) from error
