"""Codecs of a stream by name: bytes to fewer bytes and back.

    brotli     brotli over shuffled bytes: all first bytes of the items, then all second bytes, and
               so on. Sign and exponent bytes of float16 values then are next to each other.
    adaptive   the arithmetic coder of integer matrices (level_coder.py)
    series     the delta coder of one row of numbers (delta_coder.py)
    plain      the bytes as they are

A stream records the name of its codec, so another codec is one more entry of CODECS. A decoder
knows how many bytes must come out and never holds much more than that. The parameter `pack.codec`
names a family; the family and the kind of a stream's contents say which codecs are tried, and the
shortest result is kept.

Shapes: R rows, C columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import brotli
import numpy as np

from stages.pack.entropy import delta_coder, level_coder

WINDOW_BITS = 24  # brotli's largest standard window, 16 MB: as large as the whole artifact
CHUNK_BYTES = 1 << 20  # requested from the brotli decoder at once; it may give twice as much

Kind = Literal["matrix", "series", "bytes"]
FAMILIES: dict[str, dict[Kind, tuple[str, ...]]] = {
    "adaptive": {
        "matrix": ("adaptive",),
        "series": ("series", "brotli", "plain"),
        "bytes": ("brotli", "plain"),
    },
    "brotli": {"matrix": ("brotli",), "series": ("brotli",), "bytes": ("brotli",)},
}


@dataclass(frozen=True)
class StreamLayout:
    """Shape of a decoded stream: a matrix (R, C) of little-endian items."""

    item_bytes: int
    rows: int
    columns: int
    states: int = 1  # of the trellis that the items, integers, follow; 1: of none
    exponents: bytes = b""  # int8 of rows and then of columns (pack/exponents.py); empty: not known
    kind: Kind = "bytes"
    exponent_streams: tuple[int, ...] = ()  # indices of the tensor's streams that hold the exponents

    @property
    def raw_bytes(self) -> int:
        """Bytes of the decoded stream."""
        return self.item_bytes * self.rows * self.columns

    @property
    def row_column_exponents(self) -> tuple[np.ndarray, np.ndarray]:
        """Exponents of rows (R,) and of columns (C,), int8; zeros where they are not known."""
        exponents = np.frombuffer(self.exponents or bytes(self.rows + self.columns), np.int8)
        return exponents[: self.rows], exponents[self.rows :]

    def with_exponents(self, streams: Sequence[bytes]) -> "StreamLayout":
        """Add the exponents from the raw streams of the tensor, if some of those hold them."""
        return replace(self, exponents=b"".join(streams[index] for index in self.exponent_streams))


class Codec(NamedTuple):
    """A pair of functions."""

    encode: Callable[[bytes, StreamLayout, int], bytes]  # raw bytes, layout, brotli quality
    decode: Callable[[bytes, StreamLayout], bytes]


def encode(codec: str, raw: bytes, layout: StreamLayout, quality: int) -> bytes:
    """Encode `raw` by the named codec; `quality` is brotli's, 0 to 11."""
    return CODECS[codec].encode(raw, layout, quality)


def encode_shortest(family: str, raw: bytes, layout: StreamLayout, quality: int) -> tuple[str, bytes]:
    """Encode by every codec that the family has for this kind of stream.

    Returns the name and the payload of the shortest.
    """
    candidates = [(codec, encode(codec, raw, layout, quality)) for codec in FAMILIES[family][layout.kind]]
    return min(candidates, key=lambda candidate: len(candidate[1]))


def decode(codec: str, payload: bytes, layout: StreamLayout) -> bytes:
    """Decode; a ValueError when the payload does not hold exactly what `layout` declares."""
    if codec not in CODECS:
        raise ValueError(f"unknown codec {codec!r}; known are {', '.join(CODECS)}")
    return CODECS[codec].decode(payload, layout)


def compile_ahead(family: str) -> None:
    """Compile the functions that the family's codecs call, which takes seconds."""
    if family == "adaptive":
        level_coder.compile_ahead()
        delta_coder.compile_ahead()


