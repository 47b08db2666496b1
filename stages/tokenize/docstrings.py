"""The built-in corpus `pydocs`: docstrings of the Python packages that the pipeline needs anyway.

A document is a docstring of at least MIN_CHARACTERS (shorter ones say little), read with
`ast.get_docstring`, so nothing is imported. The same package versions give the same documents:

* files are read in sorted order, and exact duplicates are dropped;
* a whole module is on one side, by the hash of its path;
* a docstring that another module repeats with other spelling or spacing is dropped if the two
  modules are on different sides;
* syntax newer than FEATURE_VERSION, the oldest Python supported, makes a file unreadable on every
  Python; the manifest lists such files.
"""

import ast
import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.common.concurrency import fork_pool
from stages.common.progress import Logger
from stages.tokenize import split
from stages.tokenize.split import Side, TextDocument

PACKAGES = ("torch", "numpy", "sympy", "networkx")
MIN_CHARACTERS = 200
FEATURE_VERSION = (3, 11)
FILES_PER_TASK = 32  # files that a worker process gets at once
_PIN = re.compile(r"^([A-Za-z0-9._-]+)\s*==\s*([^\s;#]+)")


@dataclass
class Corpus:
    """The documents of the built-in corpus, in file order, and its entries of the manifest."""

    documents: list[TextDocument] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)


def pinned_versions(lock: str) -> dict[str, str]:
    """Read the `name==version` lines of a lock file.

    Returns the version of each normalised package name.
    """
    pins = (_PIN.match(line) for line in lock.splitlines())
    return {re.sub(r"[-_.]+", "-", pin[1]).lower(): pin[2] for pin in pins if pin}


def check_versions(lock: str, lock_name: str) -> dict[str, str]:
    """Check that the installed packages are the pinned ones; returns the version of each.

    Local versions such as `+cpu` are not compared. Raises ValueError when a package is not pinned,
    not installed, or installed in another version.
    """
    pins = pinned_versions(lock)
    versions = {}
    for package in PACKAGES:
        if package not in pins:
            raise ValueError(
                f"{lock_name} does not pin {package}, of which the built-in corpus is made; "
                f"add `{package}==VERSION`"
            )
        versions[package] = pins[package].partition("+")[0]

        # Compare with the installed package.
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(
                f"{package} is not installed, but {lock_name} pins {pins[package]}; install the lock file"
            ) from None
        if installed.partition("+")[0] != versions[package]:
            raise ValueError(
                f"{package} {installed} is installed, but {lock_name} pins {pins[package]}; "
                "install the lock file"
            )
    return versions


def corpus(val_fraction: float, max_bytes: int, processes: int, logger: Logger) -> Corpus:
    """Read the corpus of the installed packages.

    Raises ValueError for a docstring above `max_bytes` of UTF-8.
    """
    # Name each module after its package and path; the name decides its side.
    modules: list[tuple[str, Path]] = []
    for package in PACKAGES:
        root = _package_folder(package)
        for path in sorted(root.rglob("*.py")):
            modules.append((f"{package}/{path.relative_to(root).as_posix()}", path))
    all_texts = _read_modules([path for _, path in modules], processes, logger)

    # Collect the docstrings in that order, and count those that are dropped.
    documents: list[TextDocument] = []
    unreadable: list[str] = []
    repeated = on_both_sides = 0
    earlier_texts: set[str] = set()
    side_of_content: dict[int, Side] = {}
    for (name, _), texts in zip(modules, all_texts, strict=True):
        if texts is None:
            unreadable.append(name)
            continue

        # All docstrings of a module are on the side of its name.
        side = split.side_of(split.name_hash(name), val_fraction)
        for number, text in enumerate(texts):
            if len(text.encode("utf-8")) > max_bytes:
                raise ValueError(
                    f"{name}, docstring {number}: a document above tokenize.max_document_bytes ({max_bytes})"
                )

            # Drop exact duplicates, and texts whose content is on the other side already.
            if text in earlier_texts:
                repeated += 1
            elif side_of_content.setdefault(split.content_hash(text), side) != side:
                on_both_sides += 1
            else:
                documents.append(TextDocument(text, f"{name}, docstring {number}", side))
            earlier_texts.add(text)

    manifest = {
        "source_files": len(modules),
        "source_files_unreadable": unreadable,
        "docstrings_repeated": repeated,
        "docstrings_on_both_sides": on_both_sides,
        "docstring_characters_min": MIN_CHARACTERS,
    }
    return Corpus(documents, manifest)


def docstrings(source: bytes) -> list[str] | None:
    """Extract the docstrings of a module that are long enough, in source order.

    None when it does not parse.

    A file without triple quotes (a third of them) is not parsed: no one writes a docstring of this
    length without.
    """
    if b'"""' not in source and b"'''" not in source:
        return []
    try:
        module = ast.parse(source, feature_version=FEATURE_VERSION)
    except (SyntaxError, ValueError):
        return None
    texts = (ast.get_docstring(node) for node in _definitions(module))
    return [text for text in texts if text is not None and len(text) >= MIN_CHARACTERS and _is_text(text)]


def _definitions(
    node: ast.AST,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield module, classes and functions in source order.

    Only statements can contain one, so expressions (most of the tree) are not visited.
    """
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield node
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        statements = getattr(node, block, None)
        if isinstance(statements, list):
            for statement in statements:
                yield from _definitions(statement)


def _is_text(text: str) -> bool:
    """Reject unpaired surrogates, which an escape in the source can make."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{package} is installed without a package folder, so its docstrings cannot be read")
    return Path(spec.submodule_search_locations[0])


def _read_modules(paths: list[Path], processes: int, logger: Logger) -> Iterator[list[str] | None]:
    """Yield the docstrings of each file, in order, read by several processes."""
    with (
        fork_pool(processes, _ignore_warnings) as pool,
        logger.progress("docstrings", len(paths)) as progress,
    ):
        for texts in pool.map(_read_module, paths, chunksize=FILES_PER_TASK):
            progress.advance(1, "files")
            yield texts


def _ignore_warnings() -> None:
    warnings.simplefilter("ignore")  # SyntaxWarning about escape sequences in other people's code


def _read_module(path: Path) -> list[str] | None:
    return docstrings(path.read_bytes())
