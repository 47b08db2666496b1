"""Ready-made challenge shards, checked and taken as they are.

Every shard's header, length and ids are checked; the stream of each side must begin with BOS (a document may go on in the next shard: the
challenge cuts at a fixed token count). Val bytes decide bpb, so each val document is decoded and compared with its count. For all shards,
an id whose bytes the rule would miscount is an error (a transformation's marks, such as those of CaseOps).
"""

import shutil
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stages.common import bpb, shards
from stages.common.progress import Progress
from stages.tokenize import duplicates, encode
from stages.tokenize.split import Side
from stages.tokenize.tokenizer import Tokenizer, uncountable
from stages.tokenize.writer import ShardFacts

DECODE_DOCUMENTS = 1024


@dataclass
class Adopted:
    """One side's shards after the copy."""

    facts: dict[str, ShardFacts] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)  # our name to the given one
    hashes: "array[int]" = field(default_factory=lambda: array("Q"))
    uncounted_leading_spaces: int | None = None  # known for val alone


def adopt(
    paths: list[Path], folder: Path, side: Side, tokenizer: Tokenizer, threads: int, progress: Progress
) -> Adopted:
    """Check the shards `paths`, copy them into `folder` in this order, and hash their documents."""
    refused = uncountable(tokenizer)
    folder.mkdir()
    result = Adopted()
    before = tokenizer.table.bos  # nothing precedes a stream; BOS is as good, for it must begin with BOS
    for number, path in enumerate(paths):
        shards.count(path)
        shards.check_ids(path, tokenizer.table.vocab_size)
        name = f"{side}/{side}_{number:06d}.bin"
        result.facts[name], before = _measure(path, before, tokenizer, refused)
        shutil.copyfile(path, folder.parent / name)
        result.sources[name] = path.name
        progress.advance(result.facts[name].tokens, "tokens")
    batch: list[duplicates.Located] = []
    spaces = 0
    for document in duplicates.documents(paths, tokenizer.table.bos):
        result.hashes.append(duplicates.hash64(document.tokens))
        if side == "val":
            batch.append(document)
        if len(batch) == DECODE_DOCUMENTS:
            spaces += _check_decoded(batch, tokenizer, threads)
            batch = []
    if side == "val":
        result.uncounted_leading_spaces = spaces + _check_decoded(batch, tokenizer, threads)
    return result


def _measure(
    path: Path, before: int, tokenizer: Tokenizer, refused: dict[int, str]
) -> tuple[ShardFacts, int]:
    """Tokens, documents and bytes of a shard that follows the token `before`; and its last token."""
    table = tokenizer.table
    is_refused = np.zeros(table.vocab_size, dtype=bool)
    is_refused[list(refused)] = True
    tokens = shards.view(path)
    facts = ShardFacts(tokens=len(tokens))
    for start in range(0, len(tokens), duplicates.BLOCK_TOKENS):
        block = np.concatenate([[before], tokens[start : start + duplicates.BLOCK_TOKENS]]).astype(np.int64)
        bad = np.flatnonzero(is_refused[block[1:]])
        if len(bad):
            token = int(block[1 + bad[0]])
            piece = tokenizer.processor.id_to_piece(token).encode("unicode_escape").decode("ascii")
            raise ValueError(
                f"{path}: token id {token} ({piece}) at position {start + bad[0]} {refused[token]}; tokenize the text with `files`"
            )
        facts.documents += int(np.count_nonzero(block[1:] == table.bos))
        facts.bytes += int(bpb.target_bytes(block, table).sum())
        before = int(block[-1])
    return facts, before


def _check_decoded(documents: list[duplicates.Located], tokenizer: Tokenizer, threads: int) -> int:
    """Compare counted bytes with the decoded text; returns how many documents begin with a space, which is not counted."""
    texts = tokenizer.processor.decode(
        [document.tokens[1:].tolist() for document in documents], num_threads=threads
    )
    for document, text in zip(documents, texts, strict=True):
        counted = int(bpb.target_bytes(document.tokens, tokenizer.table).sum())
        encode.check_bytes(str(document), text, document.tokens, counted, tokenizer)
    return sum(text.startswith(" ") for text in texts)
