"""The validation stream: the tokens that are scored, and the bytes of text of each target."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from stages.common import shards
from stages.common.bpb import ByteTable, byte_table, load_tokenizer, target_bytes


class ValidationStream(NamedTuple):
    """A stream of N tokens, which starts with BOS, has N-1 targets: all tokens but the first."""

    tokens: np.ndarray  # (N,) uint16
    counted_bytes: np.ndarray  # (N-1,) int64: bytes of each target
    table: ByteTable  # the table that counted them

    @property
    def targets(self) -> int:
        """The number of targets, N-1."""
        return len(self.tokens) - 1


def open_validation_stream(val_folder: Path, tokenizer_file: Path) -> ValidationStream:
    """Read the shards of a folder and count the bytes of every target.

    A ValueError when the shards do not fit the tokenizer: an id outside its vocabulary, or no BOS
    at the start.
    """
    table = byte_table(load_tokenizer(tokenizer_file))
    for path in shards.find(val_folder):
        shards.check_ids(path, table.vocab_size)
    tokens = shards.stream(val_folder)
    shards.document_starts(tokens, table.bos)
    return ValidationStream(tokens, target_bytes(tokens, table), table)


def open_stream_for_model(
    val_folder: Path, tokenizer_file: Path, vocab_size: int, window: int
) -> ValidationStream:
    """Open the stream for a model of `vocab_size` ids that reads windows of `window` tokens.

    A ValueError when the tokenizer or the length of the stream does not fit.
    """
    stream = open_validation_stream(val_folder, tokenizer_file)
    if stream.table.vocab_size != vocab_size:
        raise ValueError(
            f"{tokenizer_file} has {stream.table.vocab_size} ids, but the model was trained on {vocab_size}"
        )
    if stream.targets < window:
        raise ValueError(
            f"{val_folder}: {stream.targets} targets are fewer than one window of {window};"
            " give more validation text"
        )
    return stream
