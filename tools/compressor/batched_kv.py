"""Score many streams in parallel, one token of each at a time, with a KV cache: a fast decoder.

The scores are those of the sliding scorer (same windows, same forward pass), and each stream is
scored as if it were alone. Keys and values of earlier tokens are cached
(stages/sliding_eval/kv_cache.py), and the model attends to them in place of the tokens of the pass.

Sums run in another order than in a forward pass over a whole window, so losses differ from a
ledger's in their last digits. Encoder and decoder must take the same steps with the same number of
streams; on one machine with one thread these give the same bits.

Shapes: B streams, N tokens of a stream, V ids of the vocabulary, T tokens of a forward pass.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from stages.common.parallel import World
from stages.sliding_eval.kv_cache import CachedPass, KVStorage
from stages.sliding_eval.windows import window_start
from stages.train.model import Extensions, Model
from stages.train.params import ModelParams

# Bounds the memory of a forward pass. Where a window is computed from its start, streams take
# turns.
MAX_TOKENS_PER_PASS = 1 << 16


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
        extensions = Extensions(kv_cache=CachedPass(self.storage, new, streams, self.model.ops.attend))
        return self.model.logits(inputs_BT, True, inputs_BT.shape[1] - 1, extensions)[:, 0]

    def observe(self, tokens_B: np.ndarray) -> None:
        """Append the next token of each stream."""
        self.tokens_BN[:, self.observed] = torch.from_numpy(tokens_B.astype(np.int64))
        self.observed += 1

    def keep_first(self, streams: int) -> None:
        """Drop all but the first streams, when the others have ended."""
        self.tokens_BN = self.tokens_BN[:streams]
