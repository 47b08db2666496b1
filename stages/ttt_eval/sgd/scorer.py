"""Score-first test-time training by SGD on whole chunks (#549, #1413, #1493).

The stream is cut into chunks of targets. Chunk c is scored with weights that were trained on chunks
0 ... c-1, and only then trained on, in stream order. The last chunk is not trained on, because
nothing follows it. The training targets of a chunk are exactly its scored targets. The loss is
computed in float32 like everywhere.
"""

import copy
import math
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.common.copy_on_write import CopyOnWrite
from stages.common.parallel import World
from stages.common.progress import Logger
from stages.scoring.queries import Queries, TargetScores, concatenate, zero_scores
from stages.sliding_eval.params import SlidingEvalParams
from stages.sliding_eval.scorer import SlidingScorer
from stages.train.data import windows_to_device
from stages.train.model import Model, is_matrix, is_quantised
from stages.ttt_eval.loss_weighting import weighted
from stages.ttt_eval.params import TttEvalParams


def chunk_lr(chunk: int, chunks: int, lr: float) -> float:
    """Learning rate of a chunk: half a cosine from lr at the first to 0 at the last."""
    return lr * 0.5 * (1 + math.cos(math.pi * chunk / max(1, chunks - 1)))


def sgd_(
    parameters: list[Tensor], gradients: list[Tensor], momenta: list[Tensor], lr: float, momentum: float
) -> None:
    """One step of SGD, in place.

    buffer <- momentum * buffer + gradient; parameter <- parameter - lr * buffer.
    """
    torch._foreach_mul_(momenta, momentum)
    torch._foreach_add_(momenta, gradients)
    torch._foreach_add_(parameters, momenta, alpha=-lr)


def select_trained_(model: Model, trained: str) -> list[Tensor]:
    """Turn off the gradients of all parameters but those to train, and return these.

    `trained`: all, the blocks' matrices, or vectors, which are all that is stored unquantised.
    """
    for name, parameter in model.named_parameters():
        chosen = {"all": True, "matrices": is_matrix(name), "vectors": not is_quantised(name)}[trained]
        parameter.requires_grad_(chosen)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class TrainedWeights(NamedTuple):
    """Model and optimizer state: all that training changes."""

    model: Model
    momenta: list[Tensor]  # of the trained parameters

    def copy(self) -> "TrainedWeights":
        """An independent copy."""
        return TrainedWeights(copy.deepcopy(self.model), [momentum.clone() for momentum in self.momenta])