def shuffle(raw: bytes, item_bytes: int) -> bytes:
    """Transpose bytes: byte 0 of every item, then byte 1 of every item, and so on.

    >>> shuffle(b"aAbBcC", 2)
    b'abcABC'
    """
    return np.frombuffer(raw, np.uint8).reshape(-1, item_bytes).T.tobytes()


def unshuffle(shuffled: bytes, item_bytes: int) -> bytes:
    """The inverse of `shuffle`."""
    return np.frombuffer(shuffled, np.uint8).reshape(item_bytes, -1).T.tobytes()


def brotli_compress(raw: bytes, quality: int) -> bytes:
    """Compress to a whole brotli stream."""
    return bytes(brotli.compress(raw, quality=quality, lgwin=WINDOW_BITS))


def brotli_decompress(payload: bytes, max_bytes: int) -> bytes:
    """Decompress a whole brotli stream.

    A ValueError when it is damaged, cut short, or holds more than `max_bytes`.
    """
    decoder = brotli.Decompressor()
    chunks = []
    length = 0
    pending = payload
    try:
        while not decoder.is_finished():
            chunk = decoder.process(pending, output_buffer_limit=min(max_bytes - length + 1, CHUNK_BYTES))
            if not chunk and not decoder.is_finished():
                raise ValueError("a brotli stream ends too early")
            chunks.append(chunk)
            length += len(chunk)
            pending = b""
            if length > max_bytes:
                raise ValueError(f"a brotli stream holds more than the {max_bytes} bytes declared")
    except brotli.error as error:
        raise ValueError("a brotli stream is damaged") from error
    return b"".join(chunks)


def _encode_brotli(raw: bytes, layout: StreamLayout, quality: int) -> bytes:
    return brotli_compress(shuffle(raw, layout.item_bytes), quality)


def _decode_brotli(payload: bytes, layout: StreamLayout) -> bytes:
    raw = brotli_decompress(payload, layout.raw_bytes)
    if len(raw) != layout.raw_bytes:
        raise ValueError(f"a brotli stream holds {len(raw)} bytes, {layout.raw_bytes} are declared")
    return unshuffle(raw, layout.item_bytes)


def _encode_adaptive(raw: bytes, layout: StreamLayout, _quality: int) -> bytes:
    values_RC = np.frombuffer(raw, f"<i{layout.item_bytes}").reshape(layout.rows, layout.columns)
    return level_coder.encode(values_RC.astype(np.int16), *layout.row_column_exponents, layout.states)


def _decode_adaptive(payload: bytes, layout: StreamLayout) -> bytes:
    values_RC = level_coder.decode(payload, *layout.row_column_exponents, layout.states)
    narrow_RC = values_RC.astype(f"<i{layout.item_bytes}")
    if not np.array_equal(narrow_RC, values_RC):
        raise ValueError(f"an arithmetic-coded stream holds values beyond {layout.item_bytes} bytes")
    return narrow_RC.tobytes()


def _encode_series(raw: bytes, layout: StreamLayout, _quality: int) -> bytes:
    return delta_coder.encode(raw, layout.item_bytes)


def _decode_series(payload: bytes, layout: StreamLayout) -> bytes:
    if layout.kind != "series":
        raise ValueError("the codec `series` is named for a stream that is not a series of numbers")
    return delta_coder.decode(payload, layout.item_bytes, layout.rows * layout.columns)


def _encode_plain(raw: bytes, _layout: StreamLayout, _quality: int) -> bytes:
    return raw


def _decode_plain(payload: bytes, layout: StreamLayout) -> bytes:
    if len(payload) != layout.raw_bytes:
        raise ValueError(f"a plain stream holds {len(payload)} bytes, {layout.raw_bytes} are declared")
    return payload


CODECS = {
    "brotli": Codec(_encode_brotli, _decode_brotli),
    "adaptive": Codec(_encode_adaptive, _decode_adaptive),
    "series": Codec(_encode_series, _decode_series),
    "plain": Codec(_encode_plain, _decode_plain),
}
