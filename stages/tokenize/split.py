"""The train/val split, which depends on a document's content or module, never on its position.

Hashes are the first 64 bits of sha256, read as a little-endian number. documents.u64 stores them in
the same way.
"""

import hashlib
import re
from typing import Literal, NamedTuple

Side = Literal["train", "val"]
HASH_BYTES = 8  # first bytes of a sha256 that make a hash
_NOT_LETTER_OR_DIGIT = re.compile(r"[\W_]+")


class TextDocument(NamedTuple):
    """A text, its origin for messages, and its side where the source has decided it."""

    text: str
    name: str
    side: Side | None = None
    units: int = 1  # of progress that reading it took: bytes of its file as stored, elsewhere one


def first_64_bits(digest: bytes) -> int:
    """Read the first 64 bits of a digest as a little-endian number."""
    return int.from_bytes(digest[:HASH_BYTES], "little")


def normalised(text: str) -> str:
    """Reduce a text to its letters and digits, case folded.

    Two documents with equal results are the same to a reader.

    >>> normalised("Straße 1,\\n(two)") == normalised("STRASSE 1: two")
    True
    """
    return _NOT_LETTER_OR_DIGIT.sub("", text.casefold())


def content_digest(text: str) -> bytes:
    """Compute the sha256 of the normalised text."""
    return hashlib.sha256(normalised(text).encode("utf-8")).digest()


def content_hash(text: str) -> int:
    """Compute the 64-bit hash of the normalised text."""
    return first_64_bits(content_digest(text))


def name_hash(name: str) -> int:
    """Compute the 64-bit hash of a name."""
    return first_64_bits(hashlib.sha256(name.encode("utf-8")).digest())


def side_of(hash64: int, val_fraction: float) -> Side:
    """Assign the lowest `val_fraction` of all hashes to val, the others to train."""
    return "val" if hash64 < val_fraction * 2 ** (8 * HASH_BYTES) else "train"
