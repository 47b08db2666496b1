"""Python source without what only its readers need; names and the text of every other token stay as they were written.

What remains must parse to the tree that the source has when the same is taken out of it.
"""

import ast

from stages.bundle import strip_ast
from stages.bundle.minify_whitespace import relaid


def strip(source: str) -> str:
    """`source` without comments, docstrings, annotations and what they import; a body that held nothing else becomes `pass`."""
    stripped = relaid(strip_ast.cut(relaid(source)))
    assert shape(stripped) == shape(source), "stripping changed the program"
    return stripped


def shape(source: str) -> str:
    """What the source does: its syntax tree, written out, without what is stripped."""
    return ast.dump(strip_ast.module(ast.parse(source)))
