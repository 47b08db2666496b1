"""Rebuild a record and compare every byte: `python -m tools.rebuild records/FOLDER`.

The record's submission.json names commits, parameters and seeds. For each seed the whole pipeline
runs in a temporary clone of this repository with a DVC cache of its own, so that no output of the
first run is reused. Then every output is compared with the hash that the record states.

A run on a CPU is the same on every x86-64 machine (docs/reproducibility.md); a run on GPUs is the
same on equal hardware if parallel.deterministic is on. Exit code 0: all bytes are equal; 1: some
differ; 2: the record cannot be rebuilt.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from stages.common.cli_errors import user_errors
from stages.common.json_object import read_json_object
from stages.submission.artifacts import sha256
from tools.compare import revisions
from tools.rebuild.first_difference import first_difference
from tools.record.runs import CODE, FOLDER, PARAMETERS, REQUIREMENTS, SUMMARY

REQUIRED_FIELDS = ("commits", "parameters", "seeds", "provenance", "seed_results", "sha256")
MAX_LISTED = 5  # file names in one message


class RebuildResult(NamedTuple):
    """Outcome for one seed: equal to the last byte or not, and a sentence to print."""

    equal: bool
    message: str


def read_record_summary(folder: Path) -> dict[str, Any]:
    """Return the record's submission.json; ValueError if it lacks a field that a rebuild needs."""
    path = folder / SUMMARY
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name the folder of a record")
    summary = read_json_object(path)
    missing = [key for key in REQUIRED_FIELDS if key not in summary]
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(missing)}: only records that this project merged can be rebuilt"
        )
    return summary


def rebuild_seed(summary: Mapping[str, Any], folder: Path, seed: int, clone: Path) -> RebuildResult:
    """Run the pipeline of one seed in `clone` and compare its outputs with the record in `folder`."""
    # The run's source and parameters.
    commit = available_commit(summary["commits"][str(seed)])
    _git(clone, "checkout", "--quiet", "--force", "--detach", commit)
    parameters = yaml.safe_dump({"seed": seed} | summary["parameters"], sort_keys=False)
    (clone / PARAMETERS).write_text(parameters, encoding="utf-8")
    changed = changed_inputs(clone, summary["provenance"]["inputs_md5"])
    if changed:
        more = f" and {len(changed) - MAX_LISTED} more" if len(changed) > MAX_LISTED else ""
        return RebuildResult(
            False,
            f"not run: at {commit[:10]} the content of {', '.join(changed[:MAX_LISTED])}{more}"
            " is not that of the recorded run",
        )

    # Without a lock file DVC runs every stage.
    (clone / revisions.LOCK_FILE).unlink(missing_ok=True)
    repro = subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=clone, check=False)
    if repro.returncode != 0:
        return RebuildResult(False, "the pipeline failed; its messages are above")
    lock = yaml.safe_load((clone / revisions.LOCK_FILE).read_text(encoding="utf-8"))["stages"]
    return compare_outputs(summary, folder, seed, lock, clone)


def available_commit(commits: Mapping[str, str]) -> str:
    """Return the commit of the run or, if the experiment was not fetched, the one it was started from."""
    for commit in (commits["run"], commits["base"]):
        command = ["git", "cat-file", "-e", f"{commit}^{{commit}}"]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return commit
    raise ValueError(
        f"neither {commits['run'][:10]} nor {commits['base'][:10]} is in this repository:"
        " `git fetch`, or `dvc exp pull` the runs"
    )


def changed_inputs(clone: Path, stated: Mapping[str, str]) -> list[str]:
    """Return the source files and data files whose content differs from the recorded run.

    `stated` is the MD5 by path of everything that a stage read and no stage made. Folders are
    skipped: a difference in them shows in the outputs.
    """
    changed = []
    for path, md5 in stated.items():
        file = clone / path
        if md5.endswith(".dir"):
            continue
        if not file.is_file() or hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest() != md5:
            changed.append(path)
    return changed


