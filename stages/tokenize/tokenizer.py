"""SentencePiece tokenizers: a lossless one that this stage trains, or a given one that it checks.

Ours is BPE with byte fallback, identity normalisation, white space kept, no dummy prefix, digits
split, pad/bos/eos/unk 0-3. Pieces are cut at spaces and none is a run of spaces, because the
challenge's rule strips one U+2581 from the front of a piece and would count any further one as
three bytes. A run of spaces is therefore encoded as that number of lone-space tokens.
"""

import heapq
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece

from stages.common import bpb
from stages.common.bpb import ByteTable
from stages.tokenize import split
from stages.tokenize.params import SMALLEST_VOCAB
from stages.tokenize.split import TextDocument

LOG_ERRORS_ONLY = 2  # SentencePiece's log level; it raises errors as well
MAX_SENTENCE_BYTES = 1 << 30  # a document is one "sentence"; SentencePiece drops longer ones
PRIVATE_USE = range(0xE000, 0xF900)  # code points of Unicode's private-use area


class Tokenizer(NamedTuple):
    """A SentencePiece model: the content of its file, its processor and its byte table."""

    model_bytes: bytes
    processor: sentencepiece.SentencePieceProcessor
    table: ByteTable


class TokenizerSample(NamedTuple):
    """The texts that a tokenizer is trained on, in the order of their hashes."""

    texts: list[str]
    size: int  # UTF-8 bytes


def sample(documents: Iterable[TextDocument], val_fraction: float, max_bytes: int) -> TokenizerSample:
    """Sample the train documents with the lowest content hashes, up to `max_bytes` of UTF-8.

    The sample is random but independent of the order of the files. Memory holds the sample alone:
    when it grows too large, the document with the highest hash is dropped.
    """
    kept: list[tuple[int, str, int]] = []  # heap of (-hash, text, bytes): the highest hash on top
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
    return TokenizerSample([text for _, text, _ in sorted(kept, reverse=True)], size)


def train(texts: list[str], vocab_size: int, threads: int) -> bytes:
    """Train a model of `vocab_size` ids.

    Returns the model file, the same bytes for the same texts and threads.
    """
    if not texts:
        raise ValueError(
            "there are no train documents to train the tokenizer on; "
            "lower tokenize.val_fraction or give more text"
        )

    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": vocab_size,
        # Lossless: every byte sequence has tokens, and nothing is normalised away.
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        # A digit is a piece of its own; only the first character of a piece may be a space.
        "split_digits": True,
        "split_by_whitespace": True,
        "allow_whitespace_only_pieces": False,
        # Ids, determinism and limits.
        "pad_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "unk_id": 3,
        "num_threads": threads,
        "max_sentence_length": MAX_SENTENCE_BYTES,
        "minloglevel": LOG_ERRORS_ONLY,
    }

    # SentencePiece reports a vocabulary that the texts cannot fill as a RuntimeError.
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, **settings
        )
    except RuntimeError as error:
        raise ValueError(_vocabulary_error(vocab_size, str(error))) from error
    return model.getvalue()


def _vocabulary_error(vocab_size: int, message: str) -> str:
    """Return the reason and remedy for SentencePiece's message that it cannot make `vocab_size` pieces."""
    sizes = "set tokenize.vocab_size and model.vocab_size to"
    needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if needed:
        return (
            f"tokenize.vocab_size: {vocab_size} pieces are too few for the different characters of the text; "
            f"{sizes} at least {needed[1]}"
        )
    most = re.search(r"set it to a value <= (\d+)", message)
    remedy = "give more text"
    if most and int(most[1]) > SMALLEST_VOCAB:
        remedy = f"{sizes} at most {most[1]}, or {remedy}"
    return f"tokenize.vocab_size: too little text for {vocab_size} pieces; {remedy}"


def load(path: Path, vocab_size: int) -> Tokenizer:
    """Load the model at `path`.

    Raises ValueError unless it has `vocab_size` ids, byte fallback, BOS and a lone-space piece.
    """
    processor = bpb.load_tokenizer(path)
    if processor.vocab_size() != vocab_size:
        raise ValueError(
            f"{path} has {processor.vocab_size()} ids, but tokenize.vocab_size is {vocab_size}; "
            "set it to the model's"
        )
    try:
        table = bpb.byte_table(processor)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Tokenizer(path.read_bytes(), processor, table)


def miscounted_ids(tokenizer: Tokenizer) -> dict[int, str]:
    """Find the ids whose counted bytes are not those of their text; returns the reason for each.

    An inner U+2581 is a space and is counted as three bytes. Private-use pieces are the marks of a
    reversible text transformation (CaseOps, #1729), which the original text does not contain:
    without its side file the count is too high (#2071: 164,594,398 for 151,074,309).
    """
    reasons = {}
    for i in range(tokenizer.table.vocab_size):
        piece = tokenizer.processor.id_to_piece(i)
        if tokenizer.table.boundary[i] or tokenizer.processor.is_byte(i):
            continue
        if bpb.SPACE_MARKER in piece[1:]:
            reasons[i] = (
                "has U+2581 after its first character, which would count as three bytes for one space"
            )
        elif any(ord(character) in PRIVATE_USE for character in piece):
            reasons[i] = "is a private-use mark (CaseOps), which is not a byte of the original text"
    return reasons
