"""Reads a SentencePiece model as a file: the rules of its normaliser, and the bytes that nothing needs.

The file is a protocol buffer, `ModelProto` of sentencepiece_model.proto: pieces (1), options of the
trainer (2), the normaliser (3) and the denormaliser (5). The protobuf package is not needed: the wire
format is a sequence of fields, each a tag (number * 8 + type) and a value.

The normaliser replaces strings before the text is cut into pieces. Its rules are a double-array trie of
the keys (Yata et al. 2007, as in Darts-clone) with offsets into a pool of the replacements, each ended
by a zero byte:

    uint32 bytes of the trie | uint32 units of the trie | pool

A unit holds, from the lowest bit: label (8), has a leaf (1), shift (1), offset (22); in a leaf the
highest bit is set and the others are the offset into the pool. The child of a node for byte b is the
unit at `base ^ b`, where base is the node's own place ^ its offset.
"""

import struct
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # types of a field
FIXED_BYTES = {FIXED64: 8, FIXED32: 4}  # bytes of a field's value
VARINT_BYTES = 10  # of a number of 64 bits

# Fields of ModelProto, and of its parts, that SentencePiece reads: number -> type.
PIECE, TRAINER, NORMALISER, DENORMALISER = 1, 2, 3, 5
PIECE_TEXT = 1
PIECE_FIELDS = {PIECE_TEXT: BYTES, 2: FIXED32, 3: VARINT}
RULES = 2  # of a normaliser
NORMALISER_FIELDS = {1: BYTES, RULES: BYTES, 3: VARINT, 4: VARINT, 5: VARINT, 6: BYTES}
SYMBOLS = (30, 31)  # of the trainer: control and user-defined symbols, each also a piece
TRAINER_FIELDS = (
    dict.fromkeys((1, 2, 5, *SYMBOLS, 36, 44, 45, 46, 47, 48, 53, 54), BYTES)
    | dict.fromkeys((10, 15, 51), FIXED32)
    | dict.fromkeys((3, 4, 6, 7, 11, 12, 13, 14, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26), VARINT)
    | dict.fromkeys((32, 33, 34, 35, 40, 41, 42, 43, 49, 50, 52), VARINT)
)
PART_FIELDS = {TRAINER: TRAINER_FIELDS, NORMALISER: NORMALISER_FIELDS, DENORMALISER: NORMALISER_FIELDS}

PIECE_BYTES = 128  # longest text of a piece that counts as needed; SP8192's longest has 18 bytes
RULES_BYTES = (
    1 << 19
)  # of a table of rules; that of nmt_nfkc_cf, the largest of SentencePiece's own, has 250 kB
OPTION_BYTES = 4096  # of all strings in options: names, paths of the training text
UNUSED_UNITS = 2.0  # units of a trie for each that its keys use: a double array has gaps
BLOCK_UNITS = 512  # and this many more; it grows by blocks of 256
MAX_KEY_BYTES = 64  # of a rule that is followed
MAX_RULES = 1 << 21  # keys and beginnings of keys that are followed; nmt_nfkc has 260,000
LEAF: Any = np.uint32(1 << 31)
LABEL: Any = np.uint32(0x800000FF)


class Field(NamedTuple):
    """One field of a protocol buffer."""

    number: int
    kind: int  # VARINT, FIXED64, BYTES or FIXED32
    value: bytes | int

    @property
    def data(self) -> bytes:
        """The bytes of a field of type BYTES or of fixed length."""
        assert isinstance(self.value, bytes)
        return self.value

    @property
    def size(self) -> int:
        """Bytes of the shortest form of this field."""
        tag = _varint_size(self.number << 3)
        if isinstance(self.value, int):
            return tag + _varint_size(self.value)
        return tag + len(self.value) + (_varint_size(len(self.value)) if self.kind == BYTES else 0)


class Rule(NamedTuple):
    """One replacement of a normaliser."""

    key: bytes
    replacement: bytes


@dataclass(frozen=True)
class NormaliserRules:
    """The rules of a normaliser that make a text longer, and the extent of all rules."""

    count: int
    lengthening: tuple[Rule, ...]
    needed_bytes: int  # of the whole table, with the gaps that a trie may have


