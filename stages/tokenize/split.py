"""Which side of the train/val split a document is on: a function of its content (or its module), never of its position.

Hashes are the first 64 bits of sha256, read as a little-endian number, which is how documents.u64 stores them too.
"""

import hashlib
import re
from typing import Literal, NamedTuple

Side = Literal["train", "val"]
HASH_BYTES = 8
_NOT_LETTER_OR_DIGIT = re.compile(r"[\W_]+")


class Document(NamedTuple):
    """A text, where it comes from (for messages), and its side where the source has decided that already."""

    text: str
    name: str
    side: Side | None = None


def prefix(digest: bytes) -> int:
    """The first 64 bits of a digest."""
    return int.from_bytes(digest[:HASH_BYTES], "little")


def normalised(text: str) -> str:
    """The letters and digits of a text, case folded: what makes two documents the same to a reader.

    >>> normalised("Straße 1,\\n(two)") == normalised("STRASSE 1: two")
    True
    """
    return _NOT_LETTER_OR_DIGIT.sub("", text.casefold())


def content_hash(text: str) -> int:
    """64 bits of the normalised text's sha256."""
    return prefix(hashlib.sha256(normalised(text).encode("utf-8")).digest())


def name_hash(name: str) -> int:
    """64 bits of a name's sha256."""
    return prefix(hashlib.sha256(name.encode("utf-8")).digest())


def side_of(hash64: int, val_fraction: float) -> Side:
    """val for the lowest `val_fraction` of all hashes."""
    return "val" if hash64 < val_fraction * 2 ** (8 * HASH_BYTES) else "train"
