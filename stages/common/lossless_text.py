"""Text to token ids and back without loss, whatever the tokenizer changes.

The bytes of an id are read from its piece alone (U+2581 is a space, a byte-fallback piece its byte), so a sequence spells what its parts
spell. Ids are kept as far as they spell the text; where the tokenizer would change a character, as one that removes white space does, that
character is spelled by itself, and the rest is tokenized anew.
"""

import sentencepiece

from stages.common.bpb import SPACE_MARKER, byte_table

AT_ONCE = 512  # characters that are tokenized anew behind a change: the whole rest each time would take quadratic time


class Speller:
    """A SentencePiece model with byte fallback, made lossless."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
        self.tokenizer = tokenizer
        table = byte_table(tokenizer)
        self.bos = table.bos
        self.bytes_of = [b"" if table.boundary[i] else self._bytes(i) for i in range(table.vocab_size)]
        self.alone = {self.bytes_of[i]: i for i in range(table.vocab_size) if tokenizer.is_byte(i)}
        self.alone[b" "] = tokenizer.piece_to_id(SPACE_MARKER)

    def encode(self, text: str) -> list[int]:
        """Ids that spell `text`."""
        found: list[int] = []
        at, reach = 0, len(text)
        while at < len(text):
            part = text[at : at + reach]
            ids, characters = self._as_far_as_right(part)
            if characters < len(part):
                reach = AT_ONCE
            if not characters:
                ids, characters = [self.alone[bytes([byte])] for byte in part[0].encode("utf-8")], 1
            found += ids
            at += characters
        return found

    def decode(self, ids: list[int]) -> bytes:
        """The bytes of ids."""
        return b"".join([self.bytes_of[i] for i in ids])

    def _as_far_as_right(self, text: str) -> tuple[list[int], int]:
        """The tokenizer's ids up to the first that does not spell the text, and how many characters they spell."""
        ids: list[int] = self.tokenizer.encode(text)
        spelled, position, kept, reached = text.encode("utf-8"), 0, 0, 0
        for count, i in enumerate(ids, start=1):
            piece = self.bytes_of[i]
            if not piece or not spelled.startswith(piece, position):
                break
            position += len(piece)
            if spelled[position : position + 1].hex()[:1] not in (
                "8",
                "9",
                "a",
                "b",
            ):  # not inside a character
                kept, reached = count, position
        return ids[:kept], len(spelled[:reached].decode("utf-8"))

    def _bytes(self, i: int) -> bytes:
        piece: str = self.tokenizer.id_to_piece(i)
        return (
            bytes([int(piece[3:5], 16)])
            if self.tokenizer.is_byte(i)
            else piece.replace(SPACE_MARKER, " ").encode("utf-8")
        )


def cut(text: str, pieces: int, shortest: int) -> list[str]:
    """`text` in parts of at most a `pieces`th of it, or of `shortest` characters if that is more; cut after line ends where it can be."""
    size = max(shortest, -(-len(text) // pieces))
    parts, start = [], 0
    while start < len(text):
        end = text.rfind("\n", start + size // 2, start + size) + 1 if start + size < len(text) else len(text)
        end = end or start + size
        parts.append(text[start:end])
        start = end
    return parts
