"""Make a record again and compare every byte: `python -m tools.rebuild records/FOLDER`.

The folder names commits, parameters and seeds. In a temporary clone of this repository the whole pipeline runs for each seed, with a cache
of its own, so that nothing is taken from the first time; then every output is held against the hash that the folder states. A run on the
CPU must be equal on every x86-64 machine (docs/reproducibility.md), one on a GPU on equal hardware if parallel.deterministic is on.
The exit code is 0 for equal bytes, 1 for others, 2 where the record cannot be rebuilt.
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

from stages.common.cli_errors import refusing
from stages.submission.artifacts import sha256
from tools.compare import revisions
from tools.rebuild.first_difference import first_difference
from tools.record.runs import CODE, FOLDER, PARAMETERS, SUMMARY

NEEDED = ("commits", "parameters", "seeds", "provenance", "seed_results", "sha256")
SHOWN = 5  # names in a message


class Outcome(NamedTuple):
    """What a rebuilt seed came to."""

    equal: bool
    words: str


def read(folder: Path) -> dict[str, Any]:
    """The record's submission.json; a ValueError when it does not say what a rebuild needs."""
    path = folder / SUMMARY
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name the folder of a record")
    try:
        summary: Any = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    missing = [key for key in NEEDED if not isinstance(summary, dict) or key not in summary]
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(missing)}: only records that this project merged can be rebuilt"
        )
    found: dict[str, Any] = summary
    return found


def rebuild(summary: Mapping[str, Any], folder: Path, seed: int, clone: Path) -> Outcome:
    """Run the pipeline for a seed in `clone` and compare."""
    commits = summary["commits"][str(seed)]
    commit = available(commits)
    _git(clone, "checkout", "--quiet", "--force", "--detach", commit)
    (clone / PARAMETERS).write_text(
        yaml.safe_dump({"seed": seed} | summary["parameters"], sort_keys=False), encoding="utf-8"
    )
    other = changed_inputs(clone, summary["provenance"]["inputs_md5"])
    if other:
        more = f" and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
        return Outcome(
            False,
            f"not run: at {commit[:10]} other bytes stand in {', '.join(other[:SHOWN])}{more} than in what ran",
        )
    (clone / revisions.LOCK).unlink(missing_ok=True)
    ran = subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=clone, check=False)
    if ran.returncode != 0:
        return Outcome(False, "the pipeline failed; its own words stand above")
    lock = yaml.safe_load((clone / revisions.LOCK).read_text(encoding="utf-8"))["stages"]
    return compare(summary, folder, seed, lock, clone)


def available(commits: Mapping[str, str]) -> str:
    """The commit of the run, or, where the experiment was not fetched, the one that it was started from."""
    for commit in (commits["run"], commits["base"]):
        if (
            subprocess.run(
                ["git", "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True, check=False
            ).returncode
            == 0
        ):
            return commit
    raise ValueError(
        f"neither {commits['run'][:10]} nor {commits['base'][:10]} is in this repository: `git fetch`, or `dvc exp pull` the runs"
    )


def changed_inputs(clone: Path, stated: Mapping[str, str]) -> list[str]:
    """The files, of those that stages read and no stage makes, that are not what ran; folders are compared when they were read."""
    found = []
    for path, md5 in stated.items():
        file = clone / path
        if md5.endswith(".dir"):
            continue
        if not file.is_file() or hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest() != md5:
            found.append(path)
    return found


def compare(
    summary: Mapping[str, Any], folder: Path, seed: int, lock: Mapping[str, Any], clone: Path
) -> Outcome:
    """The rebuilt outputs against the stated hashes, in the order of the pipeline: the first difference is the cause."""
    stated = summary["provenance"]["outputs_md5"][str(seed)]
    rebuilt = {
        out["path"]: (stage, out["md5"]) for stage, entry in lock.items() for out in entry.get("outs", [])
    }
    for path in stated:
        if path not in rebuilt:
            return Outcome(False, f"{path} was not made again")
    for path, (stage, md5) in rebuilt.items():
        if path in stated and stated[path] != md5:
            where = _where(summary["commits"][str(seed)]["run"], path, clone / path)
            return Outcome(
                False, f"first difference in stage {stage}: {path}{where}; {_score(summary, seed, clone)}"
            )
    for name in (CODE, "requirements.txt"):
        if sha256((clone / FOLDER / name).read_bytes()) != sha256((folder / name).read_bytes()):
            place = first_difference(folder / name, clone / FOLDER / name)
            return Outcome(
                False,
                f"first difference in {folder / name} itself, {place}: it is not what its own hashes say",
            )
    return Outcome(
        True, f"equal: {len(stated)} outputs of {len(lock)} stages; {_score(summary, seed, clone)}"
    )


def _where(commit: str, path: str, rebuilt: Path) -> str:
    """The place in the file, where the first one can still be had."""
    with tempfile.TemporaryDirectory() as scratch:
        original = Path(scratch) / "original"
        try:
            revisions.fetch(commit, path, original)
        except ValueError:
            return " (where in it is not known: the first one is not in DVC's cache or remote)"
        return f", {first_difference(original, rebuilt)}"


def _score(summary: Mapping[str, Any], seed: int, clone: Path) -> str:
    """val_bpb both times."""
    before = summary["seed_results"][str(seed)]["val_bpb"]
    after = json.loads((clone / FOLDER / SUMMARY).read_text(encoding="utf-8"))["val_bpb"]
    if before == after:
        return f"val_bpb {before!r} to the last digit"
    return f"val_bpb {before:.8f}, rebuilt {after:.8f}"


def _git(folder: Path, *words: str) -> None:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"git {words[0]} failed: {done.stderr.strip()}")


def run(folder: Path, only: int | None) -> bool:
    """Rebuild the seeds and say what came of it; True where every byte is the same."""
    summary = read(folder)
    seeds = summary["seeds"] if only is None else [only]
    if only is not None and only not in summary["seeds"]:
        raise ValueError(f"{folder} has no seed {only}; it has {', '.join(map(str, summary['seeds']))}")
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch) / "clone"
        _git(Path.cwd(), "clone", "--quiet", "--shared", "--no-checkout", ".", str(clone))
        outcomes = [(seed, rebuild(summary, folder, seed, clone)) for seed in seeds]
    for seed, outcome in outcomes:
        print(f"seed {seed}: {outcome.words}")
    return all(outcome.equal for _, outcome in outcomes)


def main(argv: list[str] | None = None) -> None:
    """The command; a user's error is one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.rebuild",
        description="Run the pipeline of a record again, in a temporary clone, and compare every output with what the record states.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of a record, below records/")
    parser.add_argument("--seed", type=int, help="only this one (default: all)")
    arguments = parser.parse_args(argv)
    with refusing("rebuild"):
        equal = run(arguments.folder, arguments.seed)
    raise SystemExit(0 if equal else 1)
