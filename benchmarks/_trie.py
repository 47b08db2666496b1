"""A token as a few binary decisions: the tree of the bytes that tokens emit, with an END event wherever one may stop.

What a token emits depends on its predecessor: behind a control token its leading marker is no space (stages/bpb.py), so there are two
trees. In the order of their bytes the tokens below any node, and below any first bits of its next byte, are neighbours: every probability
of the network is a ratio of two sums over intervals. Decisions of which one side is empty are no decisions, and are left out.

Shapes: V ids, E decisions of all paths of one tree.
"""

from typing import NamedTuple

import numpy as np
import sentencepiece
from numba import njit

from stages.bpb import SPACE_MARKER, ByteTable

AFTER_TEXT, AFTER_CONTROL = 0, 1
END = 0  # in the place of a bit prefix, which begins with a one
UNIT = float(1 << 60)  # of a mass: sums of integers are exact in any order
Step = tuple[int, ...]  # a decision: low, middle, high, the side taken, depth, prefix, node
Node = tuple[int, int, int, list[Step]]  # the interval of ids below a node, its depth, and the decisions that lead there


class Trie(NamedTuple):
    """One tree: the paths of all ids, one behind the other."""

    order_V: np.ndarray  # int64: the ids in the order of their bytes
    place_V: np.ndarray  # int64: where each id stands in that order
    same_V2: np.ndarray  # int64: the interval of ids that emit the same bytes
    first_V: np.ndarray  # int64 (V+1): where each id's path begins
    low_E: np.ndarray  # int64: the interval of the decision ...
    middle_E: np.ndarray  # ... and where its right side begins: to go on, or a bit that is 1
    high_E: np.ndarray
    right_E: np.ndarray  # bool: which side the path takes
    depth_E: np.ndarray  # int64: bytes of the token that are known
    prefix_E: np.ndarray  # int64: bits of the next byte that are known, behind a leading one; END
    node_E: np.ndarray  # int64: number of the node
    text_start_V: np.ndarray  # int64 (V+1): where each id's bytes begin
    text: np.ndarray  # uint8


def emissions(tokenizer: sentencepiece.SentencePieceProcessor, table: ByteTable, mode: int) -> list[bytes]:
    """What each id adds to the text behind a text token, or behind a control token."""
    found = []
    for i in range(table.vocab_size):
        if table.boundary[i]:
            found.append(b"")
        elif tokenizer.is_byte(i):
            found.append(bytes([int(tokenizer.id_to_piece(i)[1:-1], 16)]))
        else:
            space = b" " if table.leading_space[i] and mode == AFTER_TEXT else b""
            found.append(space + tokenizer.id_to_piece(i).removeprefix(SPACE_MARKER).encode("utf-8"))
    return found


def build(texts: list[bytes]) -> Trie:
    """The tree of what the ids emit."""
    order = sorted(range(len(texts)), key=lambda i: (texts[i], i))
    ordered = [texts[i] for i in order]
    paths: list[list[Step]] = [[] for _ in texts]
    same = np.zeros((len(texts), 2), np.int64)
    nodes: list[Node] = [(0, len(texts), 0, [])]
    number = 0
    while nodes:
        low, high, depth, path = nodes.pop()
        here = low
        while here < high and len(ordered[here]) == depth:
            here += 1
        mixed = low < here < high
        for token in order[low:here]:
            paths[token] = [*path, (low, here, high, 0, depth, END, number)] if mixed else path
            same[token] = low, here
        if here < high:
            going_on = [*path, (low, here, high, 1, depth, END, number)] if mixed else path
            nodes += _children(ordered, here, high, depth, going_on, number)
        number += 1
    rows = np.array([row for path in paths for row in path], np.int64).reshape(-1, 7)
    low_E, middle_E, high_E, right_E, depth_E, prefix_E, node_E = (np.ascontiguousarray(column) for column in rows.T)
    return Trie(
        order_V=np.array(order),
        place_V=np.argsort(order),
        same_V2=same,
        first_V=np.cumsum([0, *map(len, paths)]),
        low_E=low_E,
        middle_E=middle_E,
        high_E=high_E,
        right_E=right_E.astype(bool),
        depth_E=depth_E,
        prefix_E=prefix_E,
        node_E=node_E,
        text_start_V=np.cumsum([0, *map(len, texts)]),
        text=np.frombuffer(b"".join(texts), np.uint8),
    )


def _children(ordered: list[bytes], low: int, high: int, depth: int, path: list[Step], node: int) -> list[Node]:
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
                step = [*path, (low, middle, high, side, depth, prefix, node)] if mixed else path
                waiting.append((a, b, 2 * prefix + side, step))
    return found


def masses(logp_V: np.ndarray, trie: Trie) -> np.ndarray:
    """Sums of the fixed-point probabilities before each place in the order of bytes, (V+1,) int64."""
    units = np.maximum(1, np.rint(np.exp(logp_V[trie.order_V]) * UNIT)).astype(np.int64)
    return np.concatenate(([0], np.cumsum(units)))


@njit(nogil=True)
def path_logits(sums: np.ndarray, trie: Trie, token: int, out: np.ndarray) -> int:
    """The network's logit of the right side of each decision on a token's path; their number."""
    first, last = trie.first_V[token], trie.first_V[token + 1]
    for i in range(first, last):
        right, left = sums[trie.high_E[i]] - sums[trie.middle_E[i]], sums[trie.middle_E[i]] - sums[trie.low_E[i]]
        out[i - first] = np.log(right) - np.log(left)
    return last - first


@njit(nogil=True)
def within(sums: np.ndarray, trie: Trie, token: int) -> float:
    """log P(token) / T: its share among the ids that emit the same bytes."""
    place = trie.place_V[token]
    return np.log(sums[place + 1] - sums[place]) - np.log(sums[trie.same_V2[token, 1]] - sums[trie.same_V2[token, 0]])
