import copy
import math

import numpy as np
import pytest
import torch

from stages.sliding_eval.params import SlidingEvalParams
from stages.sliding_eval.scorer import SlidingScorer
from stages.ttt_eval.params import Params, TttEvalParams
from stages.ttt_eval.sgd.scorer import TTTScorer, chunk_lr
from tests.factories import (
    PARALLEL,
    SLIDING,
    TINY,
    TTT,
    assert_forks_are_independent,
    assert_pieces_and_predictions_agree,
    make_world,
    random_model,
)


def stream(count: int = 150) -> np.ndarray:
    """A cycle that a model can learn while it is scored."""
    tokens = (np.arange(count) * 5 % 23 + 4).astype(np.uint16)
    tokens[0] = 1
    return tokens


def scorer(tokens: np.ndarray, **changes: float) -> TTTScorer:
    return TTTScorer(
        random_model(6), SLIDING, TttEvalParams(**{**TTT.__dict__, **changes}), make_world(), len(tokens) - 1
    )


def slow_ttt(tokens: np.ndarray) -> np.ndarray:
    """Test-time training with torch's own SGD: all targets of a chunk are scored, then it is trained on."""
    model = random_model(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    targets = len(tokens) - 1
    chunks = math.ceil(targets / 32)
    ids = torch.from_numpy(tokens.astype(np.int64))
    nll = np.empty(targets)

    for chunk in range(chunks):
        first, end = 32 * chunk, min(targets, 32 * chunk + 32)
        with torch.no_grad():
            for target in range(first, end):
                start = 0 if target < 16 else ((target - 16) // 4 + 1) * 4
                logits = model.logits(ids[None, start : target + 1])[0, -1]
                nll[target] = float(torch.nn.functional.cross_entropy(logits, ids[target + 1]))

        # Then train on them, unless no target follows.
        if chunk == chunks - 1:
            break
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * chunk / (chunks - 1)))
        for _ in range(2):
            for begin in range(first, end, 16):
                optimizer.zero_grad()
                rows = ids[None, begin : begin + 17]
                model(rows[:, :-1], rows[:, 1:]).mean().backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
    return nll


def test_equals_a_slow_version_with_torch_s_sgd():
    tokens = stream()
    np.testing.assert_allclose(scorer(tokens).score_stream(tokens), slow_ttt(tokens), atol=5e-4)


@pytest.mark.parametrize("trained", ["matrices", "vectors"])
def test_what_is_not_trained_stays_as_it_is(trained):
    """Matrices are the blocks' products; vectors are all that is kept in full precision, so never a table."""
    tokens = stream()
    s = scorer(tokens, trained=trained)
    before = copy.deepcopy(s.scorer.model.state_dict())
    s.score_stream(tokens)
    moved = {
        name for name, tensor in s.scorer.model.state_dict().items() if not torch.equal(before[name], tensor)
    }
    matrices = {
        name for name, tensor in before.items() if name.startswith("blocks.") and name.endswith(".weight")
    }
    tables = {"embedding.weight", "value_tables.0.weight", "value_tables.1.weight"}
    assert moved == (matrices if trained == "matrices" else set(before) - matrices - tables)


