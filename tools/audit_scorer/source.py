"""Find the code of an external scorer without importing it, and what its processes are shown of it.

A process sees the scorer's own module or top package, the artifact, and files that are named with --code;
with an artifact all of them are counted. It does not see anything else of the module's folder.
"""

import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path

from stages.audit.remote.process import ScorerSource
from stages.audit.sandbox.artifact import copy_artifact, copy_file, counted_bytes
from stages.audit.sandbox.room import gpu_devices, interpreter_folders

CODE_FOLDER = "/scorer"  # in the sandbox
ARTIFACT_FOLDER = "/artifact"  # in the sandbox


def find_source(
    factory: str,
    artifact: Path | None,
    code: Sequence[Path],
    n_targets: int,
    precision: str | None,
    copies: Path,
) -> ScorerSource:
    """Describe how a process builds the scorers of `factory`, module:function.

    copies: an empty folder for copies of the counted files, because times and modes of files could hold
    data. ValueError if there is no such module, or if files cannot be shown.
    """
    module, separator, name = factory.partition(":")
    if not separator or not module or not name:
        raise ValueError(f"--scorer {factory}: expected module:factory")

    # The scorer's code, and what --code names, each at the top of one folder.
    visible = {}
    top = _find_module(factory, module)
    for path in [*([] if top is None else [top]), *code]:
        if not path.exists():
            raise ValueError(f"--code {path} does not exist")
        place = copies / "code" / path.name
        if place.exists():
            raise ValueError(f"two files or folders of the scorer's code are called {path.name}")
        _copy(path, place)
        visible[f"{CODE_FOLDER}/{path.name}"] = place

    # The counted files.
    arguments: tuple[object, ...] = (n_targets,)
    if artifact is not None:
        copy_artifact(artifact, copies / "artifact")
        visible[ARTIFACT_FOLDER] = copies / "artifact"
        arguments = (n_targets, ARTIFACT_FOLDER)

    return ScorerSource(
        factory,
        arguments,
        visible,
        search_path=(CODE_FOLDER,),
        devices=gpu_devices(),
        precision=precision,
    )


def code_bytes(factory: str, code: Sequence[Path]) -> dict[str, int]:
    """Count the bytes of all code that the scorer's processes are shown: contents, paths and link targets."""
    top = _find_module(factory, factory.partition(":")[0])
    return bytes_in_code_folder([*([] if top is None else [top]), *code])


def bytes_in_code_folder(paths: Sequence[Path]) -> dict[str, int]:
    """Count the bytes of files and folders at the top of the code folder, by their paths in the sandbox."""
    sizes = {}
    for path in paths:
        for name, size in counted_bytes(path).items():
            inside = f"{path.name}/{name}" if path.is_dir() else name
            sizes[f"{CODE_FOLDER}/{inside}"] = size
    return sizes


def _find_module(factory: str, module: str) -> Path | None:
    """Find the file of a module, or the folder of its top package; None for one of the interpreter's."""
    top = module.partition(".")[0]
    if top in sys.builtin_module_names:
        return None
    spec = importlib.machinery.PathFinder.find_spec(top, sys.path)
    if spec is None:
        raise ValueError(f"--scorer {factory}: there is no module {top} here or on PYTHONPATH")
    found = spec.submodule_search_locations or ([spec.origin] if spec.origin else [])
    path = Path(next(iter(found))).absolute()
    is_installed = any(path.is_relative_to(folder) for folder in interpreter_folders())
    return None if is_installed else path


def _copy(path: Path, place: Path) -> None:
    if path.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        copy_artifact(path, place)
    else:
        copy_file(path, place)
