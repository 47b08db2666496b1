"""The parameters of training under a preset, for benchmarks that run its loop themselves."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from stages import config
from stages.train.params import Params


def train_params(preset: str, changes: Sequence[str]) -> Params:
    """What train reads of params.yaml with `preset` laid over it and KEY=VALUE changes laid over that."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "params.yaml"
        write = [sys.executable, "-m", "stages.preset", preset, "--output", str(file)]
        subprocess.run(write, check=True, stdout=subprocess.DEVNULL)
        return config.load(file, Params, list(changes))
