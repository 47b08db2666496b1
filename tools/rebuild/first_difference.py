"""Find the position of the first difference between two files or folders, in words for a message."""

from pathlib import Path

MAX_SHOWN_CHARACTERS = 80  # of a line


def first_difference(original: Path, rebuilt: Path) -> str | None:
    """Describe the first difference of two files or folders; None if all bytes are the same."""
    if original.is_dir() != rebuilt.is_dir():
        return "one is a folder, the other a file"
    if not original.is_dir():
        return _in_bytes(original.read_bytes(), rebuilt.read_bytes())

    original_names = _file_names(original)
    rebuilt_names = _file_names(rebuilt)
    for name in sorted(original_names | rebuilt_names):
        if name not in original_names or name not in rebuilt_names:
            return f"{name} is in one of them only"
        found = _in_bytes((original / name).read_bytes(), (rebuilt / name).read_bytes())
        if found:
            return f"{name}: {found}"
    return None


def _file_names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _in_bytes(original: bytes, rebuilt: bytes) -> str | None:
    """Describe the first byte that differs and, in a text, its line.

    >>> _in_bytes(b"one\\ntwo\\n", b"one\\ntoo\\n")
    'byte 5 (line 2: "two", rebuilt "too") of 8'
    """
    if original == rebuilt:
        return None
    shorter = min(len(original), len(rebuilt))
    offset = next((i for i in range(shorter) if original[i] != rebuilt[i]), shorter)
    sizes = f"{len(original):,}"
    if len(original) != len(rebuilt):
        sizes += f", rebuilt {len(rebuilt):,}"

    original_line = _line_at(original, offset)
    rebuilt_line = _line_at(rebuilt, offset)
    if original_line is None or rebuilt_line is None:
        return f"byte {offset:,} of {sizes}"
    number = original.count(b"\n", 0, offset) + 1
    return f'byte {offset:,} (line {number:,}: "{original_line}", rebuilt "{rebuilt_line}") of {sizes}'


def _line_at(data: bytes, offset: int) -> str | None:
    """Return the line around an offset, shortened; None if the data is not text."""
    if b"\0" in data:
        return None
    start = data.rfind(b"\n", 0, offset) + 1
    end = data.find(b"\n", offset)
    try:
        return data[start : end if end >= 0 else len(data)].decode("utf-8")[:MAX_SHOWN_CHARACTERS]
    except UnicodeDecodeError:
        return None
