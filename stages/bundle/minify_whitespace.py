"""Python source laid out for the compressor: no comments, no blank lines, a statement on one line, one space for each level,
and otherwise none but between words.

The text of every token stays as it was written. `ast.unparse` would do as much, and prints another text in another Python version; the
bundle is counted and hashed, so it must be the same file whoever builds it.
"""

import io
import re
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

WORD = re.compile(r"\w")


class Piece(NamedTuple):
    """A token, or a whole f-string, as it stands in the source."""

    type: int
    text: str
    start: tuple[int, int]
    end: tuple[int, int]


def relaid(source: str) -> str:
    """`source` in the layout above; a line that a backslash continues is joined like one that a bracket does."""
    laid: list[str] = []
    level, before = 0, None
    for piece in pieces(source):
        if piece.type in (tokenize.INDENT, tokenize.DEDENT):
            level += 1 if piece.type == tokenize.INDENT else -1
        elif piece.type == tokenize.NEWLINE:
            laid.append("\n")
            before = None
        elif piece.type not in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
            laid += [" " * level if before is None else _gap(before, piece), piece.text]
            before = piece
    return "".join(laid)


def pieces(source: str) -> Iterator[Piece]:
    """The tokens of `source`; an f-string is one piece, as it is one token up to Python 3.11."""
    lines = source.split("\n")
    opened: list[tuple[int, int]] = []
    for token in tokenize.generate_tokens(
        io.StringIO(source + "\n").readline
    ):  # whose last line may want its end
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_START":
            opened.append(token.start)
        elif kind == "FSTRING_END":
            start = opened.pop()
            if not opened:
                yield Piece(tokenize.STRING, _between(lines, start, token.end), start, token.end)
        elif not opened:
            yield Piece(token.type, token.string, token.start, token.end)


def _gap(before: Piece, piece: Piece) -> str:
    """A space where two pieces of a statement would otherwise be read as one: word after word, or an attribute of a number."""
    joins = WORD.match(piece.text[0]) or piece.text[0] == "."
    return (
        " "
        if joins
        and (before.type == tokenize.NUMBER or (WORD.match(before.text[-1]) and piece.text[0] != "."))
        else ""
    )


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    rows = lines[start[0] - 1 : end[0]]
    rows[-1] = rows[-1][: end[1]]
    rows[0] = rows[0][start[1] :]
    return "\n".join(rows)
