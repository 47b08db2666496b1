"""Checkpoints: a killed run that is resumed ends with the same bytes as one that was not killed.

A checkpoint is kept in a scratch folder whose name is a hash of everything that decides the result:
parameters, code, shards, number of ranks. After a change of the seed or of a line of code a run
therefore starts from the beginning instead of continuing the wrong one. Each rank writes its own
file; the marker that names the step to resume from is written after all ranks have written theirs.
"""

import hashlib
import inspect
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from stages.common import shards
from stages.common.parallel import World
from stages.common.stage import canonical_json
from stages.train.params import Params

RESUME_MARKER = "resume-from"  # name of the file that holds the number of steps done, in decimal


def run_key(params: Params, shard_paths: Iterable[Path], world: World) -> str:
    """The hash that names a run's scratch folder."""
    digest = hashlib.sha256(canonical_json(asdict(params)).encode())
    digest.update(f"ranks {world.size} device {world.device.type} torch {torch.__version__}".encode())
    for name in sorted(filter(_is_training_code, sys.modules)):
        digest.update(inspect.getsource(sys.modules[name]).encode())
    for path in shard_paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


class Checkpoints:
    """The saved states of one run, one every `every` steps; with `every` 0 or no folder none are saved."""

    def __init__(self, folder: Path | None, every: int, world: World) -> None:
        self.folder = folder if every else None
        self.every = every
        self.world = world

    def is_due(self, steps_done: int) -> bool:
        """True if a state is to be saved after this many steps."""
        return self.folder is not None and steps_done % self.every == 0

    def save(self, steps_done: int, state: dict[str, Any]) -> None:
        """Save this rank's state, then make it the one to resume from. Every rank must call this."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(steps_done)
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

        # All ranks have saved: the marker may name this step.
        self.world.barrier()
        if self.world.is_main:
            marker = self.folder / RESUME_MARKER
            marker.with_suffix(".partial").write_text(str(steps_done), encoding="ascii")
            marker.with_suffix(".partial").replace(marker)

        # The marker names this step: older files may go.
        self.world.barrier()
        for old in self.folder.glob(f"*-rank{self.world.rank}.pt"):
            if old != path:
                old.unlink()

    def load(self) -> dict[str, Any] | None:
        """This rank's state at the step to resume from; None if there is none.

        Rank 0 reads the marker for all, because other machines may not see its disk. A ValueError
        if this rank's file is missing.
        """
        if self.folder is None:
            return None
        marker = self.folder / RESUME_MARKER
        marked_step = int(marker.read_text(encoding="ascii")) if marker.exists() else 0
        steps_done = int(self.world.max_of(marked_step))
        if not steps_done:
            return None

        path = self._path(steps_done)
        if not path.exists():
            raise ValueError(
                f"--scratch: the run has a checkpoint of step {steps_done}, but not {path} of rank"
                f" {self.world.rank}; give machines whose ranks may be swapped a shared folder, or remove the"
                " folder on each of them to start from the beginning"
            )
        state: dict[str, Any] = torch.load(path, map_location=self.world.device, weights_only=True)
        return state

    def remove(self) -> None:
        """Delete the checkpoints of a run that has ended well."""
        self.world.barrier()
        if self.folder is not None and self.world.is_local_rank_zero:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, steps_done: int) -> Path:
        assert self.folder is not None
        return self.folder / f"step{steps_done:06d}-rank{self.world.rank}.pt"


def open_checkpoints(params: Params, shard_folder: Path, scratch: Path, world: World) -> Checkpoints:
    """The checkpoints of this run below `scratch`. The shards are hashed only if checkpoints are on."""
    every = params.train.checkpoint_every
    folder = scratch / run_key(params, shards.find(shard_folder), world) if every else None
    return Checkpoints(folder, every, world)


def _is_training_code(module: str) -> bool:
    """True for modules that decide the result of training: train's own and those that all stages share."""
    return module.startswith(("stages.train", "stages.common"))
