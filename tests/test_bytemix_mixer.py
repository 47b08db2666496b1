"""The pieces that the byte mixture is compiled from, each against what it says."""

import math

import numpy as np
import pytest
from numba import njit

from stages.scoring import byte_tree
from stages.ttt_eval.bytemix import mixer
from stages.ttt_eval.bytemix.context_tables import HALF, LONGEST, PLACE, work_for
from stages.ttt_eval.bytemix.mixer import FEWEST, LIMIT, NEVER, SEEN_BITS, WHOLE, Mixture
from stages.ttt_eval.bytemix.simd import WIDTH, dot, step
from tests.test_byte_tree_logits import trained

__all__ = ["trained"]  # the fixture
ROWS = np.random.Generator(np.random.PCG64(1)).normal(size=(3, WIDTH)).astype(np.float32)


def test_a_row_of_inputs_times_two_of_weights():
    summed = njit(lambda weights, inputs: dot(weights, 0, WIDTH, inputs, 0))
    assert summed(ROWS[:2].ravel(), ROWS[2]) == pytest.approx((ROWS[0] + ROWS[1]) @ ROWS[2], rel=1e-5)


def test_a_step_adds_to_one_row_alone_and_counts_itself():
    weights = ROWS[:2].copy()
    njit(lambda weights, inputs: step(weights, WIDTH, inputs, 0, np.float32(0.5)))(
        weights.reshape(-1), ROWS[2]
    )
    expected = ROWS[1] + 0.5 * ROWS[2]
    expected[-1] += 1
    np.testing.assert_array_equal(weights[0], ROWS[0])
    np.testing.assert_allclose(weights[1], expected, rtol=1e-6)


def test_the_exponential():
    for x in np.linspace(-18, 18, 1001):
        assert mixer._exp(x) == pytest.approx(math.exp(x), rel=1e-10)


@pytest.mark.parametrize("came", [0, 1])
def test_an_opinion_stays_a_chance_and_forgets(came: int):
    """From one end to the other, and no further: a number of 22 bits is never carried into the others."""
    chances = np.array([WHOLE * (1 - came) << SEEN_BITS | FEWEST], np.uint32)
    for times in range(4000):
        before = int(chances[0] >> SEEN_BITS)
        mixer._learnt(chances, np.uint32(0), came * (WHOLE << SEEN_BITS))
        after = int(chances[0] >> SEEN_BITS)
        assert before <= after <= WHOLE if came else before >= after >= 0
        assert chances[0] & NEVER == min(FEWEST + times + 1, LIMIT)
    assert abs(after - came * WHOLE) < 256 * came + 1


def test_nothing_is_learnt_where_nothing_was_seen():
    chances = np.array([WHOLE // 2 << SEEN_BITS | NEVER], np.uint32)
    before = chances.copy()
    mixer._learnt(chances, np.uint32(0), WHOLE << SEEN_BITS)
    np.testing.assert_array_equal(chances, before)


def test_every_prefix_of_a_byte_has_a_place_of_its_own():
    places = {(int(HALF[prefix]), int(PLACE[prefix])) for prefix in range(1, 256)}
    assert len(places) == 255
    assert {place for _, place in places} == set(range(1, 16))


def random_case(of, count: int, seed: int = 4):
    """Targets, trees and milder paths than a network's, so that long ones have many decisions to mix."""
    random = np.random.Generator(np.random.PCG64(seed))
    trees = byte_tree.of_table(of)
    tokens = random.integers(0, of.vocab_size, count + 1)
    trees_N = byte_tree.numbers_behind(of.boundary, tokens[:-1])
    return (
        trees,
        tokens[1:],
        trees_N,
        random.normal(size=(count, trees.longest)).astype(np.float32),
        np.zeros(count, np.float32),
    )


def test_a_text_longer_than_what_is_kept_of_it(trained):
    """A match is looked for in the last bytes alone; until they are full the size changes nothing."""
    of, tokens = trained
    trees, _, _, paths_ND, nll_N = random_case(of, len(tokens) - 1)
    targets, trees_N = tokens[1:].astype(np.int64), byte_tree.numbers_behind(of.boundary, tokens[:-1])
    short, long = Mixture(trees, 1000), Mixture(trees, 1 << 20)
    assert len(short.arrays.ring) == 1024
    ends = np.cumsum(
        [len(of.emissions(bool(behind))[token]) for behind, token in zip(trees_N, targets, strict=True)]
    )
    assert ends[-1] > 3 * 1024
    by_short, by_long = (one.follow(targets, trees_N, paths_ND, nll_N, 0.02) for one in (short, long))
    assert np.isfinite(by_short).all()
    full = int(np.searchsorted(ends, 1024 - LONGEST))
    assert by_short[full:].sum() != by_long[full:].sum()
    tables_alike = Mixture(trees, 1000)
    tables_alike.arrays = tables_alike.arrays._replace(table=np.zeros(1 << 18, np.uint32))
    np.testing.assert_array_equal(
        tables_alike.follow(targets, trees_N, paths_ND, nll_N, 0.02)[:full], by_long[:full]
    )


def test_gains_of_long_paths_are_those_of_their_decisions(trained):
    """More decisions than are multiplied at once, and the cap of a mixed logit: each against log1p."""
    of, _ = trained
    trees, targets, trees_N, paths_ND, nll_N = random_case(of, 600)
    counts = trees.first_TV[trees_N, targets + 1] - trees.first_TV[trees_N, targets]
    own, mixed = np.linspace(-5.9, 5.9, 40), np.linspace(18, -18, 40)
    work = work_for(40)
    work.own[:], work.mixed[:] = own, mixed
    gain = njit(lambda work: mixer._gain(work, 0, 40))(work)
    assert gain == pytest.approx((np.log1p(np.exp(-own)) - np.log1p(np.exp(-mixed))).sum(), rel=1e-9)
    np.testing.assert_allclose(work.mixed, 1 / (1 + np.exp(mixed)), rtol=1e-9)
    assert counts.max() > 8
    assert np.isfinite(Mixture(trees, 4000).follow(targets, trees_N, paths_ND, nll_N, 0.02)).all()


def test_no_loss_jumps_where_the_network_becomes_sure(trained):
    """A decision is left to it little by little: what was learnt against it has no weight at the end."""
    of, _ = trained
    trees, targets, trees_N, paths_ND, nll_N = random_case(of, 600)
    learnt, losses = Mixture(trees, 4000), []
    learnt.follow(targets, trees_N, paths_ND, nll_N, 0.5)
    for logit in (4.0, 5.0, 5.5, 5.999, 6.001):
        paths_ND = np.full((1, trees.longest), logit, np.float32)
        losses.append(
            [
                learnt.copy().follow(targets[i : i + 1], trees_N[i : i + 1], paths_ND, nll_N[:1], 0.5)[0]
                for i in range(200)
            ]
        )
    away = np.abs(losses).max(axis=1)
    assert away[0] > 0.5
    assert away[2] < 0.7 * away[1]
    assert away[3] < 0.002 * away[1] + 1e-6
    assert away[4] == 0


def test_what_is_no_number_is_left_alone(trained):
    of, _ = trained
    trees, targets, trees_N, paths_ND, nll_N = random_case(of, 50)
    spoiled = np.full_like(paths_ND, np.nan)
    spoiled[::2] = np.inf
    np.testing.assert_array_equal(Mixture(trees, 4000).follow(targets, trees_N, spoiled, nll_N, 0.02), nll_N)
