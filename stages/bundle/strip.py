"""Strip Python source to what runs; names and the text of every remaining token stay as written.

The result is checked: it must parse to the syntax tree that the source has once the same things are
removed from the tree.
"""

import ast

from stages.bundle import strip_ast
from stages.bundle.minify_whitespace import minify_whitespace


def strip(source: str) -> str:
    """Return `source` without comments, docstrings, annotations and the imports that only annotations used.

    A body that held nothing else becomes `pass`.
    """
    stripped = minify_whitespace(strip_ast.strip_text(minify_whitespace(source)))
    assert syntax_tree_text(stripped) == syntax_tree_text(source), "stripping changed the program"
    return stripped


def syntax_tree_text(source: str) -> str:
    """Return the syntax tree of the source, as text, without what is stripped."""
    return ast.dump(strip_ast.strip_tree(ast.parse(source)))
