"""List the tools with one line each: `python -m tools`."""

import argparse
import ast
from pathlib import Path

TOOLS_FOLDER = Path(__file__).resolve().parent


def descriptions() -> dict[str, str]:
    """Return the first docstring line of every tool by name; that of a package is in its `__init__.py`."""
    files = {path.stem: path for path in TOOLS_FOLDER.glob("*.py") if not path.stem.startswith("_")}
    files |= {path.parent.name: path for path in TOOLS_FOLDER.glob("*/__init__.py")}
    return {name: _first_docstring_line(files[name]) for name in sorted(files)}


def _first_docstring_line(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def main() -> None:
    """Print the list, with or without --help."""
    lines = descriptions()
    width = max(map(len, lines))
    listed = "\n".join(f"  {name:<{width}}  {line}" for name, line in lines.items())
    parser = argparse.ArgumentParser(
        prog="python -m tools",
        usage="python -m tools.NAME [--help] ...",
        description=f"The tools:\n\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help=argparse.SUPPRESS)
    parser.parse_args()
    print(parser.format_help(), end="")


if __name__ == "__main__":
    main()
