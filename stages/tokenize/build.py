"""Builds the shards of both sides from documents or ready shards, and proves the sides disjoint."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stages.common import shards
from stages.common.progress import Logger, Progress
from stages.tokenize import duplicates, split, writer
from stages.tokenize.encode import encode
from stages.tokenize.import_shards import ImportedSide, import_side
from stages.tokenize.params import TokenizeParams
from stages.tokenize.split import TextDocument
from stages.tokenize.tokenizer import Tokenizer
from stages.tokenize.writer import SideWriter

OpenDocuments = Callable[[], Iterator[TextDocument]]  # each call begins from the start


class DocumentSource(NamedTuple):
    """A source of documents."""

    documents: OpenDocuments  # of both sides
    tokenizer_documents: OpenDocuments  # may contain val, which tokenizer.sample leaves out
    total_units: float  # of progress: the `units` of all documents together
    unit: str
    manifest: dict[str, Any]  # entries of the manifest

    def tracked(self, documents: Iterator[TextDocument], progress: Progress) -> Iterator[TextDocument]:
        """Yield `documents`; each counts as done when the next one is requested."""
        for document in documents:
            yield document
            progress.advance(document.units, self.unit)


class TokenizedCorpus(NamedTuple):
    """A description of the shards written below the output folder."""

    train_hashes: np.ndarray  # (documents,) uint64, sorted
    val_hashes: np.ndarray  # (documents,) uint64, sorted
    manifest: dict[str, Any]


def from_documents(
    source: DocumentSource, tokenizer: Tokenizer, params: TokenizeParams, output: Path, logger: Logger
) -> TokenizedCorpus:
    """Encode every document into the shards of its side; raises ValueError when a side gets none."""
    train = SideWriter(output / "train", params.shard_tokens)
    val = SideWriter(output / "val", params.shard_tokens)
    sides = {"train": train, "val": val}

    with train, val, logger.progress("tokenize", source.total_units) as progress:
        documents = source.tracked(source.documents(), progress)
        for encoded in encode(documents, tokenizer, params.threads):
            # Hash the decoded text, not the source: texts that the tokenizer makes equal are then
            # on one side.
            content = split.content_hash(encoded.text)
            side = encoded.source.side or split.side_of(content, params.val_fraction)
            sides[side].add(encoded)

    for name, side_writer in sides.items():
        if not side_writer.totals.documents:
            raise ValueError(
                f"no document is on the side of {name}; "
                "give more text, or change tokenize.val_fraction or the globs"
            )

    manifest = {
        "corpus": source.manifest,
        "train": asdict(train.totals),
        "val": asdict(val.totals),
        "shards": writer.as_manifest(train.shards | val.shards, output),
    }
    return TokenizedCorpus(
        duplicates.sorted_hashes(train.hashes), duplicates.sorted_hashes(val.hashes), manifest
    )


def from_shards(
    train_paths: list[Path],
    val_paths: list[Path],
    tokenizer: Tokenizer,
    params: TokenizeParams,
    output: Path,
    logger: Logger,
) -> TokenizedCorpus:
    """Check and copy ready shards."""
    total = sum(shards.count(path) for path in [*train_paths, *val_paths])
    with logger.progress("import", total) as progress:
        val = import_side(val_paths, output / "val", "val", tokenizer, params.threads, progress)
        train = import_side(train_paths, output / "train", "train", tokenizer, params.threads, progress)

    manifest = {
        "corpus": {"shards": train.original_names | val.original_names},
        "train": _totals(train),
        "val": _totals(val),
        "shards": writer.as_manifest(train.shards | val.shards, output),
    }
    return TokenizedCorpus(
        duplicates.sorted_hashes(train.hashes), duplicates.sorted_hashes(val.hashes), manifest
    )


def require_disjoint(corpus: TokenizedCorpus, output: Path, bos: int) -> None:
    """Raise ValueError when a val document is in train, token for token."""
    hits = duplicates.common_hashes(corpus.train_hashes, corpus.val_hashes)
    duplicate = duplicates.first_duplicate(output / "train", output / "val", bos, hits)
    if duplicate is None:
        return
    train = f"token {duplicate.train.position} of {duplicate.train.path.relative_to(output)}"
    val = f"token {duplicate.val.position} of {duplicate.val.path.relative_to(output)}"
    raise ValueError(
        f"a val document is in train: the one at {train} equals the one at {val} "
        f"({len(duplicate.val.tokens)} tokens)"
    )


def _totals(side: ImportedSide) -> dict[str, int]:
    """Sum an imported side's shards for the manifest; raises ValueError when it has no document."""
    totals = {
        "documents": sum(shard.documents for shard in side.shards.values()),
        "tokens": sum(shard.tokens for shard in side.shards.values()),
        "bytes": sum(shard.bytes for shard in side.shards.values()),
    }
    if not totals["documents"]:
        raise ValueError("the shards hold no document")
    if side.uncounted_leading_spaces is not None:
        totals["uncounted_leading_spaces"] = side.uncounted_leading_spaces
        totals["document_bytes"] = totals["bytes"] + side.uncounted_leading_spaces
    return totals