def fields(data: bytes) -> Iterator[Field]:
    """Yield the fields of a protocol buffer; a ValueError where it is not one."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == VARINT:
            value, at = _read_varint(data, at)
            yield Field(number, kind, value)
            continue
        if kind == BYTES:
            length, at = _read_varint(data, at)
        elif kind in FIXED_BYTES:
            length = FIXED_BYTES[kind]
        else:
            raise ValueError(f"byte {at}: a field of type {kind}, expected a SentencePiece model")
        if at + length > len(data):
            raise ValueError(f"byte {at}: a field of {length} bytes ends after the file")
        yield Field(number, kind, data[at : at + length])
        at += length


def tokenizer_excess_bytes(path: Path) -> int:
    """Count the bytes of a SentencePiece model that a model rebuilt from its pieces would not have.

    Rebuilt are different pieces with their scores and kinds, known options, and a normaliser's rules.
    All else counts: unknown fields, texts beyond PIECE_BYTES and OPTION_BYTES, repeated pieces and
    options, gaps of a table of rules and what its keys do not reach, a table beyond RULES_BYTES, numbers in
    more bytes than they need.
    """
    data = path.read_bytes()
    try:
        return len(data) - _rebuilt_size(data)
    except ValueError as error:
        raise ValueError(f"{path} is not a SentencePiece model: {error}") from error


def normaliser_rules(data: bytes) -> NormaliserRules:
    """Read the rules of the normaliser of a model, given as the bytes of its file.

    A ValueError if they cannot all be followed.
    """
    table = b""
    for part in fields(data):
        if (part.number, part.kind) == (NORMALISER, BYTES):
            for field in fields(part.data):
                if (field.number, field.kind) == (RULES, BYTES):
                    table = field.data
    return read_rules(table)


def read_rules(table: bytes) -> NormaliserRules:
    """Follow all keys of a table of rules, level by level of the trie."""
    if not table:
        return NormaliserRules(0, (), 0)
    units, pool = _split_table(table)

    # The children of a base are the units whose place, without their label, is that base.
    places = np.arange(len(units), dtype=np.int64)
    labels = units & LABEL
    is_child = (labels < 256) & (labels > 0)
    child_places = places[is_child]
    child_bases = child_places ^ labels[is_child].astype(np.int64)
    order = np.argsort(child_bases, kind="stable")
    child_places, child_bases = child_places[order], child_bases[order]
    next_bases = places ^ _offsets(units)
    ends = np.append(np.flatnonzero(np.frombuffer(pool, dtype=np.uint8) == 0), len(pool))

    # Level d holds the beginnings of keys of d bytes: (n,) bases and (n, d) bytes.
    bases = next_bases[:1]
    keys = np.empty((1, 0), dtype=np.uint8)
    used_units = {0}
    used_texts: set[int] = set()
    lengthening: list[Rule] = []
    count, followed = 0, 0
    while len(bases):
        first = np.searchsorted(child_bases, bases, side="left")
        counts = np.searchsorted(child_bases, bases, side="right") - first
        parents = np.repeat(np.arange(len(bases)), counts)
        within = np.arange(len(parents)) - np.repeat(np.cumsum(counts) - counts, counts)
        found = child_places[first[parents] + within]

        # The next level.
        letters = labels[found].astype(np.uint8)
        keys = np.column_stack([keys[parents], letters])
        bases = next_bases[found]
        used_units.update(np.unique(found).tolist())

        followed += len(found)
        if followed > MAX_RULES or keys.shape[1] > MAX_KEY_BYTES:
            raise ValueError(f"more than {MAX_RULES} rules, or one of more than {MAX_KEY_BYTES} bytes")

        # A rule ends where a node has a leaf.
        has_leaf = (units[found] >> np.uint32(8)) & np.uint32(1) == 1
        leaves = bases[has_leaf]
        if len(leaves) and leaves.max() >= len(units):
            raise ValueError("a rule has its replacement beyond the table")
        texts = (units[leaves] & ~LEAF).astype(np.int64)
        if len(texts) and texts.max() > len(pool):
            raise ValueError("a rule has its replacement beyond the table")

        # What these rules need of the table.
        count += len(texts)
        used_units.update(np.unique(leaves).tolist())
        used_texts.update(np.unique(texts).tolist())

        # Keep those whose replacement is longer than the key.
        text_ends = ends[np.searchsorted(ends, texts)]
        for row in np.flatnonzero(text_ends - texts > keys.shape[1]).tolist():
            key = keys[has_leaf][row].tobytes()
            lengthening.append(Rule(key, pool[texts[row] : text_ends[row]]))

    # Bytes that the keys and their replacements need.
    pool_bytes = sum(int(ends[np.searchsorted(ends, text)]) - text + 1 for text in used_texts)
    trie_bytes = 4 * min(len(units), int(UNUSED_UNITS * len(used_units)) + BLOCK_UNITS)
    needed = min(len(table), 4 + trie_bytes + pool_bytes)
    return NormaliserRules(count, tuple(lengthening), needed)


def is_unicode_rule(rule: Rule) -> bool:
    """Tell if a rule is one of Unicode's compatibility normalisation (NFKC), or of its case folding."""
    try:
        key = rule.key.decode("utf-8")
        replacement = rule.replacement.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return replacement in unicode_forms(key)


