"""Stand-alone commands, `python -m tools.NAME`. They may import from `stages`; no stage imports from here."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import stages  # noqa: F401  (pins the instruction set, which must come before numpy is imported)


def add_path_option(parser: argparse.ArgumentParser, option: str, default: str, what: str) -> None:
    """Add an option that names a file or folder, with its default in the help text."""
    metavar = "FILE" if Path(default).suffix else "DIR"
    parser.add_argument(
        option, type=Path, default=Path(default), metavar=metavar, help=f"{what} (default: %(default)s)"
    )


def require_file(path: Path, remedy: str) -> Path:
    """Return the path of an input; ValueError with the remedy if it does not exist or is a folder."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a file; {remedy}")
    if not path.exists():
        raise ValueError(f"{path} does not exist; {remedy}")
    return path


def require_folder(path: Path, remedy: str) -> Path:
    """Return the path of an input; ValueError with the remedy if it is not a folder."""
    if not path.is_dir():
        raise ValueError(
            f"{path} is a file, expected a folder; {remedy}"
            if path.exists()
            else f"{path} does not exist; {remedy}"
        )
    return path


@contextlib.contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Context manager: put the path in front of the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
