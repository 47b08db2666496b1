"""Encodes a tensor's streams: in this process, or in a forked child (encode_process.py)."""

from collections.abc import Sequence
from typing import Protocol

from stages.pack.entropy import codecs
from stages.pack.entropy.codecs import StreamLayout
from stages.pack.file.container import EncodedStream


class StreamEncoder(Protocol):
    """Protocol of an encoder. Several threads may call it at once."""

    def encode(
        self, layouts: Sequence[StreamLayout], streams: Sequence[bytes], family: str, quality: int
    ) -> tuple[EncodedStream, ...]:
        """Encode the raw streams of a tensor, each by the shortest codec of a family.

        `quality` is brotli's, 0 to 11. Raises ValueError for values that no codec takes.
        """


class InProcessEncoder:
    """Encodes on the thread that calls."""

    def encode(
        self, layouts: Sequence[StreamLayout], streams: Sequence[bytes], family: str, quality: int
    ) -> tuple[EncodedStream, ...]:
        """Encode the raw streams of a tensor."""
        encoded = []
        for layout, raw in zip(layouts, streams, strict=True):
            codec, payload = codecs.encode_shortest(family, raw, layout.with_exponents(streams), quality)
            encoded.append(EncodedStream(codec, payload))
        return tuple(encoded)
