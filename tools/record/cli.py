"""Merge runs of several seeds into one record: `python -m tools.record seed-42 seed-314 seed-999`.

The names are experiments or revisions of this repository whose pipeline has run. They are averaged
only if they differ in nothing but the seed (compatibility.py), and become a folder in records/ in
the form that the challenge asks for. The same runs give the same bytes.

This is a tool and not a stage, because a stage cannot see other experiments: a run in a temporary
clone has no references to them.
"""

import argparse
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from stages.common.cli_errors import user_errors
from stages.common.stage import canonical_json
from tools.record import leaderboard
from tools.record.baseline import RECORDS_FOLDER, claim_against
from tools.record.compatibility import require_compatible
from tools.record.record import merge_runs
from tools.record.record_readme import render_readme
from tools.record.runs import CODE, LOG, REQUIREMENTS, SUMMARY, PipelineRun, read_run


def folder_name(summary: dict[str, Any]) -> str:
    """Return the name of a record's folder: date and name, as in the challenge.

    >>> folder_name({"date": "2030-01-02", "name": "Caddie, base model"})
    '2030-01-02_Caddie_base_model'
    """
    return f"{summary['date']}_{re.sub(r'[^A-Za-z0-9.-]+', '_', summary['name']).strip('_')}"


def read_runs(names: list[str]) -> list[PipelineRun]:
    """Read the runs, sorted by seed."""
    with tempfile.TemporaryDirectory() as scratch:
        runs = [read_run(name, Path(scratch) / str(i)) for i, name in enumerate(names)]
    return sorted(runs, key=lambda run: run.seed)


def record_files(runs: list[PipelineRun], summary: dict[str, Any]) -> dict[str, bytes]:
    """Return the files of the record by name: what the runs share, one log per seed, what was generated."""
    files = {CODE: runs[0].files[CODE], REQUIREMENTS: runs[0].files[REQUIREMENTS]}
    for run in runs:
        files[f"train_seed{run.seed}.log"] = run.files[LOG]
    files[SUMMARY] = canonical_json(summary).encode("utf-8")
    files["README.md"] = render_readme(summary, leaderboard.read_leaderboard()).encode("utf-8")
    return files


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files into `folder`, all or none; a folder of an earlier merge is replaced."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, data in files.items():
        (partial / name).write_bytes(data)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def merge_and_write(arguments: argparse.Namespace) -> None:
    """Read the runs, check and merge them, test the claim, write the record and print its figures."""
    runs = read_runs(arguments.names)
    require_compatible(runs)
    summary = merge_runs(runs)
    if arguments.against is not None:
        summary["claim"] = claim_against(summary, arguments.against)
    folder = arguments.records / folder_name(summary)
    write_folder(folder, record_files(runs, summary))

    seeds = ", ".join(map(str, summary["seeds"]))
    print(
        f"{folder}: val_bpb {summary['val_bpb']:.6f},"
        f" sample deviation {summary['val_bpb_std']:.6f}, seeds {seeds}"
    )
    print(f"{summary['bytes_total']:,} bytes with the worst seed")
    if "claim" in summary:
        print(f"Against {summary['claim']['against']['name']}: {summary['claim']['verdict']}")


def main(argv: list[str] | None = None) -> None:
    """Run the command; a user error is one line and exit code 2."""
    arguments = _parser().parse_args(argv)
    with user_errors("record"):
        merge_and_write(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.record",
        description="Merge runs that differ only in the seed into a record:"
        " mean and sample deviation of the scores, the largest byte counts.",
    )
    parser.add_argument(
        "names", nargs="+", metavar="NAME", help="experiments or revisions, one for each seed"
    )
    parser.add_argument(
        "--against",
        metavar="NAME",
        help="a pull request in data/leaderboard.yaml, or a record: test if this one is better by 0.005 nats",
    )
    parser.add_argument(
        "--records",
        type=Path,
        default=RECORDS_FOLDER,
        metavar="DIR",
        help="folder in which the record's folder is written (default: %(default)s)",
    )
    return parser
