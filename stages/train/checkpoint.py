"""Resuming a killed run, so that it ends with the same bytes as one that was not killed.

A checkpoint lives in a scratch folder whose name is a hash of everything that decides the result: parameters, code, shards, number of
ranks. A changed seed or a changed line of code therefore starts afresh instead of continuing the wrong run. Each rank writes its own file;
the marker that makes a step the one to resume from is written when all have.
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
from stages.common.command import canonical_json
from stages.common.parallel import World, speaks_for_its_machine
from stages.train.params import Params

MARKER = "resume-from"


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
    """Saved states of one run; `folder` is None when they are off, and then nothing happens."""

    def __init__(self, folder: Path | None, every: int, world: World) -> None:
        self.folder = folder if every else None
        self.every = every
        self.world = world

    def save(self, steps_done: int, state: dict[str, Any]) -> None:
        """Save this rank's state when it is time, then make it the one to resume from."""
        if self.folder is None or steps_done % self.every:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(steps_done)
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)
        self.world.barrier()
        if self.world.is_main:
            marker = self.folder / MARKER
            marker.with_suffix(".partial").write_text(str(steps_done), encoding="ascii")
            marker.with_suffix(".partial").replace(marker)
        self.world.barrier()
        for old in self.folder.glob(f"*-rank{self.world.rank}.pt"):
            if old != path:
                old.unlink()

    def load(self) -> dict[str, Any] | None:
        """This rank's state at the step to resume from; None when the run begins.

        The marker is on the disk of rank 0's machine, which other machines may not see.
        """
        if self.folder is None:
            return None
        marker = self.folder / MARKER
        steps_done = int(self.world.max_of(int(marker.read_text(encoding="ascii")) if marker.exists() else 0))
        if not steps_done:
            return None
        if not self._path(steps_done).exists():
            raise ValueError(
                f"--scratch: the run has a checkpoint of step {steps_done}, but not {self._path(steps_done)} of rank {self.world.rank};"
                " give machines that may change places a folder that they share, or remove it on each to begin anew"
            )
        state: dict[str, Any] = torch.load(
            self._path(steps_done), map_location=self.world.device, weights_only=True
        )
        return state

    def remove(self) -> None:
        """Forget the run: it has ended well."""
        self.world.barrier()
        if self.folder is not None and speaks_for_its_machine():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, steps_done: int) -> Path:
        assert self.folder is not None
        return self.folder / f"step{steps_done:06d}-rank{self.world.rank}.pt"


def open_checkpoints(params: Params, shard_folder: Path, scratch: Path, world: World) -> Checkpoints:
    """The checkpoints of this run below `scratch`; hashing the shards is only paid for when checkpoints are on."""
    every = params.train.checkpoint_every
    folder = scratch / run_key(params, shards.find(shard_folder), world) if every else None
    return Checkpoints(folder, every, world)


def _is_training_code(name: str) -> bool:
    """Whether a loaded module decides what training does: the modules that stages share, and train's own."""
    package, _, rest = name.partition(".")
    return package == "stages" and rest != "" and ("." not in rest or rest.startswith("train."))
