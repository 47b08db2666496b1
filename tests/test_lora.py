"""Adapters in the one forward, and the scorer that trains a set of them for each document."""

import copy
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from stages.scoring.queries import Queries
from stages.sliding_eval.params import SlidingEvalParams
from stages.train.model import Extensions, Model
from stages.train.params import ModelParams
from stages.ttt_eval.lora.documents import group_documents, split_documents
from stages.ttt_eval.lora.scorer import LoRAScorer
from stages.ttt_eval.lora.weights import AdapterBatch, AdapterLayout, adamw_, fresh_adapters
from stages.ttt_eval.loss_weighting import weighted
from stages.ttt_eval.params import LoraParams, Params, TttEvalParams
from tests.factories import (
    LORA,
    PARALLEL,
    SLIDING,
    TINY,
    TTT,
    add_between_threads,
    assert_forks_are_independent,
    assert_pieces_and_predictions_agree,
    make_world,
    random_model,
)

DOCUMENTS = replace(TINY, attention="documents")
BOS = TINY.bos_id
# Targets of each document: one, fewer than a chunk, whole chunks, more than the window, one again, and a
# document that is left open.
LENGTHS = (1, 3, 10, 42, 17, 1, 5, 26, 12, 23)
VISITS = 9

each_attention = pytest.mark.parametrize(
    "model_params", [TINY, DOCUMENTS], ids=lambda model_params: model_params.attention
)


def stream() -> np.ndarray:
    """Documents of LENGTHS targets, each a cycle of its own that can be learnt while it is scored."""
    parts = []
    for number, length in enumerate(LENGTHS):
        document = (np.arange(length) * (number + 2) % 23 + 4).astype(np.uint16)
        document[0] = BOS
        parts.append(document)
    return np.concatenate(parts)


def lora(**changes: Any) -> TttEvalParams:
    return replace(TTT, kind="lora", lora=replace(LORA, **changes))


def scorer(model_params: ModelParams = TINY, weight_by_surprise: bool = False, **changes: Any) -> LoRAScorer:
    return LoRAScorer(
        random_model(6, model_params),
        SLIDING,
        replace(lora(**changes), weight_by_surprise=weight_by_surprise),
        make_world(),
    )


