"""The pieces that the byte mixture is compiled from, each against what it says."""

import math
from typing import Any

import numpy as np
import pytest
from numba import njit

from stages.scoring import byte_tree
from stages.ttt_eval.bytemix import mixer
from stages.ttt_eval.bytemix.context_tables import NIBBLE_OF_PREFIX, NODE_OF_PREFIX
from stages.ttt_eval.bytemix.mixer import (
    COUNT_BITS,
    FROZEN,
    INITIAL_COUNT,
    MAX_PROB,
    MAX_PROB_COUNT,
    ByteMixer,
    decision_buffers,
)
from stages.ttt_eval.bytemix.simd import WIDTH, add_scaled, dot
from stages.ttt_eval.bytemix.text_history import MAX_MATCH


@njit
def update(probs: np.ndarray, bit: Any) -> None:
    probs[0] = mixer._updated_prob(probs[0], bit)


ROWS = np.random.Generator(np.random.PCG64(1)).normal(size=(3, WIDTH)).astype(np.float32)


def test_a_row_of_inputs_times_two_of_weights():
    summed = njit(lambda weights, inputs: dot(weights, 0, weights, 1, inputs, 0))
    assert summed(ROWS[:2], ROWS[2:]) == pytest.approx((ROWS[0] + ROWS[1]) @ ROWS[2], rel=1e-5)


def test_a_step_adds_to_one_row_alone_and_counts_itself():
    weights = ROWS[:2].copy()
    njit(lambda weights, inputs: add_scaled(weights, 1, inputs, 0, np.float32(0.5)))(weights, ROWS[2:])
    expected = ROWS[1] + 0.5 * ROWS[2]
    expected[-1] += 1
    np.testing.assert_array_equal(weights[0], ROWS[0])
    np.testing.assert_allclose(weights[1], expected, rtol=1e-6)


def test_the_exponential():
    compiled = njit(lambda x: mixer._exp(x))
    for x in np.linspace(-18, 18, 1001):
        assert compiled(x) == pytest.approx(math.exp(x), rel=1e-10)


@pytest.mark.parametrize("came", [0, 1])
def test_an_adaptive_probability_stays_in_its_range_and_forgets(came: int):
    """From one end to the other, and no further: a number of 22 bits is never carried into the others."""
    chances = np.array([MAX_PROB * (1 - came) << COUNT_BITS | INITIAL_COUNT], np.uint32)
    for times in range(4000):
        before = int(chances[0] >> COUNT_BITS)
        update(chances, came)
        after = int(chances[0] >> COUNT_BITS)
        assert before <= after <= MAX_PROB if came else before >= after >= 0
        assert chances[0] & FROZEN == min(INITIAL_COUNT + times + 1, MAX_PROB_COUNT)
    assert abs(after - came * MAX_PROB) < 256 * came + 1


