"""Bytes as a string literal in a Latin-1 source: one byte of file for each, but for the few that Python's reader would change.

A bytes literal takes ASCII alone, so the characters are those whose numbers are the bytes: `.encode("latin-1")` gives them back. Base85,
which the records use, takes 1.25 bytes for each; this takes about 1.012 for what is as good as random.
"""

import re

# NUL ends a source, a reader of text makes CR a newline, a backslash begins an escape; a quote counts where three, or the end, may follow.
UNSAFE = re.compile(r'[\0\r\\]|"(?="")|"\Z')
ESCAPES = {"\r": r"\r", "\\": r"\\", '"': r"\""}


def quote(data: bytes) -> str:
    """An expression of type str, in characters below 256; in a Latin-1 source it evaluates to `data` decoded as Latin-1."""
    return '"""' + UNSAFE.sub(_escaped, data.decode("latin-1")) + '"""'


def _escaped(found: re.Match[str]) -> str:
    """NUL is written with three digits where a digit follows that would join it."""
    if found[0] != "\0":
        return ESCAPES[found[0]]
    return r"\000" if found.string[found.end() : found.end() + 1].isdigit() else r"\0"
