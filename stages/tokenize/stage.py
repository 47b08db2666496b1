"""Stage tokenize: turns documents into token shards, a tokenizer and a manifest."""

import hashlib
import time
from functools import partial
from pathlib import Path
from typing import Any

from stages.common.stage import Run, Stage
from stages.tokenize import build, docstrings, duplicates, files, tokenizer
from stages.tokenize.build import DocumentSource, TokenizedCorpus
from stages.tokenize.params import TRAIN_TOKENIZER, Params
from stages.tokenize.tokenizer import Tokenizer

STAGE = Stage(
    name="tokenize",
    summary="Turn documents into token shards, with the tokenizer and the proof that no val document "
    "is in train.",
    params=Params,
    reads={
        "text": Path("data/text"),
        "shards": Path("data/shards"),
        "tokenizer": Path("data/tokenizer"),
        "lock": Path("requirements.lock"),
    },
    writes=("train", "val", "tokenizer.model", "documents.u64", "manifest.json"),
)


def main(run: Run[Params]) -> None:
    """Make or load the tokenizer, write the shards of both sides, prove them disjoint."""
    params = run.params.tokenize
    if params.source == "shards":
        # These are tokens already: the tokenizer must be the one that made them.
        model, about_model = _given_tokenizer(run)
        folder = run.path("shards")
        train_paths = files.find(folder, params.train_glob, "tokenize.train_glob")
        val_paths = files.find(folder, params.val_glob, "tokenize.val_glob")
        corpus = build.from_shards(train_paths, val_paths, model, params, run.output, run.logger)
    else:
        # Training the tokenizer reads the documents once, encoding reads them again.
        source = _pydocs(run) if params.source == "pydocs" else _files(run)
        if params.tokenizer == TRAIN_TOKENIZER:
            model, about_model = _trained_tokenizer(run, source)
        else:
            model, about_model = _given_tokenizer(run)
        started = time.monotonic()
        corpus = build.from_documents(source, model, params, run.output, run.logger)
        _log_rate(run, corpus, time.monotonic() - started)

    # The hashes stay as evidence that the sides share no document.
    build.require_disjoint(corpus, run.output, model.table.bos)
    duplicates.write_hashes(run.output / "documents.u64", corpus.train_hashes, corpus.val_hashes)

    run.write_bytes("tokenizer.model", model.model_bytes)
    about_model["sha256"] = hashlib.sha256(model.model_bytes).hexdigest()
    about_model["vocab_size"] = model.table.vocab_size
    run.write_json("manifest.json", {"source": params.source, "tokenizer": about_model} | corpus.manifest)


def _pydocs(run: Run[Params]) -> DocumentSource:
    """Open the built-in corpus; the installed packages must be those of the lock file."""
    params = run.params.tokenize
    lock = run.path("lock")
    versions = docstrings.check_versions(lock.read_text(encoding="utf-8"), str(lock))
    corpus = docstrings.corpus(params.val_fraction, params.max_document_bytes, params.threads, run.logger)
    count = len(corpus.documents)
    run.logger.log(f"tokenize: {count:,} docstrings of {corpus.manifest['source_files']:,} files")
    documents = partial(iter, corpus.documents)
    return DocumentSource(documents, documents, count, "documents", corpus.manifest | {"packages": versions})


def _files(run: Run[Params]) -> DocumentSource:
    """Open the files of the user."""
    params = run.params.tokenize
    options = files.ReadOptions(params.text_key, params.max_document_bytes)
    found = files.open_files(run.path("text"), params.train_glob, params.val_glob, options)
    run.logger.log(
        f"tokenize: {len(found.train)} train files, {len(found.val)} val files, "
        f"{found.total_bytes:,} bytes as stored"
    )
    manifest = {"train_files": len(found.train), "val_files": len(found.val)}
    return DocumentSource(found.documents, found.train_documents, found.total_bytes, "bytes", manifest)


def _trained_tokenizer(run: Run[Params], source: DocumentSource) -> tuple[Tokenizer, dict[str, Any]]:
    """Train a tokenizer on a sample of the source's train documents.

    Returns it and its entries of the manifest.
    """
    params = run.params.tokenize
    val_fraction = 0.0 if params.val_glob else params.val_fraction  # with val files, all others are train
    with run.logger.progress("sample", source.total_units) as progress:
        documents = source.tracked(source.tokenizer_documents(), progress)
        sample = tokenizer.sample(documents, val_fraction, params.tokenizer_sample_bytes)

    started = time.monotonic()
    path = run.output / "tokenizer.model"
    path.write_bytes(tokenizer.train(sample.texts, params.vocab_size, params.threads))
    model = tokenizer.load(path, params.vocab_size)
    assert not tokenizer.miscounted_ids(model), "a piece of the trained tokenizer would be miscounted"
    run.timing["tokenizer_training_seconds"] = time.monotonic() - started
    run.logger.log(
        f"tokenize: tokenizer of {params.vocab_size} ids trained on {len(sample.texts):,} documents, "
        f"{sample.size:,} bytes"
    )
    return model, {"trained": True, "sample_documents": len(sample.texts), "sample_bytes": sample.size}


def _given_tokenizer(run: Run[Params]) -> tuple[Tokenizer, dict[str, Any]]:
    """Load the tokenizer that the parameters name; returns it and its entries of the manifest."""
    params = run.params.tokenize
    path = run.path("tokenizer") / params.tokenizer
    return tokenizer.load(path, params.vocab_size), {"trained": False}


def _log_rate(run: Run[Params], corpus: TokenizedCorpus, seconds: float) -> None:
    """Log the size of both sides and the speed of encoding."""
    train = corpus.manifest["train"]
    val = corpus.manifest["val"]
    rate = (train["tokens"] + val["tokens"]) / seconds
    run.timing |= {"encoding_seconds": seconds, "tokens_per_second": rate}
    for side, totals in (("train", train), ("val", val)):
        run.logger.log(
            f"tokenize: {side} {totals['documents']:,} documents, {totals['tokens']:,} tokens, "
            f"{totals['bytes']:,} bytes ({totals['bytes'] / totals['tokens']:.3f} a token)"
        )
    run.logger.log(f"tokenize: {rate:,.0f} tokens/s")