def test_nothing_is_learnt_where_nothing_was_seen():
    chances = np.array([MAX_PROB // 2 << COUNT_BITS | FROZEN], np.uint32)
    before = chances.copy()
    update(chances, 1)
    np.testing.assert_array_equal(chances, before)


def test_every_prefix_of_a_byte_has_a_place_of_its_own():
    places = {(int(NIBBLE_OF_PREFIX[prefix]), int(NODE_OF_PREFIX[prefix])) for prefix in range(1, 256)}
    assert len(places) == 255
    assert {place for _, place in places} == set(range(1, 16))


def random_case(of, count: int, seed: int = 4):
    """Targets, trees and milder paths than a network's, so that long ones have many decisions to mix."""
    random = np.random.Generator(np.random.PCG64(seed))
    trees = byte_tree.build_byte_trees(of)
    tokens = random.integers(0, of.vocab_size, count + 1)
    trees_N = byte_tree.tree_index_after(of.boundary, tokens[:-1])
    return (
        trees,
        tokens[1:],
        trees_N,
        random.normal(size=(count, trees.longest_path)).astype(np.float32),
        np.zeros(count, np.float32),
    )


def test_a_text_longer_than_what_is_kept_of_it(tokenised):
    """A match is looked for in the last bytes alone; until they are full the size changes nothing."""
    of, tokens = tokenised
    trees, _, _, paths_ND, nll_N = random_case(of, len(tokens) - 1)
    targets, trees_N = tokens[1:].astype(np.int64), byte_tree.tree_index_after(of.boundary, tokens[:-1])
    short, long = ByteMixer(trees, 1000, 0.02), ByteMixer(trees, 1 << 20, 0.02)
    assert len(short.state.text.ring) == 1024
    ends = np.cumsum(
        [len(of.appended_bytes(bool(behind))[token]) for behind, token in zip(trees_N, targets, strict=True)]
    )
    assert ends[-1] > 3 * 1024
    by_short, by_long = (one.score_and_learn(targets, trees_N, paths_ND, nll_N) for one in (short, long))
    assert np.isfinite(by_short).all()
    full = int(np.searchsorted(ends, 1024 - MAX_MATCH))
    assert by_short[full:].sum() != by_long[full:].sum()
    tables_alike = ByteMixer(trees, 1000, 0.02)
    text = tables_alike.state.text._replace(match_table=np.zeros(1 << 18, np.uint32))
    tables_alike.state = tables_alike.state._replace(text=text)
    np.testing.assert_array_equal(
        tables_alike.score_and_learn(targets, trees_N, paths_ND, nll_N)[:full], by_long[:full]
    )


def test_gains_of_long_paths_are_those_of_their_decisions(tokenised):
    """More decisions than are multiplied at once, and the cap of a mixed logit: each against log1p."""
    of, _ = tokenised
    trees, targets, trees_N, paths_ND, nll_N = random_case(of, 600)
    counts = trees.path_start_TV[trees_N, targets + 1] - trees.path_start_TV[trees_N, targets]
    own, mixed = np.linspace(-5.9, 5.9, 40), np.linspace(18, -18, 40)
    work = decision_buffers(40)
    work.network_logits[:], work.mixed_logits[:] = own, mixed
    gain = njit(lambda work: mixer._set_errors_and_sum_gain(work, 0, 40))(work)
    assert gain == pytest.approx((np.log1p(np.exp(-own)) - np.log1p(np.exp(-mixed))).sum(), rel=1e-9)
    np.testing.assert_allclose(work.errors, 1 / (1 + np.exp(mixed)), rtol=1e-9)
    assert counts.max() > 8
    assert np.isfinite(ByteMixer(trees, 4000, 0.02).score_and_learn(targets, trees_N, paths_ND, nll_N)).all()


def test_no_loss_jumps_where_the_network_becomes_sure(tokenised):
    """A decision is left to it little by little: what was learnt against it has no weight at the end."""
    of, _ = tokenised
    trees, targets, trees_N, paths_ND, nll_N = random_case(of, 600)
    learnt, losses = ByteMixer(trees, 4000, 0.5), []
    learnt.score_and_learn(targets, trees_N, paths_ND, nll_N)
    for logit in (4.0, 5.0, 5.5, 5.999, 6.001):
        paths_ND = np.full((1, trees.longest_path), logit, np.float32)
        losses.append(
            [
                learnt.copy().score_and_learn(targets[i : i + 1], trees_N[i : i + 1], paths_ND, nll_N[:1])[0]
                for i in range(200)
            ]
        )
    away = np.abs(losses).max(axis=1)
    assert away[0] > 0.5
    assert away[2] < 0.7 * away[1]
    assert away[3] < 0.002 * away[1] + 1e-6
    assert away[4] == 0


def test_what_is_no_number_is_left_alone(tokenised):
    of, _ = tokenised
    trees, targets, trees_N, paths_ND, nll_N = random_case(of, 50)
    spoiled = np.full_like(paths_ND, np.nan)
    spoiled[::2] = np.inf
    np.testing.assert_array_equal(
        ByteMixer(trees, 4000, 0.02).score_and_learn(targets, trees_N, spoiled, nll_N), nll_N
    )
