"""Score-first test-time training of low-rank adapters, a fresh set for each document.

The method is that of #1530 and its successors, but for what is said below.

A document is cut into chunks of targets. Chunk c is scored with adapters trained on chunks
0 ... c-1 of the same document. The gradient of the very losses that are its scores then makes one
step of AdamW. A document's last chunk is never trained on. The model's own weights are frozen.

Nothing passes from one document to another: a score depends on the tokens before it in its own
document only. So documents can be rows of one batch, in any order. (#1530 and its successors also
adapt a batch at a time, but keep A from batch to batch and train the model in between; then order
matters.)

The context of a chunk ends with the chunk and reaches back `window` tokens at most. It is computed
again for every chunk because the adapters have changed. A batch loses its rows as their documents
end: with the lengths of web text, a fixed number of rows would be four times the work. So there are
many shapes, and nothing here is compiled.

The other rows of a batch change the last digits of a score, because sums over other shapes run in
another order. A call with too few documents to fill a batch scores them one by one, which costs
little. Then every shape follows from the chunk's number, and a score is a function of its past to
the last bit.

Shapes: N targets of a call, B documents, L tokens of the longest document, T tokens of context,
S targets of a chunk, P weights of a document's adapters, V vocabulary.
"""

import copy
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.common.parallel import World
from stages.common.progress import Logger, Progress
from stages.scoring.queries import Queries, TargetScores, score_targets, zero_scores
from stages.sliding_eval.params import SlidingEvalParams
from stages.train.model import Extensions, Model, is_matrix
from stages.train.reference import softcapped
from stages.ttt_eval.lora.documents import StreamDocument, group_documents, pad_rows, split_documents
from stages.ttt_eval.lora.weights import AdapterBatch, AdapterLayout, adamw_, fresh_adapters
from stages.ttt_eval.loss_weighting import weighted
from stages.ttt_eval.params import TttEvalParams


def frozen(model: Model) -> Model:
    """A copy without gradients, its matrices already in the dtype in which they are used."""
    twin = copy.deepcopy(model).requires_grad_(False)
    for name, parameter in twin.named_parameters():
        if is_matrix(name):
            parameter.data = parameter.data.to(model.dtype)
    return twin


class ScoringCall(NamedTuple):
    """One call of `LoRAScorer.score`: its queries, and where its result is collected."""

    scores: TargetScores[np.ndarray]  # on each rank those of its own documents, zeros elsewhere
    queries: Queries[np.ndarray] | None
    progress: Progress


