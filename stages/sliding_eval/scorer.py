"""The sliding scorer: a fixed model, a window of context, one score for each target.

It keeps only as much of the observed prefix as the next window needs, so forks are cheap. Inputs behind the last observed token are padded
to the window's length, which a causal model cannot see. Nothing is compiled as a whole: a pass is large enough to hide its launches, the
fused kernels leave little to fuse, and compiling took several times as long as scoring 679,260 targets (docs/decisions.md).
"""

from collections.abc import Sequence

import numpy as np
import torch

from stages.common.parallel import World
from stages.common.progress import Report
from stages.scoring.queries import Asked, Questions, rows_of, scores_of
from stages.sliding_eval.params import SlidingEvalParams
from stages.sliding_eval.windows import Window, plan, window_of
from stages.train.model import Model


class SlidingScorer:
    """A lawful scorer (stages/common/scorer.py) over a fixed model; all ranks call it alike and all get every score."""

    def __init__(
        self, model: Model, params: SlidingEvalParams, world: World, report: Report | None = None
    ) -> None:
        self.params = params
        self.world = world
        self.report = report or Report(is_main=False)
        self.model = model
        self.observed = 0  # tokens of the prefix
        self.kept = np.empty(0, dtype=np.int64)  # its last tokens, as many as a window can need

    @property
    def vocab_size(self) -> int:
        """The number of token ids a distribution is over."""
        return self.model.params.vocab_size

    @property
    def warm_up_targets(self) -> int:
        """The first window and a batch of others for each rank: the kernels of both shapes are compiled then."""
        return self.params.window + self.params.stride * self.params.batch_windows * self.world.size

    def fork(self) -> "SlidingScorer":
        """An independent copy; the model is shared, nothing changes it."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def observe(self, token: int) -> None:
        """Append a token to the prefix."""
        self._keep(np.array([token], dtype=np.int64))

    def predict(self) -> np.ndarray:
        """Natural log-probabilities of the next token, (V,) float64."""
        target = self.observed - 1
        if target < 0:
            raise ValueError("nothing is observed yet: the first token of a stream is given, not predicted")
        start = window_of(target, self.params.window, self.params.stride)
        inputs = self._rows([Window(start, target, target + 1)], self.kept, self.observed - len(self.kept))
        with torch.no_grad():
            logits = self.model.logits(inputs, looped=True)[0, target - start]
        return torch.log_softmax(logits.double(), dim=-1).cpu().numpy()

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Score and observe tokens in order; nats, float32 (see the protocol for what the first call leaves out)."""
        return self.score(tokens, None)[0]

    def score(self, tokens: np.ndarray, asked: Asked | None) -> np.ndarray:
        """`score_stream` as the first of (R, N) rows; the others answer what is asked."""
        first = max(0, self.observed - 1)
        given = 1 if self.observed == 0 and len(tokens) else 0
        self._keep(tokens.astype(np.int64), trim=False)
        scores = self._score_targets(first, first + len(tokens) - given, asked)
        self._trim()
        return scores

    @torch.no_grad()
    def _score_targets(self, first: int, end: int, asked: Asked | None) -> np.ndarray:
        """The answers about targets first ... end - 1, whose tokens are observed and kept: (R, N) float32."""
        windows = plan(first, end, self.params.window, self.params.stride)
        scores = torch.zeros(rows_of(asked), end - first, device=self.world.device)
        batches = self._batches(windows)
        with self.report.progress("score", len(windows)) as progress:
            for batch in batches[self.world.rank :: self.world.size]:
                self._score_batch(batch, first, scores, asked)
                progress.advance(len(batch) * self.world.size)
        return self.world.sum_(scores).cpu().numpy()

    def _batches(self, windows: list[Window]) -> list[list[Window]]:
        """Windows that score only their last stride are batched; one that scores more (the stream's first) goes alone."""
        stride, size = self.params.stride, self.params.batch_windows
        alone = [[window] for window in windows if window.first - window.start < self.params.window - stride]
        rest = windows[len(alone) :]
        return alone + [rest[i : i + size] for i in range(0, len(rest), size)]

    def _score_batch(
        self, batch: list[Window], first: int, scores: torch.Tensor, asked: Asked | None
    ) -> None:
        offset = self.observed - len(self.kept)
        inputs = self._rows(batch, self.kept, offset)
        targets = self._rows(batch, self.kept, offset - 1)
        scored_from = min(self.params.window - self.params.stride, batch[0].first - batch[0].start)
        z_NV = self.model.uncapped(inputs, True, slice(scored_from, None)).flatten(0, 1)
        questions = None
        if asked is not None:
            about = [self._rows(batch, row, first)[:, scored_from:].flatten() for row in asked.about_2N]
            questions = Questions(torch.stack(about), asked.forest)
        answers = scores_of(self.model, z_NV, targets[:, scored_from:].flatten(), questions).unflatten(
            1, (len(batch), -1)
        )
        for row, window in enumerate(batch):
            begin = window.first - window.start - scored_from
            scores[:, window.first - first : window.end - first] = answers[
                :, row, begin : begin + window.end - window.first
            ]

    def _rows(self, batch: Sequence[Window], source: np.ndarray, offset: int) -> torch.Tensor:
        """For each window's positions what `source` holds, which begins at position `offset`; zeros elsewhere: (rows, window)."""
        padded = np.zeros((len(batch), self.params.window), dtype=np.int64)
        for row, window in enumerate(batch):
            missing = max(0, offset - window.start)
            piece = source[window.start + missing - offset : window.end - offset]
            padded[row, missing : missing + len(piece)] = piece
        return torch.from_numpy(padded).to(self.world.device)

    def _keep(self, tokens: np.ndarray, trim: bool = True) -> None:
        self.kept = np.concatenate((self.kept, tokens))
        self.observed += len(tokens)
        if trim:
            self._trim()

    def _trim(self) -> None:
        """Forget what no later window reaches."""
        next_start = window_of(max(0, self.observed - 1), self.params.window, self.params.stride)
        self.kept = self.kept[max(0, next_start - (self.observed - len(self.kept))) :]
