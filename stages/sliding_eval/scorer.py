"""The sliding scorer: a fixed model scores every target once, with overlapping windows of context.

It keeps only the part of the observed prefix that a later window can read, so forks are cheap.
Inputs after the last observed token are padding up to the window's length; a causal model cannot
see them. Nothing is compiled as a whole: a forward pass is long enough to hide its kernel launches,
the fused kernels leave little to fuse, and compilation took several times as long as scoring
679,260 targets (docs/decisions.md).

Shapes: N targets or tokens, V vocabulary, B windows of a batch, W tokens of a window.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stages.common.parallel import World
from stages.common.progress import Logger
from stages.scoring.queries import Queries, TargetScores, score_targets, zero_scores
from stages.sliding_eval.kv_cache import CachedPass, KVStorage
from stages.sliding_eval.params import SlidingEvalParams
from stages.sliding_eval.windows import Window, plan_windows, window_start
from stages.train.model import Extensions, Model
from stages.train.reference import softcapped


class SlidingScorer:
    """A scorer (stages/common/scorer.py) over a fixed model.

    All ranks make the same calls; each scores its share of the windows, and all get every score.
    """

    def __init__(
        self, model: Model, params: SlidingEvalParams, world: World, logger: Logger | None = None
    ) -> None:
        self.params = params
        self.world = world
        self.logger = logger or Logger(is_main=False)
        self.model = model
        self.observed = 0  # number of tokens of the prefix
        # The last tokens of the prefix, as many as a later window can read.
        self.kept_N = np.empty(0, dtype=np.int64)
        # For predictions one after another: the cache of the window that starts at this target.
        self.cache: KVStorage | None = None
        self.cache_start = 0
        self.cached_z_V = torch.empty(0)  # logits of the next token, once all tokens are cached

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.model.params.vocab_size

    @property
    def warm_up_targets(self) -> int:
        """The first window and a batch of later ones per rank: both shapes of kernels compile then."""
        return self.params.window + self.params.stride * self.params.batch_windows * self.world.size

    def fork(self) -> "SlidingScorer":
        """An independent copy; the model, which nothing changes, is shared."""
        twin = copy.copy(self)
        twin.cache = None
        return twin

    def forget_cache(self) -> None:
        """Compute the next prediction from the start of its window, because the model has changed."""
        self.cache = None

    def observe(self, token: int) -> None:
        """Append a token to the prefix."""
        self._append(np.array([token], dtype=np.int64))
        self._trim()

    @torch.no_grad()
    def predict(self) -> np.ndarray:
        """Natural log-probabilities of the next token, (V,) float64."""
        target = self.observed - 1
        if target < 0:
            raise ValueError("nothing is observed yet: the first token of a stream is given, not predicted")
        start = window_start(target, self.params.window, self.params.stride)
        z_V = self._cached_logits(start) if self._uses_cache else self._window_logits(start)
        logits_V = softcapped(z_V, self.model.params.logit_softcap)
        return torch.log_softmax(logits_V.double(), dim=-1).cpu().numpy()

    @property
    def _uses_cache(self) -> bool:
        """The cache knows no document boundaries, and the fused kernels know no cache."""
        return self.model.params.attention == "windows" and not self.world.kernels

    def _window_logits(self, start: int) -> Tensor:
        """Logits (V,) of the next token from a pass over its whole window."""
        target = self.observed - 1
        inputs_1W = self._gather([Window(start, target, target + 1)], self.kept_N, self._kept_from)
        position = target - start
        return self.model.raw_logits(inputs_1W, True, slice(position, position + 1))[0, 0]

    def _cached_logits(self, start: int) -> Tensor:
        """Logits (V,) of the next token from a pass over the tokens that are not cached yet."""
        # A new window, and one that has grown by more than a token, from its start.
        cache = self.cache
        tokens = self.observed - start
        if self._is_predicted(start, tokens):
            return self.cached_z_V
        if cache is None or self.cache_start != start or cache.cached != tokens - 1:
            cache = KVStorage(self.model.params, self.params.window, 1, self.world)
            self.cache, self.cache_start = cache, start

        # A single token comes with the one before it if the model mixes the two.
        new = tokens - cache.cached
        before = 1 if cache.cached and self.model.smear is not None else 0
        inputs_N = self.kept_N[len(self.kept_N) - new - before :]
        inputs_1T = torch.from_numpy(inputs_N[None]).to(self.world.device)
        extensions = Extensions(kv_cache=CachedPass(cache, new, slice(None), self.model.ops.attend))
        self.cached_z_V = self.model.raw_logits(inputs_1T, True, slice(-1, None), extensions)[0, -1]
        cache.cached = tokens
        return self.cached_z_V

    def _is_predicted(self, start: int, tokens: int) -> bool:
        """True if `cached_z_V` are the logits after the first `tokens` of the window at `start`."""
        return self.cache is not None and self.cache_start == start and self.cache.cached == tokens

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Score and observe tokens (N,) in order; nats, float32. See the protocol for the first call."""
        return self.score(tokens, None).nll_N

    @torch.no_grad()
    def score(self, tokens: np.ndarray, queries: Queries[np.ndarray] | None) -> TargetScores[np.ndarray]:
        """Score and observe tokens (N,) in order, with one query for each target."""
        # Targets first ... end - 1; target i is token i + 1.
        first = max(0, self.observed - 1)
        self._append(tokens.astype(np.int64))
        end = max(first, self.observed - 1)

        # A single target that was predicted is scored from the same logits.
        device = self.world.device
        start = window_start(first, self.params.window, self.params.stride)
        if end - first == 1 and self.world.size == 1 and self._is_predicted(start, end - start):
            return self._score_predicted(queries)

        # Each rank scores every size-th batch, and leaves zeros where others score.
        scores = zero_scores(end - first, queries, lambda shape: torch.zeros(shape, device=device))
        windows = plan_windows(first, end, self.params.window, self.params.stride)
        with self.logger.progress("score", len(windows)) as progress:
            for batch in self._batches(windows)[self.world.rank :: self.world.size]:
                scores.write_(batch[0].first - first, self._score_batch(batch, first, queries))
                progress.advance(len(batch) * self.world.size)

        self._trim()
        return scores.map(lambda values: self.world.sum_(values).cpu().numpy())

    def _score_predicted(self, queries: Queries[np.ndarray] | None) -> TargetScores[np.ndarray]:
        """Score the last token of the prefix from the logits that were predicted before it."""

        def on_device(ids_N: np.ndarray) -> Tensor:
            return torch.from_numpy(ids_N).to(self.world.device)

        target_1 = on_device(self.kept_N[-1:])
        self._trim()
        query = None if queries is None else queries.map(on_device)
        scores = score_targets(self.model, self.cached_z_V[None], target_1, query)
        return scores.map(lambda values: values.cpu().numpy())

    def _batches(self, windows: list[Window]) -> list[list[Window]]:
        """Group the windows that score only their last stride.

        A window that scores more, the first of the stream, forms a batch alone.
        """
        stride, size = self.params.stride, self.params.batch_windows
        alone = [[window] for window in windows if window.first - window.start < self.params.window - stride]
        rest = windows[len(alone) :]
        return alone + [rest[i : i + size] for i in range(0, len(rest), size)]

    def _score_batch(
        self, batch: list[Window], first: int, queries: Queries[np.ndarray] | None
    ) -> TargetScores[Tensor]:
        """Run the model on a batch; returns the scores of its targets in stream order.

        `queries` begin with that of target `first`.
        """
        # Target i is token i + 1.
        inputs_BW = self._gather(batch, self.kept_N, self._kept_from)
        targets_BW = self._gather(batch, self.kept_N, self._kept_from - 1)

        # Logits are computed from the first position that any window of the batch scores.
        scored_from = min(self.params.window - self.params.stride, batch[0].first - batch[0].start)
        z_NV = self.model.raw_logits(inputs_BW, True, slice(scored_from, None)).flatten(0, 1)
        targets_N = targets_BW[:, scored_from:].flatten()
        batch_queries = None
        if queries is not None:
            batch_queries = queries.map(
                lambda ids_N: self._gather(batch, ids_N, first)[:, scored_from:].flatten()
            )
        scores = score_targets(self.model, z_NV, targets_N, batch_queries)

        # Each window contributes only the targets that it is the first to reach.
        def first_reached(values: Tensor) -> Tensor:
            by_window = values.unflatten(-1, (len(batch), -1))
            pieces = []
            for row, window in enumerate(batch):
                begin = window.first - window.start - scored_from
                pieces.append(by_window[..., row, begin : begin + window.end - window.first])
            return torch.cat(pieces, dim=-1)

        return scores.map(first_reached)

    @property
    def _kept_from(self) -> int:
        """Stream position of the first token that is kept."""
        return self.observed - len(self.kept_N)

    def _gather(self, batch: Sequence[Window], source_N: np.ndarray, offset: int) -> Tensor:
        """The entries of `source_N` at each window's positions, (B, W) int64; zero where it has none.

        The first entry of `source_N` is at position `offset` of the stream.
        """
        padded_BW = np.zeros((len(batch), self.params.window), dtype=np.int64)
        for row, window in enumerate(batch):
            missing = max(0, offset - window.start)
            piece = source_N[window.start + missing - offset : window.end - offset]
            padded_BW[row, missing : missing + len(piece)] = piece
        return torch.from_numpy(padded_BW).to(self.world.device)

    def _append(self, tokens: np.ndarray) -> None:
        self.kept_N = np.concatenate((self.kept_N, tokens))
        self.observed += len(tokens)

    def _trim(self) -> None:
        """Drop the tokens that no later window reads."""
        next_start = window_start(max(0, self.observed - 1), self.params.window, self.params.stride)
        self.kept_N = self.kept_N[max(0, next_start - self._kept_from) :]
