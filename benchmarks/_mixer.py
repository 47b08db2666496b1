"""A byte model of several orders mixed with a network on the decisions of a token (PAQ's logistic mixing, Mahoney 2005), learning after it.

Every decision of a token's path has the network's logit, a logit from counts behind each order's context, and one from the longest match;
weights that start at the network alone join them. Contexts are the stream's bytes and the token's own bytes so far; nothing learns until
the token is scored, so that its probability is one of a law over all tokens whose sum is one (`law` shows it).

Shapes: K orders and the word, X inputs, D decisions of a path.
"""

from typing import Any

import numpy as np
from numba import njit

from benchmarks._trie import END, Trie, path_logits, within

Arrays = Any  # of a State: compiled functions take a tuple
A = np.ndarray

ORDERS = 6
CONTEXTS = ORDERS + 1  # and the word so far
INPUTS = CONTEXTS + 3  # and the network, a constant, the match
BITS = 22  # of a table's slots
LIMIT = 60  # of a count
STEADY = 1024  # updates of a set of weights behind which its steps shrink with their root
SMALL = 0.4  # added to both counts
LONGEST = 32  # of a match, in bytes; longer are alike
MATCH_BITS, MATCH_BYTES = 20, 8
NETWORK_EDGES = np.array([0.5, 1.5, 3.0, 5.0, 8.0])  # of |logit|
SETS = 2 * (CONTEXTS + 1) * (len(NETWORK_EDGES) + 1)
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
DECISIONS = 320  # at most, of a token of 32 bytes


class State:
    """All that learns."""

    def __init__(self, text_bytes: int) -> None:
        self.counts = np.zeros((CONTEXTS, 1 << BITS, 3), np.uint8)  # of 0, of 1, check
        self.weights = np.zeros((SETS, INPUTS))
        self.weights[:, 0] = 1.0
        self.updates = np.zeros(SETS, np.int64)
        self.matched = np.full((LONGEST + 1, 2), 1.0)  # how often the match's next bit was wrong, right
        self.text = np.zeros(text_bytes + 64, np.uint8)
        self.table = np.zeros(1 << MATCH_BITS, np.int64)
        self.registers = np.zeros(3, np.int64)  # bytes seen; place and length of the match

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """As compiled functions take them."""
        return self.counts, self.weights, self.updates, self.matched, self.text, self.table, self.registers


@njit(nogil=True)
def _keys(text: np.ndarray, end: int, keys: np.ndarray) -> None:
    """Hashes of the last 1 ... ORDERS bytes before `end`, and of the letters since the last other byte."""
    key = np.uint64(0)
    for k in range(ORDERS):
        if end - 1 - k >= 0:
            key = (key ^ np.uint64(np.int64(text[end - 1 - k]) + 1)) * MULTIPLIER
            key ^= key >> np.uint64(29)
        keys[k] = key + np.uint64(k)
    word, place = np.uint64(77), end - 1
    while place >= 0 and end - place < 24 and ((text[place] | 32) - 97 < 26 and (text[place] | 32) >= 97):
        word = (word ^ np.uint64(np.int64(text[place] | 32) + 1)) * MULTIPLIER
        word ^= word >> np.uint64(29)
        place -= 1
    keys[ORDERS] = word


@njit(nogil=True)
def _from_counts(counts: A, keys: A, event: np.uint64, slots_K: A, checks_K: A, x_K: A) -> int:
    """The logit behind each context, 0 where it is new, and where it is kept; the longest known order, 0 for none."""
    longest = 0
    for k in range(CONTEXTS):
        hashed = (keys[k] + event * np.uint64(0xD6E8FEB86659FD93)) * MULTIPLIER
        hashed ^= hashed >> np.uint64(32)
        slots_K[k], checks_K[k] = np.int64(hashed & np.uint64((1 << BITS) - 1)), np.uint8((hashed >> np.uint64(56)) | np.uint64(1))
        seen, x_K[k] = counts[k, slots_K[k]], 0.0
        if seen[2] == checks_K[k]:
            x_K[k] = np.log((seen[1] + SMALL) / (seen[0] + SMALL))
            longest = k + 1 if k < ORDERS else longest
    return longest


