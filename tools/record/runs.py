"""Read runs of the pipeline by name: the files that an experiment or revision handed in, and its dvc.lock.

Everything is read at the commit, from Git and from DVC's cache or remote, so a clone that has
fetched the experiments (`dvc exp pull`) reads the same. Only the command `dvc` is needed.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stages.common.json_object import read_json_object
from stages.submission.artifacts import sha256
from tools.compare import revisions

FOLDER = "artifacts/submission"
CODE = "train_gpt.py"
LOG = "train.log"
REQUIREMENTS = "requirements.txt"
SUMMARY = "submission.json"
PARAMETERS = "params.yaml"
# Names of output files that contain measurements, which differ in every run.
MEASURED_FILES = ("log.txt", "timing.json", "train.log", "submission.json")


@dataclass(frozen=True)
class PipelineRun:
    """One run of the pipeline: its names, and the files that it handed in."""

    name: str  # as given by the user
    commit: str
    base: str  # the commit that the experiment was started from
    summary: dict[str, Any]  # submission.json
    stages: dict[str, Any]  # of dvc.lock
    files: dict[str, bytes]  # CODE, LOG and REQUIREMENTS

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.summary["seeds"][0])

    @property
    def parameters(self) -> dict[str, Any]:
        """All effective parameters, including the seed."""
        parameters: dict[str, Any] = self.summary["parameters"]
        return parameters

    def output_hashes(self) -> dict[str, str]:
        """Return the hash of every output by path, in pipeline order, without MEASURED_FILES."""
        hashes = {}
        for stage in self.stages.values():
            for output in stage.get("outs", []):
                if Path(output["path"]).name not in MEASURED_FILES:
                    hashes[output["path"]] = output["md5"]
        return hashes

    def input_hashes(self) -> dict[str, str]:
        """Return the hash, by path, of everything that a stage read and no stage made: code, lock file, data.

        The inputs of `bundle` are left out: they are all of `stages/`, and the part of it that
        matters is its output, which is compared. Raises ValueError if two stages read different
        states of a file, which cannot happen in one run of the pipeline.
        """
        outputs = {out["path"] for stage in self.stages.values() for out in stage.get("outs", [])}
        hashes: dict[str, str] = {}
        for name, stage in self.stages.items():
            if name == "bundle":
                continue
            for dependency in stage.get("deps", []):
                path = dependency["path"]
                if any(_is_within(path, output) for output in outputs):
                    continue
                if hashes.setdefault(path, dependency["md5"]) != dependency["md5"]:
                    raise ValueError(
                        f"{self.name}: its stages ran with different states of {path}; run `dvc repro` there"
                    )
        return hashes


def read_run(name: str, folder: Path) -> PipelineRun:
    """Read the run called `name`, an experiment or a revision; its files are copied to `folder`, a new one.

    Raises ValueError if it has no submission, or one that does not match its dvc.lock.
    """
    remedy = "run them with `make record`, or fetch those of others with `dvc exp pull`"
    commit = revisions.resolve_commit(name, remedy)
    lock = _read_yaml(name, commit, revisions.LOCK_FILE)
    parameters = _read_yaml(name, commit, PARAMETERS)
    stages = lock.get("stages", {})
    if "submission" not in stages:
        raise ValueError(
            f"{name} ({commit[:10]}) has not run the stage submission:"
            f" its {revisions.LOCK_FILE} does not name it; run `dvc repro`"
        )

    # The files that Git tracks may have been edited since the run; the hashes in dvc.lock tell.
    revisions.fetch_output(commit, FOLDER, folder)
    for output in stages["submission"].get("outs", []):
        path = Path(output["path"])
        if path.parent == Path(FOLDER) and (folder / path.name).is_file():
            _require_hash(name, folder / path.name, output["md5"])

    # The parameters at the commit and the code must be those of the run.
    summary = _read_summary(name, folder / SUMMARY)
    if summary["parameters"] != parameters:
        raise ValueError(
            f"{name}: {PARAMETERS} there is not what its {SUMMARY} ran with;"
            " run `dvc repro` and commit, then merge again"
        )
    files = {file: (folder / file).read_bytes() for file in (CODE, LOG, REQUIREMENTS)}
    if sha256(files[CODE]) != summary["source_sha256"]:
        raise ValueError(
            f"{name}: {CODE} has another hash than its {SUMMARY} states; run `dvc repro submission`"
        )
    return PipelineRun(name, commit, revisions.parent_commit(commit), summary, stages, files)


def _read_summary(name: str, path: Path) -> dict[str, Any]:
    """Read a submission.json, which must be of one seed."""
    summary = read_json_object(path)
    seeds = summary.get("seeds")
    seed = summary.get("parameters", {}).get("seed")
    if seeds != [seed] or seed is None:
        raise ValueError(
            f"{name}: its {SUMMARY} is not of one seed (seeds {seeds});"
            " name runs of the pipeline, not records"
        )
    return summary


def _read_yaml(name: str, commit: str, path: str) -> dict[str, Any]:
    text = revisions.read_at_commit(commit, path)
    content: Any = yaml.safe_load(text) if text else None
    if not isinstance(content, dict):
        raise ValueError(f"{name} ({commit[:10]}) has no {path}: it is not a run of the pipeline")
    return content


def _require_hash(name: str, path: Path, md5: str) -> None:
    found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(
            f"{name}: {FOLDER}/{path.name} was changed after the run"
            f" ({found}, {revisions.LOCK_FILE} says {md5}); run `dvc repro`"
        )


def _is_within(path: str, folder: str) -> bool:
    return path == folder or Path(folder) in Path(path).parents


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as one mapping with dotted keys.

    >>> flatten({"train": {"steps": 4}, "seed": 1})
    {'train.steps': 4, 'seed': 1}
    """
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