class LoRAScorer:
    """A lawful scorer. All ranks make the same calls, and all get every score.

    The model given is never changed.
    """

    def __init__(
        self,
        model: Model,
        sliding: SlidingEvalParams,
        params: TttEvalParams,
        world: World,
        logger: Logger | None = None,
    ) -> None:
        self.model = frozen(model)
        self.window = sliding.window
        self.params = params
        self.lora = params.lora
        self.world = world
        self.logger = logger or Logger(is_main=False)
        self.layout = AdapterLayout(model.params, self.lora, len(model.plans[True].order))
        self.fresh_P = self.layout.fresh(world.device)

        # The open document: its tokens, and its adapters, trained on its whole chunks. The tensors
        # are replaced and never changed, so forks can share them.
        self.open_tokens = np.empty(0, dtype=np.int64)
        self.open_adapters = fresh_adapters(self.fresh_P, 1)

    @property
    def vocab_size(self) -> int:
        """The number of token ids a distribution is over."""
        return self.model.params.vocab_size

    @property
    def warm_up_targets(self) -> int:
        """A window: one or two documents, with most of the shapes that kernels will meet."""
        return self.window

    def fork(self) -> "LoRAScorer":
        """An independent copy."""
        return copy.copy(self)

    def observe(self, token: int) -> None:
        """Append a token to the prefix; the last one of a chunk trains its document's adapters."""
        self.open_tokens = np.append(self.open_tokens, token)
        n_targets = len(self.open_tokens) - 1
        if token == self.model.params.bos_id or n_targets == 0:
            self.open_tokens = self.open_tokens[-1:]
            self.open_adapters = fresh_adapters(self.fresh_P, 1)
        elif n_targets % self.lora.chunk == 0:
            adapters = self.open_adapters.copy(0)
            chunk = n_targets // self.lora.chunk - 1
            tokens_1L = self._on_device(self.open_tokens[None])
            self._score_chunk_and_train(adapters, tokens_1L, None, chunk, trained=1)
            self.open_adapters = adapters

    @torch.no_grad()
    def predict(self) -> np.ndarray:
        """Natural log-probabilities of the next token, (V,) float64."""
        if not len(self.open_tokens):
            raise ValueError("nothing is observed yet: the first token of a stream is given, not predicted")

        # The context is padded to where its chunk will end: the rotary base depends on its length.
        start, end = self._context(chunk=(len(self.open_tokens) - 1) // self.lora.chunk)
        inputs_1T = self._on_device(pad_rows([self.open_tokens[start:]], end - start))
        last = len(self.open_tokens) - 1 - start
        z_11V = self._raw_logits(inputs_1T, slice(last, last + 1), self.open_adapters.weights_BP)
        logits_V = softcapped(z_11V[0, 0], self.model.params.logit_softcap)
        return torch.log_softmax(logits_V.double(), dim=-1).cpu().numpy()

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Score and observe tokens in order; nats, float32."""
        return self.score(tokens, None).nll_N

    def score(self, tokens: np.ndarray, queries: Queries[np.ndarray] | None) -> TargetScores[np.ndarray]:
        """Score and observe tokens (N,) in order, with one query for each target."""
        tokens = tokens.astype(np.int64)
        if not len(self.open_tokens):  # the first token of a stream is given
            self.open_tokens = tokens[:1]
            tokens = tokens[1:]
        scores = zero_scores(len(tokens), queries, _zeros)
        if not len(tokens):
            return scores

        documents = split_documents(self.open_tokens, tokens, self.model.params.bos_id)
        new = [document for document in documents if not document.first_target]
        with self.logger.progress("score and train", len(tokens)) as progress:
            call = ScoringCall(scores, queries, progress)

            # The document that an earlier call began: every rank continues it, and one keeps its
            # scores.
            open_adapters = None
            if documents[0].first_target:
                open_adapters = self._score_group(documents[:1], self.open_adapters.copy(0), call)
                if not self.world.is_main:
                    scores.write_(0, zero_scores(len(tokens), queries, _zeros))

            # New documents are shared out over the ranks.
            group_size = self.lora.documents if len(new) >= self.lora.documents else 1
            for group in group_documents(new, self.world.rank, self.world.size, group_size):
                adapters = fresh_adapters(self.fresh_P, len(group))
                open_adapters = self._score_group(group, adapters, call) or open_adapters

        # The last document stays open. If it is a new one, one rank has its adapters.
        self.open_tokens = documents[-1].tokens
        if new and self.world.size > 1:
            open_adapters = self._on_every_rank(open_adapters)
        assert open_adapters is not None, "no rank scored the last document, which is open"
        self.open_adapters = open_adapters
        return scores.map(lambda values: self.world.sum_(self._on_device(values)).cpu().numpy())

    def _on_every_rank(self, adapters: AdapterBatch | None) -> AdapterBatch:
        """Share adapters that one rank has with the others, which have None and add zeros."""
        if adapters is None:
            zeros_1P = torch.zeros_like(self.fresh_P)[None]
            adapters = AdapterBatch(zeros_1P, zeros_1P.clone())
        return AdapterBatch(*(self.world.sum_(tensor) for tensor in adapters))

    def _score_group(
        self, group: list[StreamDocument], adapters: AdapterBatch, call: ScoringCall
    ) -> AdapterBatch | None:
        """Score documents as rows of a batch, those with the most targets first.

        Returns the adapters of the document that stays open, if it is in the group.
        """
        size = self.lora.chunk
        n_chunks = max(document.n_chunks(size) for document in group)
        tokens_BL = self._on_device(pad_rows([document.tokens for document in group], n_chunks * size + 1))

        def by_document(ids_N: np.ndarray) -> Tensor:
            rows = [_ids_of_document(document, ids_N) for document in group]
            return self._on_device(pad_rows(rows, n_chunks * size))

        queries = None if call.queries is None else call.queries.map(by_document)

        # Documents end at different chunks; those that go on are the first rows.
        scored = []
        for chunk in range(group[0].first_target // size, n_chunks):
            rows = sum(document.n_chunks(size) > chunk for document in group)
            trained = sum(document.n_trained_chunks(size) > chunk for document in group)
            scores = self._score_chunk_and_train(adapters.first(rows), tokens_BL, queries, chunk, trained)
            scored.append((chunk, scores))
            call.progress.advance(rows * size * self.world.size)

        # Copied from the device at the end, so that it never waits for the host.
        for chunk, scores in scored:
            on_host = scores.map(lambda values: values.cpu().numpy())
            self._write_scores(call.scores, group, chunk, on_host)
        for row, document in enumerate(group):
            if document.is_open:
                return adapters.copy(row)
        return None

    def _score_chunk_and_train(
        self,
        adapters: AdapterBatch,
        tokens_BL: Tensor,
        queries: Queries[Tensor] | None,
        chunk: int,
        trained: int,
    ) -> TargetScores[Tensor]:
        """Score a chunk of every document, then train the first `trained` documents on it, in place.

        `queries` have ids (B, L - 1). Returns the scores of B * S targets, document by document.
        """
        start, end = self._context(chunk)
        rows = len(adapters.weights_BP)
        size = self.lora.chunk
        positions = slice(chunk * size - start, end - start)  # of the chunk in its context
        weights_BP = adapters.weights_BP.detach().requires_grad_(trained > 0)
        with torch.set_grad_enabled(trained > 0):
            # Score.
            z_BSV = self._raw_logits(tokens_BL[:rows, start:end], positions, weights_BP)
            targets_BS = tokens_BL[:rows, end - size + 1 : end + 1]
            chunk_queries = queries and queries.map(lambda ids_BL: ids_BL[:rows, end - size : end].flatten())
            scores = score_targets(self.model, z_BSV.flatten(0, 1), targets_BS.flatten(), chunk_queries)

            # Train: each document's loss has a gradient in its own weights only.
            if trained:
                nll_BS = scores.nll_N.unflatten(0, (rows, size))
                losses_BS = weighted(nll_BS[:trained], self.params.weight_by_surprise)
                (gradients_BP,) = torch.autograd.grad(losses_BS.mean(dim=1).sum(), weights_BP)
                adamw_(adapters.first(trained), gradients_BP[:trained], chunk + 1, self.lora)
        return scores.map(Tensor.detach)

    def _raw_logits(self, inputs_BT: Tensor, positions: slice, weights_BP: Tensor) -> Tensor:
        """Logits before the softcap at the positions, (B, S, V)."""
        adapters = self.layout.adapters(weights_BP.to(self.model.dtype))
        return self.model.raw_logits(inputs_BT, True, positions, Extensions(adapters))

    def _write_scores(
        self,
        call_scores: TargetScores[np.ndarray],
        group: Sequence[StreamDocument],
        chunk: int,
        scores: TargetScores[np.ndarray],
    ) -> None:
        """Write a chunk's scores, those of the first documents of a group, to their places in the call's."""
        size = self.lora.chunk
        for row in range(len(scores.nll_N) // size):
            document = group[row]
            first = max(document.first_target, chunk * size)
            end = min(document.n_targets, (chunk + 1) * size)
            in_chunk = slice((row - chunk) * size + first, (row - chunk) * size + end)
            call_scores.write_(document.offset + first, scores.map(itemgetter((..., in_chunk))))

    def _context(self, chunk: int) -> tuple[int, int]:
        """Start and end of a chunk's context; they do not depend on where the document ends."""
        end = (chunk + 1) * self.lora.chunk
        return max(0, end - self.window), end

    def _on_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.world.device)


def _ids_of_document(document: StreamDocument, ids_N: np.ndarray) -> np.ndarray:
    """The part of a call's query ids that is a document's, (M,); zeros for targets scored earlier."""
    ids_M = np.zeros(document.n_targets, dtype=np.int64)
    first = document.offset + document.first_target
    ids_M[document.first_target :] = ids_N[first : document.offset + document.n_targets]
    return ids_M


def _zeros(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, np.float32)
