"""Codecs of a stream: bytes to fewer bytes and back, by name.

`brotli` shuffles first: all first bytes of the items, then all second bytes, so that the sign and exponent bytes of float16 values stand
together. A stream records the name of its codec, so that a further codec is one more entry of CODECS. A decoder is told how many bytes
must come out and never holds much more than that.
"""

from collections.abc import Callable
from typing import NamedTuple

import brotli
import numpy as np

WINDOW_BITS = 24  # brotli's largest standard window, 16 MB: as large as the whole artifact
CHUNK_BYTES = 1 << 20  # of output asked of the decoder at once; it may overshoot by as much again


class Codec(NamedTuple):
    """Two functions: encode(raw, item_bytes, quality) and decode(payload, item_bytes, raw_bytes)."""

    encode: Callable[[bytes, int, int], bytes]
    decode: Callable[[bytes, int, int], bytes]


def encode(codec: str, raw: bytes, item_bytes: int, quality: int) -> bytes:
    """`raw`, which holds items of `item_bytes` bytes, as `codec` writes it."""
    return CODECS[codec].encode(raw, item_bytes, quality)


def decode(codec: str, payload: bytes, item_bytes: int, raw_bytes: int) -> bytes:
    """The `raw_bytes` bytes that were encoded; a ValueError when the payload does not hold exactly those."""
    if codec not in CODECS:
        raise ValueError(f"unknown codec {codec!r}; known are {', '.join(CODECS)}")
    return CODECS[codec].decode(payload, item_bytes, raw_bytes)


def shuffle(raw: bytes, item_bytes: int) -> bytes:
    """Byte 0 of every item, then byte 1 of every item, and so on.

    >>> shuffle(b"aAbBcC", 2)
    b'abcABC'
    """
    return np.frombuffer(raw, np.uint8).reshape(-1, item_bytes).T.tobytes()


def unshuffle(shuffled: bytes, item_bytes: int) -> bytes:
    """The inverse of shuffle."""
    return np.frombuffer(shuffled, np.uint8).reshape(item_bytes, -1).T.tobytes()


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


def _encode_brotli(raw: bytes, item_bytes: int, quality: int) -> bytes:
    return bytes(brotli.compress(shuffle(raw, item_bytes), quality=quality, lgwin=WINDOW_BITS))


def _decode_brotli(payload: bytes, item_bytes: int, raw_bytes: int) -> bytes:
    raw = inflate(payload, raw_bytes)
    if len(raw) != raw_bytes:
        raise ValueError(f"a brotli stream holds {len(raw)} bytes, {raw_bytes} are declared")
    return unshuffle(raw, item_bytes)


CODECS = {"brotli": Codec(_encode_brotli, _decode_brotli)}
