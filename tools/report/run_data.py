"""A run as the report sees it, from a folder or from a revision or experiment of this repository.

Small files lie in Git at the revision; only ledgers come out of DVC's cache. All runs must have scored the working tree's stream.
"""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.common import ledger
from stages.scoring.evaluate import Stream
from stages.submission.artifacts import Row
from tools.compare import revisions

ARTIFACTS = Path("artifacts")


@dataclass(frozen=True)
class Seen:
    """One run: its tables, its summary, the losses of both scorers."""

    name: str
    losses: list[Row]  # train/loss.tsv
    layers: list[Row]  # pack/layers.tsv
    summary: dict[str, Any]  # submission.json
    ledgers: dict[str, np.ndarray]  # scorer -> (N-1,) float32, nats

    @property
    def seed(self) -> int:
        """Its seed."""
        return int(self.summary["seeds"][0])

    @property
    def claimed(self) -> np.ndarray:
        """The ledger of the scorer that was named before the run."""
        return self.ledgers[self.summary["parameters"]["submission"]["scorer"]]

    @property
    def seconds(self) -> float:
        """Training seconds."""
        return float(self.summary["measured"]["training_seconds"])


def read(name: str, stream: Stream) -> Seen:
    """The run called `name`: a folder that holds `artifacts/`, or a revision or experiment.

    A ValueError when it is none of them, is not whole, or scored another stream.
    """
    folder = Path(name)
    if folder.is_dir():
        _require_same_stream(folder)
        return _seen(
            "the working tree" if folder == Path() else name,
            lambda path: _text(folder / path),
            {s: ledger.read(folder / _ledger(s), stream.targets) for s in revisions.SCORERS},
        )
    commit = revisions.resolve(name)
    ledgers = {scorer: revisions.read(f"{name}:{scorer}", stream.targets) for scorer in revisions.SCORERS}
    return _seen(name, lambda path: revisions.show(commit, str(path)), ledgers)


def _ledger(scorer: str) -> Path:
    return ARTIFACTS / scorer / revisions.FILE


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _seen(name: str, text: Callable[[Path], str | None], ledgers: dict[str, np.ndarray]) -> Seen:
    def content(path: str) -> str:
        found = text(ARTIFACTS / path)
        if found is None:
            raise ValueError(f"{name} has no {ARTIFACTS / path}: run `dvc repro` there")
        return found

    losses, layers = (
        list(csv.DictReader(content(path).splitlines(), delimiter="\t"))
        for path in ("train/loss.tsv", "pack/layers.tsv")
    )
    return Seen(name, losses, layers, json.loads(content("submission/submission.json")), ledgers)


def _require_same_stream(folder: Path) -> None:
    """Raise ValueError unless the folder's val shards and tokenizer are the working tree's."""
    for path in map(Path, revisions.STREAM):
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        for file in files:
            if not (folder / file).is_file() or (folder / file).read_bytes() != file.read_bytes():
                raise ValueError(
                    f"{folder / file} is not this working tree's {file}: it scored another stream, so it is not comparable"
                )
