"""The loss of weights on held-out text, the same text for all that are compared."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stages.common import shards
from stages.common.bpb import ByteTable, target_bytes
from stages.common.parallel import World
from stages.sliding_eval.windows import plan
from stages.train.data import Windows, to_device
from stages.train.model import Model, model_for
from stages.train.params import ModelParams

WINDOWS_AT_ONCE = 32
SLIDING_WINDOW, SLIDING_STRIDE, SLIDING_TARGETS = 3072, 512, 262_144


@torch.no_grad()
def sliding_nats(model: Model, folder: Path, factors: Sequence[float], here: World) -> dict[float, float]:
    """Mean nats a token of a folder's first targets by sliding windows, for each factor on the logits before the softcap.

    Windows have one length whatever the model was trained with, so that models of other contexts are compared too.
    """
    tokens = shards.stream(folder)[: SLIDING_TARGETS + 1].astype(np.int64)
    ragged = (len(tokens) - 1 - SLIDING_WINDOW) % SLIDING_STRIDE  # behind the last whole window
    windows = plan(SLIDING_WINDOW, len(tokens) - 1 - ragged, SLIDING_WINDOW, SLIDING_STRIDE)
    sums, count = dict.fromkeys(factors, 0.0), 0
    for first in range(0, len(windows), WINDOWS_AT_ONCE):
        rows = np.stack(
            [tokens[window.start : window.end + 1] for window in windows[first : first + WINDOWS_AT_ONCE]]
        )
        inputs, targets = to_device(rows, here.device)
        z_NV = model.uncapped(inputs, True, slice(-SLIDING_STRIDE, None)).flatten(0, 1)
        scored = targets[:, -SLIDING_STRIDE:].flatten()
        count += len(scored)
        for factor in factors:
            sums[factor] += float(
                model.operations.cross_entropy(z_NV * factor, scored, model.params.logit_softcap)
                .double()
                .sum()
            )
    return {factor: total / count for factor, total in sums.items()}


class HeldOut:
    """`count` windows of a folder's shards, and a model to score them with."""

    def __init__(self, folder: Path, count: int, params: ModelParams, here: World) -> None:
        self.model, self.here, self.count = model_for(params, here), here, count
        self.windows = Windows(folder, params.context, params.vocab_size, seed=0)

    @torch.no_grad()
    def losses(self, state: dict[str, Tensor]) -> np.ndarray:
        """Mean nats a token of each window."""
        self.model.load_state_dict(state)
        batches = (
            self.windows.batch(first, WINDOWS_AT_ONCE) for first in range(0, self.count, WINDOWS_AT_ONCE)
        )
        return np.concatenate(
            [
                self.model(*to_device(batch, self.here.device)).double().mean(1).cpu().numpy()
                for batch in batches
            ]
        )

    def bytes_a_token(self, table: ByteTable) -> float:
        """Bytes of text that a target stands for, in the mean over the windows."""
        counted = [target_bytes(tokens, table).mean() for tokens in self.windows.batch(0, self.count)]
        return float(np.mean(counted))
