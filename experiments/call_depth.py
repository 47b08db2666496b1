"""Call depth of four walks through a source tree, from the entry of each to the arithmetic, and their files.

    python -m experiments.call_depth --tree FOLDER [FOLDER ...] [--results FILE]

The walks are a document to bits per byte, a matrix to bytes and back, a scored target through test-time
training, tilt and mixture, and a parameter from params.yaml to its use. They run on a tiny model, each
tree in a process of its own (experiments/_walks.py, which lists the end points).

A stack has one line for each function of the tree's `stages` from the entry to an end point, both
included; comprehensions do not count, a compiled function counts one. "files on the way" are those of
the stacks, "files touched" all in which a function ran between the entry's call and its return.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._command import command_line, write_results

WALKS = Path(__file__).resolve().with_name("_walks.py")


def run_walks(tree: Path) -> dict[str, list[dict[str, Any]]]:
    """Record the walks in one tree; returns the parts of each walk by its name."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", str(WALKS), folder]  # -P: this tree is not on the path
        environment = os.environ | {"PYTHONPATH": str(tree)}
        subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
        walks: dict[str, list[dict[str, Any]]] = json.loads((Path(folder) / "walks.json").read_text())
        return walks


def summarise(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Depths and files of one walk, from its parts."""
    stacks = {end: stack for part in parts for end, stack in part["stacks"].items()}
    on_the_way = {function.partition(":")[0] for stack in stacks.values() for function in stack}
    return {
        "frames": {end: len(stack) for end, stack in stacks.items()},
        "deepest": max(map(len, stacks.values())),
        "files_on_the_way": len(on_the_way),
        "files_touched": len({file for part in parts for file in part["files"]}),
        "parts": parts,
    }


def report(tree: str, walks: dict[str, dict[str, Any]]) -> str:
    """Format the table of one tree, and the stacks below it, function by function."""
    lines = [
        tree,
        "",
        "| walk | deepest stack (frames) | files on the way | files touched | frames to each end |",
    ]
    lines += ["|---|---:|---:|---:|---|"]
    for name, walk in walks.items():
        counts = [walk["deepest"], walk["files_on_the_way"], walk["files_touched"]]
        ends = ", ".join(f"{end} {frames}" for end, frames in walk["frames"].items())
        lines += [f"| {name} | {' | '.join(map(str, counts))} | {ends} |"]
    for name, walk in walks.items():
        for part in walk["parts"]:
            for end, stack in part["stacks"].items():
                lines += ["", f"{name}: {end}, {len(stack)} frames", *(f"  {function}" for function in stack)]
    return "\n".join(lines)


def main() -> None:
    """Print the report of every tree, and write the JSON file."""
    parser = command_line(__doc__)
    parser.add_argument("--tree", type=Path, nargs="+", default=[Path.cwd()], metavar="FOLDER")
    parser.add_argument("--results", type=Path, metavar="FILE")
    arguments = parser.parse_args()

    results = {}
    for tree in arguments.tree:
        walks = {name: summarise(parts) for name, parts in run_walks(tree.resolve()).items()}
        results[str(tree)] = walks
        print(report(str(tree), walks), end="\n\n", flush=True)
    if arguments.results:
        write_results(arguments.results, results)


if __name__ == "__main__":
    main()