def compare_outputs(
    summary: Mapping[str, Any], folder: Path, seed: int, lock: Mapping[str, Any], clone: Path
) -> RebuildResult:
    """Compare the rebuilt outputs with the stated hashes.

    They are compared in the order of the pipeline, so that the first difference is the cause of the
    others. `lock` is the field `stages` of the clone's dvc.lock.
    """
    stated = summary["provenance"]["outputs_md5"][str(seed)]
    rebuilt = {}
    for stage, entry in lock.items():
        for output in entry.get("outs", []):
            rebuilt[output["path"]] = (stage, output["md5"])

    # Outputs of stages, by the hashes that DVC computed.
    for path in stated:
        if path not in rebuilt:
            return RebuildResult(False, f"{path} was not made again")
    for path, (stage, md5) in rebuilt.items():
        if path in stated and stated[path] != md5:
            position = _describe_difference(summary["commits"][str(seed)]["run"], path, clone / path)
            scores = _describe_scores(summary, seed, clone)
            return RebuildResult(False, f"first difference in stage {stage}: {path}{position}; {scores}")

    # The files in the record's own folder.
    for name in (CODE, REQUIREMENTS):
        if sha256((clone / FOLDER / name).read_bytes()) != sha256((folder / name).read_bytes()):
            difference = first_difference(folder / name, clone / FOLDER / name)
            return RebuildResult(
                False,
                f"first difference in {folder / name} itself, {difference}:"
                " it does not match the record's hashes",
            )
    scores = _describe_scores(summary, seed, clone)
    return RebuildResult(True, f"equal: {len(stated)} outputs of {len(lock)} stages; {scores}")


def _describe_difference(commit: str, path: str, rebuilt: Path) -> str:
    """Say at which byte a file differs, if the recorded one can be fetched."""
    with tempfile.TemporaryDirectory() as scratch:
        original = Path(scratch) / "original"
        try:
            revisions.fetch_output(commit, path, original)
        except ValueError:
            return " (position unknown: the recorded file is not in DVC's cache or remote)"
        return f", {first_difference(original, rebuilt)}"


def _describe_scores(summary: Mapping[str, Any], seed: int, clone: Path) -> str:
    """Give val_bpb of the record and of the rebuild."""
    recorded = summary["seed_results"][str(seed)]["val_bpb"]
    rebuilt = json.loads((clone / FOLDER / SUMMARY).read_text(encoding="utf-8"))["val_bpb"]
    if recorded == rebuilt:
        return f"val_bpb {recorded!r} to the last digit"
    return f"val_bpb {recorded:.8f}, rebuilt {rebuilt:.8f}"


def _git(folder: Path, *words: str) -> None:
    result = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ValueError(f"git {words[0]} failed: {result.stderr.strip()}")


def rebuild_record(folder: Path, only_seed: int | None) -> bool:
    """Rebuild all seeds of a record, or one, and print the results; True if every byte is the same."""
    summary = read_record_summary(folder)
    seeds = summary["seeds"] if only_seed is None else [only_seed]
    if only_seed is not None and only_seed not in summary["seeds"]:
        raise ValueError(f"{folder} has no seed {only_seed}; it has {', '.join(map(str, summary['seeds']))}")

    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch) / "clone"
        _git(Path.cwd(), "clone", "--quiet", "--shared", "--no-checkout", ".", str(clone))
        for seed in seeds:
            results[seed] = rebuild_seed(summary, folder, seed, clone)

    for seed, result in results.items():
        print(f"seed {seed}: {result.message}")
    return all(result.equal for result in results.values())


def main(argv: list[str] | None = None) -> None:
    """Run the command; a user error is one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.rebuild",
        description="Run the pipeline of a record again, in a temporary clone,"
        " and compare every output with the hash that the record states.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of a record, in records/")
    parser.add_argument("--seed", type=int, metavar="N", help="rebuild only this seed (default: all)")
    arguments = parser.parse_args(argv)
    with user_errors("rebuild"):
        equal = rebuild_record(arguments.folder, arguments.seed)
    raise SystemExit(0 if equal else 1)
