"""What of a Python source only its readers need, found in its syntax tree: docstrings, annotations, and imports that only those used.

Annotations that code may read when it runs stay: those in the body of a class (fields of dataclasses and NamedTuples), and those of a
decorated function (Triton's `constexpr`, the schemas of torch's custom operators). `module` does to a tree what `cut` does to a text, and
each is the other's check.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeGuard

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Cut(NamedTuple):
    """A place in the UTF-8 of a source, and what is put there instead."""

    start: int
    end: int
    put: bytes = b""


def cut(source: str) -> str:
    """`source`, which has no comments, without what only readers need; a statement that must leave something behind leaves `pass`."""
    return _Text(source).cut()


def module(tree: ast.Module) -> ast.Module:
    """`tree`, altered in place: without docstrings, the annotations of `annotated`, the imports that they alone used, and `pass`."""
    unused = orphans(tree)
    for target in annotated(tree):
        if isinstance(target, ast.arg):
            target.annotation = None
        elif isinstance(target, Function):
            target.returns = None
    assigned = {node for node in annotated(tree) if isinstance(node, ast.AnnAssign)}
    nodes: list[ast.AST] = list(ast.walk(tree))
    for node in nodes:
        if is_documented(node):
            del node.body[0]
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                setattr(
                    node, name, [kept for statement in block for kept in _kept(statement, assigned, unused)]
                )
    return tree


def _kept(statement: ast.AST, assigned: set[ast.AnnAssign], unused: set[ast.alias]) -> Iterator[ast.AST]:
    if isinstance(statement, ast.ImportFrom):
        statement.names = [alias for alias in statement.names if alias not in unused]
        if statement.names:
            yield statement
    elif isinstance(statement, ast.AnnAssign) and statement in assigned:
        assert statement.value is not None
        yield ast.Assign([statement.target], statement.value)
    elif not isinstance(statement, ast.Pass):
        yield statement


def is_documented(node: ast.AST) -> TypeGuard[Documented]:
    """Whether the first statement of `node` is its docstring."""
    return isinstance(node, Documented) and ast.get_docstring(node, clean=False) is not None


def annotated(tree: ast.AST) -> Iterator[ast.arg | Function | ast.AnnAssign]:
    """What has an annotation that nothing reads: arguments, functions (their result) and assignments."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function) and not node.decorator_list:
            yield from (
                argument
                for argument in ast.walk(node.args)
                if isinstance(argument, ast.arg) and argument.annotation
            )
            if node.returns:
                yield node
        if isinstance(node, ast.AnnAssign) and node.value and not isinstance(tree, ast.ClassDef):
            yield node
        yield from annotated(node)


def orphans(tree: ast.Module) -> set[ast.alias]:
    """Names that the module imports with `from`, at its top, for the annotations of `annotated` alone.

    That nobody imports them from this module is mypy's business (no_implicit_reexport). Words in strings count as uses.
    """
    given = [_annotation(node) for node in annotated(tree)]
    dropped = {inner for annotation in given for inner in ast.walk(annotation)}
    only = _words(dropped) - _words(node for node in ast.walk(tree) if node not in dropped)
    imports = (node for node in tree.body if isinstance(node, ast.ImportFrom))
    return {alias for node in imports for alias in node.names if (alias.asname or alias.name) in only}


def _annotation(node: ast.arg | Function | ast.AnnAssign) -> ast.expr:
    found = node.returns if isinstance(node, Function) else node.annotation
    assert found is not None
    return found


def _words(nodes: Iterable[ast.AST]) -> set[str]:
    words: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Name):
            words.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words.update(re.findall(r"\w+", node.value))
    return words


class _Text:
    """A source as UTF-8, in which the tree counts its columns."""

    def __init__(self, source: str) -> None:
        self.raw = source.encode("utf-8")
        self.tree = ast.parse(source)
        self.lines = [0]  # where each begins
        for line in self.raw.split(b"\n"):
            self.lines.append(self.lines[-1] + len(line) + 1)

    def cut(self) -> str:
        raw = self.raw
        cuts = {*self._docstrings(), *map(self._annotation, annotated(self.tree)), *self._imports()}
        for place in sorted(cuts, reverse=True):
            raw = raw[: place.start] + place.put + raw[place.end :]
        return raw.decode("utf-8")

    def span(self, node: ast.stmt | ast.expr | ast.arg) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.lines[node.lineno - 1] + node.col_offset, self.lines[
            node.end_lineno - 1
        ] + node.end_col_offset

    def _docstrings(self) -> Iterator[Cut]:
        for node in ast.walk(self.tree):
            if is_documented(node):
                yield self._statement(
                    node.body[0], alone=len(node.body) == 1 and not isinstance(node, ast.Module)
                )

    def _imports(self) -> Iterator[Cut]:
        unused = orphans(self.tree)
        for node in self.tree.body:
            if not isinstance(node, ast.ImportFrom) or unused.isdisjoint(node.names):
                continue
            names = [
                alias.name + (f" as {alias.asname}" if alias.asname else "")
                for alias in node.names
                if alias not in unused
            ]
            kept = f"from {'.' * node.level}{node.module or ''} import {', '.join(names)}"
            yield Cut(*self.span(node), kept.encode("utf-8")) if names else self._statement(node, alone=False)

    def _statement(self, node: ast.stmt, alone: bool) -> Cut:
        start, end = self.span(node)
        return Cut(start, end, b"pass" if alone or self.raw[end:].lstrip(b" \t").startswith(b";") else b"")

    def _annotation(self, node: ast.arg | Function | ast.AnnAssign) -> Cut:
        """From the end of what is annotated to the end of the annotation; parentheses around it go with it."""
        first, last = self.span(_annotation(node))
        if isinstance(node, Function):
            begin = self.raw.rindex(b"->", 0, first)
        else:
            begin = self.raw.rindex(
                b":", self.span(node.target if isinstance(node, ast.AnnAssign) else node)[0], first
            )
        for _ in range(self.raw.count(b"(", begin, first)):
            last = self.raw.index(b")", last) + 1
        return Cut(len(self.raw[:begin].rstrip(b" ")), last)
