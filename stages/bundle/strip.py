"""Python source without its comments, docstrings and blank lines, every other character as it was written.

`ast.unparse` would be shorter, and it prints another text in another Python version; the bundle is counted and hashed, so it must be the
same file whoever builds it. Docstrings are found by their place in the tree, comments and blank lines by the tokenizer, and what remains
must parse to the same tree.
"""

import ast
import io
import tokenize
from typing import TypeGuard

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def strip(source: str) -> str:
    """`source` without comments, docstrings and blank lines; a body that held nothing else becomes `pass`."""
    stripped = _without_blank_lines(_without_comments(_without_docstrings(source)))
    assert shape(stripped) == shape(source), "stripping changed the program"
    return stripped


def shape(source: str) -> str:
    """What the source does: its syntax tree, written out, without docstrings and `pass`."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if _is_documented(node):
            del node.body[0]
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                setattr(node, name, [statement for statement in block if not isinstance(statement, ast.Pass)])
    return ast.dump(tree)


def _is_documented(node: ast.AST) -> TypeGuard[Documented]:
    return isinstance(node, Documented) and ast.get_docstring(node, clean=False) is not None


def _without_docstrings(source: str) -> str:
    lines = source.split("\n")
    found = [node for node in ast.walk(ast.parse(source)) if _is_documented(node)]
    for node in sorted(found, key=lambda node: node.body[0].lineno, reverse=True):
        docstring = node.body[0]
        assert docstring.end_lineno is not None
        assert docstring.end_col_offset is not None
        first, last = docstring.lineno - 1, docstring.end_lineno - 1
        before = lines[first].encode()[: docstring.col_offset].decode()  # the tree counts columns in bytes of UTF-8
        after = lines[last].encode()[docstring.end_col_offset :].decode()
        needed = after.lstrip().startswith(";") or (len(node.body) == 1 and not isinstance(node, ast.Module))
        lines[first : last + 1] = [(before + ("pass" if needed else "") + after).rstrip()]
    return "\n".join(lines)


def _without_comments(source: str) -> str:
    lines = source.split("\n")
    for token in _tokens(source):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    return "\n".join(lines)


def _without_blank_lines(source: str) -> str:
    lines = source.split("\n")
    tokens = _tokens(source)
    blank = {token.start[0] for token in tokens if token.type == tokenize.NL and not lines[token.start[0] - 1].strip()}
    kept = [line for row, line in enumerate(lines, 1) if row not in blank]
    text = "\n".join(kept).rstrip("\n")
    return text + "\n" if text else ""


def _tokens(source: str) -> list[tokenize.TokenInfo]:
    return list(tokenize.generate_tokens(io.StringIO(source).readline))
