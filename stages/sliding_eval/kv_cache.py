"""KV cache of windows that grow by one token at a time, in place of a pass over the whole window.

The positions of a window begin at 0, so a window that moves is computed from its start again.
A token's pass sums in another order than a pass over the window, so losses differ in their last
digits.

Shapes: B windows, W tokens of a window, H query heads, K key-value heads, C channels of a head, T
tokens of a forward pass (the others: see stages/train/model.py).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.common.parallel import World
from stages.train.model import rope_cos_sin, visit_plan
from stages.train.params import ModelParams
from stages.train.reference import remove_self_value


class KVStorage:
    """Keys and values of each visit of a block, for windows that all have the same number of cached tokens.

    A block that is looped is visited more than once, and every visit has its own keys and values.
    """

    def __init__(self, params: ModelParams, window: int, streams: int, world: World) -> None:
        self.cos_WR, self.sin_WR = rope_cos_sin(window, params, world.device)
        self.keys: list[Tensor] = []  # (B, K, W, C), by visit
        self.values: list[Tensor] = []
        shape = (streams, params.kv_heads, window, params.head_dim)
        for _ in visit_plan(params, looped=True).order:
            self.keys.append(torch.zeros(shape, dtype=world.dtype, device=world.device))
            self.values.append(torch.zeros(shape, dtype=world.dtype, device=world.device))
        self.cached = 0  # tokens of the window whose keys and values are in the cache


class CachedPass(NamedTuple):
    """A forward pass over tokens that are not in the cache yet: all that a window has at its start, or one.

    A single token may have the one before it in the input, for the smear gate. This is the
    `kv_cache` of the model's `Extensions`.
    """

    storage: KVStorage
    new: int
    streams: slice
    attend_window: Callable[..., Tensor]  # ops.attend of the model

    def cos_sin(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (T, R) of the RoPE angles at the positions of the input."""
        end = self.storage.cached + self.new
        positions = slice(end - tokens, end)
        return self.storage.cos_WR[positions], self.storage.sin_WR[positions]

    def attend(self, visit: int, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor) -> Tensor:
        """Attend from new tokens to the cache and to each other, (B, T, H, C); other rows are zero."""
        cached = self.storage.cached
        end = cached + self.new
        assert self.new == 1 or cached == 0

        # Append the new keys and values.
        k_BKWC = self.storage.keys[visit][self.streams, :, :end]
        v_BKWC = self.storage.values[visit][self.streams, :, :end]
        k_BKWC[:, :, cached:] = k_BTKC[:, -self.new :].transpose(1, 2)
        v_BKWC[:, :, cached:] = v_BTKC[:, -self.new :].transpose(1, 2)
        if cached == 0:
            return self.attend_window(q_BTHC, k_BTKC, v_BTKC, None)

        # A single token attends to everything before it, so no mask is needed, and the query heads
        # that share a key head take the place of tokens. Plain operations, as their sums are the same
        # on every machine.
        q_BHC = q_BTHC[:, -1]
        q_BKGC = q_BHC.reshape(len(q_BHC), k_BKWC.shape[1], -1, q_BHC.shape[2])
        scores_BKGW = torch.matmul(q_BKGC.float(), k_BKWC.float().mT) * q_BHC.shape[2] ** -0.5
        y_BKGC = torch.matmul(torch.softmax(scores_BKGW, dim=-1), v_BKWC.float())
        y_B1HC = y_BKGC.reshape(q_BHC.shape).unsqueeze(1).to(q_BTHC.dtype)

        rows_before = q_BTHC.shape[1] - 1
        y_BTHC = F.pad(y_B1HC, (0, 0, 0, 0, rows_before, 0))
        return remove_self_value(y_BTHC, v_BTKC)