@njit(nogil=True)
def _expected(byte: int, prefix: int) -> int:
    """The next bit of a byte of which `prefix` is known; -1 where the byte begins otherwise."""
    known = 0
    while prefix >> (known + 1):
        known += 1
    return ((byte >> (7 - known)) & 1) if (byte | 256) >> (8 - known) == prefix else -1


@njit(nogil=True)
def _inputs(
    state: Arrays, trie: Trie, token: int, logits_D: A, slots_DK: A, checks_DK: A, x_DX: A, sets_D: A, expected_D: A, totals_D: A
) -> None:
    """Everything about a token's decisions that depends on those before, and on nothing else."""
    counts, weights, _, matched, text, _, registers = state
    first, start, begin = trie.first_V[token], registers[0], trie.text_start_V[token]
    text[start : start + trie.text_start_V[token + 1] - begin] = trie.text[begin : trie.text_start_V[token + 1]]
    keys, depth, follows = np.empty(CONTEXTS, np.uint64), -1, registers[2] > 0
    for d in range(trie.first_V[token + 1] - first):
        if trie.depth_E[first + d] != depth:
            for j in range(max(depth, 0), trie.depth_E[first + d]):
                follows = follows and text[registers[1] + j] == text[start + j]
            depth = trie.depth_E[first + d]
            _keys(text, start + depth, keys)
        prefix = trie.prefix_E[first + d]
        event = np.uint64(prefix if prefix != END else 256 + trie.node_E[first + d])
        x_DX[d, 0], x_DX[d, 1], x_DX[d, 2] = min(max(logits_D[d], -30.0), 30.0), 0.25, 0.0
        longest = _from_counts(counts, keys, event, slots_DK[d], checks_DK[d], x_DX[d, 3:])
        expected_D[d] = _expected(np.int64(text[registers[1] + depth]), prefix) if follows and prefix != END else -1
        if expected_D[d] >= 0:
            length = min(registers[2] + depth, LONGEST)
            chance = np.log(matched[length, 1] / matched[length, 0])
            x_DX[d, 2] = chance if expected_D[d] else -chance
        bucket = np.searchsorted(NETWORK_EDGES, abs(logits_D[d]), side="right")
        sets_D[d] = ((0 if prefix == END else 1) * (CONTEXTS + 1) + longest) * (len(NETWORK_EDGES) + 1) + bucket
        totals_D[d] = 0.0
        for k in range(INPUTS):
            totals_D[d] += weights[sets_D[d], k] * x_DX[d, k]


@njit(nogil=True)
def _loss(trie: Trie, token: int, count: int, totals_D: A) -> float:
    """Nats of the path: of each decision's side."""
    nats = 0.0
    for d in range(count):
        total = totals_D[d] if trie.right_E[trie.first_V[token] + d] else -totals_D[d]
        nats += np.log1p(np.exp(-total)) if total > 0 else -total + np.log1p(np.exp(total))
    return nats