def unicode_forms(text: str) -> tuple[str, str]:
    """Return a text in NFKC, and in NFKC case folded."""
    composed = unicodedata.normalize("NFKC", text)
    return composed, unicodedata.normalize("NFKC", composed.casefold())


def _rebuilt_size(data: bytes) -> int:
    """Compute the bytes of a model rebuilt from what SentencePiece reads of it."""
    # The last of several parts of one kind is taken; of pieces each one.
    pieces: dict[bytes, int] = {}  # text -> bytes of the field
    parts: dict[int, bytes] = {}
    for field in fields(data):
        if field.kind == BYTES and field.number == PIECE:
            text, size = _rebuilt_piece(field.data)
            pieces.setdefault(text, size)
        elif field.kind == BYTES and field.number in PART_FIELDS:
            parts[field.number] = field.data

    # Strings of options are needed up to a bound, over all parts.
    size = sum(pieces.values())
    strings = 0
    for number, part in parts.items():
        inner, strings_of_part = _rebuilt_part(number, part, set(pieces))
        size += inner + _varint_size(number << 3) + VARINT_BYTES
        strings += strings_of_part
    return min(len(data), size + min(strings, OPTION_BYTES))


def _rebuilt_part(number: int, part: bytes, pieces: set[bytes]) -> tuple[int, int]:
    """Return the bytes that an options part needs, strings apart, and those of its strings."""
    # Different fields: of numbers and of tables of rules the last is taken, of strings each one.
    known: dict[tuple[int, bytes | int], Field] = {}
    for field in fields(part):
        if PART_FIELDS[number].get(field.number) == field.kind:
            is_rules = number != TRAINER and field.number == RULES
            is_repeated = field.kind == BYTES and not is_rules
            known[field.number, field.value if is_repeated else 0] = field

    # Each in its shortest form; symbols are texts of pieces, and needed as these are.
    inner, strings = 0, 0
    for field in known.values():
        is_symbol = number == TRAINER and field.number in SYMBOLS and field.data in pieces
        if number != TRAINER and field.number == RULES:
            needed = min(RULES_BYTES, read_rules(field.data).needed_bytes)
            inner += field.size - len(field.data) + needed
        elif field.kind != BYTES or is_symbol:
            inner += field.size
        else:
            strings += field.size
    return inner, strings


def _rebuilt_piece(data: bytes) -> tuple[bytes, int]:
    """Return the text of a piece, and the bytes of its field with no more than that is needed."""
    known = {field.number: field for field in fields(data) if PIECE_FIELDS.get(field.number) == field.kind}
    text = known[PIECE_TEXT].data if PIECE_TEXT in known else b""
    inner = sum(field.size for field in known.values()) - max(0, len(text) - PIECE_BYTES)
    return text, Field(PIECE, BYTES, bytes(inner)).size


def _split_table(table: bytes) -> tuple[np.ndarray, bytes]:
    """Split a table of rules into the units of its trie, (n,) uint32, and the pool of replacements."""
    trie_bytes = struct.unpack("<I", table[:4])[0] if len(table) >= 4 else 0
    if not 4 <= trie_bytes <= len(table) - 4 or trie_bytes % 4:
        raise ValueError(f"a table of rules of {len(table)} bytes says that its trie has {trie_bytes}")
    return np.frombuffer(table[4 : 4 + trie_bytes], dtype="<u4"), table[4 + trie_bytes :]


def _offsets(units: np.ndarray) -> np.ndarray:
    """Compute the offsets of the units (n,) uint32 of a trie; returns (n,) int64."""
    shift = (units & np.uint32(1 << 9)) >> np.uint32(6)
    return (units >> np.uint32(10)).astype(np.int64) << shift.astype(np.int64)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Read a number of seven bits a byte; returns it and the position after it."""
    value = 0
    for shift in range(0, 7 * VARINT_BYTES, 7):
        if at >= len(data):
            raise ValueError(f"byte {at}: the file ends within a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"byte {at}: a number of more than {VARINT_BYTES} bytes")


def _varint_size(value: int) -> int:
    """Compute the bytes of a number of seven bits a byte."""
    return max(1, -(-value.bit_length() // 7))
