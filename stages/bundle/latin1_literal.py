"""Quote bytes as a string literal in a Latin-1 source: one byte of file per byte of data, with few escapes.

A bytes literal takes ASCII only, so the literal is a str whose code points are the bytes;
`.encode("latin-1")` gives the bytes back. Base85, which the records use, takes 1.25 bytes per byte;
this takes about 1.012 for data that looks random.
"""

import re

# Escaped: NUL, which ends a source; CR, which Python's reader turns into a newline; a backslash;
# and a double quote where a closing triple quote would be read, that is before two more quotes or
# at the end.
UNSAFE = re.compile(r'[\0\r\\]|"(?="")|"\Z')
ESCAPES = {"\r": r"\r", "\\": r"\\", '"': r"\""}


def quote(data: bytes) -> str:
    """Return a str expression, all characters below 256, that evaluates to `data.decode("latin-1")`."""
    return '"""' + UNSAFE.sub(_escape, data.decode("latin-1")) + '"""'


def _escape(found: re.Match[str]) -> str:
    """Return the escape; before a digit NUL gets three octal digits, so that the digit does not join it."""
    if found[0] != "\0":
        return ESCAPES[found[0]]
    next_character = found.string[found.end() : found.end() + 1]
    return r"\000" if next_character.isdigit() else r"\0"
