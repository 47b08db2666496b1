"""Encodes documents to tokens in batches, and checks the byte count of each against its text.

The document is decode(encode(text)): a given tokenizer may normalise, and bytes are counted of what
can be restored. The challenge's rule (stages/common/bpb.py) counts exactly the document's UTF-8
bytes, less one space with which it may begin, since the rule counts no leading space after BOS.
This errs on the careful side (fewer bytes, higher bpb); the manifest says how often it happens.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import sentencepiece

from stages.common import bpb
from stages.common.bpb import ByteTable
from stages.tokenize.split import TextDocument
from stages.tokenize.tokenizer import Tokenizer

# A batch ends at either limit; its documents are encoded in parallel.
BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 1 << 22


class Encoded(NamedTuple):
    """A document as tokens."""

    source: TextDocument
    text: str  # decode(encode(source.text))
    tokens: np.ndarray  # (n,) uint16, BOS first
    counted_bytes: int  # by the challenge's rule

    @property
    def leading_space(self) -> bool:
        """True if the document begins with a space, which the rule does not count."""
        return self.text.startswith(" ")


def encode(documents: Iterable[TextDocument], tokenizer: Tokenizer, threads: int) -> Iterator[Encoded]:
    """Encode each document, in order.

    A document without tokens (empty, or emptied by normalisation) consists of BOS alone.
    """
    for batch in _batches(documents):
        texts = [document.text for document in batch]
        ids = tokenizer.processor.encode(texts, out_type=int, num_threads=threads)
        decoded = tokenizer.processor.decode(ids, num_threads=threads)
        token_arrays = [np.array([tokenizer.table.bos, *one], dtype=np.uint16) for one in ids]
        counts = _count_bytes(token_arrays, tokenizer.table)

        for document, text, tokens, counted in zip(batch, decoded, token_arrays, counts, strict=True):
            check_bytes(document.name, text, tokens, counted, tokenizer)
            yield Encoded(document, text, tokens, counted)


def check_bytes(name: str, text: str, tokens: np.ndarray, counted: int, tokenizer: Tokenizer) -> None:
    """Raise ValueError unless the counted bytes of a document's tokens (n,) are those of its text.

    The message names the document and its first piece that is miscounted.
    """
    expected = len(text.encode("utf-8")) - text.startswith(" ")
    if counted != expected:
        piece = _describe_first_miscount(tokens, tokenizer.processor, tokenizer.table)
        raise ValueError(
            f"{name}: {counted} bytes counted for {expected} bytes of text{piece}; this tokenizer does not "
            "fit the challenge's byte rule: train it with byte fallback, and with no piece that has a space "
            "after its first character"
        )


def _count_bytes(documents: list[np.ndarray], table: ByteTable) -> list[int]:
    """Count the bytes of each document's tokens (n,).

    All documents are counted in one pass: the BOS of each counts no bytes and separates it from the
    one before.
    """
    counts = np.concatenate([[0], bpb.target_bytes(np.concatenate(documents), table)])
    starts = np.cumsum([0, *(len(document) for document in documents[:-1])])
    return [int(total) for total in np.add.reduceat(counts, starts)]


def _batches(documents: Iterable[TextDocument]) -> Iterator[list[TextDocument]]:
    batch: list[TextDocument] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch = []
            characters = 0
    if batch:
        yield batch


def _describe_first_miscount(
    tokens: np.ndarray, processor: sentencepiece.SentencePieceProcessor, table: ByteTable
) -> str:
    """Describe the first of a document's tokens (n,) whose counted bytes are not its text's.

    Empty if there is none.
    """
    counts = bpb.target_bytes(tokens, table).tolist()
    previous_tokens = tokens[:-1].tolist()
    for counted, token, previous in zip(counts, tokens[1:].tolist(), previous_tokens, strict=True):
        if processor.is_byte(token):
            continue
        piece = processor.id_to_piece(token)
        text = "" if table.boundary[token] else piece.replace(bpb.SPACE_MARKER, " ")
        uncounted_space = bool(table.boundary[previous]) and text.startswith(" ")
        expected = len(text.encode("utf-8")) - uncounted_space
        if counted != expected:
            return f", first at piece {piece!r} (id {token}: {counted} for {expected})"
    return ""