def test_weights_by_surprise_are_relative_to_each_sequence():
    """The gradient of one batch is that of each loss times a bounded weight.

    The weight is the loss over the mean of its sequence.
    """
    tokens = stream(65)
    s = scorer(tokens, weight_by_surprise=True, batch_tokens=32, epochs=1)
    s.score_stream(tokens[:33])
    model = random_model(6)
    ids = torch.from_numpy(tokens[:33].astype(np.int64))
    losses = model(ids[:-1].view(2, 16), ids[1:].view(2, 16))
    share = (losses.detach() / losses.detach().mean(1, keepdim=True)).clip(1 / 3, 3)
    (share * losses).mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for mine, theirs in zip(s.scorer.model.parameters(), model.parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(mine, theirs - 0.05 * theirs.grad, atol=1e-5, rtol=1e-4)


def test_learning_helps_and_the_first_chunk_is_the_plain_model():
    tokens = stream(400)
    adapted = scorer(tokens).score_stream(tokens)
    plain = SlidingScorer(random_model(6), SLIDING, make_world()).score_stream(tokens)
    np.testing.assert_allclose(adapted[:32], plain[:32], atol=2e-5)
    assert adapted[200:].mean() < plain[200:].mean() - 0.5


def test_scores_come_before_updates():
    """A changed token leaves every earlier score as it was, to the bit; old weights score its own chunk."""
    tokens = stream()
    base = scorer(tokens).score_stream(tokens)
    for position in (31, 32, 33, 40, 64, 65, 100, 149):
        changed = tokens.copy()
        changed[position] = 30
        scores = scorer(tokens).score_stream(changed)
        np.testing.assert_array_equal(scores[: position - 1], base[: position - 1])
        assert scores[position - 1] != base[position - 1]


def test_zero_epochs_or_zero_rate_is_the_sliding_scorer():
    tokens = stream()
    plain = SlidingScorer(random_model(6), SLIDING, make_world()).score_stream(tokens)
    np.testing.assert_allclose(scorer(tokens, epochs=0).score_stream(tokens), plain, atol=2e-5)
    np.testing.assert_allclose(scorer(tokens, lr=0.0).score_stream(tokens), plain, atol=2e-5)


def test_pieces_predictions_and_the_whole_stream_agree():
    tokens = stream()
    assert_pieces_and_predictions_agree(lambda: scorer(tokens), tokens, [1, 20, 33, 34, 97])


def test_the_model_given_and_the_forks_are_independent():
    tokens = stream()
    assert_forks_are_independent(
        lambda model: TTTScorer(model, SLIDING, TTT, make_world(), len(tokens) - 1), tokens
    )


def test_a_fork_that_trains_first_does_not_move_the_original():
    tokens = stream()
    s = scorer(tokens)
    s.score_stream(tokens[:20])
    twin = s.fork()
    twin.score_stream(tokens[20:90])
    np.testing.assert_array_equal(s.score_stream(tokens[20:]), scorer(tokens).score_stream(tokens)[19:])


def test_the_schedule_is_half_a_cosine_over_chunks():
    assert chunk_lr(0, 5, 0.1) == pytest.approx(0.1)
    assert chunk_lr(2, 5, 0.1) == pytest.approx(0.05)
    assert chunk_lr(4, 5, 0.1) == pytest.approx(0.0)
    assert chunk_lr(0, 1, 0.1) == pytest.approx(0.1)


def test_the_last_chunk_is_not_trained_on():
    tokens = stream(65)  # two whole chunks
    s = scorer(tokens)
    s.score_stream(tokens[:33])
    weights = copy.deepcopy(s.scorer.model.state_dict())
    s.score_stream(tokens[33:])
    assert all(torch.equal(weights[name], tensor) for name, tensor in s.scorer.model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk": 40}, r"ttt_eval\.chunk: 40 is not a multiple of sliding_eval\.window \(16\)"),
        ({"batch_tokens": 20}, r"ttt_eval\.batch_tokens: 20 is not a multiple"),
        ({"epochs": -1}, "epochs: -1 is negative"),
        ({"momentum": 1.5}, "momentum: 1.5 is not between 0 and 1"),
    ],
)
def test_parameters_that_cannot_be_right(changes, message):
    with pytest.raises(ValueError, match=message):
        Params(PARALLEL, SLIDING, TttEvalParams(**{**TTT.__dict__, **changes}))


def test_a_chunk_that_cuts_a_window_in_two():
    with pytest.raises(ValueError, match="would cut a window of stride 6 in two"):
        Params(PARALLEL, SlidingEvalParams(16, 6, 3, 32), TTT)


def test_tiny_model_fits_the_window():
    assert TINY.context == SLIDING.window
