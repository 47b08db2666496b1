"""Bits per byte, and the one function that counts bytes.

Loss per token says nothing across tokenizers, so the challenge scores bits per byte of text. Three complications, all in `byte_table` and
`target_bytes` (#1493; knowledge of the defects it avoids: leading spaces counted twice, byte-fallback pieces counted as three bytes):

* a piece's leading marker U+2581 is a space, and counts one byte only where a text byte stands: not after a control token, where a
  document begins;
* a byte-fallback piece `<0xAB>` is one byte, whatever its name looks like;
* control, unknown and unused ids are no text: zero bytes, and a boundary for the token that follows.
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
    """What each token id adds to the text: arrays over the V ids of a tokenizer."""

    texts: tuple[bytes, ...]  # of each id: what it says, without the leading space
    leading_space: np.ndarray  # (V,) bool: the piece begins with the marker
    boundary: np.ndarray  # (V,) bool: control, unknown or unused, so no text
    bos: int

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        return len(self.texts)

    @cached_property
    def base(self) -> np.ndarray:
        """(V,) int64: bytes without the leading space."""
        return np.array([len(text) for text in self.texts], dtype=np.int64)

    @cached_property
    def codes(self) -> np.ndarray:
        """(V,) uint64: a number for what each id says, to be hashed where an id's own number must not matter."""
        kinds = self.boundary + 2 * self.leading_space.astype(np.int64)
        said = (bytes([kind]) + text for kind, text in zip(kinds.tolist(), self.texts, strict=True))
        return np.array(
            [int.from_bytes(hashlib.blake2b(one, digest_size=8).digest(), "little") for one in said],
            dtype=np.uint64,
        )

    def emissions(self, after_boundary: bool) -> list[bytes]:
        """What each id adds to the text, behind a token without text or behind one with."""
        space = b"" if after_boundary else b" "
        return [
            space * leading + text
            for leading, text in zip(self.leading_space.tolist(), self.texts, strict=True)
        ]


def load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model; a ValueError when the file is not one."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: a SentencePiece model is expected there")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a SentencePiece model: {error}") from error


def byte_table(tokenizer: sentencepiece.SentencePieceProcessor) -> ByteTable:
    """The byte table of a tokenizer, which must have byte fallback, a BOS and the lone space marker as a piece."""
    vocab = tokenizer.vocab_size()
    byte_ids = [i for i in range(vocab) if tokenizer.is_byte(i)]
    if len(byte_ids) != 256:
        raise ValueError(
            f"the tokenizer has {len(byte_ids)} byte-fallback pieces, expected 256; train it with byte_fallback"
        )
    if tokenizer.is_unknown(tokenizer.piece_to_id(SPACE_MARKER)):
        raise ValueError(
            "the tokenizer has no piece for a lone space (U+2581), so leading spaces could not be counted"
        )
    if tokenizer.bos_id() < 0:
        raise ValueError("the tokenizer has no BOS id; every document starts with BOS")
    texts = [b""] * vocab
    leading_space = np.zeros(vocab, dtype=bool)
    boundary = np.zeros(vocab, dtype=bool)
    for i in range(vocab):
        if tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i):
            boundary[i] = True
        elif tokenizer.is_byte(i):
            texts[i] = bytes([int(tokenizer.id_to_piece(i)[1:-1], 16)])
        else:
            piece = tokenizer.id_to_piece(i)
            leading_space[i] = piece.startswith(SPACE_MARKER)
            texts[i] = piece.removeprefix(SPACE_MARKER).encode("utf-8")
    return ByteTable(tuple(texts), leading_space, boundary, tokenizer.bos_id())


def target_bytes(tokens: np.ndarray, table: ByteTable) -> np.ndarray:
    """Bytes of each target of a stream of N tokens, (N-1,) int64: target i is tokens[i + 1], after tokens[i]."""
    previous, target = tokens[:-1], tokens[1:]
    return table.base[target] + (table.leading_space[target] & ~table.boundary[previous])


def bits_per_byte(nll: np.ndarray, counted_bytes: np.ndarray) -> float:
    """Total nats of `nll` in bits over total bytes, summed in float64; both (N-1,)."""
    if nll.shape != counted_bytes.shape:
        raise ValueError(
            f"{len(nll)} losses against {len(counted_bytes)} targets: the ledger belongs to another stream"
        )
    total_bytes = int(counted_bytes.sum(dtype=np.int64))
    if total_bytes == 0:
        raise ValueError("the targets hold no bytes, so bits per byte is undefined")
    return float(nll.sum(dtype=np.float64)) / math.log(2) / total_bytes
