"""The built-in corpus: technical English that is on every machine which can run the pipeline at all.

A document is a docstring (`ast.get_docstring`, nothing is imported) of at least MIN_CHARACTERS; shorter ones say little. The same versions
give the same documents: files in sorted order, exact duplicates dropped, whole modules on one side by the hash of their path, and a
docstring that another module has in other spelling or spacing dropped where the two modules lie on different sides. Syntax newer than
FEATURE_VERSION makes a file unreadable on the oldest Python supported, so it is skipped on all of them; the manifest counts such files.
"""

import ast
import gc
import importlib.metadata
import importlib.util
import multiprocessing
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.common import failure_detector
from stages.common.progress import Report
from stages.tokenize import split
from stages.tokenize.split import Document, Side

PACKAGES = ("torch", "numpy", "sympy", "networkx")
MIN_CHARACTERS = 200
FEATURE_VERSION = (3, 11)
FILES_PER_TASK = 32
_PIN = re.compile(r"^([A-Za-z0-9._-]+)\s*==\s*([^\s;#]+)")


@dataclass
class Corpus:
    """The documents of the built-in corpus, in file order, and how they came about (for the manifest)."""

    documents: list[Document] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def pinned_versions(lock: str) -> dict[str, str]:
    """Package to version, from the `name==version` lines of a lock file."""
    pins = (_PIN.match(line) for line in lock.splitlines())
    return {re.sub(r"[-_.]+", "-", pin[1]).lower(): pin[2] for pin in pins if pin}


def check_versions(lock: str, lock_name: str) -> dict[str, str]:
    """The pinned version of each package; a ValueError when another is installed, or none (`+cpu` and its like do not count)."""
    pins = pinned_versions(lock)
    versions = {}
    for package in PACKAGES:
        if package not in pins:
            raise ValueError(
                f"{lock_name} does not pin {package}, of which the built-in corpus is made; add `{package}==VERSION`"
            )
        versions[package] = pins[package].partition("+")[0]
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(
                f"{package} is not installed, but {lock_name} pins {pins[package]}; install the lock file"
            ) from None
        if installed.partition("+")[0] != versions[package]:
            raise ValueError(
                f"{package} {installed} is installed, but {lock_name} pins {pins[package]}; install the lock file"
            )
    return versions


def corpus(val_fraction: float, max_bytes: int, processes: int, report: Report) -> Corpus:
    """The corpus of the installed packages."""
    files = [
        (package, root, path)
        for package in PACKAGES
        for root in [_folder(package)]
        for path in sorted(root.rglob("*.py"))
    ]
    names = [f"{package}/{path.relative_to(root).as_posix()}" for package, root, path in files]
    unreadable = []
    seen: set[str] = set()
    sides: dict[int, Side] = {}
    result = Corpus()
    repeated = across = 0
    for name, texts in zip(names, _read_all([path for _, _, path in files], processes, report), strict=True):
        if texts is None:
            unreadable.append(name)
            continue
        side = split.side_of(split.name_hash(name), val_fraction)
        for number, text in enumerate(texts):
            if len(text.encode("utf-8")) > max_bytes:
                raise ValueError(
                    f"{name}, docstring {number}: a document above tokenize.max_document_bytes ({max_bytes})"
                )
            if text in seen:
                repeated += 1
            elif sides.setdefault(split.content_hash(text), side) != side:
                across += 1
            else:
                result.documents.append(Document(text, f"{name}, docstring {number}", side))
            seen.add(text)
    result.facts = {
        "source_files": len(files),
        "source_files_unreadable": unreadable,
        "docstrings_repeated": repeated,
        "docstrings_on_both_sides": across,
        "docstring_characters_min": MIN_CHARACTERS,
    }
    return result


def docstrings(source: bytes) -> list[str] | None:
    """The docstrings of a module that are long enough, in source order; None when it does not parse.

    A file without triple quotes (a third of them) is not parsed: no one writes so long a docstring without.
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
    """Module, classes and functions; only statements can hold one, so expressions (most of the tree) are not visited."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield node
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        statements = getattr(node, block, None)
        if isinstance(statements, list):
            for statement in statements:
                yield from _definitions(statement)


def _is_text(text: str) -> bool:
    return not any(
        "\ud800" <= character <= "\udfff" for character in text
    )  # an escape in the source can make an unpaired surrogate


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # a top-level name: finds without importing
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{package} is installed without a package folder, so its docstrings cannot be read")
    return Path(spec.submodule_search_locations[0])


def _read_all(paths: list[Path], processes: int, report: Report) -> Iterator[list[str] | None]:
    context = multiprocessing.get_context(
        "fork"
    )  # spawned workers would import torch first, which takes longer than their work
    with (
        ProcessPoolExecutor(processes, context, initializer=_start_worker) as pool,
        report.progress("docstrings", len(paths)) as progress,
    ):
        for texts in pool.map(_read, paths, chunksize=FILES_PER_TASK):
            progress.advance(1, "files")
            yield texts


def _start_worker() -> None:
    failure_detector.end_with_parent()
    gc.disable()  # a syntax tree holds no cycles, and collection would take half the time
    warnings.simplefilter("ignore")  # SyntaxWarning: of other people's escape sequences


def _read(path: Path) -> list[str] | None:
    return docstrings(path.read_bytes())
