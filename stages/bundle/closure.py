"""Which files a module needs: the closure of its imports, read from the source text without importing anything.

The bundle carries this set, and a test holds each stage's `deps` in dvc.yaml against it (DVC does not trace imports).
"""

import ast
from collections.abc import Iterator
from pathlib import Path


def closure(root: Path, module: str) -> set[Path]:
    """Paths relative to `root` of `module` and all it imports from its own top-level package, `__init__.py` files included.

    Imports inside functions count. A module that does not exist is a ValueError.
    """
    package = module.partition(".")[0]
    first = locate(root, module)
    if first is None:
        raise ValueError(f"{root / package} has no module {module}")
    found: set[Path] = set()
    waiting = [first, *_packages(root, module)]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        waiting += _imports(root, path, package)
    return found


def locate(root: Path, module: str) -> Path | None:
    """The file of a module relative to `root`, or None when there is none."""
    stem = Path(*module.split("."))
    for path in (stem / "__init__.py", stem.with_name(stem.name + ".py")):
        if (root / path).is_file():
            return path
    return None


def module_name(path: Path) -> str:
    """The name under which a file relative to the root is imported.

    >>> module_name(Path("stages/train/__init__.py")), module_name(Path("stages/common/bpb.py"))
    ('stages.train', 'stages.common.bpb')
    """
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read(path: Path) -> str:
    """The text of a source file; line ends become newlines, so that a checkout that changes them changes nothing."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def _packages(root: Path, module: str) -> Iterator[Path]:
    parts = module.split(".")
    for length in range(1, len(parts)):
        path = locate(root, ".".join(parts[:length]))
        if path is not None:
            yield path


def _imports(root: Path, path: Path, package: str) -> list[Path]:
    """The files that one file imports, with the packages above each."""
    try:
        tree = ast.parse(read(root / path))
    except SyntaxError as error:
        raise ValueError(f"{root / path} is not Python: {error}") from error
    found: list[Path] = []
    for node in ast.walk(tree):
        for module, required in _names(node, path):
            if module.partition(".")[0] != package:
                continue
            target = locate(root, module)
            if target is None and required:
                raise ValueError(f"{root / path} imports {module}, which does not exist")
            if target is not None:
                found += [target, *_packages(root, module)]
    return found


def _names(node: ast.AST, path: Path) -> Iterator[tuple[str, bool]]:
    """The modules that an import statement names; not required are those that may be attributes (`from package import name`)."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, True) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = path.parts[: len(path.parts) - node.level]
            base = ".".join([*above, *base.split(".")] if base else above)
        yield base, True
        yield from ((f"{base}.{alias.name}", False) for alias in node.names)
