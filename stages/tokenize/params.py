"""Parameters of tokenize. The vocabulary size stands here again, so that a change of the model does not tokenize anew."""

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from stages.common import shards
from stages.common.config import reject, require_positive

TRAIN_TOKENIZER = "train"
SMALLEST_VOCAB = 4 + 256 + 1  # pad, bos, eos, unk; the byte-fallback pieces; the lone space


@dataclass(frozen=True)
class TokenizeParams:
    """The section `tokenize`."""

    source: Literal[
        "pydocs", "files", "shards"
    ]  # docstrings of installed packages; documents below data/text; ready shards below data/shards
    train_glob: str  # what to train on, relative to data/text or data/shards; unused by pydocs
    val_glob: str  # what to validate on; empty (files only): split train_glob's documents by content hash. Unused by pydocs
    text_key: str  # of a JSON line: the key that holds the document
    val_fraction: float  # share of val in a split by hash: of documents (files), of modules (pydocs)
    max_document_bytes: (
        int  # UTF-8 bytes of one document; a longer one is an error, so that memory stays bounded
    )
    tokenizer: (
        str  # "train": one of our own; otherwise a SentencePiece model's file name below data/tokenizer
    )
    vocab_size: int  # V, ids of the tokenizer, trained or given
    tokenizer_sample_bytes: int  # train documents with the lowest hashes, up to so many bytes, train the tokenizer: bounds its memory
    threads: int  # of encoding and of tokenizer training; at least the latter's result may depend on it, so it is fixed
    shard_tokens: int  # tokens of a full shard (100,000,000 in the challenge)

    def __post_init__(self) -> None:
        require_positive(self, "max_document_bytes", "tokenizer_sample_bytes", "threads", "shard_tokens")
        if not SMALLEST_VOCAB < self.vocab_size <= shards.MAX_VOCAB:
            reject(
                "vocab_size",
                f"{self.vocab_size} is not above {SMALLEST_VOCAB} and at most {shards.MAX_VOCAB} (uint16 tokens)",
            )
        if not 0 < self.val_fraction < 1:
            reject("val_fraction", f"{self.val_fraction} is not between 0 and 1, both excluded")
        for key in ("train_glob", "val_glob"):
            _require_relative(key, getattr(self, key))
        if self.source != "pydocs" and not self.train_glob:
            reject("train_glob", f"empty, but source {self.source!r} needs one")
        if self.source == "files" and not self.text_key:
            reject("text_key", "empty; name the key of a JSON line that holds the document")
        if self.source == "shards" and not self.val_glob:
            reject("val_glob", "empty, but ready shards are not split: name those of the validation set")
        if self.source == "shards" and self.tokenizer == TRAIN_TOKENIZER:
            reject(
                "tokenizer",
                'saw "train", but ready shards belong to a tokenizer: name its file below data/tokenizer',
            )
        if not self.tokenizer:
            reject("tokenizer", 'empty; "train" or a file name below data/tokenizer')
        _require_relative("tokenizer", self.tokenizer)


@dataclass(frozen=True)
class Params:
    """What tokenize reads of params.yaml."""

    tokenize: TokenizeParams


def _require_relative(key: str, path: str) -> None:
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        reject(key, f"{path!r} leaves the folder it is relative to; link the file into that folder instead")
