"""Give local variables short names, so that long ones in the source cost nothing in the bundle.

Every name that others can see stays: modules, classes, functions, arguments, attributes, globals.
A name of more than SHORT letters that a function binds is replaced in the whole function, nested
functions and comprehensions included, unless it means something else somewhere in it: an argument,
a name of the module or a builtin, a nested function, an import, a nonlocal. A name of the module is
also one that a function declares global. Names in f-strings stay too, since Python 3.11 gives wrong
columns for them. Functions that define classes or look at variables by name (BY_NAME), and modules
with `import *`, stay as they are.

The renaming is implemented twice, on the text and on the syntax tree, and the results are compared.
"""

import ast
import builtins
import itertools
import keyword
import string
from collections.abc import Iterator

SHORT = 2  # letters of a name that is not replaced: what was renamed once stays as it is
BY_NAME = {"locals", "vars", "dir", "eval", "exec", "objmode"}  # builtins, and numba's objmode(x=type)

Function = ast.FunctionDef | ast.AsyncFunctionDef
Renames = dict[ast.Name, str]  # new identifier by node


def shorten_locals(source: str) -> str:
    """Return `source` with short names of local variables."""
    tree = ast.parse(source)
    lines = [line.encode("utf-8") for line in source.split("\n")]  # columns count bytes
    renames = _find_renames(tree)
    for node in sorted(renames, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        line = lines[node.lineno - 1]
        end = node.col_offset + len(node.id.encode("utf-8"))
        written = line[node.col_offset : end].decode("utf-8", "replace")
        if written != node.id:  # Python reads identifiers in Unicode's form NFKC
            raise ValueError(f"line {node.lineno}: write the identifier {node.id!r} as it is read")
        lines[node.lineno - 1] = line[: node.col_offset] + renames[node].encode("utf-8") + line[end:]
    shortened = b"\n".join(lines).decode("utf-8")

    for node, identifier in renames.items():
        node.id = identifier
    assert ast.dump(ast.parse(shortened)) == ast.dump(tree), "renaming changed the program"
    return shortened


def _find_renames(tree: ast.Module) -> Renames:
    """Return the new identifier of each Name node to rename."""
    everything = list(ast.walk(tree))
    if any(isinstance(node, ast.alias) and node.name == "*" for node in everything):
        return {}
    declared_global = {name for node in everything if isinstance(node, ast.Global) for name in node.names}
    outside = _names_outside_functions(tree) | declared_global | set(dir(builtins)) | set(keyword.kwlist)

    renames: Renames = {}
    for function in _outermost_functions(tree):
        nodes = list(ast.walk(function))
        if any(isinstance(node, ast.ClassDef) or _identifier(node) in BY_NAME for node in nodes):
            continue

        # The names to replace.
        name_nodes = [node for node in nodes if isinstance(node, ast.Name)]
        name_nodes.sort(key=lambda node: (node.lineno, node.col_offset))
        kept = outside | _names_with_other_meanings(nodes)
        stored = {node.id for node in name_nodes if isinstance(node.ctx, ast.Store)}
        long = {identifier for identifier in stored - kept if len(identifier) > SHORT}
        replaced = {identifier for identifier in long if not identifier.startswith("__")}

        # Short names in the order of the text, without those that the function uses already.
        unavailable = kept | {node.id for node in name_nodes}
        identifiers = (identifier for identifier in _identifiers() if identifier not in unavailable)
        short: dict[str, str] = {}
        for node in name_nodes:
            if node.id in replaced:
                if node.id not in short:
                    short[node.id] = next(identifiers)
                renames[node] = short[node.id]
    return renames


def _outermost_functions(node: ast.AST) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield child
        else:
            yield from _outermost_functions(child)


def _names_outside_functions(tree: ast.Module) -> set[str]:
    """Collect names that the module or a class body binds or uses."""
    nodes = list(_nodes_outside_functions(tree))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.name for node in nodes if isinstance(node, ast.ClassDef)}
    return names | _names_with_other_meanings(nodes)


def _nodes_outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what is evaluated outside functions: of a function, its decorators, defaults and annotations."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, Function):
            yield from _nodes_outside_functions(child)
            continue
        for part in (*child.decorator_list, child.args, child.returns):
            if part is not None:
                yield from ast.walk(part)


def _identifier(node: ast.AST) -> str | None:
    """Return the identifier of a Name or Attribute node."""
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else None


def _names_with_other_meanings(nodes: list[ast.AST]) -> set[str]:
    """Collect identifiers that also occur as an argument, function, import, pattern, or in an f-string."""
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
