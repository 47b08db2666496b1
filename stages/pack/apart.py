"""A model file decoded by another process (decoder.py), while this one gets ready to use its weights."""

from pathlib import Path

import torch
from torch import Tensor

from stages.pack import shared
from stages.pack.decoder import Decoder
from stages.pack.header import model_params


class Unpacking:
    """The parameters of the model in a file, at once, and its weights, later; a ValueError for a file that is damaged or not lawful."""

    def __init__(self, path: Path, decoder: Decoder | None = None) -> None:
        self._decoder = decoder or Decoder()
        model, self._shapes = self._decoder.hear(path)
        self.params = model_params(model, self._shapes)

    def state(self) -> dict[str, Tensor]:
        """The float32 weights, once they are there. A ChildProcessError when the other process was killed."""
        self._decoder.hear()
        return {name: torch.from_numpy(weights) for name, weights in shared.arrays(self._decoder.memory, self._shapes).items()}