class TTTScorer:
    """A lawful scorer that wraps the sliding scorer and trains its model after each chunk.

    `n_targets` is the length of the stream, a public constant that the learning-rate schedule
    needs. The model given is never changed: the scorer trains a copy, and forks copy it again when
    one of them continues to train.
    """

    def __init__(
        self,
        model: Model,
        sliding: SlidingEvalParams,
        params: TttEvalParams,
        world: World,
        n_targets: int,
        logger: Logger | None = None,
    ) -> None:
        self.params = params
        self.world = world
        self.window = sliding.window
        self.logger = logger or Logger(is_main=False)

        own_model = copy.deepcopy(model)
        momenta = [torch.zeros_like(parameter) for parameter in select_trained_(own_model, params.trained)]
        self.weights = CopyOnWrite(TrainedWeights(own_model, momenta), TrainedWeights.copy)
        self.scorer = SlidingScorer(own_model, sliding, world)

        self.chunks = math.ceil(n_targets / params.chunk)
        self.chunk = 0  # the one that is being scored
        self.chunk_tokens: list[np.ndarray] = []  # its tokens so far, from its first input on, in pieces
        self.n_chunk_tokens = 0

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
        twin = copy.copy(self)
        twin.weights = self.weights.fork()
        twin.scorer = self.scorer.fork()
        twin.chunk_tokens = list(self.chunk_tokens)
        return twin

    def predict(self) -> np.ndarray:
        """Natural log-probabilities of the next token, (V,) float64."""
        return self.scorer.predict()

    def observe(self, token: int) -> None:
        """Append a token to the prefix; the last one of a chunk starts its training."""
        self.scorer.observe(token)
        self._append_and_train(np.array([token], dtype=np.int64))

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Score and observe tokens in order, chunk by chunk; nats, float32."""
        return self.score(tokens, None).nll_N

    def score(self, tokens: np.ndarray, queries: Queries[np.ndarray] | None) -> TargetScores[np.ndarray]:
        """Score and observe tokens (N,) in order, chunk by chunk, with one query for each target."""
        parts = [zero_scores(0, queries, lambda shape: np.zeros(shape, np.float32))]
        n_scored = 0
        with self.logger.progress("score and train", len(tokens)) as progress:
            while len(tokens):
                # Up to the end of the chunk. The first token of a stream is given, not scored.
                part = tokens[: self.params.chunk + 1 - self.n_chunk_tokens]
                tokens = tokens[len(part) :]
                targets = slice(n_scored, n_scored + len(part) - (self.n_chunk_tokens == 0))
                part_queries = queries and queries.map(itemgetter(targets))
                parts.append(self.scorer.score(part, part_queries))
                n_scored = targets.stop

                self._append_and_train(part.astype(np.int64))
                progress.advance(len(part), f"chunk {self.chunk}/{self.chunks}")
        return concatenate(parts)

    def _append_and_train(self, tokens: np.ndarray) -> None:
        """Add scored tokens to the chunk; train on it and begin the next one if it is full."""
        self.chunk_tokens.append(tokens)
        self.n_chunk_tokens += len(tokens)
        assert self.n_chunk_tokens <= self.params.chunk + 1, "a chunk was appended to beyond its end"
        if self.n_chunk_tokens == self.params.chunk + 1:
            whole = np.concatenate(self.chunk_tokens)
            if self.chunk < self.chunks - 1:
                self._train_on(whole)
            self.chunk += 1
            self.chunk_tokens = [whole[-1:]]
            self.n_chunk_tokens = 1

    def _train_on(self, tokens: np.ndarray) -> None:
        """Train on a scored chunk: tokens (chunk + 1,)."""
        self.scorer.model, momenta = self.weights.writable()
        self.scorer.forget_cache()
        parameters = self._trained_parameters()
        lr = chunk_lr(self.chunk, self.chunks, self.params.lr)

        # Windows one after another, each with the first target of the next; a read-only view.
        windows = np.lib.stride_tricks.sliding_window_view(tokens, self.window + 1)[:: self.window]
        per_step = min(len(windows), self.params.batch_tokens // self.window)
        for _ in range(self.params.epochs):
            for first in range(0, len(windows), per_step):
                self._compute_gradients(windows[first : first + per_step])
                torch.nn.utils.clip_grad_norm_(parameters, self.params.clip_norm)
                with torch.no_grad():
                    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                    sgd_(parameters, gradients, momenta, lr, self.params.momentum)
                self.scorer.model.zero_grad(set_to_none=True)

    def _compute_gradients(self, windows: np.ndarray) -> None:
        """Compute the gradients of the mean loss of windows (B, window + 1), summed over ranks.

        Each rank takes every size-th window.
        """
        own_windows = windows[self.world.rank :: self.world.size].copy()
        if len(own_windows):
            inputs_BT, targets_BT = windows_to_device(own_windows, self.world.device)
            with torch.enable_grad():
                nll_BT = self.scorer.model(inputs_BT, targets_BT, looped=True)
                losses_BT = weighted(nll_BT, self.params.weight_by_surprise)
                (losses_BT.sum() / (len(windows) * self.window)).backward()

        for parameter in self._trained_parameters():
            if parameter.grad is None:  # more ranks than windows: this one adds zeros
                parameter.grad = torch.zeros_like(parameter)
            self.world.sum_(parameter.grad)

    def _trained_parameters(self) -> list[Tensor]:
        return [parameter for parameter in self.scorer.model.parameters() if parameter.requires_grad]
