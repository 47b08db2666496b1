"""Several seeds, one record: `python -m tools.record seed-42 seed-314 seed-999`.

The names are experiments or revisions of this repository whose pipeline has run. They are averaged only if they differ in nothing but the
seed (compatibility.py), and become a folder below records/ as the challenge wants it. The same runs give the same bytes. It stands outside
the pipeline because a stage cannot see other experiments: a run in a temporary clone has no references to them.
"""

import argparse
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from stages.common.cli_errors import refusing
from stages.common.command import canonical_json
from tools.record import leaderboard
from tools.record.baseline import RECORDS, claim
from tools.record.compatibility import require_agreement
from tools.record.record import record
from tools.record.record_readme import render
from tools.record.runs import CODE, LOG, REQUIREMENTS, SUMMARY, Run, read


def folder_name(summary: dict[str, Any]) -> str:
    """Date and name of a record, as the challenge calls its folders.

    >>> folder_name({"date": "2030-01-02", "name": "Caddie, base model"})
    '2030-01-02_Caddie_base_model'
    """
    return f"{summary['date']}_{re.sub(r'[^A-Za-z0-9.-]+', '_', summary['name']).strip('_')}"


def read_all(names: list[str]) -> list[Run]:
    """The runs in the order of their seeds."""
    with tempfile.TemporaryDirectory() as scratch:
        runs = [read(name, Path(scratch) / str(i)) for i, name in enumerate(names)]
    return sorted(runs, key=lambda run: run.seed)


def files(runs: list[Run], summary: dict[str, Any]) -> dict[str, bytes]:
    """The files of the record by name."""
    texts = {SUMMARY: canonical_json(summary), "README.md": render(summary, leaderboard.read())}
    shared = {CODE: runs[0].files[CODE], REQUIREMENTS: runs[0].files[REQUIREMENTS]}
    logs = {f"train_seed{run.seed}.log": run.files[LOG] for run in runs}
    return shared | logs | {name: text.encode("utf-8") for name, text in texts.items()}


def write(folder: Path, content: dict[str, bytes]) -> None:
    """Put the files into `folder`, whole or not at all; what a merge before this one left there goes."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, data in content.items():
        (partial / name).write_bytes(data)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def main(argv: list[str] | None = None) -> None:
    """The command; a user's error is one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.record",
        description="Merge runs that differ in nothing but the seed into a record: mean, sample deviation, the worst seed's bytes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="+", metavar="NAME", help="experiments or revisions, one for each seed"
    )
    parser.add_argument(
        "--against",
        metavar="NAME",
        help="a pull request of data/leaderboard.yaml or a record: is this better by 0.005 nats?",
    )
    parser.add_argument(
        "--records", type=Path, default=RECORDS, metavar="DIR", help="where the record's folder goes"
    )
    arguments = parser.parse_args(argv)
    with refusing("record"):
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Read, compare, average, write."""
    runs = read_all(arguments.names)
    require_agreement(runs)
    summary = record(runs)
    if arguments.against is not None:
        summary["claim"] = claim(summary, arguments.against)
    folder = arguments.records / folder_name(summary)
    write(folder, files(runs, summary))
    seeds = ", ".join(map(str, summary["seeds"]))
    print(
        f"{folder}: val_bpb {summary['val_bpb']:.6f}, sample deviation {summary['val_bpb_std']:.6f}, seeds {seeds}"
    )
    print(f"{summary['bytes_total']:,} bytes with the worst seed")
    if "claim" in summary:
        print(f"Against {summary['claim']['against']['name']}: {summary['claim']['verdict']}")
