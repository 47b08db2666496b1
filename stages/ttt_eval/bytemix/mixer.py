"""Statistics of bytes, mixed with a network's decisions by weights that are learnt as one goes (PAQ's logistic mixing, Mahoney 2005).

A decision (scoring/byte_tree.py) is a bit of the next byte, or whether the token ends. What followed the same context before
(context_tables.py) are two counts, of zeros and of ones; many of one drive out those of the other. An opinion is a logit, what that state
of counts, or that length of a match, has been worth before. Weights, of two sets chosen by what is known, join opinions to the network's
logit; they start with the network alone. Decisions of which the network is sure are left to it, and nothing is learnt of them.

Nothing learns until the token is scored, so that its probability is one of a law over all tokens: `law` gives it whole, by the same
functions.

Shapes: N targets, D decisions of the longest path, V vocabulary.
"""

import math
from typing import Any

import numpy as np
from numba import njit

from stages.scoring.byte_tree import Trees
from stages.ttt_eval.bytemix.context_tables import (
    BY_CONTEXT,
    BY_MATCH,
    CHECKED,
    CONTEXTS,
    FIELDS,
    FIRST_OPINION,
    FOUND,
    IN_LINE,
    IS_RIGHT,
    KNOWN,
    LINE,
    LINES,
    LONGEST,
    MOST_PLACES,
    MOST_TEXT,
    NETWORK,
    NUMBER,
    OF_LINE,
    OPINION_OF_MATCH,
    PLACE_IN_LINE,
    SETS,
    SETS_BY_MATCH,
    START,
    STATES,
    SURE,
    Arrays,
    Paths,
    Work,
    advance,
    paths_of,
    place,
    work_for,
)
from stages.ttt_eval.bytemix.simd import WIDTH, dot, inlined, step

MOST_COUNTED, KEPT = 7, 2  # of one side; of the other, once this one has come
FEWEST, LIMIT, NEVER = (
    4,
    127,
    1023,
)  # times an opinion is taken to have been seen: at first, at most; nothing is learnt of it
WHOLE = (1 << 22) - 2  # the largest chance
SEEN_BITS, SEEN = 10, np.uint32(1023)
GRID_BITS = 12  # of a probability
STEADY = np.float32(1024)  # decisions of a set of weights behind which its steps shrink with their root
MOST = np.float32(18.0)  # the largest mixed logit
BLOCK = (
    16  # decisions whose ratios are multiplied before their logarithm is taken: none of them is below e^-18
)

