"""Two source trees on the same inputs: seconds of their stages, and whether their outputs are equal.

    python -m benchmarks.two_trees --old FOLDER --stages pack sliding_eval ttt_eval --results FILE \\
        [--repetitions 3] [--variant NAME KEY=VALUE ...]

FOLDER is another tree, as `git archive COMMIT | tar -x -C FOLDER` makes it; the new tree is this one.
A stage runs as a process in its tree: old, new, new, old, and so on. Each process compiles its kernels
into an empty cache. Inputs are the files below `--artifacts`, unless an option names another.

Every output but log.txt and timing.json is compared; of the audit's report.json without the verdicts on
clocks, which state measured seconds when they fail. The exit code is 1 if an output differs between
trees or repetitions, or if a process failed.
"""

import argparse
import hashlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._command import command_line, write_results
from stages.common import environment

TREES = ("old", "new")
STAGES = ("pack", "sliding_eval", "ttt_eval", "audit")
# Options that name an input: the place that a stage reads it from by default.
INPUTS = {
    "model": "artifacts/train/model.safetensors",
    "hessians": "artifacts/calibrate/hessians.safetensors",
    "model_bin": "artifacts/pack/model.bin",
    "val": "artifacts/tokenize/val",
    "tokenizer": "artifacts/tokenize/tokenizer.model",
    "sliding": "artifacts/sliding_eval/nll.npy",
}
MEASURED = ("log.txt", "timing.json", "failed-report.md")
COLUMNS = "case|min s: old|new|median s: old|new|process s: old|new|new/old: min|median|outputs"


class StageRun(NamedTuple):
    """One process of a stage."""

    tree: str  # one of TREES
    exit_code: int
    wall_seconds: float
    timing: dict[str, float]  # the numbers of timing.json
    outputs: dict[str, str]  # sha256 by path below the output folder


