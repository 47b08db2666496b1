"""Codecs of a stream: bytes to fewer bytes and back, by name.

`brotli` shuffles first: all first bytes of the items, then all second bytes, so that the sign and exponent bytes of float16 values stand
together. `adaptive` is our arithmetic coder of matrices of integers (level_coder.py), `series` the same for one row of numbers
(delta_coder.py), and `plain` leaves the bytes as they are. A stream records the name of its codec, so that a further codec is one more
entry of CODECS. A decoder is told how many bytes must come out and never holds much more than that.

Which codecs a stream may have follows from the family that the parameters name and from what the stream holds; the shortest is taken.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import brotli
import numpy as np

from stages.pack.entropy import delta_coder, level_coder

WINDOW_BITS = 24  # brotli's largest standard window, 16 MB: as large as the whole artifact
CHUNK_BYTES = 1 << 20  # of output asked of the decoder at once; it may overshoot by as much again
Kind = Literal["matrix", "series", "bytes"]  # what the arithmetic coder makes of a stream
FAMILIES: dict[str, dict[Kind, tuple[str, ...]]] = {
    "adaptive": {
        "matrix": ("adaptive",),
        "series": ("series", "brotli", "plain"),
        "bytes": ("brotli", "plain"),
    },
    "brotli": {"matrix": ("brotli",), "series": ("brotli",), "bytes": ("brotli",)},
}


@dataclass(frozen=True)
class Layout:
    """What a stream decodes to: a matrix of little-endian items, which are integers on a trellis if its `states` say so."""

    item_bytes: int
    rows: int
    columns: int
    states: int = 1
    exponents: bytes = b""  # signed bytes, of rows and then of columns, where they are known beforehand (trellis_quantiser.py)
    kind: Kind = "bytes"

    @property
    def raw_bytes(self) -> int:
        """Bytes once decoded."""
        return self.item_bytes * self.rows * self.columns

    @property
    def axes(self) -> tuple[np.ndarray, np.ndarray]:
        """The exponents of rows and of columns, int8; zeros where they are not known."""
        known = np.frombuffer(self.exponents or bytes(self.rows + self.columns), np.int8)
        return known[: self.rows], known[self.rows :]


class Codec(NamedTuple):
    """Two functions: encode(raw, layout, quality) and decode(payload, layout)."""

    encode: Callable[[bytes, Layout, int], bytes]
    decode: Callable[[bytes, Layout], bytes]


def encode(codec: str, raw: bytes, layout: Layout, quality: int) -> bytes:
    """`raw`, which is laid out as `layout` says, as `codec` writes it; `quality` is brotli's."""
    return CODECS[codec].encode(raw, layout, quality)


def shortest(family: str, raw: bytes, layout: Layout, quality: int) -> tuple[str, bytes]:
    """The codec of the family that makes the fewest bytes of `raw`, and these."""
    every = [(codec, encode(codec, raw, layout, quality)) for codec in FAMILIES[family][layout.kind]]
    return min(every, key=lambda of: len(of[1]))


def compile_ahead(family: str) -> None:
    """Have compiled what the family's codecs call, which takes seconds."""
    if family == "adaptive":
        level_coder.compile_ahead()
        delta_coder.compile_ahead()


def decode(codec: str, payload: bytes, layout: Layout) -> bytes:
    """The bytes that were encoded; a ValueError when the payload does not hold exactly those."""
    if codec not in CODECS:
        raise ValueError(f"unknown codec {codec!r}; known are {', '.join(CODECS)}")
    return CODECS[codec].decode(payload, layout)


def shuffle(raw: bytes, item_bytes: int) -> bytes:
    """Byte 0 of every item, then byte 1 of every item, and so on.

    >>> shuffle(b"aAbBcC", 2)
    b'abcABC'
    """
    return np.frombuffer(raw, np.uint8).reshape(-1, item_bytes).T.tobytes()


def unshuffle(shuffled: bytes, item_bytes: int) -> bytes:
    """The inverse of shuffle."""
    return np.frombuffer(shuffled, np.uint8).reshape(item_bytes, -1).T.tobytes()


def deflate(raw: bytes, quality: int) -> bytes:
    """A whole brotli stream."""
    return bytes(brotli.compress(raw, quality=quality, lgwin=WINDOW_BITS))


def inflate(payload: bytes, most_bytes: int) -> bytes:
    """Decompress a whole brotli stream of at most `most_bytes`; a ValueError when it is damaged, cut short, or longer than that."""
    decoder, chunks, length, pending = brotli.Decompressor(), [], 0, payload
    try:
        while not decoder.is_finished():
            chunk = decoder.process(pending, output_buffer_limit=min(most_bytes - length + 1, CHUNK_BYTES))
            if not chunk and not decoder.is_finished():
                raise ValueError("a brotli stream ends too early")
            chunks.append(chunk)
            length += len(chunk)
            pending = b""
            if length > most_bytes:
                raise ValueError(f"a brotli stream holds more than the {most_bytes} bytes declared")
    except brotli.error as error:
        raise ValueError("a brotli stream is damaged") from error
    return b"".join(chunks)


def _encode_brotli(raw: bytes, layout: Layout, quality: int) -> bytes:
    return deflate(shuffle(raw, layout.item_bytes), quality)


def _decode_brotli(payload: bytes, layout: Layout) -> bytes:
    raw = inflate(payload, layout.raw_bytes)
    if len(raw) != layout.raw_bytes:
        raise ValueError(f"a brotli stream holds {len(raw)} bytes, {layout.raw_bytes} are declared")
    return unshuffle(raw, layout.item_bytes)


def _encode_adaptive(raw: bytes, layout: Layout, _: int) -> bytes:
    values = np.frombuffer(raw, f"<i{layout.item_bytes}").reshape(layout.rows, layout.columns)
    return level_coder.encode(values.astype(np.int16), *layout.axes, layout.states)


def _decode_adaptive(payload: bytes, layout: Layout) -> bytes:
    values = level_coder.decode(payload, *layout.axes, layout.states)
    narrow = values.astype(f"<i{layout.item_bytes}")
    if not np.array_equal(narrow, values):
        raise ValueError(f"an arithmetic-coded stream holds values beyond {layout.item_bytes} bytes")
    return narrow.tobytes()


def _encode_series(raw: bytes, layout: Layout, _: int) -> bytes:
    return delta_coder.encode(raw, layout.item_bytes)


def _decode_series(payload: bytes, layout: Layout) -> bytes:
    if layout.kind != "series":
        raise ValueError("a stream that is no series of numbers is coded as one")
    return delta_coder.decode(payload, layout.item_bytes, layout.rows * layout.columns)


def _encode_plain(raw: bytes, _layout: Layout, _: int) -> bytes:
    return raw


def _decode_plain(payload: bytes, layout: Layout) -> bytes:
    if len(payload) != layout.raw_bytes:
        raise ValueError(f"a plain stream holds {len(payload)} bytes, {layout.raw_bytes} are declared")
    return payload


CODECS = {
    "brotli": Codec(_encode_brotli, _decode_brotli),
    "adaptive": Codec(_encode_adaptive, _decode_adaptive),
    "series": Codec(_encode_series, _decode_series),
    "plain": Codec(_encode_plain, _decode_plain),
}