GRID = (np.arange(1 << GRID_BITS) + 0.5) / (1 << GRID_BITS)
LOGITS = np.log(GRID / (1 - GRID)).astype(np.float32)
SHARES = np.append(65536 / (np.arange(NEVER) + 1.5), 0).astype(
    np.int64
)  # of 2^16: of what is new, behind so many times
CLASS_OF_KNOWN = np.array([(known * (KNOWN - 1) + CONTEXTS - 1) // CONTEXTS for known in range(CONTEXTS + 1)])


def _next_states() -> np.ndarray:
    """The counts after a bit, (2 STATES,) uint8: three bits of zeros above three of ones."""
    after = np.zeros((2, STATES), np.uint8)
    for state in range(STATES):
        for bit in (0, 1):
            counts = [state >> 3, state & 7]
            counts[bit] = min(counts[bit] + 1, MOST_COUNTED)
            counts[1 - bit] = (
                min(counts[1 - bit], (counts[1 - bit] + KEPT) // 2)
                if counts[1 - bit] > KEPT
                else counts[1 - bit]
            )
            after[bit, state] = counts[0] << 3 | counts[1]
    return after.ravel()


AFTER = _next_states()


class Mixture:
    """What has been learnt of a stream; its size in bytes, about, sizes the tables."""

    def __init__(self, trees: Trees, text_bytes: int, lines: int = LINES) -> None:
        zeros, ones = np.divmod(np.arange(STATES), 8)
        by_state = np.tile((ones + 0.4) / (zeros + ones + 0.8), 2 * CONTEXTS)
        wrong = 1 / (np.arange(LONGEST + 1) / 4 + 3)
        by_match = np.concatenate(
            ([0.5], wrong, 1 - wrong, np.full(LONGEST + 1, 0.2), np.full(LONGEST + 1, 0.8))
        )
        chances = (np.concatenate((by_state, by_match)) * WHOLE).astype(np.uint32) << SEEN_BITS | FEWEST
        chances[: 2 * CONTEXTS * STATES : STATES] |= NEVER
        chances[2 * CONTEXTS * STATES] |= NEVER
        weights = np.zeros((SETS + SETS_BY_MATCH, WIDTH), np.float32)
        weights[:SETS, NETWORK] = 1.0
        ring = min(1 << max(10, text_bytes.bit_length()), MOST_TEXT)
        self.trees, self.paths = trees, paths_of(trees)
        self.arrays = Arrays(
            lines=np.zeros((CONTEXTS * lines + 1) * LINE, np.uint8),
            chances=chances,
            weights=weights.ravel(),
            ring=np.zeros(ring, np.uint16),
            table=np.zeros(min(ring >> 2, MOST_PLACES), np.uint32),
            history=np.zeros(8, np.uint64),
        )

    def copy(self) -> "Mixture":
        """An independent copy."""
        twin = object.__new__(type(self))
        twin.trees, twin.paths, twin.arrays = (
            self.trees,
            self.paths,
            Arrays(*(array.copy() for array in self.arrays)),
        )
        return twin

    def follow(
        self, targets_N: np.ndarray, trees_N: np.ndarray, paths_ND: np.ndarray, nll_N: np.ndarray, rate: float
    ) -> np.ndarray:
        """Each target's loss with the mixture, (N,) float32; behind each everything learns from it."""
        mixed_N = np.empty(len(nll_N), np.float32)
        _follow(
            self.arrays,
            self.paths,
            work_for(2 * paths_ND.shape[1]),
            targets_N,
            trees_N,
            paths_ND,
            nll_N,
            np.float32(rate),
            mixed_N,
        )
        return mixed_N

    def law(self, number: int, sums: np.ndarray) -> np.ndarray:
        """The log-probability of every token that may come next, (V,), from sums of the network's masses (scoring/byte_tree.py); nothing
        changes."""
        logits_ND, logq_V = np.empty((1, self.trees.longest), np.float32), np.empty(len(sums) - 1)
        _law(
            self.arrays, self.paths, work_for(self.trees.longest), self.trees, number, sums, logits_ND, logq_V
        )
        return logq_V


@inlined()
def _share(logit: Any) -> Any:
    """The mixture's share of a decision; it ends where the network is sure, and not at once, or a rounding error would make losses jump."""
    return min(1.0, SURE - abs(logit))


@inlined()
def _weigh(arrays: Arrays, work: Work, begin: int, end: int) -> None:
    """The mixed logits of placed decisions, of the side that each takes."""
    known, line, nowhere = 0, -1, np.uint32(len(arrays.lines) - LINE)  # the line that is empty for good
    for i in range(begin, end):
        field = i * FIELDS
        if np.int64(work.fields[field + IN_LINE]) != line:
            line, known = np.int64(work.fields[field + IN_LINE]), 0
            for k in range(CONTEXTS):
                at = work.lines[line * OF_LINE + START + k]
                is_own = np.uint32(arrays.lines[at]) == work.lines[line * OF_LINE + CHECKED + k]
                work.lines[line * OF_LINE + FOUND + k] = at if is_own else nowhere
                known += is_own
        place_in_line, opinion = work.fields[field + PLACE_IN_LINE], work.fields[field + FIRST_OPINION]
        for k in range(CONTEXTS):
            state = arrays.lines[work.lines[line * OF_LINE + FOUND + k] + place_in_line]
            work.states[i * CONTEXTS + k] = state
            work.inputs[i * WIDTH + k] = LOGITS[
                arrays.chances[opinion + np.uint32(k * STATES) + state] >> np.uint32(32 - GRID_BITS)
            ]
        work.inputs[i * WIDTH + CONTEXTS] = LOGITS[
            arrays.chances[work.fields[field + OPINION_OF_MATCH]] >> np.uint32(32 - GRID_BITS)
        ]
        work.fields[field + BY_CONTEXT] += np.uint32(CLASS_OF_KNOWN[known])
    for i in range(begin, end):
        first, second = (
            np.int64(work.fields[i * FIELDS + BY_CONTEXT]),
            np.int64(work.fields[i * FIELDS + BY_MATCH]),
        )
        total = dot(arrays.weights, first * WIDTH, second * WIDTH, work.inputs, i * WIDTH)
        total, share = np.float64(min(max(total, -MOST), MOST)), _share(work.own[i])
        work.mixed[i] = (total if work.fields[i * FIELDS + IS_RIGHT] else -total) * share + work.own[i] * (
            1 - share
        )


@inlined(fastmath=True)
def _exp(x: Any) -> Any:
    """e^x within 1e-10 of it, for |x| up to 18: additions and multiplications only, so that several are computed at once."""
    x = x * (1 / 64)
    y = 1 + x * (1 / 8 + x * (1 / 72))
    y = 1 + x * (
        1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040) * y)))))
    )
    for _ in range(6):
        y = y * y
    return y


@inlined(fastmath=True)
def _gain(work: Work, begin: int, end: int) -> float:
    """What the mixed decisions on a token's path take from its loss, nats; their errors take their place."""
    nats = 0.0
    for first in range(begin, end, BLOCK):
        ratio = 1.0
        for i in range(first, min(first + BLOCK, end)):
            against = _exp(-work.mixed[i])
            probability = 1 / (1 + against)
            ratio *= (1 + _exp(-work.own[i])) * probability
            work.mixed[i] = against * probability
        nats += math.log(ratio)
    return nats


@inlined()
def _learnt(chances: np.ndarray, opinion: Any, came: Any) -> None:
    """An opinion after a decision."""
    old = chances[opinion]
    times = old & SEEN
    moved = ((came - np.int64(old - times)) * SHARES[times] >> 16) & ~np.int64(SEEN)
    chances[opinion] = np.uint32(np.int64(old) + moved) + np.uint32(times < LIMIT)


