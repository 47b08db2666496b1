"""tokenize: documents to shards, a tokenizer and a manifest."""

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stages.common import command
from stages.tokenize import build, docstrings, duplicates, files, tokenizer
from stages.tokenize.build import Built, Source
from stages.tokenize.params import TRAIN_TOKENIZER, Params, TokenizeParams
from stages.tokenize.split import Document
from stages.tokenize.tokenizer import Tokenizer

STAGE = command.Stage(
    name="tokenize",
    summary="Turn documents into token shards, with the tokenizer and the proof that no val document is in train.",
    params=Params,
    reads={
        "text": Path("data/text"),
        "shards": Path("data/shards"),
        "tokenizer": Path("data/tokenizer"),
        "lock": Path("requirements.lock"),
    },
    writes=("train", "val", "tokenizer.model", "documents.u64", "manifest.json"),
)


def main(run: command.Run[Params]) -> None:
    """Open the source, train or take the tokenizer, write the shards of both sides, prove them disjoint, describe them."""
    params = run.params.tokenize
    if params.source == "shards":
        model, about_model = _given_tokenizer(run)
        folder = run.path("shards")
        train = files.find(folder, params.train_glob, "tokenize.train_glob")
        val = files.find(folder, params.val_glob, "tokenize.val_glob")
        built = build.from_shards(train, val, model, params, run.output, run.report)
    else:
        source = _pydocs(run) if params.source == "pydocs" else _files(run)
        model, about_model = (
            _trained_tokenizer(run, source) if params.tokenizer == TRAIN_TOKENIZER else _given_tokenizer(run)
        )
        started = time.monotonic()
        built = build.from_documents(source, model, params, run.output, run.report)
        _log_rate(run, built, time.monotonic() - started)
    build.require_disjoint(built, run.output, model.table.bos)
    run.write_bytes("tokenizer.model", model.model)
    duplicates.write(run.output / "documents.u64", built.train_hashes, built.val_hashes)
    about_model |= {"sha256": hashlib.sha256(model.model).hexdigest(), "vocab_size": model.table.vocab_size}
    run.write_json("manifest.json", {"source": params.source, "tokenizer": about_model} | built.manifest)


def _pydocs(run: command.Run[Params]) -> Source:
    lock = run.path("lock")
    versions = docstrings.check_versions(lock.read_text(encoding="utf-8"), str(lock))
    params = run.params.tokenize
    corpus = docstrings.corpus(params.val_fraction, params.max_document_bytes, params.threads, run.report)
    run.report.log(
        f"tokenize: {len(corpus.documents):,} docstrings of {corpus.facts['source_files']:,} files"
    )

    def documents(advance: Callable[[float], None]) -> Iterator[Document]:
        for document in corpus.documents:
            yield document
            advance(1)

    return Source(
        documents, documents, len(corpus.documents), "documents", corpus.facts | {"packages": versions}
    )


def _files(run: command.Run[Params]) -> Source:
    params: TokenizeParams = run.params.tokenize
    found = files.open_files(
        run.path("text"),
        params.train_glob,
        params.val_glob,
        files.Reading(params.text_key, params.max_document_bytes),
    )
    run.report.log(
        f"tokenize: {len(found.train)} train files, {len(found.val)} val files, {found.total_bytes:,} bytes as stored"
    )
    facts = {"train_files": len(found.train), "val_files": len(found.val)}
    return Source(found.documents, found.train_documents, found.total_bytes, "bytes", facts)


def _trained_tokenizer(run: command.Run[Params], source: Source) -> tuple[Tokenizer, dict[str, Any]]:
    params = run.params.tokenize
    with run.report.progress("sample", source.total) as progress:
        documents = source.for_tokenizer(lambda units: progress.advance(units, source.unit))
        sample = tokenizer.sample(
            documents, params.val_fraction if not params.val_glob else 0.0, params.tokenizer_sample_bytes
        )
    started = time.monotonic()
    path = run.output / "tokenizer.model"
    path.write_bytes(tokenizer.train(sample.texts, params.vocab_size, params.threads))
    model = tokenizer.load(path, params.vocab_size)
    assert not tokenizer.uncountable(model), "a piece of the trained tokenizer would be miscounted"
    run.timing["tokenizer_training_seconds"] = time.monotonic() - started
    run.report.log(
        f"tokenize: tokenizer of {params.vocab_size} ids trained on {len(sample.texts):,} documents, {sample.size:,} bytes"
    )
    return model, {"trained": True, "sample_documents": len(sample.texts), "sample_bytes": sample.size}


def _given_tokenizer(run: command.Run[Params]) -> tuple[Tokenizer, dict[str, Any]]:
    params = run.params.tokenize
    return tokenizer.load(run.path("tokenizer") / params.tokenizer, params.vocab_size), {"trained": False}


def _log_rate(run: command.Run[Params], built: Built, seconds: float) -> None:
    train, val = built.manifest["train"], built.manifest["val"]
    rate = (train["tokens"] + val["tokens"]) / seconds
    run.timing |= {"encoding_seconds": seconds, "tokens_per_second": rate}
    for side, totals in (("train", train), ("val", val)):
        documents, tokens, counted = totals["documents"], totals["tokens"], totals["bytes"]
        run.report.log(
            f"tokenize: {side} {documents:,} documents, {tokens:,} tokens, {counted:,} bytes ({counted / tokens:.3f} a token)"
        )
    run.report.log(f"tokenize: {rate:,.0f} tokens/s")


if __name__ == "__main__":
    command.launch(STAGE, main)
