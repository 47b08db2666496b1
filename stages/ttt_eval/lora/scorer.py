"""Score-first test-time training of low-rank adapters, a fresh set for each document (#1530, and what followed it).

A document is cut into chunks of targets. Chunk c is scored with adapters trained on chunks 0 ... c-1 of the same document; the gradient of
the very losses that are its scores then makes one step of AdamW. Its last chunk is never trained on. The model's own weights are frozen.

Nothing passes from one document to another, so any documents may lie side by side as rows of a batch, and in any order: a score depends on
the tokens before it in its own document only. (#1530 and its successors adapt a batch at a time too, but keep A from batch to batch and
train the model between: then order matters.) The context of a chunk ends with the chunk and reaches back `window` tokens at most, and
is recomputed for every chunk because the adapters have changed. A batch loses its rows as their documents end: with the lengths of web
text, a fixed number of rows would be four times the work. So shapes are many, and nothing here is compiled.

A document's company changes the last digits of its scores, since sums over other shapes run in another order. A call with too few documents
to fill a batch scores them one by one, which costs little: then every shape follows from the chunk's number, and a score is a function of
its past to the last bit.

Shapes: B documents, T tokens of context, S targets of a chunk, V vocabulary.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.common.parallel import World
from stages.common.progress import Progress, Report
from stages.scoring.queries import Asked, Questions, rows_of, scores_of
from stages.sliding_eval.params import SlidingEvalParams
from stages.train.model import Model, is_matrix
from stages.train.reference import softcapped
from stages.ttt_eval.lora.documents import Document, groups, split, table
from stages.ttt_eval.lora.weights import Bank, Layout, adamw_, fresh_bank
from stages.ttt_eval.loss_weighting import weighted
from stages.ttt_eval.params import TttEvalParams


def frozen(model: Model) -> Model:
    """A copy that takes no gradients, its matrices already in the dtype in which they are used."""
    twin = copy.deepcopy(model).requires_grad_(False)
    for name, parameter in twin.named_parameters():
        if is_matrix(name):
            parameter.data = parameter.data.to(model.dtype)
    return twin


class Work(NamedTuple):
    """What is asked of the scorer in one call, and where the answers go."""

    scores: np.ndarray  # (R, N) float32
    asked: Asked | None
    progress: Progress


class LoRAScorer:
    """A lawful scorer; all ranks call it alike and all get every score. The model given is never changed."""

    def __init__(
        self,
        model: Model,
        sliding: SlidingEvalParams,
        params: TttEvalParams,
        world: World,
        report: Report | None = None,
    ) -> None:
        self.model = frozen(model)
        self.window = sliding.window
        self.params = params
        self.lora = params.lora
        self.world = world
        self.report = report or Report(is_main=False)
        plan = model.plans[True]
        self.layout = Layout(model.params, self.lora, len(plan.encoder) + len(plan.decoder))
        self.fresh_P = self.layout.fresh(world.device)
        self.known = np.empty(0, dtype=np.int64)  # tokens of the open document
        self.bank = fresh_bank(
            self.fresh_P, 1
        )  # its adapters, trained on its whole chunks; replaced, never changed

    @property
    def vocab_size(self) -> int:
        """The number of token ids a distribution is over."""
        return self.model.params.vocab_size

    @property
    def warm_up_targets(self) -> int:
        """A window: a document or two, which show the kernels most of what they will be asked for."""
        return self.window

    def fork(self) -> "LoRAScorer":
        """An independent copy; what the two share is never changed."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def observe(self, token: int) -> None:
        """Append a token to the prefix; the last one of a chunk trains its document's adapters."""
        self.known = np.append(self.known, token)
        if token == self.model.params.bos_id or len(self.known) == 1:
            self.known, self.bank = self.known[-1:], fresh_bank(self.fresh_P, 1)
        elif (len(self.known) - 1) % self.lora.chunk == 0:
            bank, chunk = self.bank.copy(0), (len(self.known) - 1) // self.lora.chunk - 1
            self._step(bank, self._on_device(self.known[None]), None, chunk, trained=1)
            self.bank = bank

    @torch.no_grad()
    def predict(self) -> np.ndarray:
        """Natural log-probabilities of the next token, (V,) float64."""
        if not len(self.known):
            raise ValueError("nothing is observed yet: the first token of a stream is given, not predicted")
        start, end = self._context((len(self.known) - 1) // self.lora.chunk)
        place = len(self.known) - 1 - start
        z_1V = self._uncapped(
            self._on_device(table([self.known[start:]], end - start)),
            slice(place, place + 1),
            self.bank.weights_BP,
        )
        logits_V = softcapped(z_1V[0, 0], self.model.params.logit_softcap)
        return torch.log_softmax(logits_V.double(), dim=-1).cpu().numpy()

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Score and observe tokens in order; nats, float32."""
        return self.score(tokens, None)[0]

    def score(self, tokens: np.ndarray, asked: Asked | None) -> np.ndarray:
        """`score_stream` as the first of (R, N) rows; the others answer what is asked."""
        tokens = tokens.astype(np.int64)
        if not len(self.known):
            self.known, tokens = tokens[:1], tokens[1:]
        scores = np.zeros((rows_of(asked), len(tokens)), dtype=np.float32)
        if not len(tokens):
            return scores
        documents = split(self.known, tokens, self.model.params.bos_id)
        with self.report.progress("score and train", len(tokens)) as progress:
            self.bank = self._score_documents(documents, Work(scores, asked, progress))
        self.known = documents[-1].tokens
        return self.world.sum_(torch.from_numpy(scores).to(self.world.device)).cpu().numpy()

    def _score_documents(self, documents: list[Document], work: Work) -> Bank:
        """Score this rank's share; gives every rank the adapters of the last document, which stays open."""
        bank = None
        if documents[
            0
        ].first:  # begun in an earlier call; every rank goes on with it, and one keeps its scores
            bank = self._run(documents[:1], self.bank.copy(0), work)
            if not self.world.is_main:
                work.scores[:] = 0
        new = [document for document in documents if not document.first]
        side_by_side = self.lora.documents if len(new) >= self.lora.documents else 1
        for group in groups(new, self.world.rank, self.world.size, side_by_side):
            bank = self._run(group, fresh_bank(self.fresh_P, len(group)), work) or bank
        return self._from_its_rank(bank) if new else self._known(bank)

    def _run(self, group: list[Document], bank: Bank, work: Work) -> Bank | None:
        """Score documents side by side, those with the most targets first; gives the adapters of the one that stays open, if it is here."""
        size = self.lora.chunk
        last = max(document.chunks(size) for document in group)
        tokens_BL = self._on_device(table([document.tokens for document in group], last * size + 1))
        questions = None
        if work.asked is not None:
            about = [
                table([_about(document, row) for document in group], last * size)
                for row in work.asked.about_2N
            ]
            questions = Questions(self._on_device(np.stack(about)), work.asked.forest)
        scored = []
        for chunk in range(group[0].first // size, last):
            rows = sum(document.chunks(size) > chunk for document in group)
            trained = sum(document.trained(size) > chunk for document in group)
            scored.append((chunk, self._step(bank.rows(rows), tokens_BL, questions, chunk, trained)))
            work.progress.advance(rows * size * self.world.size)
        for chunk, scores_BS in scored:
            _fill(work.scores, group, chunk, scores_BS.cpu().numpy())
        return next((bank.copy(row) for row, document in enumerate(group) if document.is_open), None)

    def _step(
        self, bank: Bank, tokens_BL: Tensor, questions: Questions | None, chunk: int, trained: int
    ) -> Tensor:
        """The answers about a chunk of every document in the bank, (R, B, S); then the first `trained` documents learn from it."""
        start, end = self._context(chunk)
        rows, size = len(bank.weights_BP), self.lora.chunk
        place = slice(chunk * size - start, end - start)
        weights_BP = bank.weights_BP.detach().requires_grad_(trained > 0)
        with torch.set_grad_enabled(trained > 0):
            z_BSV = self._uncapped(tokens_BL[:rows, start:end], place, weights_BP)
            here = questions and questions._replace(
                about_2N=questions.about_2N[:, :rows, end - size : end].flatten(1)
            )
            scores = scores_of(
                self.model, z_BSV.flatten(0, 1), tokens_BL[:rows, end - size + 1 : end + 1].flatten(), here
            )
            scores = scores.unflatten(1, (rows, size))
            if trained:
                loss = weighted(scores[0, :trained], self.params.confidence).mean(dim=1).sum()
                (gradients_BP,) = torch.autograd.grad(loss, weights_BP)
                adamw_(bank.rows(trained), gradients_BP[:trained], chunk + 1, self.lora)
        return scores.detach()

    def _uncapped(self, inputs_BT: Tensor, place: slice, weights_BP: Tensor) -> Tensor:
        """Logits before the softcap at the positions `place`, (B, S, V)."""
        return self.model.uncapped(
            inputs_BT, True, place, self.layout.adapters(weights_BP.to(self.model.dtype))
        )

    def _context(self, chunk: int) -> tuple[int, int]:
        """Where the context of a chunk begins and ends in its document; known before the document's end is."""
        end = (chunk + 1) * self.lora.chunk
        return max(0, end - self.window), end

    def _from_its_rank(self, bank: Bank | None) -> Bank:
        """The bank that one rank has and the others have not."""
        if self.world.size > 1:
            bank = bank or Bank(*(torch.zeros_like(self.fresh_P)[None] for _ in Bank._fields))
            bank = Bank(*(self.world.sum_(tensor) for tensor in bank))
        return self._known(bank)

    @staticmethod
    def _known(bank: Bank | None) -> Bank:
        assert bank is not None, "the last document is open, and somebody scored it"
        return bank

    def _on_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.world.device)


def _about(document: Document, row: np.ndarray) -> np.ndarray:
    """A document's part of a row of questions, by its targets; zeros for those that are not scored."""
    own = np.zeros(document.targets, dtype=np.int64)
    own[document.first :] = row[document.place + document.first : document.place + document.targets]
    return own


def _fill(scores: np.ndarray, group: Sequence[Document], chunk: int, scores_BS: np.ndarray) -> None:
    """Put the answers about a chunk, (R, B, S), where they belong."""
    size = scores_BS.shape[-1]
    for row, document in enumerate(group[: scores_BS.shape[1]]):
        first, end = max(document.first, chunk * size), min(document.targets, (chunk + 1) * size)
        scores[:, document.place + first : document.place + end] = scores_BS[
            :, row, first - chunk * size : end - chunk * size
        ]
