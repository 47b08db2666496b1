"""A SentencePiece model: one we train, which loses nothing, or a given one, which is checked.

Ours: BPE with byte fallback, identity normalisation, white space kept, no dummy prefix, digits split, pad/bos/eos/unk 0-3. Pieces are
cut at spaces and none is a run of spaces, because the challenge's rule strips one U+2581 from the front of a piece and would count
any further one as three bytes; a run of spaces is therefore so many lone-space tokens.
"""

import heapq
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from stages.common import bpb
from stages.common.bpb import ByteTable
from stages.tokenize import split
from stages.tokenize.split import Document

QUIET = 2  # SentencePiece's log level: errors, which it also raises
MAX_SENTENCE = 1 << 30  # a document is one sentence; SentencePiece drops longer ones
PRIVATE_USE = range(0xE000, 0xF900)


class Tokenizer(NamedTuple):
    """A model's file content, the processor made from it, and its byte table."""

    model: bytes
    processor: sentencepiece.SentencePieceProcessor
    table: ByteTable


class Sample(NamedTuple):
    """What a tokenizer is trained on."""

    texts: list[str]
    size: int  # UTF-8 bytes


def sample(documents: Iterable[Document], val_fraction: float, max_bytes: int) -> Sample:
    """The train documents with the lowest content hashes, up to `max_bytes`: a random sample that no order of files changes.

    Memory is the sample's: the highest hash leaves when the rest is too large.
    """
    kept: list[tuple[int, str, int]] = []  # a heap with the highest hash on top
    size = 0
    for document in documents:
        hash64 = split.content_hash(document.text)
        if (document.side or split.side_of(hash64, val_fraction)) != "train":
            continue
        text_size = len(document.text.encode("utf-8"))
        heapq.heappush(kept, (-hash64, document.text, text_size))
        size += text_size
        while size > max_bytes and len(kept) > 1:
            size -= heapq.heappop(kept)[2]
    return Sample([text for _, text, _ in sorted(kept, reverse=True)], size)


def train(texts: list[str], vocab_size: int, threads: int) -> bytes:
    """A model of `vocab_size` ids trained on `texts`; the same bytes for the same texts and threads."""
    if not texts:
        raise ValueError(
            "there are no train documents to train the tokenizer on; lower tokenize.val_fraction or give more text"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            split_by_whitespace=True,
            allow_whitespace_only_pieces=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            num_threads=threads,
            max_sentence_length=MAX_SENTENCE,
            minloglevel=QUIET,
        )
    except RuntimeError as error:
        raise ValueError(
            f"tokenize.vocab_size: SentencePiece cannot make {vocab_size} pieces of the train documents: {error}"
        ) from error
    return model.getvalue()


def load(path: Path, vocab_size: int) -> Tokenizer:
    """The model at `path`, checked: of `vocab_size` ids, with byte fallback, BOS and the lone space piece."""
    processor = bpb.load_tokenizer(path)
    if processor.vocab_size() != vocab_size:
        raise ValueError(
            f"{path} has {processor.vocab_size()} ids, but tokenize.vocab_size is {vocab_size}; set it to the model's"
        )
    try:
        table = bpb.byte_table(processor)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Tokenizer(path.read_bytes(), processor, table)


def uncountable(tokenizer: Tokenizer) -> dict[int, str]:
    """The ids whose counted bytes are not those of the text they stand for, each with the reason.

    Inner U+2581 stands for a space and is counted as three bytes. Private-use pieces are the marks of a reversible text
    transformation (CaseOps, #1729), which the original text does not hold: without its side file the count is too high
    (#2071: 164,594,398 for 151,074,309).
    """
    reasons = {}
    for i in range(tokenizer.table.vocab_size):
        piece = tokenizer.processor.id_to_piece(i)
        if tokenizer.table.boundary[i] or tokenizer.processor.is_byte(i):
            continue
        if bpb.SPACE_MARKER in piece[1:]:
            reasons[i] = (
                "has U+2581 behind its first character, which would count as three bytes for one space"
            )
        elif any(ord(character) in PRIVATE_USE for character in piece):
            reasons[i] = "is a private-use mark (CaseOps), which is no byte of the original text"
    return reasons
