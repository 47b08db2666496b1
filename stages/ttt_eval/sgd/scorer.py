"""Score-first test-time training by SGD on whole chunks (#549, #1413, #1493).

The stream is cut into chunks of targets. Chunk c is scored with weights that have seen chunks 0 ... c-1, and only then trained on, in
stream order; the last chunk is not trained on, since nothing follows it. A chunk's training targets are exactly its scored targets. The
loss is computed in float32 like everywhere.
"""

import copy
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.common.copy_on_write import Shared
from stages.common.parallel import World
from stages.common.progress import Report
from stages.scoring.queries import Asked, rows_of
from stages.sliding_eval.params import SlidingEvalParams
from stages.sliding_eval.scorer import SlidingScorer
from stages.train.data import to_device
from stages.train.model import Model, is_matrix, is_quantised
from stages.ttt_eval.loss_weighting import weighted
from stages.ttt_eval.params import TttEvalParams


def chunk_lr(chunk: int, chunks: int, lr: float) -> float:
    """Half a cosine from lr at the first chunk to 0 at the last."""
    return lr * 0.5 * (1 + math.cos(math.pi * chunk / max(1, chunks - 1)))


def sgd_(
    parameters: list[Tensor], gradients: list[Tensor], momenta: list[Tensor], lr: float, momentum: float
) -> None:
    """buffer <- momentum * buffer + gradient; parameter <- parameter - lr * buffer; both in place."""
    torch._foreach_mul_(momenta, momentum)
    torch._foreach_add_(momenta, gradients)
    torch._foreach_add_(parameters, momenta, alpha=-lr)


def choose_(model: Model, trained: str) -> list[Tensor]:
    """The parameters to train: all, the blocks' matrices, or the vectors; the others take no gradients from now on."""
    for name, parameter in model.named_parameters():
        chosen = {"all": True, "matrices": is_matrix(name), "vectors": not is_quantised(name)}[trained]
        parameter.requires_grad_(chosen)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Weights(NamedTuple):
    """What training changes."""

    model: Model
    momenta: list[Tensor]

    def copy(self) -> "Weights":
        """Independent ones."""
        return Weights(copy.deepcopy(self.model), [momentum.clone() for momentum in self.momenta])


class TTTScorer:
    """A lawful scorer that wraps the sliding scorer and trains its model after each chunk.

    `n_targets` is the length of the stream, a public constant that the learning-rate schedule needs. The model given is never changed:
    the scorer trains a copy, and forks copy it again when one of them goes on to train.
    """

    def __init__(
        self,
        model: Model,
        sliding: SlidingEvalParams,
        params: TttEvalParams,
        world: World,
        n_targets: int,
        report: Report | None = None,
    ) -> None:
        self.params = params
        self.world = world
        self.window = sliding.window
        self.report = report or Report(is_main=False)
        self.chunks = math.ceil(n_targets / params.chunk)
        own = copy.deepcopy(model)
        momenta = [torch.zeros_like(parameter) for parameter in choose_(own, params.trained)]
        self.weights = Shared(Weights(own, momenta), Weights.copy)
        self.scorer = SlidingScorer(own, sliding, world)
        self.chunk = 0  # the one that is being scored
        self.pending: list[np.ndarray] = []  # tokens of this chunk so far, from its first input on, in pieces
        self.pending_tokens = 0

    @property
    def vocab_size(self) -> int:
        """The number of token ids a distribution is over."""
        return self.scorer.vocab_size

    @property
    def warm_up_targets(self) -> int:
        """The first chunk: it is scored and trained on."""
        return self.params.chunk

    def fork(self) -> "TTTScorer":
        """An independent copy; weights are shared until one of the two trains."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.weights = self.weights.fork()
        twin.scorer = self.scorer.fork()
        twin.pending = list(self.pending)
        return twin

    def predict(self) -> np.ndarray:
        """Natural log-probabilities of the next token, (V,) float64."""
        return self.scorer.predict()

    def observe(self, token: int) -> None:
        """Append a token to the prefix; the last one of a chunk starts its training."""
        self.scorer.observe(token)
        self._append(np.array([token], dtype=np.int64))

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Score and observe tokens in order, chunk by chunk; nats, float32."""
        return self.score(tokens, None)[0]

    def score(self, tokens: np.ndarray, asked: Asked | None) -> np.ndarray:
        """`score_stream` as the first of (R, N) rows; the others answer what is asked."""
        scores = [np.empty((rows_of(asked), 0), dtype=np.float32)]
        done = 0
        with self.report.progress("score and train", len(tokens)) as progress:
            while len(tokens):
                part = tokens[: self.params.chunk + 1 - self.pending_tokens]
                scored = len(part) - (self.pending_tokens == 0)
                scores.append(self.scorer.score(part, asked and asked.part(done, done + scored)))
                self._append(part.astype(np.int64))
                tokens, done = tokens[len(part) :], done + scored
                progress.advance(len(part), f"chunk {self.chunk}/{self.chunks}")
        return np.concatenate(scores, axis=1)

    def _append(self, tokens: np.ndarray) -> None:
        self.pending.append(tokens)
        self.pending_tokens += len(tokens)
        assert self.pending_tokens <= self.params.chunk + 1, "a chunk was appended to beyond its end"
        if self.pending_tokens < self.params.chunk + 1:
            return
        whole = np.concatenate(self.pending)
        if self.chunk < self.chunks - 1:
            self._train_on(whole)
        self.chunk += 1
        self.pending, self.pending_tokens = [whole[-1:]], 1

    def _train_on(self, tokens: np.ndarray) -> None:
        """Train on the scored chunk: tokens (chunk + 1,)."""
        self.scorer.model, momenta = self.weights.own()
        parameters = self._trained_parameters()
        lr = chunk_lr(self.chunk, self.chunks, self.params.lr)
        rows = np.lib.stride_tricks.sliding_window_view(tokens, self.window + 1)[:: self.window]
        per_step = min(len(rows), self.params.batch_tokens // self.window)
        for _ in range(self.params.epochs):
            for first in range(0, len(rows), per_step):
                self._gradients(rows[first : first + per_step])
                torch.nn.utils.clip_grad_norm_(parameters, self.params.clip_norm)
                with torch.no_grad():
                    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                    sgd_(parameters, gradients, momenta, lr, self.params.momentum)
                self.scorer.model.zero_grad(set_to_none=True)

    def _gradients(self, rows: np.ndarray) -> None:
        """The mean loss's gradients over all ranks; each rank takes every size-th sequence."""
        mine = rows[
            self.world.rank :: self.world.size
        ].copy()  # the rows are a read-only view of overlapping windows
        inputs, targets = to_device(mine, self.world.device)
        with torch.enable_grad():
            losses = weighted(self.scorer.model(inputs, targets, looped=True), self.params.confidence)
            (losses.sum() / (len(rows) * self.window)).backward()
        for parameter in self._trained_parameters():
            assert parameter.grad is not None
            self.world.sum_(parameter.grad)

    def _trained_parameters(self) -> list[Tensor]:
        return [parameter for parameter in self.scorer.model.parameters() if parameter.requires_grad]
