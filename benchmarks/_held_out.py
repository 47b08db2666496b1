"""Losses of weights on held-out text, which is the same for all weights that are compared."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stages.common import shards
from stages.common.bpb import ByteTable, target_bytes
from stages.common.parallel import World
from stages.sliding_eval.windows import plan_windows
from stages.train.data import TrainingWindows, windows_to_device
from stages.train.model import Model, build_model
from stages.train.params import ModelParams

WINDOWS_AT_ONCE = 32
SLIDING_WINDOW = 3072
SLIDING_STRIDE = 512
SLIDING_TARGETS = 262_144


@torch.no_grad()
def sliding_nats(model: Model, folder: Path, factors: Sequence[float], world: World) -> dict[float, float]:
    """Mean nats a token by sliding windows over a folder's first targets, for each factor on the logits.

    The factor is applied before the softcap. Windows have one length whatever the model was trained
    with, so that models of other contexts can be compared too.
    """
    tokens = shards.stream(folder)[: SLIDING_TARGETS + 1].astype(np.int64)
    ragged = (len(tokens) - 1 - SLIDING_WINDOW) % SLIDING_STRIDE  # targets after the last whole window
    windows = plan_windows(SLIDING_WINDOW, len(tokens) - 1 - ragged, SLIDING_WINDOW, SLIDING_STRIDE)

    sums = dict.fromkeys(factors, 0.0)
    count = 0
    for first in range(0, len(windows), WINDOWS_AT_ONCE):
        batch = windows[first : first + WINDOWS_AT_ONCE]
        rows = np.stack([tokens[window.start : window.end + 1] for window in batch])
        inputs, targets = windows_to_device(rows, world.device)
        z_NV = model.raw_logits(inputs, True, slice(-SLIDING_STRIDE, None)).flatten(0, 1)
        scored = targets[:, -SLIDING_STRIDE:].flatten()
        count += len(scored)
        for factor in factors:
            losses_N = model.ops.cross_entropy(z_NV * factor, scored, model.params.logit_softcap)
            sums[factor] += float(losses_N.double().sum())
    return {factor: total / count for factor, total in sums.items()}


class HeldOut:
    """The first `count` windows of a folder's shards, and a model to score them with."""

    def __init__(self, folder: Path, count: int, params: ModelParams, world: World) -> None:
        self.model = build_model(params, world)
        self.world = world
        self.count = count
        self.windows = TrainingWindows(folder, params.context, params.vocab_size, seed=0)

    @torch.no_grad()
    def losses(self, state: dict[str, Tensor]) -> np.ndarray:
        """Mean nats a token of each window, (count,)."""
        self.model.load_state_dict(state)
        found = []
        for first in range(0, self.count, WINDOWS_AT_ONCE):
            batch = self.windows.batch(first, WINDOWS_AT_ONCE)
            losses_BT = self.model(*windows_to_device(batch, self.world.device))
            found.append(losses_BT.double().mean(1).cpu().numpy())
        return np.concatenate(found)

    def bytes_a_token(self, table: ByteTable) -> float:
        """Mean bytes of text that a target emits."""
        counted = [target_bytes(tokens, table).mean() for tokens in self.windows.batch(0, self.count)]
        return float(np.mean(counted))
