"""Parameters of tokenize.

The vocabulary size is repeated here (it is also in the section `model`), so that a change of the
model does not run tokenize again.
"""

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from stages.common import shards
from stages.common.config import reject, require_positive

TRAIN_TOKENIZER = "train"  # value of `tokenizer` that asks for one trained on the train documents
# Ids before the first learned piece: pad, bos, eos, unk; 256 byte-fallback pieces; the lone space.
SMALLEST_VOCAB = 4 + 256 + 1


@dataclass(frozen=True)
class TokenizeParams:
    """The section `tokenize`; params.yaml describes each key."""

    source: Literal["pydocs", "files", "shards"]
    train_glob: str
    val_glob: str
    text_key: str
    val_fraction: float
    max_document_bytes: int
    tokenizer: str  # TRAIN_TOKENIZER, or a file name below data/tokenizer
    vocab_size: int  # V
    tokenizer_sample_bytes: int
    threads: int
    shard_tokens: int

    def __post_init__(self) -> None:
        require_positive(self, "max_document_bytes", "tokenizer_sample_bytes", "threads", "shard_tokens")
        if not SMALLEST_VOCAB < self.vocab_size <= shards.MAX_VOCAB:
            reject(
                "vocab_size",
                f"{self.vocab_size} is not above {SMALLEST_VOCAB} and at most {shards.MAX_VOCAB} "
                "(uint16 tokens)",
            )
        if not 0 < self.val_fraction < 1:
            reject("val_fraction", f"{self.val_fraction} is not between 0 and 1, both excluded")

        # Paths: required by some sources, and always inside the data folders.
        for key in ("train_glob", "val_glob"):
            _require_relative(key, getattr(self, key))
        if self.source != "pydocs" and not self.train_glob:
            reject("train_glob", f"empty, but source {self.source!r} needs one")
        if self.source == "files" and not self.text_key:
            reject("text_key", "empty; name the key of a JSON line that holds the document")
        if self.source == "shards" and not self.val_glob:
            reject(
                "val_glob",
                "empty, but ready shards are not split: name those of the validation set,"
                ' such as "fineweb_val_*.bin"',
            )

        # The tokenizer.
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
    """The section of params.yaml that tokenize reads."""

    tokenize: TokenizeParams


def _require_relative(key: str, path: str) -> None:
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        reject(key, f"{path!r} leaves the folder it is relative to; link the file into that folder instead")
