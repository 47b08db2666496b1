"""Minify the whitespace of Python source for the compressor; the text of every token stays as it was.

The result has no comments and no blank lines, one statement per line, one space per level of
indentation, and no other whitespace except between words.

`ast.unparse` would do nearly the same, but prints different text in different Python versions. The
bundle is counted and hashed, so it must be the same file on every machine.
"""

import io
import re
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

WORD = re.compile(r"\w")


class SourcePiece(NamedTuple):
    """A token, or a whole f-string, as written in the source; positions are (line, column)."""

    type: int
    text: str
    start: tuple[int, int]
    end: tuple[int, int]


def minify_whitespace(source: str) -> str:
    """Return `source` in the layout above; lines continued by a backslash or a bracket are joined."""
    output: list[str] = []
    level = 0
    previous: SourcePiece | None = None  # on the same line
    for piece in source_pieces(source):
        if piece.type == tokenize.INDENT:
            level += 1
        elif piece.type == tokenize.DEDENT:
            level -= 1
        elif piece.type == tokenize.NEWLINE:
            output.append("\n")
            previous = None
        elif piece.type not in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
            output.append(" " * level if previous is None else _separator(previous, piece))
            output.append(piece.text)
            previous = piece
    return "".join(output)


def source_pieces(source: str) -> Iterator[SourcePiece]:
    """Yield the tokens of `source`; an f-string is one piece, as it is one token up to Python 3.11."""
    lines = source.split("\n")
    open_fstrings: list[tuple[int, int]] = []  # where each begins; they nest
    with_final_newline = io.StringIO(source + "\n")
    for token in tokenize.generate_tokens(with_final_newline.readline):
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_START":
            open_fstrings.append(token.start)
        elif kind == "FSTRING_END":
            start = open_fstrings.pop()
            if not open_fstrings:
                text = _text_between(lines, start, token.end)
                yield SourcePiece(tokenize.STRING, text, start, token.end)
        elif not open_fstrings:
            yield SourcePiece(token.type, token.string, token.start, token.end)


def _separator(previous: SourcePiece, piece: SourcePiece) -> str:
    """Return a space if the two pieces would otherwise be read as one: two words, or a number and a dot."""
    begins_word = bool(WORD.match(piece.text[0]))
    if previous.type == tokenize.NUMBER and (begins_word or piece.text[0] == "."):
        return " "
    return " " if begins_word and WORD.match(previous.text[-1]) else ""


def _text_between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    rows = lines[start[0] - 1 : end[0]]
    rows[-1] = rows[-1][: end[1]]
    rows[0] = rows[0][start[1] :]
    return "\n".join(rows)