def random_adapters(layout: AdapterLayout, documents: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(documents, sum(layout.sizes), generator=generator) * 0.1


# The forward pass


@each_attention
@pytest.mark.parametrize("looped", [False, True])
def test_fresh_adapters_change_no_bit(model_params, looped):
    model = random_model(3, model_params)
    plan = model.plans[looped]
    layout = AdapterLayout(model_params, LORA, len(plan.encoder) + len(plan.decoder))
    adapters = layout.adapters(fresh_adapters(layout.fresh(torch.device("cpu")), 3).weights_BP)
    tokens = torch.from_numpy(stream()[:45].astype(np.int64)).view(3, 15)
    with torch.no_grad():
        extensions = Extensions(adapters)
        assert torch.equal(model.features(tokens, looped), model.features(tokens, looped, extensions))
        assert torch.equal(
            model.raw_logits(tokens, looped, slice(None)),
            model.raw_logits(tokens, looped, slice(None), extensions),
        )


def merged(
    model: Model, weights_P: torch.Tensor, layout: AdapterLayout, visit: int
) -> dict[str, torch.Tensor]:
    """scale B A of each adapter of a visit, as whole matrices, read from the vector by hand."""
    rank, scale, offset, found = layout.params.rank, layout.params.alpha / layout.params.rank, 0, {}
    for slot in layout.slots:
        down = weights_P[offset : offset + rank * slot.inputs].view(rank, slot.inputs)
        offset += down.numel()
        up = weights_P[offset : offset + slot.outputs * rank].view(slot.outputs, rank)
        offset += up.numel()
        if slot.visit == visit:
            found[slot.name] = scale * up @ down
    assert offset == len(weights_P)
    return found


def test_adapters_equal_changed_weights_row_by_row():
    """An adapter that reads the product's input is a change of the weight; no block is visited twice here."""
    model_params = replace(TINY, loops=0)
    layout = AdapterLayout(
        model_params, replace(LORA, adapters=("query", "key", "value", "head")), TINY.layers
    )
    model = random_model(2, model_params)
    tokens = torch.from_numpy(stream()[:30].astype(np.int64)).view(2, 15)
    weights = random_adapters(layout, 2)
    adapters = layout.adapters(weights)
    with torch.no_grad():
        adapted = model.raw_logits(tokens, True, slice(None), Extensions(adapters))
        for row in range(2):
            changed = copy.deepcopy(model)
            for index, block in enumerate(changed.blocks):
                for name, matrix in merged(model, weights[row], layout, index).items():
                    getattr(block.attention, name).weight += matrix
            x = changed.features(tokens[row : row + 1], True)
            head = model.embedding.weight + merged(model, weights[row], layout, -1)["head"]
            z = torch.nn.functional.linear(x, head)
            torch.testing.assert_close(adapted[row : row + 1], z, atol=2e-4, rtol=1e-4)


def test_adapters_beside_output_and_mlp_read_the_normed_input():
    model = random_model(2)
    layout = AdapterLayout(TINY, replace(LORA, adapters=("output", "mlp")), VISITS)
    visit = layout.adapters(random_adapters(layout, 1)).visits[4]
    h = torch.randn(1, 7, TINY.width)
    with torch.no_grad():
        for name, adapter in (("output", visit.output), ("mlp", visit.mlp)):
            assert adapter is not None
            matrix = merged(model, random_adapters(layout, 1)[0], layout, 4)[name]
            torch.testing.assert_close(
                adapter.add_to(torch.zeros(1, 7, TINY.width), h), h @ matrix.T, atol=1e-5, rtol=1e-4
            )
    assert visit.query is visit.key is visit.value is None


def test_a_row_s_adapters_do_not_reach_its_neighbours():
    model = random_model(2)
    layout = AdapterLayout(TINY, LORA, VISITS)
    tokens = torch.from_numpy(stream()[:30].astype(np.int64)).view(2, 15)
    weights = random_adapters(layout, 2).requires_grad_()
    x = model.features(tokens, True, Extensions(layout.adapters(weights)))
    (gradient,) = torch.autograd.grad(x[0].square().sum(), weights)
    assert gradient[0].abs().max() > 0
    assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))


# Training


def test_adamw_is_torch_s():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 30, generator=generator), []
    parameter = torch.nn.Parameter(ours.clone())
    bank = AdapterBatch(ours.clone(), torch.zeros_like(ours))
    optimizer = torch.optim.AdamW([parameter], lr=0.02, betas=(0.0, 0.99), eps=LORA.eps, weight_decay=0.5)
    for step in range(1, 6):
        gradient = torch.randn(2, 30, generator=generator)
        parameter.grad = gradient.clone()
        optimizer.step()
        adamw_(bank, gradient, step, LORA)
        theirs.append(parameter.detach().clone())
    torch.testing.assert_close(bank.weights_BP, theirs[-1], atol=1e-6, rtol=1e-5)