@njit(nogil=True)
def _learn(
    state: Arrays, trie: Trie, token: int, slots_DK: A, checks_DK: A, x_DX: A, sets_D: A, expected_D: A, totals_D: A, rate: float
) -> None:
    """Counts, weights and the match after a token."""
    counts, weights, updates, matched, text, table, registers = state
    count = trie.first_V[token + 1] - trie.first_V[token]
    for d in range(count):
        bit = np.int64(trie.right_E[trie.first_V[token] + d])
        error = bit - 1 / (1 + np.exp(-totals_D[d]))
        step = rate / np.sqrt(1 + updates[sets_D[d]] / STEADY)
        updates[sets_D[d]] += 1
        for k in range(INPUTS):
            weights[sets_D[d], k] += step * error * x_DX[d, k]
        for k in range(CONTEXTS):
            slot = slots_DK[d, k]
            if counts[k, slot, 2] != checks_DK[d, k]:
                counts[k, slot, 0], counts[k, slot, 1], counts[k, slot, 2] = 0, 0, checks_DK[d, k]
            counts[k, slot, bit] = min(counts[k, slot, bit] + 1, LIMIT)
            if counts[k, slot, 1 - bit] > 2:
                counts[k, slot, 1 - bit] = counts[k, slot, 1 - bit] // 2 + 1
        if expected_D[d] >= 0:
            length = min(registers[2] + trie.depth_E[trie.first_V[token] + d], LONGEST)
            matched[length, 1 if expected_D[d] == bit else 0] += 1
    for _ in range(trie.text_start_V[token + 1] - trie.text_start_V[token]):
        _advance(text, table, registers)


@njit(nogil=True)
def _advance(text: A, table: A, registers: A) -> None:
    """One byte more is history; the match goes on, or another is looked up."""
    end = registers[0] + 1
    registers[0] = end
    if registers[2] > 0 and text[registers[1]] == text[end - 1]:
        registers[1], registers[2] = registers[1] + 1, registers[2] + 1
    else:
        registers[2] = 0
    if end < MATCH_BYTES:
        return
    key = np.uint64(0)
    for j in range(MATCH_BYTES):
        key = (key ^ np.uint64(text[end - 1 - j])) * MULTIPLIER
        key ^= key >> np.uint64(29)
    slot = np.int64(key >> np.uint64(64 - MATCH_BITS))
    if registers[2] == 0 and table[slot] > 0:
        length = 0
        while length < LONGEST and length < table[slot] and text[table[slot] - 1 - length] == text[end - 1 - length]:
            length += 1
        if length >= MATCH_BYTES:
            registers[1], registers[2] = table[slot], length
    table[slot] = end


@njit(nogil=True)
def follow(state: Arrays, tries: Any, tokens: A, modes: A, logits: A, within_N: A, rate: float, nats: A) -> None:
    """The loss of each token of a stream, nats; `logits` are those of all paths, one behind the other."""
    slots_DK, checks_DK = np.empty((DECISIONS, CONTEXTS), np.int64), np.empty((DECISIONS, CONTEXTS), np.uint8)
    x_DX, sets_D, expected_D = np.empty((DECISIONS, INPUTS)), np.empty(DECISIONS, np.int64), np.empty(DECISIONS, np.int64)
    totals_D, at = np.empty(DECISIONS), 0
    for i in range(len(tokens)):
        trie, token = tries[modes[i]], np.int64(tokens[i])
        count = trie.first_V[token + 1] - trie.first_V[token]
        _inputs(state, trie, token, logits[at : at + count], slots_DK, checks_DK, x_DX, sets_D, expected_D, totals_D)
        nats[i] = _loss(trie, token, count, totals_D) - within_N[i]
        _learn(state, trie, token, slots_DK, checks_DK, x_DX, sets_D, expected_D, totals_D, rate)
        at += count


@njit(nogil=True)
def law(state: Arrays, trie: Trie, sums: A, logq_V: A) -> None:
    """The log-probability of every token after what the state has seen, given the network's masses; the state stays as it is."""
    slots_DK, checks_DK = np.empty((DECISIONS, CONTEXTS), np.int64), np.empty((DECISIONS, CONTEXTS), np.uint8)
    x_DX, sets_D, expected_D = np.empty((DECISIONS, INPUTS)), np.empty(DECISIONS, np.int64), np.empty(DECISIONS, np.int64)
    totals_D, logits_D = np.empty(DECISIONS), np.empty(DECISIONS)
    for token in range(len(logq_V)):
        count = path_logits(sums, trie, token, logits_D)
        _inputs(state, trie, token, logits_D, slots_DK, checks_DK, x_DX, sets_D, expected_D, totals_D)
        logq_V[token] = within(sums, trie, token) - _loss(trie, token, count, totals_D)
