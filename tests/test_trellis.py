"""The trellis: its graph, Ungerboeck's parity check along random walks, his free distances, errors."""

import heapq
import random
import re

import numpy as np
import pytest

from stages.pack.trellis import STATE_COUNTS, UNGERBOECK_CHECKS, build_trellis

# Squared free distances in squared level distances: Ungerboeck 1982, table I. No code has more than 16,
# since levels four apart share a branch.
FREE_DISTANCE = {4: 9, 8: 10, 16: 11, 32: 13, 64: 14, 128: 16, 256: 16}


def squared_distance(coset: int, other: int) -> int:
    """Between the nearest levels of two cosets of the integers modulo 4."""
    return min((coset - other) % 4, (other - coset) % 4) ** 2


def free_distance(states: int) -> int:
    """The least squared distance of two level sequences that leave one state and meet again.

    By Dijkstra's algorithm over pairs of states.
    """
    following = build_trellis(states).next_S2.tolist()
    waiting: list[tuple[int, int, int]] = []
    for state in range(states):
        heapq.heappush(waiting, (squared_distance(state & 1, (state & 1) + 2), *sorted(following[state])))
    seen = set()
    while waiting:
        distance, first, second = heapq.heappop(waiting)
        if first == second:
            return min(distance, 16)  # 16: two levels of the same branch, which meet at once
        if (first, second) in seen:
            continue
        seen.add((first, second))
        for branch in (0, 1):
            for other in (0, 1):
                step = squared_distance((first & 1) + 2 * branch, (second & 1) + 2 * other)
                heapq.heappush(
                    waiting, (distance + step, *sorted((following[first][branch], following[second][other])))
                )
    raise AssertionError("no two paths meet")


@pytest.mark.parametrize("states", UNGERBOECK_CHECKS)
def test_each_state_has_two_successors_and_two_predecessors(states: int) -> None:
    code = build_trellis(states)
    assert (code.states, code.stride) == (states, 2)
    assert code.next_S2.shape == (states, 2)
    assert (code.next_S2[:, 0] != code.next_S2[:, 1]).all()
    assert np.bincount(code.next_S2.ravel(), minlength=states).tolist() == [2] * states


@pytest.mark.parametrize("states", UNGERBOECK_CHECKS)
def test_every_state_can_be_reached_from_the_first(states: int) -> None:
    reached = {0}
    for _ in range(states.bit_length()):
        reached |= {int(state) for state in build_trellis(states).next_S2[sorted(reached)].ravel()}
    assert len(reached) == states


@pytest.mark.parametrize("states", UNGERBOECK_CHECKS)
@pytest.mark.parametrize("seed", range(3))
def test_the_parity_check_holds_along_random_walks(states: int, seed: int) -> None:
    draw, code, state = random.Random(seed), build_trellis(states), 0
    levels = []
    for _ in range(500):
        levels.append(2 * draw.randint(-1000, 1000) + (state & 1))
        state = int(code.next_S2[state, levels[-1] // 2 % 2])
    # A level's coset has the bits z0 (its parity) and z1 (the branch); before the walk all were zero.
    z0, z1 = [level % 2 for level in levels], [level // 2 % 2 for level in levels]
    h0, h1 = UNGERBOECK_CHECKS[states]
    for time in range(len(levels)):
        terms = [
            (h0 >> i & 1) * z0[time - i] + (h1 >> i & 1) * z1[time - i]
            for i in range(min(states.bit_length(), time + 1))
        ]
        assert sum(terms) % 2 == 0


@pytest.mark.parametrize(("states", "distance"), FREE_DISTANCE.items())
def test_the_free_distance_is_ungerboecks(states: int, distance: int) -> None:
    assert free_distance(states) == distance


def test_one_state_is_the_uniform_grid() -> None:
    code = build_trellis(1)
    assert (code.states, code.stride, code.next_S2.tolist()) == (1, 1, [[0, 0]])


@pytest.mark.parametrize("states", [-1, 0, 2, 3, 512])
def test_an_unknown_number_of_states_names_the_known_ones(states: int) -> None:
    known = ", ".join(str(number) for number in STATE_COUNTS)
    with pytest.raises(ValueError, match=re.escape(f"no trellis of {states} states; known are {known}")):
        build_trellis(states)
