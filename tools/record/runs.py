"""Runs of the pipeline by name: what an experiment or a revision handed in, and what its dvc.lock says that it was made from.

Everything is read at the commit, from Git and from DVC's cache or remote, so that a clone that has fetched the experiments
(`dvc exp pull`) reads the same. Only the command `dvc` is needed.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stages.submission.artifacts import sha256
from tools.compare import revisions

FOLDER = "artifacts/submission"
CODE, LOG, REQUIREMENTS, SUMMARY = "train_gpt.py", "train.log", "requirements.txt", "submission.json"
PARAMETERS = "params.yaml"
MEASURED = (
    "log.txt",
    "timing.json",
    "train.log",
    "submission.json",
)  # names of files that hold what was measured


@dataclass(frozen=True)
class Run:
    """One run: its names, and the files that it handed in."""

    name: str  # as it was asked for
    commit: str
    base: str  # the commit that the experiment was started from
    summary: dict[str, Any]  # submission.json
    stages: dict[str, Any]  # of dvc.lock
    files: dict[str, bytes]  # CODE, LOG and REQUIREMENTS

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return int(self.summary["seeds"][0])

    @property
    def parameters(self) -> dict[str, Any]:
        """All effective parameters, the seed among them."""
        found: dict[str, Any] = self.summary["parameters"]
        return found

    def produced(self) -> dict[str, str]:
        """The hash of every output by path, in the order of the pipeline; files that hold measured values left out."""
        outs = [out for stage in self.stages.values() for out in stage.get("outs", [])]
        return {out["path"]: out["md5"] for out in outs if Path(out["path"]).name not in MEASURED}

    def inputs(self) -> dict[str, str]:
        """The hash of everything that a stage read and no stage made: code, lock file, data; by path.

        What `bundle` reads is left out: the whole of `stages/`, of which its output, which is compared, is the part that counts. A
        ValueError when two stages read different states of a file, which one run of the pipeline cannot.
        """
        made = {out["path"] for stage in self.stages.values() for out in stage.get("outs", [])}
        found: dict[str, str] = {}
        for name, stage in self.stages.items():
            for dep in stage.get("deps", []) if name != "bundle" else []:
                if any(_inside(dep["path"], path) for path in made):
                    continue
                if found.setdefault(dep["path"], dep["md5"]) != dep["md5"]:
                    raise ValueError(
                        f"{self.name}: its stages ran with different states of {dep['path']}; run `dvc repro` there"
                    )
        return found


def read(name: str, folder: Path) -> Run:
    """The run called `name`, an experiment or a revision; `folder`, which must not exist, receives its files.

    A ValueError when it has no submission, or one that its dvc.lock does not know.
    """
    commit = revisions.resolve(name)
    lock, parameters = (_yaml(name, commit, path) for path in (revisions.LOCK, PARAMETERS))
    stages = lock.get("stages", {})
    if "submission" not in stages:
        raise ValueError(
            f"{name} ({commit[:10]}) has not run the stage submission: its {revisions.LOCK} does not name it; run `dvc repro`"
        )
    revisions.fetch(commit, FOLDER, folder)
    for out in stages["submission"].get("outs", []):
        path = Path(out["path"])
        if path.parent == Path(FOLDER) and (folder / path.name).is_file():
            _require_hash(name, folder / path.name, out["md5"])
    summary = _summary(name, folder / SUMMARY)
    if summary["parameters"] != parameters:
        raise ValueError(
            f"{name}: {PARAMETERS} there is not what its {SUMMARY} ran with; run `dvc repro` and commit, then merge again"
        )
    files = {file: (folder / file).read_bytes() for file in (CODE, LOG, REQUIREMENTS)}
    if sha256(files[CODE]) != summary["source_sha256"]:
        raise ValueError(
            f"{name}: {CODE} has another hash than its {SUMMARY} states; run `dvc repro submission`"
        )
    return Run(name, commit, revisions.parent(commit), summary, stages, files)


def _summary(name: str, path: Path) -> dict[str, Any]:
    """A submission.json of one seed."""
    found = json.loads(path.read_text(encoding="utf-8"))
    seeds = found.get("seeds")
    if not isinstance(seeds, list) or len(seeds) != 1 or found.get("parameters", {}).get("seed") != seeds[0]:
        raise ValueError(
            f"{name}: its {SUMMARY} is not of one seed (seeds {seeds}); name runs of the pipeline, not records"
        )
    result: dict[str, Any] = found
    return result


def _yaml(name: str, commit: str, path: str) -> dict[str, Any]:
    text = revisions.show(commit, path)
    content: Any = yaml.safe_load(text) if text else None
    if not isinstance(content, dict):
        raise ValueError(f"{name} ({commit[:10]}) has no {path}: it is no run of the pipeline")
    return content


def _require_hash(name: str, path: Path, md5: str) -> None:
    found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(
            f"{name}: {FOLDER}/{path.name} was changed after the run ({found}, {revisions.LOCK} says {md5}); run `dvc repro`"
        )


def _inside(path: str, folder: str) -> bool:
    return path == folder or Path(folder) in Path(path).parents


def flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping by dotted keys.

    >>> flat({"train": {"steps": 4}, "seed": 1})
    {'train.steps': 4, 'seed': 1}
    """
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
