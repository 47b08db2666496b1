"""Bits per byte, and the counting of bytes.

`target_bytes` is the only function that counts for a score; the audit counts independently, by
decoding.

Losses per token cannot be compared across tokenizers, so the challenge scores bits per byte of
text. Counting has three complications, all in `byte_table` and `target_bytes` (#1493):

* The leading marker U+2581 of a piece is a space of one byte, to be counted once (D1 in
  docs/defects.md), and only after text: at the start of a document it is not in the text.
* A byte-fallback piece such as `<0xAB>` is one byte, whatever the length of its name (D3).
* Control, unknown and unused ids are not text: zero bytes, and a boundary before the next token.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

SPACE_MARKER = "\u2581"


@dataclass(frozen=True)
class ByteTable:
    """The text of each of a tokenizer's V ids."""

    texts: tuple[bytes, ...]  # V: bytes of each id, without the leading space
    leading_space: np.ndarray  # (V,) bool: the piece begins with the marker
    boundary: np.ndarray  # (V,) bool: a control, unknown or unused id, which is not text
    bos: int  # id of BOS

    @property
    def vocab_size(self) -> int:
        """V, the number of ids."""
        return len(self.texts)

    @cached_property
    def base_bytes(self) -> np.ndarray:
        """Number of bytes of each id without the leading space, (V,) int64."""
        return np.array([len(text) for text in self.texts], dtype=np.int64)

    @cached_property
    def text_hashes(self) -> np.ndarray:
        """Hashes of the ids' texts and kinds, (V,) uint64, which do not depend on the ids' numbers."""
        kinds = self.boundary + 2 * self.leading_space.astype(np.int64)
        hashes = []
        for kind, text in zip(kinds.tolist(), self.texts, strict=True):
            digest = hashlib.blake2b(bytes([kind]) + text, digest_size=8).digest()
            hashes.append(int.from_bytes(digest, "little"))
        return np.array(hashes, dtype=np.uint64)

    def appended_bytes(self, after_boundary: bool) -> list[bytes]:
        """The bytes that each of the V ids appends to the text, after text or after a boundary."""
        space = b"" if after_boundary else b" "
        return [
            space * leading + text
            for leading, text in zip(self.leading_space.tolist(), self.texts, strict=True)
        ]


def load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Load a SentencePiece model; a ValueError when the file is not one."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: a SentencePiece model is expected there")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a SentencePiece model: {error}") from error


def byte_table(tokenizer: sentencepiece.SentencePieceProcessor) -> ByteTable:
    """Build the byte table of a tokenizer.

    A ValueError unless it has byte fallback, a BOS and the lone space marker as a piece.
    """
    # With byte fallback any text has tokens, one for each byte where no piece fits.
    vocab = tokenizer.vocab_size()
    byte_ids = [i for i in range(vocab) if tokenizer.is_byte(i)]
    if len(byte_ids) != 256:
        raise ValueError(
            f"the tokenizer has {len(byte_ids)} byte-fallback pieces, expected 256;"
            " train it with byte_fallback"
        )

    # A lone space and the start of a document each need a token of their own.
    if tokenizer.is_unknown(tokenizer.piece_to_id(SPACE_MARKER)):
        raise ValueError(
            "the tokenizer has no piece for a lone space (U+2581), so leading spaces could not be counted"
        )
    if tokenizer.bos_id() < 0:
        raise ValueError("the tokenizer has no BOS id; every document starts with BOS")

    # Each id is a boundary, one byte, or a piece of text.
    texts = [b""] * vocab
    leading_space = np.zeros(vocab, dtype=bool)
    boundary = np.zeros(vocab, dtype=bool)
    for i in range(vocab):
        if tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i):
            boundary[i] = True
        elif tokenizer.is_byte(i):
            texts[i] = bytes([int(tokenizer.id_to_piece(i)[1:-1], 16)])
        else:
            # The marker is kept apart from the text, because it counts only after text.
            piece = tokenizer.id_to_piece(i)
            leading_space[i] = piece.startswith(SPACE_MARKER)
            texts[i] = piece.removeprefix(SPACE_MARKER).encode("utf-8")
    return ByteTable(tuple(texts), leading_space, boundary, tokenizer.bos_id())


def target_bytes(tokens: np.ndarray, table: ByteTable) -> np.ndarray:
    """Bytes of each target of a stream of tokens (N,); returns (N-1,) int64.

    Target i is tokens[i + 1], after tokens[i].
    """
    previous, target = tokens[:-1], tokens[1:]
    return table.base_bytes[target] + (table.leading_space[target] & ~table.boundary[previous])


def bits_per_byte(nll: np.ndarray, counted_bytes: np.ndarray) -> float:
    """Total loss in bits over total bytes, summed in float64.

    `nll`, in nats, and `counted_bytes` are (N-1,).
    """
    if nll.shape != counted_bytes.shape:
        raise ValueError(
            f"{len(nll)} losses against {len(counted_bytes)} targets: the ledger belongs to another stream"
        )
    total_bytes = int(counted_bytes.sum(dtype=np.int64))
    if total_bytes == 0:
        raise ValueError("the targets have no bytes, so bits per byte are undefined")
    return float(nll.sum(dtype=np.float64)) / math.log(2) / total_bytes