def test_surprise_weights_each_loss_by_itself():
    nll = torch.tensor([[1.0, 2.0, 9.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    assert weighted(nll, False) is nll
    (gradient,) = torch.autograd.grad(weighted(nll, True).sum(), nll)
    torch.testing.assert_close(gradient, torch.tensor([[1 / 3, 2 / 3, 3.0, 1 / 3], [1.0] * 4, [1.0] * 4]))


# Documents


def test_a_stream_is_split_at_its_documents_and_every_target_is_in_one():
    tokens = stream().astype(np.int64)
    documents = split_documents(tokens[:1], tokens[1:], BOS)
    assert [document.n_targets for document in documents] == [*LENGTHS[:-1], LENGTHS[-1] - 1]
    assert [document.offset for document in documents] == np.cumsum((0, *LENGTHS[:-1])).tolist()
    assert [document.is_open for document in documents] == [False] * 9 + [True]
    assert all(document.tokens[0] == BOS for document in documents)
    assert all(document.tokens[-1] == BOS for document in documents[:-1])


def test_groups_are_of_similar_length_and_share_the_documents_out():
    tokens = stream().astype(np.int64)
    documents = split_documents(tokens[:1], tokens[1:], BOS)
    both = [group_documents(documents, rank, 2, 3) for rank in (0, 1)]
    lengths = [[[document.n_targets for document in group] for group in rank] for rank in both]
    assert lengths == [[[42, 22, 12], [5, 1]], [[26, 17, 10], [3, 1]]]


# The scorer


def slow_lora(tokens: np.ndarray, model_params: ModelParams, weight_by_surprise: bool = False) -> np.ndarray:
    """One document and one target at a time, with adapters as parameters, and torch's AdamW."""
    model = random_model(6, model_params).requires_grad_(False)
    layout = AdapterLayout(model_params, LORA, VISITS)
    ids = torch.from_numpy(tokens.astype(np.int64))
    nll = np.empty(len(tokens) - 1)
    size = LORA.chunk
    starts = [*np.flatnonzero(tokens == BOS).tolist(), len(tokens) - 1]

    for begin, stop in itertools.pairwise(starts):
        weights = torch.nn.Parameter(layout.fresh(torch.device("cpu"))[None])
        optimizer = torch.optim.AdamW(
            [weights], lr=LORA.lr, betas=(0.0, LORA.beta2), eps=LORA.eps, weight_decay=LORA.weight_decay
        )
        for chunk in range(math.ceil((stop - begin) / size)):
            # Score the chunk.
            first, end = begin + chunk * size, begin + chunk * size + size
            start = max(begin, end - SLIDING.window)
            losses = []
            for target in range(first, min(end, stop)):
                adapters = layout.adapters(weights)
                context = ids[None, start : target + 1]
                z = model.raw_logits(context, True, slice(-1, None), Extensions(adapters))[0, 0]
                logits = 30 * torch.tanh(z / 30)
                losses.append(torch.nn.functional.cross_entropy(logits, ids[target + 1]))
                nll[target] = losses[-1].item()

            # Then train on it, unless it ends the document.
            if end < stop:
                chunk_nll = torch.stack(losses)
                share = torch.ones(size)
                if weight_by_surprise:
                    share = chunk_nll.detach() / chunk_nll.detach().mean()
                optimizer.zero_grad()
                (share.clip(1 / 3, 3) * chunk_nll).mean().backward()
                optimizer.step()
    return nll


@each_attention
@pytest.mark.parametrize("weight_by_surprise", [False, True])
def test_equals_a_slow_version_with_torch_s_adamw(model_params, weight_by_surprise):
    tokens = stream()
    fast = scorer(model_params, weight_by_surprise).score_stream(tokens)
    np.testing.assert_allclose(fast, slow_lora(tokens, model_params, weight_by_surprise), atol=5e-4)


def test_learning_helps_within_a_document_and_its_first_chunk_is_the_plain_model():
    tokens = stream()
    adapted, plain = scorer().score_stream(tokens), scorer(lr=0.0).score_stream(tokens)
    starts = np.cumsum((0, *LENGTHS[:-1]))
    for start, length in zip(starts, LENGTHS, strict=True):
        first = slice(start, min(start + LORA.chunk, start + length, len(plain)))
        np.testing.assert_allclose(adapted[first], plain[first], atol=2e-5)
    long = slice(starts[3] + 20, starts[3] + 42)
    assert adapted[long].mean() < plain[long].mean() - 0.2


def test_a_score_depends_on_its_own_document_s_past_alone():
    """A changed token moves no earlier score, to the bit, and of other documents only its own targets."""
    tokens = stream()
    base = scorer().score_stream(tokens)
    starts = np.cumsum((0, *LENGTHS))
    for position in (3, 5, 13, 15, 19, 20, 30, 55, 75, 100, 139):
        changed = tokens.copy()
        assert changed[position] != BOS
        changed[position] = 30
        scores = scorer().score_stream(changed)
        end = min(int(starts[starts > position][0]), len(base))
        np.testing.assert_array_equal(scores[: position - 1], base[: position - 1])
        assert scores[position - 1] != base[position - 1]
        np.testing.assert_array_equal(scores[end:], base[end:])


def test_few_documents_are_scored_by_the_past_alone_to_the_last_bit():
    """The end of a document is in the future, too."""
    tokens = stream()
    base = scorer(documents=100).score_stream(tokens)
    for position in (33, 60, 100, 130):
        changed = tokens.copy()
        changed[position : position + 9 : 2] = BOS
        scores = scorer(documents=100).score_stream(changed)
        np.testing.assert_array_equal(scores[: position - 1], base[: position - 1])


def test_order_and_company_change_no_score():
    tokens = stream()
    base = scorer(lr=0.001).score_stream(tokens)
    for documents in (1, 2, 10):
        np.testing.assert_allclose(
            scorer(lr=0.001, documents=documents).score_stream(tokens), base, atol=1e-5
        )
    parts = np.split(tokens, np.cumsum(LENGTHS)[:-1])
    places = np.split(np.arange(len(tokens)), np.cumsum(LENGTHS)[:-1])
    order = [3, 9, 0, 7, 2, 8, 1, 6, 5, 4]
    # Each document's last target is the BOS that follows it, so scores move with their documents' own places.
    moved = scorer(lr=0.001).score_stream(np.append(np.concatenate([parts[i] for i in order]), [BOS]))
    kept = np.concatenate([places[i] for i in order])
    is_last = kept == len(base)
    np.testing.assert_allclose(moved[~is_last], base[kept[~is_last]], atol=1e-5)


def test_pieces_predictions_and_the_whole_stream_agree():
    assert_pieces_and_predictions_agree(scorer, stream(), [1, 2, 9, 14, 19, 20, 31, 56, 57, 97])


def test_predictions_beyond_the_training_context_are_those_of_whole_chunks():
    """The rotary base then depends on the length of the context: it must be the chunk's, not the prefix's."""
    tokens, wide = stream(), SlidingEvalParams(window=30, stride=4, batch_windows=3, chunk=32)
    whole = LoRAScorer(random_model(6), wide, lora(), make_world()).score_stream(tokens)
    one_by_one = LoRAScorer(random_model(6), wide, lora(), make_world())
    for target, token in enumerate(tokens[:60].tolist()):
        one_by_one.observe(token)
        assert abs(one_by_one.predict()[tokens[target + 1]] + whole[target]) < 2e-4


def test_the_model_given_and_the_forks_are_independent():
    observed = (9, 9, 8, 9, 7, 9, 6, 9, 9, 20, 21, BOS, 9)
    assert_forks_are_independent(
        lambda model: LoRAScorer(model, SLIDING, lora(), make_world()), stream(), observed
    )


def test_ranks_share_the_documents_out_without_changing_a_score(monkeypatch):
    """Ranks are threads that add their shares; a piece of a stream may end inside a document."""
    tokens = stream()
    whole = scorer(lr=0.001).score_stream(tokens)
    add_between_threads(monkeypatch, 2)
    ranks = [LoRAScorer(random_model(6), SLIDING, lora(lr=0.001), make_world(rank, 2)) for rank in (0, 1)]
    with ThreadPoolExecutor(2) as threads:
        for piece, expected in (
            (tokens[:47], whole[:46]),
            (tokens[47:50], whole[46:49]),
            (tokens[50:], whole[49:]),
        ):
            for scores in threads.map(lambda rank, piece=piece: rank.score_stream(piece), ranks):
                np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_hints_get_their_log_probabilities():
    tokens = stream()
    hints = np.arange(len(tokens) - 1) % TINY.vocab_size
    scores = scorer().score(tokens, Queries(hints, np.zeros_like(hints), None))
    assert scores.hint_logp_N is not None
    assert scores.path_logits_DN is None
    np.testing.assert_allclose(scores.nll_N, scorer().score_stream(tokens), atol=1e-5)
    one_by_one = scorer()
    for target in range(50):
        one_by_one.observe(int(tokens[target]))
        assert abs(one_by_one.predict()[hints[target]] - scores.hint_logp_N[target]) < 2e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk": 20}, r"ttt_eval\.lora\.chunk: 20 is above sliding_eval\.window \(16\)"),
        ({"rank": 0}, "rank: 0 is not above zero"),
        ({"adapters": ()}, "adapters: .* is empty"),
        ({"adapters": ("key", "key")}, "names one twice"),
        ({"beta2": 1.0}, "beta2: 1 would never look"),
        ({"lr": -1.0}, "lr: -1.0 is negative"),
    ],
)
def test_parameters_that_cannot_be_right(changes, message):
    with pytest.raises(ValueError, match=message):
        Params(PARALLEL, SLIDING, replace(TTT, kind="lora", lora=LoraParams(**{**LORA.__dict__, **changes})))
