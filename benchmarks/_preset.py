"""The parameters of a preset, for benchmarks that run the stages' functions themselves."""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from stages.common import config
from stages.train.params import Params


@contextlib.contextmanager
def preset_file(preset: str) -> Iterator[Path]:
    """A temporary copy of params.yaml with `preset` laid over it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "params.yaml"
        write = [sys.executable, "-m", "tools.preset", preset, "--output", str(file)]
        subprocess.run(write, check=True, stdout=subprocess.DEVNULL)
        yield file


def train_params(preset: str, changes: Sequence[str]) -> Params:
    """The parameters of the stage train from `preset` with KEY=VALUE `changes`."""
    with preset_file(preset) as file:
        return config.load(file, Params, list(changes))
