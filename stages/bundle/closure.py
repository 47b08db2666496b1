"""Import closure of a module: the files it needs, read from the source text without importing anything.

The bundle carries this set of files, and a test compares each stage's `deps` in dvc.yaml with it
(DVC does not trace imports).
"""

import ast
from collections.abc import Iterator
from pathlib import Path


def import_closure(root: Path, module: str) -> set[Path]:
    """Return `module` and everything it imports from its own top-level package, as paths relative to `root`.

    The `__init__.py` files of all packages on the way are included, and so are imports inside
    functions. Raises ValueError for a module that does not exist.
    """
    package = module.partition(".")[0]
    first = locate(root, module)
    if first is None:
        raise ValueError(f"{root / package} has no module {module}")

    found: set[Path] = set()
    pending = [first, *_parent_packages(root, module)]
    while pending:
        path = pending.pop()
        if path in found:
            continue
        found.add(path)
        pending += _imported_files(root, path, package)
    return found


def locate(root: Path, module: str) -> Path | None:
    """Return the file of a module relative to `root`, or None if there is none."""
    stem = Path(*module.split("."))
    for path in (stem / "__init__.py", stem.with_name(stem.name + ".py")):
        if (root / path).is_file():
            return path
    return None


def module_name(path: Path) -> str:
    """Return the dotted name under which a file, given relative to the root, is imported.

    >>> module_name(Path("stages/train/__init__.py")), module_name(Path("stages/common/bpb.py"))
    ('stages.train', 'stages.common.bpb')
    """
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_source(path: Path) -> str:
    """Return the text of a source file with newlines as line ends, whatever the checkout made of them."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def _parent_packages(root: Path, module: str) -> Iterator[Path]:
    """Yield the `__init__.py` of each package that contains the module."""
    parts = module.split(".")
    for length in range(1, len(parts)):
        path = locate(root, ".".join(parts[:length]))
        if path is not None:
            yield path


def _imported_files(root: Path, path: Path, package: str) -> list[Path]:
    """Return the files of `package` that one file imports, with the packages that contain each."""
    try:
        tree = ast.parse(read_source(root / path))
    except SyntaxError as error:
        raise ValueError(f"{root / path} is not Python: {error}") from error

    found: list[Path] = []
    for node in ast.walk(tree):
        for module, is_module in _imported_names(node, path):
            if module.partition(".")[0] != package:
                continue
            file = locate(root, module)
            if file is None and is_module:
                raise ValueError(f"{root / path} imports {module}, which does not exist")
            if file is not None:
                found += [file, *_parent_packages(root, module)]
    return found


def _imported_names(node: ast.AST, path: Path) -> Iterator[tuple[str, bool]]:
    """Yield (dotted name, is certainly a module) for each name in an import statement.

    In `from package import name` the name may be a module or an attribute.
    """
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name, True
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            # A relative import: drop as many parts of this file's path as there are dots.
            above = path.parts[: len(path.parts) - node.level]
            base = ".".join([*above, *base.split(".")] if base else above)
        yield base, True
        for alias in node.names:
            yield f"{base}.{alias.name}", False
