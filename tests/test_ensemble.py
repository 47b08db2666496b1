"""The byte mixture on a network is a distribution, learns after it scores, and at first is the network."""

import copy
import dataclasses
import math
import os
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from stages.common import bpb
from stages.common.parallel import World
from stages.common.scorer import Scorer
from stages.scoring import byte_tree, evaluate
from stages.scoring.byte_tree_logits import NO_HINT, DeviceByteTrees
from stages.scoring.evaluate import warm_up_kernels
from stages.scoring.queries import Queries, TargetScores, concatenate, zero_scores
from stages.scoring.stream import ValidationStream
from stages.sliding_eval.scorer import SlidingScorer
from stages.ttt_eval.build import build_scorer
from stages.ttt_eval.bytemix.mixer import ByteMixer
from stages.ttt_eval.ensemble import EnsembleScorer
from stages.ttt_eval.ngram import tilt
from stages.ttt_eval.ngram.tilt import NgramTilt
from stages.ttt_eval.sgd.scorer import TTTScorer
from tests.byte_inputs import random_log_probs
from tests.factories import (
    SLIDING,
    TINY,
    TTT,
    add_between_threads,
    make_world,
    random_model,
    scorer_inputs,
    table,
)
from tests.slow_mixture import SlowByteMixer

RATE = 0.02
CPU = torch.device("cpu")


class Drawn:
    """A network whose law at each position is drawn, and does not depend on the tokens."""

    warm_up_targets = 0

    def __init__(self, vocab_size: int, seed: int = 5) -> None:
        self.vocab_size, self.seed, self.seen = vocab_size, seed, 0

    def fork(self) -> "Drawn":
        return copy.copy(self)

    def predict(self) -> np.ndarray:
        return random_log_probs(1, self.vocab_size, self.seed * 100_003 + self.seen)[0]

    def observe(self, token: int) -> None:
        self.seen += 1

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        return self.score(tokens, None).nll_N

    def score(self, tokens: np.ndarray, queries: Queries[np.ndarray] | None) -> TargetScores[np.ndarray]:
        scores = [zero_scores(0, queries, float32_zeros)]
        for token in tokens.tolist():
            if self.seen:
                law = self.predict()[None]
                one = TargetScores(np.array([-law[0, token]], np.float32))
                if queries is not None and queries.byte_trees is not None:
                    number = len(scores) - 1
                    ids = (token, int(queries.hint_ids_N[number]), int(queries.tree_ids_N[number]))
                    path = queries.byte_trees.path_logits(
                        torch.from_numpy(law), *(torch.tensor([i]) for i in ids)
                    )
                    hint_logp_N = np.zeros(1, np.float32)
                    hint_logit_N, path_logits_DN = (logits.numpy() for logits in path)
                    one = TargetScores(one.nll_N, hint_logp_N, hint_logit_N, path_logits_DN)
                scores.append(one)
            self.observe(token)
        return concatenate(scores)


def float32_zeros(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, np.float32)


def mixed(
    of: bpb.ByteTable, targets: int, rate: float = RATE, network: Any = None, tilt: NgramTilt | None = None
) -> EnsembleScorer:
    mixer = ByteMixer(byte_tree.build_byte_trees(of), 4 * targets, rate)
    return EnsembleScorer(network or Drawn(of.vocab_size), of.boundary, CPU, tilt, mixer)


def test_weight_one_on_the_network_is_its_loss_bit_for_bit(tokenised):
    of, tokens = tokenised
    np.testing.assert_array_equal(
        mixed(of, len(tokens), rate=0.0).score_stream(tokens), Drawn(of.vocab_size).score_stream(tokens)
    )


def test_with_weight_one_its_distribution_is_that_of_the_network(tokenised):
    """Telescoped: the product of a path's decisions, and the share among the ids that emit the same bytes."""
    of, tokens = tokenised
    scorer = mixed(of, len(tokens), rate=0.0)
    for place in (1, 40, 41, 900):
        scorer.score_stream(tokens[scorer.network.seen : place])  # type: ignore[attr-defined]
        np.testing.assert_allclose(scorer.predict(), scorer.network.predict(), atol=1e-5)


