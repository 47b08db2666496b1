"""Imports ready-made challenge shards: checks them and copies them unchanged.

Header, length and ids of every shard are checked. The stream of each side must begin with BOS; a
document may continue in the next shard, because the challenge cuts at a fixed token count. Val
bytes decide bpb, so each val document is decoded and compared with its byte count. In all shards,
an id whose bytes the rule would miscount is an error (such as CaseOps' marks of a text
transformation).
"""

import shutil
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stages.common import bpb, shards
from stages.common.progress import Progress
from stages.tokenize import duplicates, encode
from stages.tokenize.duplicates import DocumentRef
from stages.tokenize.split import Side
from stages.tokenize.tokenizer import Tokenizer, miscounted_ids
from stages.tokenize.writer import ShardSummary

DECODE_DOCUMENTS = 1024  # val documents decoded at once


@dataclass
class ImportedSide:
    """One side's shards after the copy."""

    shards: dict[str, ShardSummary] = field(default_factory=dict)
    original_names: dict[str, str] = field(default_factory=dict)  # by our name of the shard
    hashes: "array[int]" = field(default_factory=lambda: array("Q"))
    uncounted_leading_spaces: int | None = None  # known of val alone


def import_side(
    paths: list[Path], folder: Path, side: Side, tokenizer: Tokenizer, threads: int, progress: Progress
) -> ImportedSide:
    """Check the shards `paths`, copy them into `folder` in this order, and hash their documents."""
    imported = ImportedSide()
    miscounted = miscounted_ids(tokenizer)
    folder.mkdir()

    # Nothing precedes the stream. BOS in its place counts the same, because the stream must begin
    # with BOS.
    previous = tokenizer.table.bos
    for number, path in enumerate(paths):
        shards.count(path)
        shards.check_ids(path, tokenizer.table.vocab_size)
        name = f"{side}/{side}_{number:06d}.bin"
        imported.shards[name], previous = _summarise(path, previous, tokenizer, miscounted)
        shutil.copyfile(path, folder.parent / name)
        imported.original_names[name] = path.name
        progress.advance(imported.shards[name].tokens, "tokens")

    # Hash all documents; decode those of val, a batch at a time.
    batch: list[DocumentRef] = []
    leading_spaces = 0
    for document in duplicates.documents(paths, tokenizer.table.bos):
        imported.hashes.append(duplicates.document_hash(document.tokens))
        if side == "val":
            batch.append(document)
        if len(batch) == DECODE_DOCUMENTS:
            leading_spaces += _check_decoded(batch, tokenizer, threads)
            batch = []
    if side == "val":
        imported.uncounted_leading_spaces = leading_spaces + _check_decoded(batch, tokenizer, threads)
    return imported


def _summarise(
    path: Path, previous: int, tokenizer: Tokenizer, miscounted: dict[int, str]
) -> tuple[ShardSummary, int]:
    """Count tokens, documents and bytes of a shard that follows the token `previous`.

    Returns them and the shard's last token.

    Raises ValueError when the shard holds one of the `miscounted` ids, whose reasons it gives.
    """
    table = tokenizer.table
    is_miscounted_V = np.zeros(table.vocab_size, dtype=bool)
    is_miscounted_V[list(miscounted)] = True

    tokens = shards.view(path)
    summary = ShardSummary(tokens=len(tokens))
    for start in range(0, len(tokens), duplicates.BLOCK_TOKENS):
        # The bytes of a token depend on the one before it, so each block begins with that one.
        block = np.concatenate([[previous], tokens[start : start + duplicates.BLOCK_TOKENS]]).astype(np.int64)

        # An id whose bytes would be miscounted is an error.
        wrong = np.flatnonzero(is_miscounted_V[block[1:]])
        if len(wrong):
            token = int(block[1 + wrong[0]])
            piece = tokenizer.processor.id_to_piece(token).encode("unicode_escape").decode("ascii")
            raise ValueError(
                f"{path}: token id {token} ({piece}) at position {start + wrong[0]} {miscounted[token]}; "
                "tokenize the text with `files`"
            )

        summary.documents += int(np.count_nonzero(block[1:] == table.bos))
        summary.bytes += int(bpb.target_bytes(block, table).sum())
        previous = int(block[-1])
    return summary, previous


def _check_decoded(documents: list[DocumentRef], tokenizer: Tokenizer, threads: int) -> int:
    """Compare counted bytes with the decoded text of each document.

    Returns the number of documents that begin with a space, which is not counted.
    """
    ids = [document.tokens[1:].tolist() for document in documents]
    texts = tokenizer.processor.decode(ids, num_threads=threads)
    for document, text in zip(documents, texts, strict=True):
        counted = int(bpb.target_bytes(document.tokens, tokenizer.table).sum())
        encode.check_bytes(str(document), text, document.tokens, counted, tokenizer)
    return sum(text.startswith(" ") for text in texts)
