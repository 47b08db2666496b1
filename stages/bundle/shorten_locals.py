"""Give local variables short names, so that long ones in the source cost nothing in the bundle.

Every name that others can see stays: modules, classes, functions, arguments, attributes, globals.
A name of more than SHORT letters that a function binds is replaced in the whole function, nested
functions and comprehensions included, unless it means something else somewhere in it: an argument,
a name of the module or a builtin, a nested function, an import, a nonlocal. Names in f-strings stay
too, since Python 3.11 gives wrong columns for them. Functions that define classes stay as they are.

The renaming is implemented twice, on the text and on the syntax tree, and the results are compared.
"""

import ast
import builtins
import itertools
import keyword
import string
from collections.abc import Iterator

SHORT = 2  # letters of a name that is not replaced: what was renamed once stays as it is

Function = ast.FunctionDef | ast.AsyncFunctionDef
Renames = dict[ast.Name, str]  # new identifier by node


def shorten_locals(source: str) -> str:
    """Return `source` with short names of local variables."""
    tree = ast.parse(source)
    lines = [line.encode("utf-8") for line in source.split("\n")]  # columns count bytes
    renames = _find_renames(tree)
    for name in sorted(renames, key=lambda name: (name.lineno, name.col_offset), reverse=True):
        line = lines[name.lineno - 1]
        end = name.col_offset + len(name.id.encode("utf-8"))
        assert line[name.col_offset : end].decode("utf-8") == name.id
        lines[name.lineno - 1] = line[: name.col_offset] + renames[name].encode("utf-8") + line[end:]
    shortened = b"\n".join(lines).decode("utf-8")

    for name, identifier in renames.items():
        name.id = identifier
    assert ast.dump(ast.parse(shortened)) == ast.dump(tree), "renaming changed the program"
    return shortened


def _find_renames(tree: ast.Module) -> Renames:
    """Return the nodes to rename."""
    outside = _bound_outside_functions(tree) | set(dir(builtins)) | set(keyword.kwlist)
    renames: Renames = {}
    for function in _outermost_functions(tree):
        nodes = list(ast.walk(function))
        if any(isinstance(node, ast.ClassDef) for node in nodes):
            continue
        names = [node for node in nodes if isinstance(node, ast.Name)]
        names.sort(key=lambda name: (name.lineno, name.col_offset))
        kept = outside | _names_with_other_meanings(nodes)
        bound = {name.id for name in names if isinstance(name.ctx, ast.Store) and len(name.id) > SHORT}

        # Short names in the order of the text, without those that the function uses already.
        unavailable = kept | {name.id for name in names}
        identifiers = (identifier for identifier in _identifiers() if identifier not in unavailable)
        short: dict[str, str] = {}
        for name in names:
            if name.id in bound - kept:
                if name.id not in short:
                    short[name.id] = next(identifiers)
                renames[name] = short[name.id]
    return renames


def _outermost_functions(node: ast.AST) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield child
        else:
            yield from _outermost_functions(child)


def _bound_outside_functions(tree: ast.AST) -> set[str]:
    """Collect names that the module or a class body binds or uses."""
    names: set[str] = set()
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, Function):
            names.add(child.name)
            continue
        if isinstance(child, ast.Name):
            names.add(child.id)
        elif isinstance(child, ast.ClassDef):
            names.add(child.name)
        elif isinstance(child, ast.alias):
            names.add((child.asname or child.name).partition(".")[0])
        names |= _bound_outside_functions(child)
    return names


def _names_with_other_meanings(nodes: list[ast.AST]) -> set[str]:
    """Collect identifiers of a function that are not variables, or that the text has as more than a Name."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, Function):
            names.add(node.name)
        elif isinstance(node, ast.Global | ast.Nonlocal):
            names.update(node.names)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            names.add(node.name)
        elif isinstance(node, ast.MatchMapping) and node.rest:
            names.add(node.rest)
        elif isinstance(node, ast.JoinedStr):
            names.update(part.id for part in ast.walk(node) if isinstance(part, ast.Name))
    return names


def _identifiers() -> Iterator[str]:
    """Yield a, b ... z, A ... Z, aa, ab ..."""
    for length in itertools.count(1):
        for letters in itertools.product(string.ascii_letters, repeat=length):
            yield "".join(letters)
