"""The verbs of tokenize: documents to two sides of shards, or ready shards to the same; and the proof that the sides share no document."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stages.common import shards
from stages.common.progress import Report
from stages.tokenize import duplicates, split, writer
from stages.tokenize.encode import encode
from stages.tokenize.import_shards import Adopted, adopt
from stages.tokenize.params import TokenizeParams
from stages.tokenize.split import Document
from stages.tokenize.tokenizer import Tokenizer
from stages.tokenize.writer import SideWriter


class Source(NamedTuple):
    """Where documents come from; both functions begin anew at each call and take what to call with the units done."""

    documents: Callable[[Callable[[float], None]], Iterator[Document]]  # of both sides
    for_tokenizer: Callable[
        [Callable[[float], None]], Iterator[Document]
    ]  # may still hold val documents of an undecided split
    total: float  # units of progress of one pass
    unit: str
    facts: dict[str, Any]  # for the manifest


class Built(NamedTuple):
    """What was written below the output folder, and what to say of it."""

    train_hashes: np.ndarray  # sorted
    val_hashes: np.ndarray
    manifest: dict[str, Any]


def from_documents(
    source: Source, tokenizer: Tokenizer, params: TokenizeParams, output: Path, report: Report
) -> Built:
    """Encode every document into the shards of its side."""
    train, val = (
        SideWriter(output / "train", params.shard_tokens),
        SideWriter(output / "val", params.shard_tokens),
    )
    sides = {"train": train, "val": val}
    with train, val, report.progress("tokenize", source.total) as progress:
        for encoded in encode(
            source.documents(lambda units: progress.advance(units, source.unit)), tokenizer, params.threads
        ):
            # The normalised document, not its source: texts that the tokenizer makes equal are then on one side by construction.
            side = encoded.source.side or split.side_of(split.content_hash(encoded.text), params.val_fraction)
            sides[side].add(encoded)
    for name, side_writer in sides.items():
        if not side_writer.totals.documents:
            raise ValueError(
                f"no document is on the side of {name}; give more text, or change tokenize.val_fraction or the globs"
            )
    manifest = {
        "corpus": source.facts,
        "train": asdict(train.totals),
        "val": asdict(val.totals),
        "shards": writer.as_manifest(train.facts | val.facts, output),
    }
    return Built(duplicates.in_order(train.hashes), duplicates.in_order(val.hashes), manifest)


def from_shards(
    train: list[Path],
    val: list[Path],
    tokenizer: Tokenizer,
    params: TokenizeParams,
    output: Path,
    report: Report,
) -> Built:
    """Check and copy ready shards."""
    total = sum(shards.count(path) for path in [*train, *val])
    with report.progress("adopt", total) as progress:
        of_val = adopt(val, output / "val", "val", tokenizer, params.threads, progress)
        of_train = adopt(train, output / "train", "train", tokenizer, params.threads, progress)
    manifest = {
        "corpus": {"shards": of_train.sources | of_val.sources},
        "train": _totals(of_train),
        "val": _totals(of_val),
        "shards": writer.as_manifest(of_train.facts | of_val.facts, output),
    }
    return Built(duplicates.in_order(of_train.hashes), duplicates.in_order(of_val.hashes), manifest)


def require_disjoint(built: Built, output: Path, bos: int) -> None:
    """Raise ValueError when a val document is in train, token for token."""
    shared = duplicates.confirmed(
        output / "train", output / "val", bos, duplicates.common(built.train_hashes, built.val_hashes)
    )
    if shared is not None:
        train = f"token {shared.train.position} of {shared.train.path.relative_to(output)}"
        val = f"token {shared.val.position} of {shared.val.path.relative_to(output)}"
        raise ValueError(
            f"a val document is in train: the one at {train} equals the one at {val} ({len(shared.val.tokens)} tokens)"
        )


def _totals(adopted: Adopted) -> dict[str, int]:
    totals = {
        key: sum(getattr(shard, key) for shard in adopted.facts.values())
        for key in ("documents", "tokens", "bytes")
    }
    if not totals["documents"]:
        raise ValueError("the shards hold no document")
    if adopted.uncounted_leading_spaces is not None:
        totals["uncounted_leading_spaces"] = adopted.uncounted_leading_spaces
        totals["document_bytes"] = totals["bytes"] + adopted.uncounted_leading_spaces
    return totals
