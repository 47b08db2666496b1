"""Byte trees, and the logits of a path's decisions: from a distribution, and with a hint put back."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.common import bpb
from stages.scoring import byte_tree
from stages.scoring.byte_tree_logits import NO_HINT, DeviceByteTrees
from stages.scoring.queries import Queries, concatenate
from stages.sliding_eval.scorer import SlidingScorer
from stages.ttt_eval.ensemble import EnsembleScorer
from stages.ttt_eval.lora.scorer import LoRAScorer
from stages.ttt_eval.ngram import tilt
from stages.ttt_eval.sgd.scorer import TTTScorer
from tests.byte_inputs import TEXTS, random_log_probs
from tests.factories import SLIDING, TINY, TTT, make_world, random_model, table

MODES = [byte_tree.AFTER_TEXT, byte_tree.AFTER_BOUNDARY]


def slow_path(law: np.ndarray, texts: list[bytes], token: int) -> list[float]:
    """Logits of a token's path, from sets of ids, without an order or intervals.

    There is a decision END where some ids stop and some go on, and one for each bit where both sides exist.
    """
    alive = set(range(len(texts)))
    found = []

    def decide(right: set[int], left: set[int]) -> None:
        if right and left:
            found.append(
                float(np.log(sum(np.exp(law[i]) for i in right) / sum(np.exp(law[i]) for i in left)))
            )

    for depth in range(len(texts[token]) + 1):
        stop = {i for i in alive if len(texts[i]) == depth}
        decide(alive - stop, stop)
        if depth == len(texts[token]):
            return found
        alive -= stop
        for bit in range(7, -1, -1):
            ones = {i for i in alive if texts[i][depth] >> bit & 1}
            decide(ones, alive - ones)
            alive = ones if texts[token][depth] >> bit & 1 else alive - ones
    raise AssertionError


def test_emissions_are_the_counted_bytes(tokenised):
    of, tokens = tokenised
    behind = of.boundary[tokens[:-1]]
    texts = {flag: of.appended_bytes(flag) for flag in (False, True)}
    emitted = [texts[bool(flag)][token] for flag, token in zip(behind, tokens[1:], strict=True)]
    np.testing.assert_array_equal([len(text) for text in emitted], bpb.target_bytes(tokens, of))
    assert b"".join(emitted).decode() == "".join(TEXTS)


@pytest.mark.parametrize("mode", MODES)
def test_a_path_has_the_decisions_of_sets_of_ids_and_the_hint_is_put_back(tokenised, mode):
    of, _ = tokenised
    texts = of.appended_bytes(bool(mode))
    targets = np.arange(0, of.vocab_size, 2)
    modes = np.full_like(targets, mode)
    log_probs = random_log_probs(len(targets), of.vocab_size)

    # Hints in turn: none, the target itself, an id that emits the same bytes if there is one, any id.
    twins = []
    for target in targets:
        same = (i for i, text in enumerate(texts) if text == texts[target] and i != target)
        twins.append(next(same, NO_HINT))
    assert sum(twin != NO_HINT for twin in twins[2::4]) > 2
    generator = np.random.Generator(np.random.PCG64(mode))
    any_id = generator.integers(of.vocab_size, size=len(targets))
    none = np.full(len(targets), NO_HINT)
    hints = np.choose(np.arange(len(targets)) % 4, [none, targets, twins, any_id])

    # The hints' logits.
    byte_trees = DeviceByteTrees(byte_tree.build_byte_trees(of), torch.device("cpu"))
    ids = (torch.from_numpy(row) for row in (targets, hints, modes))
    hint_logits, paths_DN = (
        logits.numpy() for logits in byte_trees.path_logits(torch.from_numpy(log_probs), *ids)
    )
    assert paths_DN.shape == (byte_trees.longest_path, len(targets))
    rows = np.arange(len(targets))
    at_hint = np.where(hints == NO_HINT, np.log(0.5), log_probs[rows, hints])
    np.testing.assert_allclose(hint_logits, at_hint - np.log(-np.expm1(at_hint)), atol=1e-5)

    # The paths, in which the hints are put back with another logit.
    boosts = np.where(hints == NO_HINT, 0.0, generator.normal(0, 3, len(targets)))
    paths_DN = np.ascontiguousarray(paths_DN)
    tilt._tilt_path_(byte_trees.trees, modes, targets, hints, hint_logits + boosts, paths_DN)
    log_probs[rows, hints] += boosts
    for i, target in enumerate(targets.tolist()):
        expected = slow_path(log_probs[i], texts, target)
        np.testing.assert_allclose(paths_DN[: len(expected), i], expected, atol=1e-5)
        assert not paths_DN[len(expected) :, i].any()


@pytest.mark.parametrize("mode", MODES)
def test_an_id_of_no_probability_has_a_mass(tokenised, mode):
    of, _ = tokenised
    law = np.full((1, of.vocab_size), -120.0)
    law[0, 7] = 0
    byte_trees = DeviceByteTrees(byte_tree.build_byte_trees(of), torch.device("cpu"))
    for target in range(0, of.vocab_size, 5):
        read = byte_trees.path_logits(
            torch.from_numpy(law), *(torch.tensor([i]) for i in (target, NO_HINT, mode))
        )
        assert torch.isfinite(read.path_logits_DN).all()


def a_stream() -> np.ndarray:
    tokens = np.random.Generator(np.random.PCG64(2)).integers(4, TINY.vocab_size, 120).astype(np.uint16)
    tokens[::29] = 1
    return tokens


@pytest.mark.parametrize("kind", ["sliding", "sgd", "lora"])
def test_every_network_answers_what_its_predictions_say(kind):
    tokens, of = a_stream(), table()
    hints = np.arange(119) * 7 % TINY.vocab_size
    trees_N = byte_tree.tree_index_after(of.boundary, tokens[:-1])

    def make():
        model = random_model(6)
        if kind == "sliding":
            return SlidingScorer(model, SLIDING, make_world())
        if kind == "lora":
            return LoRAScorer(model, SLIDING, replace(TTT, lora=replace(TTT.lora, lr=0.001)), make_world())
        return TTTScorer(model, SLIDING, TTT, make_world(), 119)

    byte_trees = DeviceByteTrees(byte_tree.build_byte_trees(of), torch.device("cpu"))
    pieces = make()
    parts = []
    for first, end in ((0, 1), (1, 50), (50, 120)):
        targets = slice(max(0, first - 1), end - 1)
        queries = Queries(hints[targets], trees_N[targets], byte_trees)
        parts.append(pieces.score(tokens[first:end], queries))
    scores = concatenate(parts)
    assert scores.hint_logp_N is not None
    assert scores.path_logits_DN is not None
    np.testing.assert_allclose(scores.nll_N, make().score_stream(tokens), atol=2e-5)

    one_by_one = make()
    texts = {mode: of.appended_bytes(bool(mode)) for mode in MODES}
    for target in range(0, 119):
        one_by_one.observe(int(tokens[target]))
        if target % 3:
            continue
        law = one_by_one.predict()
        assert abs(law[hints[target]] - scores.hint_logp_N[target]) < 1e-4
        law[hints[target]] = -np.inf
        with np.errstate(divide="ignore"):
            expected = slow_path(law, texts[trees_N[target]], int(tokens[target + 1]))
        np.testing.assert_allclose(scores.path_logits_DN[: len(expected), target], expected, atol=1e-3)


def test_paths_under_the_tilt_are_those_of_its_predictions():
    tokens, of = np.tile(a_stream(), 2), table()
    targets = tokens[1:].astype(np.int64)
    trees_N = byte_tree.tree_index_after(of.boundary, tokens[:-1])
    byte_trees = DeviceByteTrees(byte_tree.build_byte_trees(of), torch.device("cpu"))

    # The mechanism alone, on the scores of a network.
    alone = tilt.NgramTilt(of.text_hashes, len(targets), 0.05)
    hints = alone.observe(tokens).last(len(targets))
    assert (hints.ids_N != NO_HINT).mean() > 0.4
    network = SlidingScorer(random_model(6), SLIDING, make_world())
    scores = network.score(tokens, Queries(hints.ids_N, trees_N, byte_trees))
    alone.score_and_learn_(scores, hints, targets, trees_N, byte_trees.trees)
    assert scores.path_logits_DN is not None

    # The same as a scorer, one prediction after the other.
    other = SlidingScorer(random_model(6), SLIDING, make_world())
    ensemble = EnsembleScorer(
        other,
        of.boundary,
        torch.device("cpu"),
        tilt.NgramTilt(of.text_hashes, len(targets), 0.05),
    )

    texts = {mode: of.appended_bytes(bool(mode)) for mode in MODES}
    for target in range(len(targets)):
        ensemble.observe(int(tokens[target]))
        if target % 3:
            continue
        law = ensemble.predict()
        assert abs(law[targets[target]] + scores.nll_N[target]) < 1e-4
        expected = slow_path(law, texts[trees_N[target]], int(targets[target]))
        np.testing.assert_allclose(scores.path_logits_DN[: len(expected), target], expected, atol=1e-3)
