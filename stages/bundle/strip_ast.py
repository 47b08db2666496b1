"""Remove what only readers need from Python source: docstrings, annotations, and the imports of those.

Annotations that running code may read stay: those in a class body (fields of dataclasses and
NamedTuples) and those of a decorated function (Triton's `constexpr`, schemas of torch's custom
operators).

The removal is implemented twice: `strip_text` cuts the text, `strip_tree` edits the syntax tree.
The bundle is made by the first, and strip.py checks it with the second.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeGuard

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Function = ast.FunctionDef | ast.AsyncFunctionDef
Annotated = ast.arg | Function | ast.AnnAssign


class Replacement(NamedTuple):
    """A range of bytes in the UTF-8 of a source, and the bytes that replace it."""

    start: int
    end: int
    new: bytes = b""


def strip_text(source: str) -> str:
    """Return `source`, which must have no comments, without what only readers need.

    A statement that may not simply vanish, because its block would be empty, becomes `pass`.
    """
    return _SourceText(source).strip()


def strip_tree(tree: ast.Module) -> ast.Module:
    """Remove the same from `tree` in place, and every `pass`; returns `tree`."""
    # Imports first: once the annotations are gone, the imports that only they used cannot be told
    # apart.
    unused = unused_imports(tree)
    for node in unread_annotations(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, Function):
            node.returns = None

    # An annotated assignment becomes a plain one when its statement is rebuilt below.
    assignments = {node for node in unread_annotations(tree) if isinstance(node, ast.AnnAssign)}
    for parent in list(ast.walk(tree)):
        if has_docstring(parent):
            del parent.body[0]
        for field in ("body", "orelse", "finalbody"):
            block = getattr(parent, field, None)
            if isinstance(block, list):
                kept: list[ast.AST] = []
                for statement in block:
                    kept += _stripped_statement(statement, assignments, unused)
                setattr(parent, field, kept)
    return tree


def _stripped_statement(
    statement: ast.AST, assignments: set[ast.AnnAssign], unused: set[ast.alias]
) -> Iterator[ast.AST]:
    """Yield the statement without what is removed, or nothing if nothing remains."""
    if isinstance(statement, ast.ImportFrom):
        statement.names = [alias for alias in statement.names if alias not in unused]
        if statement.names:
            yield statement
    elif isinstance(statement, ast.AnnAssign) and statement in assignments:
        assert statement.value is not None
        yield ast.Assign([statement.target], statement.value)
    elif not isinstance(statement, ast.Pass):
        yield statement


def has_docstring(node: ast.AST) -> TypeGuard[Documented]:
    """Tell if the first statement of `node` is its docstring."""
    return isinstance(node, Documented) and ast.get_docstring(node, clean=False) is not None


def unread_annotations(tree: ast.AST) -> Iterator[Annotated]:
    """Yield the nodes whose annotation nothing reads: arguments, functions (their result) and assignments."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function) and not node.decorator_list:
            for argument in ast.walk(node.args):
                if isinstance(argument, ast.arg) and argument.annotation:
                    yield argument
            if node.returns:
                yield node
        if isinstance(node, ast.AnnAssign) and node.value and not isinstance(tree, ast.ClassDef):
            yield node
        yield from unread_annotations(node)


def unused_imports(tree: ast.Module) -> set[ast.alias]:
    """Return the names of top-level `from` imports that only the removed annotations use.

    A word in a string counts as a use. Another module might import such a name from this one; mypy
    excludes that (no_implicit_reexport).
    """
    removed: set[ast.AST] = set()
    for node in unread_annotations(tree):
        removed.update(ast.walk(_annotation_of(node)))
    used_elsewhere = _words(node for node in ast.walk(tree) if node not in removed)
    used_only_there = _words(removed) - used_elsewhere

    unused = set()
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom):
            unused |= {name for name in statement.names if (name.asname or name.name) in used_only_there}
    return unused


def _annotation_of(node: Annotated) -> ast.expr:
    annotation = node.returns if isinstance(node, Function) else node.annotation
    assert annotation is not None
    return annotation


def _words(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the identifiers that the nodes are, and the words of the strings among them."""
    words: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Name):
            words.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words.update(re.findall(r"\w+", node.value))
    return words


class _SourceText:
    """A source as UTF-8 bytes, the unit in which syntax trees count columns."""

    def __init__(self, source: str) -> None:
        self.raw = source.encode("utf-8")
        self.tree = ast.parse(source)
        self.line_starts = [0]  # byte offsets
        for line in self.raw.split(b"\n"):
            self.line_starts.append(self.line_starts[-1] + len(line) + 1)

    def strip(self) -> str:
        replacements = {*self._docstrings(), *self._unused_imports()}
        replacements |= {self._annotation(node) for node in unread_annotations(self.tree)}

        raw = self.raw
        for start, end, new in sorted(replacements, reverse=True):  # from the back: offsets stay valid
            raw = raw[:start] + new + raw[end:]
        return raw.decode("utf-8")

    def span(self, node: ast.stmt | ast.expr | ast.arg) -> tuple[int, int]:
        """Return the byte offsets at which a node begins and ends."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self.line_starts[node.lineno - 1] + node.col_offset
        end = self.line_starts[node.end_lineno - 1] + node.end_col_offset
        return start, end

    def _docstrings(self) -> Iterator[Replacement]:
        for node in ast.walk(self.tree):
            if has_docstring(node):
                is_only_statement = len(node.body) == 1 and not isinstance(node, ast.Module)
                yield self._without_statement(node.body[0], is_only_statement)

    def _unused_imports(self) -> Iterator[Replacement]:
        unused = unused_imports(self.tree)
        for node in self.tree.body:
            if not isinstance(node, ast.ImportFrom) or unused.isdisjoint(node.names):
                continue

            names = []
            for alias in node.names:
                if alias not in unused:
                    names.append(alias.name + (f" as {alias.asname}" if alias.asname else ""))
            if names:
                kept = f"from {'.' * node.level}{node.module or ''} import {', '.join(names)}"
                yield Replacement(*self.span(node), kept.encode("utf-8"))
            else:
                yield self._without_statement(node, is_only_statement=False)

    def _without_statement(self, node: ast.stmt, is_only_statement: bool) -> Replacement:
        start, end = self.span(node)
        precedes_semicolon = self.raw[end:].lstrip(b" \t").startswith(b";")
        return Replacement(start, end, b"pass" if is_only_statement or precedes_semicolon else b"")

    def _annotation(self, node: Annotated) -> Replacement:
        """Cut the annotation with its colon or arrow and the parentheses around it."""
        annotation_start, end = self.span(_annotation_of(node))
        if isinstance(node, Function):
            start = self.raw.rindex(b"->", 0, annotation_start)
        else:
            annotated = node.target if isinstance(node, ast.AnnAssign) else node
            start = self.raw.rindex(b":", self.span(annotated)[0], annotation_start)

        opened_parentheses = self.raw.count(b"(", start, annotation_start)
        for _ in range(opened_parentheses):
            end = self.raw.index(b")", end) + 1
        return Replacement(len(self.raw[:start].rstrip(b" ")), end)
