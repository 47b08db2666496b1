"""Streams of tokens to measure on."""

from pathlib import Path

from stages.scoring.stream import ValidationStream, open_validation_stream


def beginning(folder: Path, tokenizer: Path, most: int) -> ValidationStream:
    """The first targets of a folder of shards: `most` of them, or all if there are fewer."""
    whole = open_validation_stream(folder, tokenizer)
    return ValidationStream(whole.tokens[: most + 1], whole.counted_bytes[:most], whole.table)
