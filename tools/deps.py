"""Write the source files that each stage imports into its `deps` in dvc.yaml.

DVC does not trace imports (treeverse/dvc#9195), so a stage re-runs after an edit only if its `deps`
name the file. They name every file of stages/ that the stage imports, or a whole folder where the
stage needs all of it; other dependencies, comments and the order of keys stay as they are.
tests/test_dag.py fails when they are out of date.
"""

import argparse
import re
from pathlib import Path

from stages.bundle.closure import import_closure
from stages.bundle.importer_template import ENTRY
from stages.common.cli_errors import user_errors

ROOT = Path(__file__).parent.parent
STAGE_LINE = re.compile(r"^  (\w+):$")
SOURCE_LINE = re.compile(r"^      - stages/\S*$")


def main() -> None:
    """Rewrite dvc.yaml, or print what it would be."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.deps",
        description="Write the source files that each stage imports into its deps in dvc.yaml.",
    )
    parser.add_argument("--print", action="store_true", help="print the file instead")
    arguments = parser.parse_args()
    with user_errors("deps"):
        path = ROOT / "dvc.yaml"
        text = with_deps(path.read_text(encoding="utf-8"))
        if arguments.print:
            print(text, end="")
        else:
            path.write_text(text, encoding="utf-8")


def with_deps(text: str) -> str:
    """Replace the source files in the deps of every stage of a dvc.yaml."""
    lines: list[str] = []
    stage = ""
    is_written = False
    stages_without_sources: set[str] = set()
    for line in text.splitlines():
        started = STAGE_LINE.match(line)
        if started:
            stage = started.group(1)
            is_written = False
            stages_without_sources.add(stage)
        if not SOURCE_LINE.match(line):
            lines.append(line)
        elif not is_written:
            # The list replaces the first of the old lines; the others are dropped.
            lines += [f"      - {path}" for path in fold(needed_files(stage))]
            is_written = True
            stages_without_sources.discard(stage)
    if stages_without_sources:
        names = ", ".join(sorted(stages_without_sources))
        raise ValueError(f"the deps of {names} name no file of stages/ to be replaced; add one by hand")
    return "\n".join(lines) + "\n"


def needed_files(stage: str) -> set[Path]:
    """The files of stages/ that a stage imports, and for `bundle` those that it carries."""
    files = import_closure(ROOT, f"stages.{stage}.__main__")
    if stage == "bundle":
        files |= import_closure(ROOT, ENTRY)
    return files


def fold(files: set[Path]) -> list[str]:
    """Replace the files of a package below stages/ by its folder where all of them are there; sorted."""
    folded: set[Path] = set()
    for file in files:
        chosen = file
        for folder in file.parents[:-2]:  # without stages/ and the root; from the inside out
            if {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py")} <= files:
                chosen = folder
        folded.add(chosen)
    return sorted(path.as_posix() for path in folded)


if __name__ == "__main__":
    main()
