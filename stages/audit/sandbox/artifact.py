"""Lists and copies the counted files of an artifact, so that no byte of them is left uncounted.

What a program can read of a folder beyond the contents of its files counts as well: each path, empty
folders included, and the text of each link. Times, modes, attributes and the order of a folder could
hold data too; a copy does not keep them, so only copies are handed to a program that is audited.
An artifact may hold files, folders, and links to files of the same artifact. ValueError for all else:
links to anywhere else or to folders, devices, sockets and pipes.
"""

import os
import shutil
import stat
from pathlib import Path

FILE_MODE = 0o444  # of a copy
FOLDER_MODE = 0o755


def artifact_files(folder: Path) -> dict[str, Path]:
    """List the files of an artifact: path in it -> file, without links; sorted.

    A link has the path of the file that it leads to. `folder` may also be a single file.
    """
    files = {}
    for name, path in _entries(folder).items():
        if not path.is_dir():
            files[name] = path.resolve()
    return files


def counted_bytes(folder: Path) -> dict[str, int]:
    """Count the bytes of each entry of an artifact: path in it -> content, path and link target together.

    Folders are counted with their path alone, which ends in a slash.
    """
    sizes = {}
    for name, path in _entries(folder).items():
        own = len(os.fsencode(name))
        if path.is_symlink():
            sizes[name] = own + len(os.fsencode(path.readlink()))
        elif path.is_dir():
            sizes[f"{name}/"] = own
        else:
            sizes[name] = own + path.stat().st_size
    return sizes


def copy_artifact(folder: Path, target: Path) -> None:
    """Copy an artifact to the new folder `target`: contents, paths and links, and nothing else of it."""
    target.mkdir(parents=True)
    for name, path in _entries(folder).items():
        place = target / name
        if path.is_symlink():
            place.symlink_to(path.readlink())
        elif path.is_dir():
            place.mkdir()
        else:
            copy_file(path, place)

    # Times last: a new entry changes those of its folder.
    for place in [target, *target.rglob("*")]:
        if place.is_dir() and not place.is_symlink():
            place.chmod(FOLDER_MODE)
        os.utime(place, (0, 0), follow_symlinks=False)


def copy_file(source: Path, target: Path) -> None:
    """Copy the contents of a file, and nothing else of it; the copy is read-only."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(FILE_MODE)
    os.utime(target, (0, 0))


def _entries(folder: Path) -> dict[str, Path]:
    """List everything in an artifact by its path, folders before what they hold; checks each entry."""
    folder = folder.resolve()
    if not folder.is_dir():
        return {folder.name: _checked(folder, folder.parent)}
    found = {}
    for place, folders, files in os.walk(folder, onerror=_raise):
        for name in [*folders, *files]:
            path = _checked(Path(place, name), folder)
            found[str(path.relative_to(folder))] = path
    return dict(sorted(found.items()))


def _raise(error: OSError) -> None:
    raise error


def _checked(path: Path, folder: Path) -> Path:
    """Return the entry `path` of the artifact `folder`; ValueError if no artifact may hold it."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        target = path.readlink()
        led_to = Path(os.path.realpath(path))  # of a loop, the link itself
        if target.is_absolute() or not led_to.is_relative_to(folder):
            raise ValueError(f"{path} is a link that leaves the artifact (to {target}); put the file there")
        if not led_to.is_file():
            raise ValueError(f"{path} is a link to {target}, which is not a file; put the files there")
    elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"{path} is neither a file nor a folder; an artifact holds nothing else")
    return path