@inlined(fastmath=True)
def _learn(arrays: Arrays, work: Work, begin: int, end: int, rate: Any) -> None:
    """Counts, opinions and weights after a token, whose decisions are weighed."""
    line = -1
    for i in range(begin, end):
        field = i * FIELDS
        if np.int64(work.fields[field + IN_LINE]) != line:
            line = np.int64(work.fields[field + IN_LINE])
            for k in range(CONTEXTS):
                at = work.lines[line * OF_LINE + START + k]
                if work.lines[line * OF_LINE + FOUND + k] != at:
                    for j in range(1, LINE):
                        arrays.lines[at + np.uint32(j)] = np.uint8(0)
                    arrays.lines[at] = np.uint8(work.lines[line * OF_LINE + CHECKED + k])
        right, error = (
            np.int64(work.fields[field + IS_RIGHT]),
            rate * np.float32(work.mixed[i] * _share(work.own[i])),
        )
        error = error if right else -error
        for of in (BY_CONTEXT, BY_MATCH):
            row = np.int64(work.fields[field + of]) * WIDTH
            steadied = np.sqrt(np.float32(1) + arrays.weights[row + WIDTH - 1] / STEADY)
            step(arrays.weights, row, work.inputs, i * WIDTH, error / steadied)
        came, after = right * (WHOLE << SEEN_BITS), np.uint32(right * STATES)
        place_in_line, opinion = work.fields[field + PLACE_IN_LINE], work.fields[field + FIRST_OPINION]
        for k in range(CONTEXTS):
            state = work.states[i * CONTEXTS + k]
            _learnt(arrays.chances, opinion + np.uint32(k * STATES) + state, came)
            arrays.lines[work.lines[line * OF_LINE + START + k] + place_in_line] = AFTER[after + state]
        _learnt(arrays.chances, work.fields[field + OPINION_OF_MATCH], came)


@njit(nogil=True)
def _follow(
    arrays: Arrays,
    paths: Paths,
    work: Work,
    targets_N: np.ndarray,
    trees_N: np.ndarray,
    paths_ND: np.ndarray,
    nll_N: np.ndarray,
    rate: Any,
    mixed_N: np.ndarray,
) -> None:
    """The next target's lines are asked of the memory while this one is learnt from."""
    longest, begin, end = paths_ND.shape[1], np.int64(0), np.int64(0)
    for i in range(len(nll_N) + 1):
        if i:
            _weigh(arrays, work, begin, end)
            mixed_N[i - 1] = nll_N[i - 1] - _gain(work, begin, end)
            advance(arrays, paths, trees_N[i - 1], targets_N[i - 1])
        base = longest - begin
        placed = (
            place(arrays, paths, trees_N[i], targets_N[i], paths_ND, i, work, base, base, 0)
            if i < len(nll_N)
            else base
        )
        if i:
            _learn(arrays, work, begin, end, rate)
        begin, end = base, placed


@njit(nogil=True)
def _law(
    arrays: Arrays,
    paths: Paths,
    work: Work,
    trees: Trees,
    number: int,
    sums: np.ndarray,
    logits_ND: np.ndarray,
    logq_V: np.ndarray,
) -> None:
    """In the order of bytes a token shares its first decisions with the one before."""
    first_V, before, end = trees.first_TV[number], -1, np.int64(0)
    for token in trees.order_TV[number]:
        first, count, shared = first_V[token], first_V[token + 1] - first_V[token], 0
        if before >= 0:
            other, most = first_V[before], min(count, first_V[before + 1] - first_V[before])
            while (
                shared < most
                and trees.low_E[first + shared] == trees.low_E[other + shared]
                and trees.high_E[first + shared] == trees.high_E[other + shared]
            ):
                shared += 1
        for d in range(shared, count):
            e = first + d
            right, left = (
                sums[trees.high_E[e]] - sums[trees.middle_E[e]],
                sums[trees.middle_E[e]] - sums[trees.low_E[e]],
            )
            logits_ND[0, d] = math.log(np.float64(right)) - math.log(np.float64(left))
        begin = np.int64(0)
        while begin < end and np.int64(work.fields[begin * FIELDS + NUMBER]) < shared:
            begin += 1
        end = place(arrays, paths, number, token, logits_ND, 0, work, 0, begin, shared)
        _weigh(arrays, work, begin, end)
        low, high, own = (
            trees.same_TV2[number, token, 0],
            trees.same_TV2[number, token, 1],
            trees.place_TV[number, token],
        )
        nats, i = (
            math.log(np.float64(sums[own + 1] - sums[own])) - math.log(np.float64(sums[high] - sums[low])),
            0,
        )
        for d in range(count):
            if i < end and np.int64(work.fields[i * FIELDS + NUMBER]) == d:
                logit = work.mixed[i] if work.fields[i * FIELDS + IS_RIGHT] else -work.mixed[i]
                i += 1
            else:
                logit = np.float64(logits_ND[0, d])
            nats -= math.log1p(math.exp(-logit if trees.right_E[first + d] else logit))
        logq_V[token] = nats
        before = token
