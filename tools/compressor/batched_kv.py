"""Score many streams in parallel, one token of each at a time, with a KV cache: a fast decoder.

The scores are those of the sliding scorer (same windows, same forward pass), and each stream is
scored as if it were alone. Keys and values of earlier tokens are cached (`KVStorage`), and the model
attends to them in place of the tokens of the pass. When the window moves, it is computed from its
start, because positions in it begin at 0 again.

Sums run in another order than in a forward pass over a whole window, so losses differ from a
ledger's in their last digits. Encoder and decoder must take the same steps with the same number of
streams; on one machine with one thread these give the same bits.

Shapes: B streams, N tokens of a stream, V ids of the vocabulary; W tokens of a window, H query
heads, K key-value heads, C channels of a head, T tokens of a forward pass (the others: see
stages/train/model.py).
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.common.parallel import World
from stages.sliding_eval.windows import window_start
from stages.train.model import Extensions, Model, rope_cos_sin, visit_plan
from stages.train.params import ModelParams
from stages.train.reference import remove_self_value

# Bounds the memory of a forward pass. Where a window is computed from its start, streams take
# turns.
MAX_TOKENS_PER_PASS = 1 << 16


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

    The input may begin with one token before the new ones, for the smear gate. This is the
    `kv_cache` of the model's `Extensions`.
    """

    storage: KVStorage
    new: int
    streams: slice

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
        k_BKTC = self.storage.keys[visit][self.streams, :, :end]
        v_BKTC = self.storage.values[visit][self.streams, :, :end]
        k_BKTC[:, :, cached:] = k_BTKC[:, -self.new :].transpose(1, 2)
        v_BKTC[:, :, cached:] = v_BTKC[:, -self.new :].transpose(1, 2)

        q_BHTC = q_BTHC[:, -self.new :].transpose(1, 2)
        if self.new > 1:
            y_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BKTC, v_BKTC, is_causal=True, enable_gqa=True)
        else:
            # A single token attends to everything before it, so no mask is needed, and the query
            # heads that share a key head can take the place of tokens.
            groups_BKGC = q_BHTC.reshape(len(k_BKTC), k_BKTC.shape[1], -1, k_BKTC.shape[3])
            y_BHTC = F.scaled_dot_product_attention(groups_BKGC, k_BKTC, v_BKTC).reshape(q_BHTC.shape)

        rows_before = q_BTHC.shape[1] - self.new
        y_BTHC = F.pad(y_BHTC.transpose(1, 2), (0, 0, 0, 0, rows_before, 0))
        return remove_self_value(y_BTHC, v_BTKC)


class BatchedScorer:
    """B streams, all of the same length so far; the first token of each is given."""

    def __init__(
        self,
        params: ModelParams,
        state: Mapping[str, Tensor],
        window: int,
        stride: int,
        first_tokens_B: np.ndarray,
        max_length: int,
        world: World,
    ) -> None:
        streams = len(first_tokens_B)
        self.window = window
        self.stride = stride
        self.storage = KVStorage(params, window, streams, world)
        self.model = Model(params, world.dtype).to(world.device)
        self.model.load_state_dict(dict(state))
        self.tokens_BN = torch.zeros((streams, max_length), dtype=torch.int64, device=world.device)
        self.tokens_BN[:, 0] = torch.from_numpy(first_tokens_B.astype(np.int64))
        self.observed = 1  # tokens of each stream
        self.window_start = 0

    @torch.no_grad()
    def predict(self) -> np.ndarray:
        """Return natural log-probabilities of each stream's next token, (B, V) float64.

        Call it once before each `observe`: it also extends the cache.
        """
        target = self.observed - 1
        start = window_start(target, self.window, self.stride)
        if start != self.window_start:
            self.window_start = start
            self.storage.cached = 0

        # As many streams at once as fit; usually all of them.
        new = target + 1 - start - self.storage.cached
        streams = len(self.tokens_BN)
        streams_per_pass = max(1, MAX_TOKENS_PER_PASS // new)
        parts = []
        for first in range(0, streams, streams_per_pass):
            parts.append(self._logits(new, slice(first, min(first + streams_per_pass, streams))))
        self.storage.cached += new
        return torch.log_softmax(torch.cat(parts).double(), dim=-1).cpu().numpy()

    def _logits(self, new: int, streams: slice) -> Tensor:
        """Return softcapped logits (streams, V) of the next token; `new` tokens are not in the cache yet."""
        before = 1 if self.storage.cached and self.model.smear is not None else 0
        inputs_BT = self.tokens_BN[streams, self.observed - new - before : self.observed]
        extensions = Extensions(kv_cache=CachedPass(self.storage, new, streams))
        return self.model.logits(inputs_BT, True, inputs_BT.shape[1] - 1, extensions)[:, 0]

    def observe(self, tokens_B: np.ndarray) -> None:
        """Append the next token of each stream."""
        self.tokens_BN[:, self.observed] = torch.from_numpy(tokens_B.astype(np.int64))
        self.observed += 1

    def keep_first(self, streams: int) -> None:
        """Drop all but the first streams, when the others have ended."""
        self.tokens_BN = self.tokens_BN[:streams]
