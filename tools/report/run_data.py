"""Read one run for the report: from a folder, or from a revision or experiment of this repository.

Small files are in Git at the revision; only the ledgers come from DVC's cache. All runs must have
scored the validation stream of the working tree.
"""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.common import ledger
from stages.scoring.stream import ValidationStream
from stages.submission.artifacts import TableRow
from tools.compare import revisions

ARTIFACTS = Path("artifacts")


@dataclass(frozen=True)
class RunData:
    """One run: its tables, its summary, the losses of both scorers."""

    name: str
    losses: list[TableRow]  # train/loss.tsv
    layers: list[TableRow]  # pack/layers.tsv
    summary: dict[str, Any]  # submission.json
    ledgers: dict[str, np.ndarray]  # scorer -> (N-1,) float32, nats

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.summary["seeds"][0])

    @property
    def claimed(self) -> np.ndarray:
        """Ledger (N-1,) of the scorer that was named before the run."""
        return self.ledgers[self.summary["scorer"]]

    @property
    def training_seconds(self) -> float:
        """Seconds of training."""
        return float(self.summary["measured"]["training_seconds"])


def read_run_data(name: str, stream: ValidationStream) -> RunData:
    """Return the run called `name`: a folder that contains `artifacts/`, or a revision or experiment.

    Raises ValueError if it is none of them, if a file is missing, or if it scored another stream.
    """
    folder = Path(name)
    ledgers = {}
    if folder.is_dir():
        _require_same_stream(folder)
        for scorer in revisions.SCORERS:
            path = folder / ARTIFACTS / scorer / revisions.LEDGER_FILE
            ledgers[scorer] = ledger.read(path, stream.targets)

        def read_file(path: Path) -> str | None:
            file = folder / path
            return file.read_text(encoding="utf-8") if file.is_file() else None

        return _run_data("the working tree" if folder == Path() else name, read_file, ledgers)

    commit = revisions.resolve_commit(name)
    for scorer in revisions.SCORERS:
        ledgers[scorer] = revisions.read_ledger(f"{name}:{scorer}", stream.targets)
    return _run_data(name, lambda path: revisions.read_at_commit(commit, str(path)), ledgers)


def _run_data(name: str, read_file: Callable[[Path], str | None], ledgers: dict[str, np.ndarray]) -> RunData:
    """Read the small files; `read_file` returns a file's text, or None if the run does not have it."""

    def read_artifact(path: str) -> str:
        text = read_file(ARTIFACTS / path)
        if text is None:
            raise ValueError(f"{name} has no {ARTIFACTS / path}: run `dvc repro` there")
        return text

    return RunData(
        name,
        losses=list(csv.DictReader(read_artifact("train/loss.tsv").splitlines(), delimiter="\t")),
        layers=list(csv.DictReader(read_artifact("pack/layers.tsv").splitlines(), delimiter="\t")),
        summary=json.loads(read_artifact("submission/submission.json")),
        ledgers=ledgers,
    )


def _require_same_stream(folder: Path) -> None:
    """Raise ValueError unless the folder's val shards and tokenizer are those of the working tree."""
    for path in map(Path, revisions.STREAM_PATHS):
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        for file in files:
            if not (folder / file).is_file() or (folder / file).read_bytes() != file.read_bytes():
                raise ValueError(
                    f"{folder / file} is not this working tree's {file}:"
                    " it scored another stream, so it is not comparable"
                )
