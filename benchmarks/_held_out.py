"""The loss of weights on held-out windows, the same windows for all that are compared."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stages.bpb import ByteTable, target_bytes
from stages.parallel import World
from stages.train.data import Windows, to_device
from stages.train.model import model_for
from stages.train.params import ModelParams

WINDOWS_AT_ONCE = 32


class HeldOut:
    """`count` windows of a folder's shards, and a model to score them with."""

    def __init__(self, folder: Path, count: int, params: ModelParams, here: World) -> None:
        self.model, self.here, self.count = model_for(params, here), here, count
        self.windows = Windows(folder, params.context, params.vocab_size, seed=0)

    @torch.no_grad()
    def losses(self, state: dict[str, Tensor]) -> np.ndarray:
        """Mean nats a token of each window."""
        self.model.load_state_dict(state)
        batches = (self.windows.batch(first, WINDOWS_AT_ONCE) for first in range(0, self.count, WINDOWS_AT_ONCE))
        return np.concatenate([self.model(*to_device(batch, self.here.device)).double().mean(1).cpu().numpy() for batch in batches])

    def bytes_a_token(self, table: ByteTable) -> float:
        """Bytes of text that a target stands for, in the mean over the windows."""
        counted = [target_bytes(tokens, table).mean() for tokens in self.windows.batch(0, self.count)]
        return float(np.mean(counted))
