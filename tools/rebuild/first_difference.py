"""Where two files, or two folders of files, first differ: what a rebuild says when bytes are not the same."""

from pathlib import Path


def first_difference(a: Path, b: Path) -> str | None:
    """In words; None where the bytes are the same."""
    if a.is_dir() != b.is_dir():
        return "one is a folder, the other a file"
    if not a.is_dir():
        return _in_file(a.read_bytes(), b.read_bytes())
    names = [
        sorted(path.relative_to(side).as_posix() for path in side.rglob("*") if path.is_file())
        for side in (a, b)
    ]
    for name in sorted({*names[0], *names[1]}):
        if name not in names[0] or name not in names[1]:
            return f"{name} is in one of them only"
        found = _in_file((a / name).read_bytes(), (b / name).read_bytes())
        if found:
            return f"{name}: {found}"
    return None


def _in_file(a: bytes, b: bytes) -> str | None:
    """The first byte that differs, and in a text its line.

    >>> _in_file(b"one\\ntwo\\n", b"one\\ntoo\\n")
    'byte 5 (line 2: "two", rebuilt "too") of 8'
    """
    if a == b:
        return None
    shorter = min(len(a), len(b))
    offset = next((i for i in range(shorter) if a[i] != b[i]), shorter)
    sizes = f"{len(a):,}" if len(a) == len(b) else f"{len(a):,}, rebuilt {len(b):,}"
    lines = _line(a, offset), _line(b, offset)
    if lines[0] is None or lines[1] is None:
        return f"byte {offset:,} of {sizes}"
    number = a.count(b"\n", 0, offset) + 1
    return f'byte {offset:,} (line {number:,}: "{lines[0]}", rebuilt "{lines[1]}") of {sizes}'


def _line(data: bytes, offset: int) -> str | None:
    """The line around an offset; None where the file is no text."""
    if b"\0" in data:
        return None
    start = data.rfind(b"\n", 0, offset) + 1
    end = data.find(b"\n", offset)
    try:
        return data[start : end if end >= 0 else len(data)].decode("utf-8")[:80]
    except UnicodeDecodeError:
        return None