def test_it_learns(tokenised):
    of, tokens = tokenised
    plain, nll = Drawn(of.vocab_size).score_stream(tokens), mixed(of, len(tokens)).score_stream(tokens)
    assert nll.dtype == np.float32
    assert nll[len(nll) // 2 :].mean() < 0.5 * plain[len(nll) // 2 :].mean()


def test_it_computes_what_dictionaries_do_in_float64(tokenised):
    """Except for probabilities at the edge of a cell of the grid of logits, which may fall to either side."""
    of, tokens = tokenised
    tokens = tokens[:400]
    targets = tokens[1:].astype(np.int64)
    byte_trees = DeviceByteTrees(byte_tree.build_byte_trees(of), CPU)
    trees_N = byte_tree.tree_index_after(of.boundary, tokens[:-1])
    scores = Drawn(of.vocab_size).score(tokens, Queries(np.full_like(trees_N, NO_HINT), trees_N, byte_trees))
    assert scores.path_logits_DN is not None
    paths_ND = np.ascontiguousarray(scores.path_logits_DN.T) * np.float32(
        0.3
    )  # less sure: more decisions are mixed

    no_losses = np.zeros(len(targets), np.float32)
    without_collisions = ByteMixer(byte_trees.trees, 1 << 20, RATE, slots_per_context=1 << 20)
    fast = -without_collisions.score_and_learn(targets, trees_N, paths_ND, no_losses)

    by_dictionaries = SlowByteMixer(of.boundary, RATE)
    gains = []
    for row in zip(trees_N, targets, paths_ND, strict=True):
        gains.append(by_dictionaries.gain(byte_trees.trees, *row))
    slow = np.array(gains)
    assert slow[200:].mean() > 3
    apart = np.abs(slow - fast)
    assert np.median(apart) < 5e-5
    assert apart.mean() < 5e-4
    assert apart.max() < 0.02


def test_noise_cannot_be_beaten():
    """The canary bound: n uniform ids of V cost n log2 V - 64 bits, except in one of 2^64 streams."""
    of = table()
    tokens = np.random.Generator(np.random.PCG64(3)).integers(0, TINY.vocab_size, 8000).astype(np.uint16)

    class Uniform(Drawn):
        def predict(self) -> np.ndarray:
            return np.full(self.vocab_size, -math.log(self.vocab_size))

    bits = mixed(of, len(tokens), network=Uniform(TINY.vocab_size)).score_stream(tokens).sum(
        dtype=np.float64
    ) / math.log(2)
    assert (
        (len(tokens) - 1) * math.log2(TINY.vocab_size) - 64
        < bits
        < (len(tokens) - 1) * (math.log2(TINY.vocab_size) + 0.1)
    )


def test_the_counterfactual_sum_is_one_late_in_a_stream_and_the_law_is_what_is_charged(tokenised):
    of, tokens = tokenised
    scorer = mixed(of, len(tokens) - 1)
    assert scorer.mixer is not None
    at = 0
    after_boundary = np.flatnonzero(of.boundary[tokens])[-3:] + 1
    drawn = np.random.Generator(np.random.PCG64(1)).integers(len(tokens) // 2, len(tokens) - 1, 12)

    for place in np.unique(np.concatenate((drawn, after_boundary))).tolist():
        scorer.score_stream(tokens[at:place])
        at = place
        state = copy.deepcopy(scorer.mixer.value.state)
        law = scorer.predict()
        assert abs(np.exp(law).sum() - 1) < 1e-9
        assert np.abs(law - scorer.network.predict()).max() > 0.1

        # A prediction changes nothing, and each id is charged what was predicted.
        after = scorer.mixer.value.state
        arrays = zip((*state.text, *state[1:]), (*after.text, *after[1:]), strict=True)
        assert all(np.array_equal(a, b) for a, b in arrays)
        for token in [int(tokens[place]), *range(0, of.vocab_size, 11)]:
            charged = scorer.fork().score_stream(np.array([token], dtype=np.uint16))[0]
            assert abs(charged + law[token]) < 1e-4 * max(1, charged / 10)


def test_scores_come_before_updates(tokenised):
    of, tokens = tokenised
    base = mixed(of, len(tokens)).score_stream(tokens)
    for position in (300, 700, 701, 1500):
        changed = tokens.copy()
        changed[position:] = (changed[position:] + 5) % of.vocab_size
        scores = mixed(of, len(tokens)).score_stream(changed)
        np.testing.assert_array_equal(scores[: position - 1], base[: position - 1])
        assert scores[position - 1] != base[position - 1]


def test_forks_are_independent_in_both_directions(tokenised):
    of, tokens = tokenised
    straight = mixed(of, len(tokens))
    straight.score_stream(tokens[:500])
    expected = straight.score_stream(tokens[500:900])
    for first in ("original", "fork"):
        scorer = mixed(of, len(tokens))
        for token in tokens[:500].tolist():
            scorer.observe(token)
        twin = scorer.fork()
        other, kept = (scorer, twin) if first == "original" else (twin, scorer)
        other.score_stream(np.full(300, 9, dtype=np.uint16))
        np.testing.assert_array_equal(kept.score_stream(tokens[500:900]), expected)


def test_pieces_and_predictions_agree_with_the_whole_stream(monkeypatch: pytest.MonkeyPatch):
    of = table()
    tokens = np.random.Generator(np.random.PCG64(2)).integers(4, 12, 400).astype(np.uint16)
    tokens[::37] = 1

    def make():
        sliding = SlidingScorer(random_model(6), SLIDING, make_world())
        return mixed(of, 399, network=sliding, tilt=NgramTilt(of.text_hashes, 399, 0.05))

    whole = make().score_stream(tokens)
    pieces = make()
    parts = np.concatenate([pieces.score_stream(part) for part in np.split(tokens, [1, 20, 33, 34, 200])])
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    monkeypatch.setattr("stages.ttt_eval.ensemble.PIECE", 48)
    np.testing.assert_allclose(make().score_stream(tokens), whole, atol=1e-5)

    one_by_one = make()
    one_by_one.observe(int(tokens[0]))
    for target in range(300):
        if target % 3 == 0:
            law = one_by_one.predict()
            assert abs(np.logaddexp.reduce(law)) < 1e-9
            assert abs(law[tokens[target + 1]] + whole[target]) < 2e-5
        one_by_one.observe(int(tokens[target + 1]))


def test_the_parameters_decide():
    inputs = scorer_inputs(random_model(6), 100)
    for tilt_rate in (0.0, 0.05):
        for mixer_rate in (0.0, RATE):
            params = dataclasses.replace(TTT, mixer_rate=mixer_rate, tilt_rate=tilt_rate)
            scorer = build_scorer("ttt_eval", SLIDING, params, inputs)
            if not tilt_rate and not mixer_rate:
                assert isinstance(scorer, TTTScorer)
                continue
            assert isinstance(scorer, EnsembleScorer)
            assert (scorer.tilt is not None, scorer.mixer is not None) == (bool(tilt_rate), bool(mixer_rate))
            assert scorer.tilt is None or scorer.tilt.value.rate == tilt_rate
            assert scorer.mixer is None or scorer.mixer.value.rate == mixer_rate
    with pytest.raises(ValueError, match="mixer_rate: -1 is negative"):
        dataclasses.replace(TTT, mixer_rate=-1)


@pytest.mark.parametrize("kind", ["sgd", "lora"])
def test_a_target_is_few_calls_from_the_evaluation_to_the_arithmetic(kind: Any, monkeypatch):
    """Frames of this project from the evaluation to what computes a target's scores, both included.

    The mixture runs on a thread of its own, whose frames are counted alone.
    """
    params = dataclasses.replace(TTT, kind=kind, mixer_rate=RATE, tilt_rate=0.05)
    tokens = (np.arange(300) % 30 + 4).astype(np.uint16)
    tokens[::50] = TINY.bos_id
    scorer = build_scorer("ttt_eval", SLIDING, params, scorer_inputs(random_model(6), 299))
    depths: dict[str, int] = {}

    def record_depth(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def recorded(*arguments: Any, **named: Any) -> Any:
            files = [frame.filename for frame in traceback.extract_stack()]
            depth = sum("/stages/" in file for file in files) + 1
            depths[name] = max(depths.get(name, 0), depth)
            return function(*arguments, **named)

        monkeypatch.setattr(owner, name, recorded)

    record_depth(DeviceByteTrees, "path_logits")
    record_depth(tilt, "_score_and_learn")
    record_depth(ByteMixer, "score_and_learn")
    evaluate.score(scorer, ValidationStream(tokens, np.ones(299, np.int64), table()))
    assert set(depths) == {"path_logits", "_score_and_learn", "score_and_learn"}
    assert max(depths.values()) <= 7


@pytest.mark.parametrize(
    ("name", "kind", "batch_tokens"),
    [
        ("sliding_eval", "sgd", TTT.batch_tokens),
        ("ttt_eval", "sgd", TTT.batch_tokens),
        ("ttt_eval", "sgd", SLIDING.window),  # fewer windows a step than ranks
        ("ttt_eval", "lora", TTT.batch_tokens),
    ],
)
def test_ranks_score_as_one_does(name: str, kind: Any, batch_tokens: int, monkeypatch: pytest.MonkeyPatch):
    """With tilt and mixture, in pieces that end inside documents and chunks."""
    lora = dataclasses.replace(TTT.lora, lr=0.001)
    params = dataclasses.replace(
        TTT, kind=kind, batch_tokens=batch_tokens, lora=lora, mixer_rate=RATE, tilt_rate=0.05
    )
    tokens = (np.arange(200) * 7 % 30 + 4).astype(np.uint16)
    tokens[::45] = TINY.bos_id

    def make(world: World) -> Scorer:
        inputs = scorer_inputs(random_model(6), 199)._replace(world=world)
        return build_scorer(name, SLIDING, params, inputs)

    whole = make(make_world()).score_stream(tokens)
    add_between_threads(monkeypatch, 2)
    ranks = [make(make_world(rank, 2)) for rank in (0, 1)]
    with ThreadPoolExecutor(2) as threads:
        for first, end in ((0, 77), (77, 80), (80, 200)):
            piece = tokens[first:end]
            for nll in threads.map(lambda rank, piece=piece: rank.score_stream(piece), ranks):
                np.testing.assert_allclose(nll, whole[max(0, first - 1) : end - 1], atol=2e-5)


@pytest.mark.parametrize("answer", [math.nan, math.inf, -math.inf, None], ids=str)
def test_a_warm_up_with_arbitrary_scores_writes_only_inside_its_arrays(answer: float | None):
    """Kernels are compiled meanwhile, and what their launches would have written is whatever was there
    (stages/train/kernels/precompile.py)."""

    class Anything:
        vocab_size, warm_up_targets = table().vocab_size, 600

        def score(self, tokens: np.ndarray, queries: Queries[np.ndarray] | None) -> TargetScores[np.ndarray]:
            random = np.random.Generator(np.random.PCG64(0))

            def arbitrary(shape: tuple[int, ...]) -> np.ndarray:
                bits = random.integers(0, 1 << 32, shape, np.uint32).view(np.float32)
                return bits if answer is None else np.full(shape, answer, np.float32)

            return zero_scores(len(tokens) - 1, queries, arbitrary)

    scorer = mixed(table(), 600, network=Anything(), tilt=NgramTilt(table().text_hashes, 600, 0.05))
    assert scorer.tilt is not None
    with np.errstate(invalid="ignore"):
        warm_up_kernels(scorer)
    assert os.environ["NUMBA_BOUNDSCHECK"] == "1", "nobody would see it"
    assert scorer.tilt.value.state.updates_W.any() == (answer is None or not math.isnan(answer))
