"""Documents to tokens, in batches, with the byte count of each checked against its text.

The document is decode(encode(text)): a given tokenizer may normalise, and bytes refer to what can be restored. The challenge's rule
(stages/common/bpb.py) counts exactly the document's UTF-8 bytes, less the one space with which a document may begin: the rule counts no
leading space after BOS. That errs on the careful side (fewer bytes, higher bpb); the manifest says how often.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import sentencepiece

from stages.common import bpb
from stages.common.bpb import ByteTable
from stages.tokenize.split import Document
from stages.tokenize.tokenizer import Tokenizer

BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 1 << 22


class Encoded(NamedTuple):
    """A document as tokens."""

    source: Document
    text: str  # decode(encode(source.text))
    tokens: np.ndarray  # (n,) uint16, BOS first
    counted: int  # bytes by the challenge's rule

    @property
    def leading_space(self) -> bool:
        """Whether the document begins with the space that the rule does not count."""
        return self.text.startswith(" ")


def encode(documents: Iterable[Document], tokenizer: Tokenizer, threads: int) -> Iterator[Encoded]:
    """Each document encoded, in order; one without a token (empty, or emptied by the normalisation) has BOS alone."""
    for batch in _batches(documents):
        ids = tokenizer.processor.encode(
            [document.text for document in batch], out_type=int, num_threads=threads
        )
        texts = tokenizer.processor.decode(ids, num_threads=threads)
        arrays = [np.array([tokenizer.table.bos, *of_one], dtype=np.uint16) for of_one in ids]
        for document, text, tokens, counted in zip(
            batch, texts, arrays, _counted(arrays, tokenizer.table), strict=True
        ):
            check_bytes(document.name, text, tokens, counted, tokenizer)
            yield Encoded(document, text, tokens, counted)


def check_bytes(name: str, text: str, tokens: np.ndarray, counted: int, tokenizer: Tokenizer) -> None:
    """Raise ValueError when the counted bytes are not those of the text, naming the document and its first piece that is miscounted."""
    expected = len(text.encode("utf-8")) - text.startswith(" ")
    if counted != expected:
        piece = _first_miscounted(tokens, tokenizer.processor, tokenizer.table)
        raise ValueError(
            f"{name}: {counted} bytes counted for {expected} bytes of text{piece}; this tokenizer does not fit the challenge's byte rule: "
            "train it with byte fallback, and with no piece that has a space behind its first character"
        )


def _counted(documents: list[np.ndarray], table: ByteTable) -> list[int]:
    """Bytes of each document; BOS, which begins each, counts none and ends the reach of the token before it."""
    counts = np.concatenate([[0], bpb.target_bytes(np.concatenate(documents), table)])
    starts = np.cumsum([0, *(len(document) for document in documents[:-1])])
    return [int(total) for total in np.add.reduceat(counts, starts)]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _first_miscounted(
    tokens: np.ndarray, processor: sentencepiece.SentencePieceProcessor, table: ByteTable
) -> str:
    for counted, token, before in zip(
        bpb.target_bytes(tokens, table), tokens[1:].tolist(), tokens[:-1].tolist(), strict=True
    ):
        if processor.is_byte(token):
            continue
        surface = "" if table.boundary[token] else processor.id_to_piece(token).replace(bpb.SPACE_MARKER, " ")
        expected = len(surface.encode("utf-8")) - (bool(table.boundary[before]) and surface.startswith(" "))
        if counted != expected:
            return f", first at piece {processor.id_to_piece(token)!r} (id {token}: {counted} for {expected})"
    return ""
