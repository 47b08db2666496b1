"""Lossless tokenization: text to token ids and back, whatever the tokenizer normalises.

The bytes of an id are read from its piece alone (U+2581 is a space, a byte-fallback piece its
byte), so a sequence of ids decodes to the concatenation of their bytes. The tokenizer's ids are
kept as far as they decode to the text. Where the tokenizer would change a character (some remove
white space), that character is encoded byte by byte, and the rest is tokenized again.
"""

import sentencepiece

from stages.common.bpb import SPACE_MARKER, byte_table

RETRY_CHARACTERS = (
    512  # characters that are tokenized again after a change; all of the rest would take quadratic time
)


class LosslessTokenizer:
    """A SentencePiece model with byte fallback, made lossless."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
        self.tokenizer = tokenizer
        table = byte_table(tokenizer)
        self.bos = table.bos
        self.token_bytes = [b"" if table.boundary[i] else self._bytes(i) for i in range(table.vocab_size)]
        self.byte_ids = {self.token_bytes[i]: i for i in range(table.vocab_size) if tokenizer.is_byte(i)}
        self.byte_ids[b" "] = tokenizer.piece_to_id(SPACE_MARKER)

    def encode(self, text: str) -> list[int]:
        """Ids that decode to `text`."""
        found: list[int] = []
        position = 0
        length = len(text)  # characters that are tokenized at once
        while position < len(text):
            part = text[position : position + length]
            ids, characters = self._exact_prefix(part)
            if characters < len(part):
                length = RETRY_CHARACTERS
            if not characters:
                ids = [self.byte_ids[bytes([byte])] for byte in part[0].encode("utf-8")]
                characters = 1
            found += ids
            position += characters
        return found

    def decode(self, ids: list[int]) -> bytes:
        """Concatenate the bytes of the ids."""
        return b"".join([self.token_bytes[i] for i in ids])

    def _exact_prefix(self, text: str) -> tuple[list[int], int]:
        """The tokenizer's ids up to the first that does not match the text.

        Also returns the number of characters that they cover.
        """
        ids: list[int] = self.tokenizer.encode(text)
        encoded = text.encode("utf-8")
        position = 0
        kept_ids = 0
        kept_bytes = 0
        for count, i in enumerate(ids, start=1):
            piece = self.token_bytes[i]
            if not piece or not encoded.startswith(piece, position):
                break
            position += len(piece)

            # Cut between characters only: bytes 0x80 to 0xBF continue one.
            is_inside_character = position < len(encoded) and 0x80 <= encoded[position] < 0xC0
            if not is_inside_character:
                kept_ids = count
                kept_bytes = position
        return ids[:kept_ids], len(encoded[:kept_bytes].decode("utf-8"))

    def _bytes(self, i: int) -> bytes:
        """The bytes of an id, from its piece: `<0xE2>` is a byte."""
        piece: str = self.tokenizer.id_to_piece(i)
        if self.tokenizer.is_byte(i):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE_MARKER, " ").encode("utf-8")


def split_text(text: str, pieces: int, shortest: int) -> list[str]:
    """Split `text` into at most `pieces` parts, of `shortest` characters at least but for the last.

    A part ends after the last line end of its second half, if it has one.
    """
    size = max(shortest, -(-len(text) // pieces))
    parts = []
    start = 0
    while start < len(text):
        end = len(text)
        if start + size < len(text):
            line_end = text.rfind("\n", start + size // 2, start + size) + 1
            end = line_end or start + size
        parts.append(text[start:end])
        start = end
    return parts