def output_digest(path: Path) -> str:
    """Sha256 of a file; of a report of the audit, without its verdicts on clocks."""
    content = path.read_bytes()
    if path.name in ("report.json", "failed-report.json"):
        report = json.loads(content)
        report["verdicts"] = [v for v in report["verdicts"] if not v["name"].endswith("clock")]
        content = json.dumps(report, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def read_outputs(folder: Path) -> dict[str, str]:
    """Digests of all files below a folder that are not measured, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in MEASURED)
    return {path.relative_to(folder).as_posix(): output_digest(path) for path in files}


def read_timing(folder: Path) -> dict[str, float]:
    """The numbers of timing.json; empty if the stage did not write it."""
    file = folder / "timing.json"
    timing = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {name: value for name, value in timing.items() if isinstance(value, (int, float))}


def differing(runs: Sequence[StageRun]) -> list[str]:
    """Names of the outputs that are not the same in all runs; an absent one counts as different."""
    names = sorted({name for run in runs for name in run.outputs})
    return [name for name in names if len({run.outputs.get(name) for run in runs}) > 1]


def compare(runs: Sequence[StageRun]) -> dict[str, Any]:
    """Summarise the runs of one case: seconds of each tree, ratios, and outputs that differ."""
    summary: dict[str, Any] = {"runs": [run._asdict() for run in runs]}
    for tree in TREES:
        own_runs = [run for run in runs if run.tree == tree]
        wall = [run.wall_seconds for run in own_runs]
        summary[tree] = {
            "min_seconds": min(wall),
            "median_seconds": statistics.median(wall),
            "process_seconds": statistics.median(run.timing.get("process_seconds", 0.0) for run in own_runs),
            "differ_between_repetitions": differing(own_runs),
        }
    for key in ("min_seconds", "median_seconds"):
        summary[f"ratio_of_{key}"] = summary["new"][key] / summary["old"][key]

    # Runs that failed or wrote nothing are not equal.
    summary["differ"] = differing(runs)
    summary["equal"] = not summary["differ"] and all(run.outputs and run.exit_code == 0 for run in runs)
    return summary


def table(cases: dict[str, dict[str, Any]]) -> str:
    """Format the summaries of `compare` by name of the case; old before new in each pair of columns."""
    rows = [COLUMNS.split("|")]
    for name, case in cases.items():
        cells = [name]
        for key in ("min_seconds", "median_seconds", "process_seconds"):
            cells += [f"{case[tree][key]:.2f}" for tree in TREES]
        cells += [f"{case[f'ratio_of_{kind}_seconds']:.3f}" for kind in ("min", "median")]
        rows.append([*cells, outcome(case)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def outcome(case: dict[str, Any]) -> str:
    """Describe a case's outputs in one cell of the table."""
    if case["equal"]:
        return "equal"
    reasons = [f"exit code {run['exit_code']}" for run in case["runs"] if run["exit_code"]]
    unsteady = {name for tree in TREES for name in case[tree]["differ_between_repetitions"]}
    reasons += [f"{name} (between repetitions)" if name in unsteady else name for name in case["differ"]]
    return "DIFFERENT: " + ", ".join(reasons or ["no outputs"])


def run_stage(
    stage: str, tree: str, folder: Path, changes: Sequence[str], arguments: argparse.Namespace
) -> StageRun:
    """Run a stage of the tree in `folder` as a process, with parameters KEY=VALUE `changes`."""
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "output"
        command = [sys.executable, "-m", f"stages.{stage}", "--output", str(output)]
        params = arguments.params if tree == "new" else arguments.old_params
        command += ["--params", str(params.absolute())] if params else []

        # Inputs, by the options of this tree's stage.
        given = {default: getattr(arguments, option) for option, default in INPUTS.items()}
        for name, default in importlib.import_module(f"stages.{stage}.stage").STAGE.reads.items():
            path = given.get(default.as_posix()) or arguments.artifacts / default.relative_to("artifacts")
            command += [f"--{name.replace('_', '-')}", str(path.absolute())]
        command += [word for change in changes for word in ("--set", change)]

        caches = {name: f"{temporary}/{name}" for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        started = time.perf_counter()
        ended = subprocess.run(command, cwd=folder, env=os.environ | caches, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        return StageRun(tree, ended.returncode, seconds, read_timing(output), read_outputs(output))


def main() -> None:
    """Run every case, print the table, and write the JSON file."""
    parser = command_line(__doc__)
    parser.add_argument("--old", type=Path, required=True, metavar="FOLDER", help="the other tree")
    parser.add_argument("--stages", nargs="+", choices=STAGES, required=True)
    parser.add_argument("--results", type=Path, required=True, metavar="FILE")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="runs of each tree")

    # Parameters and inputs
    for option in ("--params", "--old-params"):
        parser.add_argument(option, type=Path, metavar="FILE", help="default: the tree's params.yaml")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--old-set", nargs="+", metavar="KEY=VALUE", help="default: as --set")
    parser.add_argument("--variant", nargs="+", action="append", help="of ttt_eval: NAME KEY=VALUE ...")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="FOLDER")
    for option, default in INPUTS.items():
        parser.add_argument(f"--{option.replace('_', '-')}", type=Path, metavar="PATH", help=f"for {default}")
    arguments = parser.parse_args()

    # A case is a stage, or a stage and a variant of its parameters.
    variants = {f"ttt_eval, {name}": changes for name, *changes in arguments.variant or []}
    cases: dict[str, list[str]] = {}
    for stage in arguments.stages:
        cases |= variants if stage == "ttt_eval" and variants else {stage: []}

    # Run each case in alternating order.
    folders = {"old": arguments.old.absolute(), "new": Path.cwd()}
    changes = {"new": arguments.set, "old": arguments.set if arguments.old_set is None else arguments.old_set}
    summaries: dict[str, dict[str, Any]] = {}
    for name, own_changes in cases.items():
        runs = []
        for repetition in range(arguments.repetitions):
            for tree in TREES if repetition % 2 == 0 else reversed(TREES):
                stage = name.partition(",")[0]
                runs.append(run_stage(stage, tree, folders[tree], changes[tree] + own_changes, arguments))
                print(f"{name}, {tree}: {runs[-1].wall_seconds:.2f} s", flush=True)
        summaries[name] = compare(runs) | {"changes": own_changes}

    print(table(summaries))
    about = {"changes": changes, "cases": summaries, "load_average": os.getloadavg()}
    write_results(arguments.results, about | environment.run_environment())
    sys.exit(0 if all(summary["equal"] for summary in summaries.values()) else 1)


if __name__ == "__main__":
    main()
