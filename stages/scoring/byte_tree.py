"""A token as a few binary decisions: the tree of the bytes that tokens emit, with an END event wherever one may stop.

What a token emits depends on its predecessor: behind a control token its leading marker is no space (stages/common/bpb.py), so there are
two trees. In the order of their bytes the tokens below any node, and below any first bits of its next byte, are neighbours: every
probability of a law over tokens is a ratio of two sums over intervals. Decisions of which one side is empty are no decisions, and are left
out. Any law on these decisions is one over all tokens, with what is left at a path's end shared out among the ids that emit the same bytes;
without END it would not be (#1916, #2098, #2138).

Shapes: T trees, V ids, E decisions of all paths.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stages.common.bpb import ByteTable

AFTER_TEXT, AFTER_BOUNDARY = 0, 1  # numbers of the two trees
END = 0  # in the place of a bit prefix, which begins with a one
UNIT = float(1 << 61)  # of a mass: sums of integers are exact in any order
Step = tuple[int, ...]  # a decision: low, middle, high, the side taken, depth, prefix
Node = tuple[
    int, int, int, list[Step]
]  # the interval of ids below a node, its depth, and the decisions that lead there


class Trees(NamedTuple):
    """Trees over the same ids: the paths of all ids in all of them, one behind the other. What counts E, or letters, counts over all."""

    order_TV: np.ndarray  # int64: the ids in the order of their bytes
    place_TV: np.ndarray  # int64: where each id stands in that order
    same_TV2: np.ndarray  # int64: the interval of ids that emit the same bytes
    first_TV: np.ndarray  # int64 (T, V+1): where each id's path begins
    low_E: np.ndarray  # int64: the interval of the decision ...
    middle_E: np.ndarray  # ... and where its right side begins: to go on, or a bit that is 1
    high_E: np.ndarray
    right_E: np.ndarray  # bool: which side the path takes
    depth_E: np.ndarray  # uint8: bytes of the token that are known
    prefix_E: np.ndarray  # uint8: bits of the next byte that are known, behind a leading one; END
    text_start_TV: np.ndarray  # int64 (T, V+1): where each id's bytes begin
    text: np.ndarray  # uint8
    boundary_V: np.ndarray  # bool: ids behind which a token is in the second tree

    @property
    def longest(self) -> int:
        """Decisions of the longest path."""
        return int(np.diff(self.first_TV, axis=1).max())


def numbers_behind(boundary_V: np.ndarray, previous_N: np.ndarray) -> np.ndarray:
    """The number of the tree that the token behind each is in, (N,) int64."""
    return np.where(boundary_V[previous_N], AFTER_BOUNDARY, AFTER_TEXT)


def of_table(table: ByteTable) -> Trees:
    """Both trees of a tokenizer."""
    orders, sames, firsts, starts, rows = [], [], [], [], [np.empty((0, 6), np.int64)]
    letters = b""
    for number in (AFTER_TEXT, AFTER_BOUNDARY):
        texts = table.emissions(number == AFTER_BOUNDARY)
        order, same, paths = _paths(texts)
        orders.append(order)
        sames.append(same)
        firsts.append(sum(map(len, rows)) + np.cumsum([0, *map(len, paths)]))
        starts.append(len(letters) + np.cumsum([0, *map(len, texts)]))
        rows.append(np.array([step for path in paths for step in path], np.int64).reshape(-1, 6))
        letters += b"".join(texts)
    low_E, middle_E, high_E, right_E, depth_E, prefix_E = (
        np.ascontiguousarray(column) for column in np.concatenate(rows).T
    )
    return Trees(
        order_TV=np.stack(orders),
        place_TV=np.argsort(orders, axis=1),
        same_TV2=np.stack(sames),
        first_TV=np.stack(firsts),
        low_E=low_E,
        middle_E=middle_E,
        high_E=high_E,
        right_E=right_E.astype(bool),
        depth_E=depth_E.astype(np.uint8),
        prefix_E=prefix_E.astype(np.uint8),
        text_start_TV=np.stack(starts),
        text=np.frombuffer(letters, np.uint8).copy(),
        boundary_V=table.boundary,
    )


def _paths(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, list[list[Step]]]:
    """Of one tree: the ids in the order of their bytes, (V,), the intervals of those that emit the same, (V, 2), and the paths."""
    order = sorted(range(len(texts)), key=lambda i: (texts[i], i))
    ordered = [texts[i] for i in order]
    paths: list[list[Step]] = [[] for _ in texts]
    same = np.zeros((len(texts), 2), np.int64)
    nodes: list[Node] = [(0, len(texts), 0, [])]
    while nodes:
        low, high, depth, path = nodes.pop()
        here = low
        while here < high and len(ordered[here]) == depth:
            here += 1
        mixed = low < here < high
        for token in order[low:here]:
            paths[token] = [*path, (low, here, high, 0, depth, END)] if mixed else path
            same[token] = low, here
        if here < high:
            going_on = [*path, (low, here, high, 1, depth, END)] if mixed else path
            nodes += _children(ordered, here, high, depth, going_on)
    return np.array(order), same, paths


def _children(ordered: list[bytes], low: int, high: int, depth: int, path: list[Step]) -> list[Node]:
    """The nodes below one, each with the decisions that lead there: the bits of the next byte."""
    found: list[Node] = []
    waiting = [(low, high, 1, path)]
    while waiting:
        low, high, prefix, path = waiting.pop()
        if prefix >= 256:
            found.append((low, high, depth + 1, path))
            continue
        bit = 7 - (prefix.bit_length() - 1)
        middle = low
        while middle < high and not ordered[middle][depth] >> bit & 1:
            middle += 1
        mixed = low < middle < high
        for side, (a, b) in enumerate(((low, middle), (middle, high))):
            if a < b:
                step = [*path, (low, middle, high, side, depth, prefix)] if mixed else path
                waiting.append((a, b, 2 * prefix + side, step))
    return found


def sums(logp_V: np.ndarray, order_V: np.ndarray) -> np.ndarray:
    """What stands before each place in an order of the ids, in units of probability, (V+1,) int64; no id has nothing."""
    units = np.maximum(1, np.rint(np.exp(logp_V[order_V]) * UNIT)).astype(np.int64)
    return np.concatenate(([0], np.cumsum(units)))
