"""A token as a sequence of binary decisions: the tree of the bytes that tokens append to the text.

A path starts at the root, before the token's first byte. Each byte is eight decisions, one for each
bit; before a byte at which some token may already have ended, an END decision says whether this one
has. A decision in which all ids take the same side is left out. With the ids "a", "ab" and "b":

    "a" or "b" first?         0x61 and 0x62 differ in one bit that decides; the others are left out
    "a": has the token ended? END: id "a"; else: id "ab", since no other begins like that

The bytes of a token depend on its predecessor: after a control token its leading marker is not a
space (stages/common/bpb.py), so there are two trees.

Sorted by their bytes, the ids below any node, and those below any first bits of its next byte, are
neighbours. The probability of a decision is therefore a ratio of two sums over intervals of sorted
ids. Conversely, any probabilities of the decisions give a distribution over all tokens, once the
mass at the end of a path is shared out among the ids that append the same bytes. Without END
decisions it would not be one (#1916, #2098, #2138).

Shapes: T trees, V ids, E decisions of all paths of all trees, N targets.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stages.common.bpb import ByteTable

# Indices of the two trees.
AFTER_TEXT, AFTER_BOUNDARY = 0, 1
END = 0  # bit prefix of an END decision; those of bits begin with a one
UNIT = float(1 << 61)  # integer mass of probability 1; sums of integers are exact in any order


class Decision(NamedTuple):
    """One decision on a path, over the sorted ids low ... high - 1."""

    low: int
    middle: int  # the right side is middle ... high - 1: those that go on, or whose bit is 1
    high: int
    goes_right: int  # side that the path takes, 0 or 1
    depth: int  # bytes of the token that are known
    bit_prefix: int  # known bits of the next byte after a leading one; END


class Node(NamedTuple):
    """A node of the tree under construction: sorted ids low ... high - 1, alike in `depth` bytes."""

    low: int
    high: int
    depth: int
    path: list[Decision]  # decisions that lead here


class ByteTrees(NamedTuple):
    """Both trees of a tokenizer as arrays; paths and texts of all ids of both trees are concatenated."""

    sorted_ids_TV: np.ndarray  # int64: ids in the order of their bytes
    rank_TV: np.ndarray  # int64: position of each id in that order
    same_bytes_TV2: np.ndarray  # int64: begin and end of the sorted ids that append the same bytes
    path_start_TV: np.ndarray  # int64 (T, V+1): first decision of each id's path
    low_E: np.ndarray  # int64; this and the following five: the fields of Decision
    middle_E: np.ndarray  # int64
    high_E: np.ndarray  # int64
    goes_right_E: np.ndarray  # bool
    depth_E: np.ndarray  # uint8
    bit_prefix_E: np.ndarray  # uint8
    text_start_TV: np.ndarray  # int64 (T, V+1): first byte of each id in `text`
    text: np.ndarray  # uint8: bytes that each id appends
    boundary_V: np.ndarray  # bool: ids after which a token is in the second tree

    @property
    def longest_path(self) -> int:
        """Number of decisions of the longest path."""
        return int(np.diff(self.path_start_TV, axis=1).max())


def tree_index_after(boundary_V: np.ndarray, previous_N: np.ndarray) -> np.ndarray:
    """Index of the tree of each token, (N,) int64, from the token before it."""
    return np.where(boundary_V[previous_N], AFTER_BOUNDARY, AFTER_TEXT)


def build_byte_trees(table: ByteTable) -> ByteTrees:
    """Build both trees of a tokenizer."""
    sorted_ids, same_bytes, path_starts, text_starts = [], [], [], []
    decisions = [np.empty((0, len(Decision._fields)), np.int64)]
    text = b""
    for tree in (AFTER_TEXT, AFTER_BOUNDARY):
        texts = table.appended_bytes(tree == AFTER_BOUNDARY)
        order_V, same_V2, paths = _build_tree(texts)
        sorted_ids.append(order_V)
        same_bytes.append(same_V2)

        # Append this tree's paths and texts to those of the tree before.
        path_starts.append(sum(map(len, decisions)) + np.cumsum([0, *map(len, paths)]))
        rows = [decision for path in paths for decision in path]
        decisions.append(np.array(rows, np.int64).reshape(-1, len(Decision._fields)))
        text_starts.append(len(text) + np.cumsum([0, *map(len, texts)]))
        text += b"".join(texts)

    # One array for each field of a decision, over the paths of both trees.
    columns = Decision(*np.concatenate(decisions).T)

    return ByteTrees(
        sorted_ids_TV=np.stack(sorted_ids),
        rank_TV=np.argsort(sorted_ids, axis=1),
        same_bytes_TV2=np.stack(same_bytes),
        path_start_TV=np.stack(path_starts),
        low_E=np.ascontiguousarray(columns.low),
        middle_E=np.ascontiguousarray(columns.middle),
        high_E=np.ascontiguousarray(columns.high),
        goes_right_E=np.ascontiguousarray(columns.goes_right, bool),
        depth_E=np.ascontiguousarray(columns.depth, np.uint8),
        bit_prefix_E=np.ascontiguousarray(columns.bit_prefix, np.uint8),
        text_start_TV=np.stack(text_starts),
        text=np.frombuffer(text, np.uint8).copy(),
        boundary_V=table.boundary,
    )


def _build_tree(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, list[list[Decision]]]:
    """Build one tree from the bytes of every id.

    Returns the ids sorted by their bytes (V,), the begin and end of the sorted ids with the same
    bytes (V, 2), and each id's path.
    """
    order = sorted(range(len(texts)), key=lambda i: (texts[i], i))
    sorted_texts = [texts[i] for i in order]
    paths: list[list[Decision]] = [[] for _ in texts]
    same_V2 = np.zeros((len(texts), 2), np.int64)
    nodes = [Node(0, len(texts), 0, [])]
    while nodes:
        low, high, depth, path = nodes.pop()

        # The ids that end at this node come first: they are prefixes of the others.
        middle = low
        while middle < high and len(sorted_texts[middle]) == depth:
            middle += 1
        is_decision = low < middle < high

        for token in order[low:middle]:
            paths[token] = [*path, Decision(low, middle, high, 0, depth, END)] if is_decision else path
            same_V2[token] = low, middle
        if middle < high:
            longer = [*path, Decision(low, middle, high, 1, depth, END)] if is_decision else path
            nodes += _children(sorted_texts, Node(middle, high, depth, longer))
    return np.array(order), same_V2, paths


def _children(sorted_texts: list[bytes], node: Node) -> list[Node]:
    """Split a node, none of whose ids ends there, by the bits of the next byte."""
    children: list[Node] = []
    pending = [(node.low, node.high, 1, node.path)]
    while pending:
        low, high, bit_prefix, path = pending.pop()
        if bit_prefix >= 256:  # a leading one and all eight bits
            children.append(Node(low, high, node.depth + 1, path))
            continue

        # Find the first id whose next bit is 1.
        bit = 7 - (bit_prefix.bit_length() - 1)
        middle = low
        while middle < high and not sorted_texts[middle][node.depth] >> bit & 1:
            middle += 1
        is_decision = low < middle < high

        for side, (begin, end) in enumerate(((low, middle), (middle, high))):
            if begin == end:
                continue
            longer = path
            if is_decision:
                longer = [*path, Decision(low, middle, high, side, node.depth, bit_prefix)]
            pending.append((begin, end, 2 * bit_prefix + side, longer))
    return children


def cumulative_mass(logp_V: np.ndarray, sorted_ids_V: np.ndarray) -> np.ndarray:
    """Probability of all ids before each position of the sorted order, (V+1,) int64 in units of 1 / UNIT.

    Every id gets at least one unit.
    """
    units = np.maximum(1, np.rint(np.exp(logp_V[sorted_ids_V]) * UNIT)).astype(np.int64)
    return np.concatenate(([0], np.cumsum(units)))
