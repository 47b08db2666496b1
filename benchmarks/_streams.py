"""Streams to measure on."""

from pathlib import Path

from stages.scoring.evaluate import Stream, open_stream


def beginning(folder: Path, tokenizer: Path, most: int) -> Stream:
    """The first targets of a folder of shards, `most` of them or all that there are."""
    whole = open_stream(folder, tokenizer)
    return Stream(whole.tokens[: most + 1], whole.counted_bytes[:most], whole.table)
