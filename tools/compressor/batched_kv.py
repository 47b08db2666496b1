"""Many streams side by side under one fixed model, one token of each at a time: what a decoder must do, made quick.

The scores are the sliding scorer's (the same windows, the same forward pass), each stream being scored as if it were alone. Keys and values
of earlier tokens are kept and not computed again: `Cache` stands for the two of the model's operations that know positions. A window that
moves is computed anew, because its positions begin at 0 again.

Sums run in another order than where a window is one pass, so losses differ from a ledger's in their last digits. Whoever codes and
decodes must take the same steps with the same number of streams, which then give the same bits on one machine with one thread.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.common.parallel import World
from stages.sliding_eval.windows import window_of
from stages.train import reference
from stages.train.model import Model, rotary
from stages.train.ops import PLAIN, Operations
from stages.train.params import ModelParams
from stages.train.reference import Documents

TOKENS_AT_ONCE = (
    1 << 16
)  # of one forward pass: memory; streams beyond it are taken in turn where windows are computed anew


class Cache:
    """Keys and values of each visit of a block for windows that all hold `at` tokens (shapes: see stages/train/model.py)."""

    def __init__(self, params: ModelParams, window: int, lanes: int, here: World) -> None:
        self.cos_WR, self.sin_WR = rotary(window, params, here.device)
        shape = (lanes, params.kv_heads, window, params.head_dim)
        self.empty = torch.zeros(shape, dtype=here.dtype, device=here.device)
        self.held: list[tuple[Tensor, Tensor]] = []  # by visit; (lanes, K, W, C)
        self.at = 0  # tokens held
        self.fresh = 0  # tokens of this pass that are not held yet; what stands before them is there for the smear gate alone
        self.rows = slice(0)  # the streams of this pass
        self.visit = 0

    def operations(self) -> Operations:
        """The plain operations, with this cache in the place of those that know positions."""
        return PLAIN._replace(split_heads=self.split_heads, attend=self.attend)

    def start(self, fresh: int, rows: slice) -> None:
        """Announce a pass over new tokens of some streams: a window's first ones together, every other by itself."""
        assert fresh == 1 or self.at == 0
        self.fresh, self.rows, self.visit = fresh, rows, 0

    def split_heads(
        self,
        joint_BTE: Tensor,
        gain_H: Tensor,
        cos_TR: Tensor,
        sin_TR: Tensor,
        starts_BT: Tensor | None,
        kv_heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The operation of that name at the tokens' places in the window; a stream is one document, so none begins inside a window."""
        end = self.at + self.fresh
        places = slice(end - joint_BTE.shape[1], end)
        return reference.split_heads(
            joint_BTE, gain_H, self.cos_WR[places], self.sin_WR[places], None, kv_heads
        )

    def attend(self, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, documents: Documents | None) -> Tensor:
        """The operation of that name, zero for tokens that are not new; keys and values of earlier ones come from the cache."""
        if self.visit == len(self.held):
            self.held.append((self.empty.clone(), self.empty.clone()))
        end = self.at + self.fresh
        keys, values = (held[self.rows, :, :end] for held in self.held[self.visit])
        keys[:, :, self.at :] = k_BTKC[:, -self.fresh :].transpose(1, 2)
        values[:, :, self.at :] = v_BTKC[:, -self.fresh :].transpose(1, 2)
        self.visit += 1
        q_BHTC = q_BTHC[:, -self.fresh :].transpose(1, 2)
        if self.fresh > 1:
            y_BHTC = F.scaled_dot_product_attention(q_BHTC, keys, values, is_causal=True, enable_gqa=True)
        else:  # it sees everything, so that the heads of a group can stand where tokens would
            groups = q_BHTC.reshape(len(keys), keys.shape[1], -1, keys.shape[3])
            y_BHTC = F.scaled_dot_product_attention(groups, keys, values).reshape(q_BHTC.shape)
        y_BTHC = F.pad(y_BHTC.transpose(1, 2), (0, 0, 0, 0, q_BTHC.shape[1] - self.fresh, 0))
        return reference.exclude_own_value(y_BTHC, v_BTKC)


class Lanes:
    """So many streams, all of one length so far; each begins with a token that is given."""

    def __init__(
        self,
        params: ModelParams,
        state: Mapping[str, Tensor],
        window: int,
        stride: int,
        firsts: np.ndarray,
        longest: int,
        here: World,
    ) -> None:
        self.window, self.stride = window, stride
        self.cache = Cache(params, window, len(firsts), here)
        self.model = Model(params, here.dtype, self.cache.operations()).to(here.device)
        self.model.load_state_dict(dict(state))
        self.tokens_BN = torch.zeros((len(firsts), longest), dtype=torch.int64, device=here.device)
        self.tokens_BN[:, 0] = torch.from_numpy(firsts.astype(np.int64))
        self.observed = 1
        self.window_start = 0

    @torch.no_grad()
    def predict(self) -> np.ndarray:
        """Natural log-probabilities of each stream's next token, (B, V) float64; asked for once, before `observe`."""
        target = self.observed - 1
        start = window_of(target, self.window, self.stride)
        if start != self.window_start:
            self.window_start, self.cache.at = start, 0
        fresh = target + 1 - start - self.cache.at
        together = max(1, TOKENS_AT_ONCE // fresh)
        lanes = len(self.tokens_BN)
        parts = [
            self._logits(fresh, slice(first, min(first + together, lanes)))
            for first in range(0, lanes, together)
        ]
        self.cache.at += fresh
        return torch.log_softmax(torch.cat(parts).double(), dim=-1).cpu().numpy()

    def _logits(self, fresh: int, rows: slice) -> Tensor:
        """Softcapped logits of the next token of some streams, (rows, V), whose last `fresh` tokens are not in the cache."""
        before = 1 if self.cache.at and self.model.smear is not None else 0
        inputs = self.tokens_BN[rows, self.observed - fresh - before : self.observed]
        self.cache.start(fresh, rows)
        return self.model.logits(inputs, looped=True, scored_from=inputs.shape[1] - 1)[:, 0]

    def observe(self, tokens: np.ndarray) -> None:
        """The next token of each stream, (B,)."""
        self.tokens_BN[:, self.observed] = torch.from_numpy(tokens.astype(np.int64))
        self.observed += 1

    def keep(self, lanes: int) -> None:
        """Go on with the first streams only."""
        self.tokens_BN = self.tokens_BN[:lanes]
