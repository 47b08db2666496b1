"""Statistics of bytes, mixed with a network's decisions by weights that are learnt as one goes (PAQ's logistic mixing, Mahoney 2005).

A decision (tree.py) is a bit of the next byte, or whether the token ends. What followed the same context before is kept for nine contexts:
the last one to six bytes, the word so far with and without the one before, and the token's bytes so far behind the last two tokens; a tenth
opinion is that of the longest match. An opinion is a logit, what that state of counts, or that length of a match, has been worth before.
Weights, of two sets chosen by what is known, join them to the network's logit; they start with the network alone. Decisions of which the
network is sure are left to it, and nothing is learnt of them.

Nothing learns until the token is scored, so that its probability is one of a law over all tokens: `law` gives it whole, by the same
functions.

A context's counts lie in lines of 16 bytes, hashed: a check, and a byte for each of the 15 places that half a byte has (or, for the end of
a token, for its length), whose two halves are counts of ones and of zeros; many of one drive out those of the other.

Shapes: N targets, D decisions of the longest path, K contexts, X inputs, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from stages.sliding_eval.tree import END, Trees

F = TypeVar("F", bound=Callable[..., Any])

ORDERS = 6
WORD, WORDS, PAIR = ORDERS, ORDERS + 1, ORDERS + 2  # numbers of the other contexts
CONTEXTS = ORDERS + 3
MATCH, NETWORK, ALWAYS = CONTEXTS, CONTEXTS + 1, CONTEXTS + 2  # numbers of the inputs behind them
INPUTS = CONTEXTS + 3
SURE = 6.0  # a network's logit from which on a decision is its alone: half of all are, and nothing is lost by it
MOST_COUNTED, KEPT = 7, 2  # of one side; of the other, once this one has come
LINE, LINES = 16, 1 << 15  # bytes; lines of a context: few, so that what was read long ago is forgotten
STATE_LIMIT, MATCH_LIMIT = 255, 1022  # an opinion forgets by one in so many in the end
STEADY = 1024.0  # decisions of a set of weights behind which its steps shrink with their root
SHORTEST, LONGEST = 6, 32  # of a match, bytes; longer ones are alike
EDGES = np.array([0.5, 1.5, 3.0, 5.0], np.float32)  # between which |logit| of the network chooses weights
KNOWN = 8  # classes of how many contexts are known
LENGTHS = np.array([1, 12, 20, 32])  # from which on a match is of the next class
CLASSES = len(LENGTHS) + 1
GRID = 4096  # of a probability
TO_GRID, MOST = np.float32(GRID - 0.01), np.float32(18.0)  # a chance to its place; the largest mixed logit
NO_HALF = np.uint64(99)
MULTIPLIER, MIXER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
BYTE = np.uint64(255)

LOGITS = np.log((np.arange(GRID) + 0.5) / (GRID - np.arange(GRID) - 0.5)).astype(np.float32)
NEVER, WHOLE = 1023, (1 << 22) - 2  # times a state was seen of which nothing is learnt; the largest chance
SHARES = np.append(1 / (np.arange(NEVER) + 1.5), 0).astype(np.float32)  # of what is new, behind so many
BITS = np.array([0, *(prefix.bit_length() - 1 for prefix in range(1, 256))], np.uint8)  # of a byte that a prefix knows
HALF = np.array([0] + 15 * [1] + [p >> max(0, p.bit_length() - 5) for p in range(16, 256)], np.uint64)  # which line a prefix is in
PLACE = np.array(
    [*range(16), *((p & ((1 << (p.bit_length() - 5)) - 1)) | 1 << (p.bit_length() - 5) for p in range(16, 256))], np.uint8
)  # and where


def _next_states() -> np.ndarray:
    """The counts after a bit, (2, 256) uint8."""
    after = np.zeros((2, 256), np.uint8)
    for state in range(256):
        for bit in (0, 1):
            counts = [state >> 4, state & 15]
            counts[bit] = min(counts[bit] + 1, MOST_COUNTED)
            counts[1 - bit] = min(counts[1 - bit], (counts[1 - bit] + KEPT) // 2) if counts[1 - bit] > KEPT else counts[1 - bit]
            after[bit, state] = counts[0] << 4 | counts[1]
    return after


AFTER = _next_states()


def inlined(fastmath: bool = False) -> Callable[[F], F]:
    """Compile a function into its callers, without counts of references, which took a seventh of the time: it makes no arrays."""
    options: dict[str, Any] = {"nogil": True, "fastmath": fastmath, "forceinline": True, "_nrt": False}
    made: Callable[[F], F] = njit(**options)
    return made


def _asked_for(typing_context: Any, array: Any, index: Any) -> Any:
    """Ask the memory for the line of an array of bytes that holds an index, and go on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.gep(data, [builder.zext(arguments[1], ir.IntType(64))])
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")  # type: ignore[no-untyped-call]
        builder.call(function, [place, number(1), number(3), number(1)])  # to be written, to stay, data
        return context.get_dummy_value()

    return types.void(array, index), generate


prefetch: Any = intrinsic(_asked_for)


class Arrays(NamedTuple):
    """All that learns, as compiled functions take it."""

    boundary: np.ndarray  # (V,) bool: ids without text, behind which everything begins anew
    lines: np.ndarray  # uint8: those of one context behind those of the other
    chances: np.ndarray  # (2K 256,) uint32: of a one, by context, END or bit, and state: 22 bits above 10 of how often it was seen
    by_context: np.ndarray  # (sets, X) float32 weights
    by_match: np.ndarray
    steps_by_context: np.ndarray  # (sets,) float32: decisions so far
    steps_by_match: np.ndarray
    match_chances: np.ndarray  # (4 (LONGEST + 1),) float32
    match_seen: np.ndarray  # uint16
    text: np.ndarray  # uint8, a ring
    begins: np.ndarray  # uint8: 1 where a token begins, 2 where one without text stood before
    table: np.ndarray  # int64: where a text of SHORTEST bytes was last followed
    history: np.ndarray  # (8,) uint64, see below


SEEN, LAST, IN_WORD, BEFORE, TOKEN, TOKEN_BEFORE, MATCHED, LENGTH = range(8)
# of `history`: bytes read; the last eight; hashes of the word so far, the one before, the last two tokens; the match's place and length


class Mixture:
    """What has been learnt of a stream; its size in bytes, about, sizes the tables."""

    def __init__(self, boundary: np.ndarray, text_bytes: int) -> None:
        counts = np.arange(256)
        chances = ((counts & 15) + 0.4) / ((counts >> 4) + (counts & 15) + 0.8) * WHOLE
        chances = chances.astype(np.uint32) << 10 | np.where(counts, 4, NEVER).astype(np.uint32)
        sets, sets_by_match = 2 * KNOWN * (len(EDGES) + 1), 2 * CLASSES * 8 * 2
        wrong = 1 / (np.arange(LONGEST + 1) / 4 + 3)
        ring = 1 << max(10, text_bytes.bit_length())
        self.arrays = Arrays(
            boundary=boundary.astype(np.bool_),
            lines=np.zeros(CONTEXTS * LINES * LINE, np.uint8),
            chances=np.tile(chances, 2 * CONTEXTS),
            by_context=np.zeros((sets, INPUTS), np.float32),
            by_match=np.zeros((sets_by_match, INPUTS), np.float32),
            steps_by_context=np.zeros(sets, np.float32),
            steps_by_match=np.zeros(sets_by_match, np.float32),
            match_chances=np.concatenate((wrong, 1 - wrong, np.full(LONGEST + 1, 0.2), np.full(LONGEST + 1, 0.8))).astype(np.float32),
            match_seen=np.full(4 * (LONGEST + 1), 4, np.uint16),
            text=np.zeros(ring, np.uint8),
            begins=np.zeros(ring, np.uint8),
            table=np.zeros(ring >> 2, np.int64),
            history=np.zeros(8, np.uint64),
        )
        self.arrays.by_context[:, NETWORK] = 1.0

    def copy(self) -> "Mixture":
        """An independent copy."""
        twin = object.__new__(type(self))
        twin.arrays = Arrays(*(array.copy() for array in self.arrays))
        return twin


class Work(NamedTuple):
    """The decisions of a token that are not the network's alone, in the order of the path; twice, one half for each of two tokens."""

    number_D: np.ndarray  # int64: of each decision among them, or how many come before
    edge_L: np.ndarray  # int64: which decision of the trees
    logit_L: np.ndarray  # float32: the network's
    line_L: np.ndarray  # int64: which of the token's lines
    place_L: np.ndarray  # uint8: where in it
    match_L: np.ndarray  # int64: number of the match's opinion, -1 for none
    sure_L: np.ndarray  # int64: the first of the sets of weights that the network's logit chooses from ...
    by_context_L: np.ndarray  # ... the one of these that is taken ...
    by_match_L: np.ndarray  # ... and that of the other sets
    states_LK: np.ndarray  # uint8
    inputs_LX: np.ndarray  # float32
    total_L: np.ndarray  # float32: the mixed logit
    error_L: np.ndarray  # float32: what was minus its probability
    lines_LK: np.ndarray  # uint32: where the token's lines begin
    checks_LK: np.ndarray  # uint8
    keys_K: np.ndarray  # uint64: hashes of the contexts


@njit(nogil=True)
def _work(longest: int) -> Work:
    return Work(
        np.zeros(2 * longest, np.int64),
        np.zeros(2 * longest, np.int64),
        np.zeros(2 * longest, np.float32),
        np.zeros(2 * longest, np.int64),
        np.zeros(2 * longest, np.uint8),
        np.zeros(2 * longest, np.int64),
        np.zeros(2 * longest, np.int64),
        np.zeros(2 * longest, np.int64),
        np.zeros(2 * longest, np.int64),
        np.zeros((2 * longest, CONTEXTS), np.uint8),
        np.zeros((2 * longest, INPUTS), np.float32),
        np.zeros(2 * longest, np.float32),
        np.zeros(2 * longest, np.float32),
        np.zeros((2 * longest, CONTEXTS), np.uint32),
        np.zeros((2 * longest, CONTEXTS), np.uint8),
        np.zeros(CONTEXTS, np.uint64),
    )


@inlined()
def _read(last: Any, word: Any, before: Any, byte: Any) -> tuple[Any, Any, Any]:
    """The last bytes, the word so far and the one before, behind one byte more."""
    last = last << np.uint64(8) | np.uint64(byte)
    small = np.uint64(byte) | np.uint64(32)
    if np.uint64(97) <= small <= np.uint64(122) or small >= np.uint64(128):
        return last, (word + small + np.uint64(1)) * MIXER, before
    return last, np.uint64(0), word if word else before


@inlined()
def _keys(last: Any, word: Any, before: Any, inside: Any, history: np.ndarray, keys_K: np.ndarray) -> None:
    """Hashes of the contexts."""
    mask = BYTE
    for k in range(ORDERS):
        keys_K[k] = last & mask
        mask = mask << np.uint64(8) | BYTE
    keys_K[WORD] = word + (last & BYTE)
    keys_K[WORDS] = word * MULTIPLIER + before
    keys_K[PAIR] = (inside * MULTIPLIER + history[TOKEN_BEFORE]) * MIXER + history[TOKEN]
    for k in range(CONTEXTS):
        keys_K[k] = (keys_K[k] + np.uint64(k + 1) * MIXER) * MULTIPLIER


@inlined()
def _find(lines: np.ndarray, work: Work, line: int, half: Any) -> None:
    """The lines that the contexts have for half a byte, and what a line must begin with to be theirs."""
    for k in range(CONTEXTS):
        key = (work.keys_K[k] ^ work.keys_K[k] >> np.uint64(29) ^ half * MIXER) * MULTIPLIER
        start = np.uint32(k * LINES * LINE) + (np.uint32(key >> np.uint64(20)) & np.uint32(LINES * LINE - LINE))
        prefetch(lines, start)
        work.lines_LK[line, k] = start
        work.checks_LK[line, k] = np.uint8(key >> np.uint64(8)) | np.uint8(1)


@inlined()
def _match(arrays: Arrays, at: Any, length: Any, prefix: Any, depth: Any) -> int:
    """The number of the match's opinion about a decision; -1 for none. `at`: the place in its text; `length`: so far."""
    if prefix == END:
        ends = arrays.begins[at] == 2 if depth == 0 else arrays.begins[at] > 0
        return (2 if ends else 3) * (LONGEST + 1) + length
    byte = np.int64(arrays.text[at]) | 256
    if byte >> 8 - BITS[prefix] != prefix:
        return -1
    return (byte >> 7 - BITS[prefix] & 1) * (LONGEST + 1) + length


@inlined()
def _place(
    arrays: Arrays, trees: Trees, number: int, token: int, logits_ND: np.ndarray, row: int, work: Work, base: int, begin: int
) -> int:
    """What follows from the text of a token's decisions, from number `begin` on; what is learnt is asked for, and not read yet.

    Decisions before stay as another token with the same ones left them. The half that begins at `base` is filled; gives where it ends.
    """
    first, end = trees.first_TV[number, token], trees.first_TV[number, token + 1]
    history, mask = arrays.history, np.int64(len(arrays.text) - 1)
    last, word, before, inside = history[LAST], history[IN_WORD], history[BEFORE], np.uint64(0)
    matched, match_length, seen = np.int64(history[MATCHED]), np.int64(history[LENGTH]), np.int64(history[SEEN])
    follows, depth, keyed, half = match_length > 0, 0, -1, NO_HALF
    count, letters = work.number_D[base + begin] if begin else base, trees.text_start_TV[number, token]
    line = work.line_L[count - 1] if count > base else base - 1
    for e in range(first + begin, end):
        work.number_D[base + e - first] = count
        logit = logits_ND[row, e - first]
        if abs(logit) >= SURE:
            continue
        prefix = trees.prefix_E[e]
        while depth < trees.depth_E[e]:
            byte = trees.text[letters + depth]
            follows = follows and arrays.text[matched + depth & mask] == byte and matched + depth + 1 < seen
            last, word, before = _read(last, word, before, byte)
            inside = (inside + np.uint64(byte) + np.uint64(1)) * MIXER
            depth += 1
        if keyed != depth:
            _keys(last, word, before, inside, history, work.keys_K)
            keyed, half = depth, NO_HALF
        if half != HALF[prefix]:
            half, line = HALF[prefix], line + 1
            _find(arrays.lines, work, line, half)
        opinion = _match(arrays, matched + depth & mask, min(match_length + depth, LONGEST), prefix, depth) if follows else -1
        length = 0
        if opinion >= 0:
            while length < len(LENGTHS) and match_length + depth >= LENGTHS[length]:
                length += 1
        sure = 0
        for edge in EDGES:
            sure += abs(logit) >= edge
        work.edge_L[count], work.logit_L[count], work.line_L[count], work.match_L[count] = e, logit, line, opinion
        work.place_L[count] = min(depth, LINE - 2) + 1 if prefix == END else PLACE[prefix]
        work.sure_L[count] = (prefix != END) * KNOWN * (len(EDGES) + 1) + sure
        work.by_match_L[count] = (((prefix != END) * CLASSES + length) * 8 + BITS[prefix]) * 2 + (logit > 0)
        count += 1
    return count


@inlined(fastmath=True)
def _weigh(arrays: Arrays, trees: Trees, work: Work, begin: int, end: int) -> None:
    """The mixed logits of placed decisions."""
    known, line = 0, -1
    for i in range(begin, end):
        edge, place = work.edge_L[i], work.place_L[i]
        if work.line_L[i] != line:
            line, known = work.line_L[i], 0
            for k in range(CONTEXTS):
                known += arrays.lines[work.lines_LK[line, k]] == work.checks_LK[line, k]
        row = 0 if trees.prefix_E[edge] == END else CONTEXTS
        for k in range(CONTEXTS):
            at = work.lines_LK[line, k]
            state = arrays.lines[at + place] if arrays.lines[at] == work.checks_LK[line, k] else np.uint8(0)
            work.states_LK[i, k] = state
            work.inputs_LX[i, k] = LOGITS[arrays.chances[(row + k) * 256 + state] >> np.uint32(20)]
        opinion = work.match_L[i]
        work.inputs_LX[i, MATCH] = LOGITS[np.int64(arrays.match_chances[opinion] * TO_GRID)] if opinion >= 0 else np.float32(0)
        work.inputs_LX[i, NETWORK], work.inputs_LX[i, ALWAYS] = work.logit_L[i], np.float32(0.25)
        chosen = work.sure_L[i] + (known * (KNOWN - 1) + CONTEXTS - 1) // CONTEXTS * (len(EDGES) + 1)
        by_match, total = work.by_match_L[i], np.float32(0)
        for x in range(INPUTS):
            total += (arrays.by_context[chosen, x] + arrays.by_match[by_match, x]) * work.inputs_LX[i, x]
        work.by_context_L[i] = chosen
        work.total_L[i] = min(max(total, -MOST), MOST)


@inlined()
def _gain(trees: Trees, work: Work, begin: int, end: int) -> float:
    """What the mixed decisions on a token's path take from its loss, nats: 0 where they are the network's; fills the errors."""
    nats, ratio = 0.0, 1.0
    for i in range(begin, end):
        side = 1.0 if trees.right_E[work.edge_L[i]] else -1.0
        other = math.exp(-side * work.total_L[i])
        ratio *= (1 + math.exp(-side * work.logit_L[i])) / (1 + other)
        work.error_L[i] = side * other / (1 + other)
        if ratio < 1e-200:
            nats, ratio = nats + math.log(ratio), 1.0
    return nats + math.log(ratio)


@inlined(fastmath=True)
def _learn(arrays: Arrays, trees: Trees, work: Work, begin: int, end: int, rate: Any) -> None:
    """Counts, opinions and weights after a token, whose decisions are weighed."""
    if begin == end:
        return
    for line in range(work.line_L[begin], work.line_L[end - 1] + 1):
        for k in range(CONTEXTS):
            at = work.lines_LK[line, k]
            if arrays.lines[at] != work.checks_LK[line, k]:
                arrays.lines[at : at + LINE] = 0
                arrays.lines[at] = work.checks_LK[line, k]
    for i in range(begin, end):
        edge, line, place, error = work.edge_L[i], work.line_L[i], work.place_L[i], work.error_L[i]
        bit = np.int64(trees.right_E[edge])
        chosen, by_match = work.by_context_L[i], work.by_match_L[i]
        step = rate * error / np.sqrt(np.float32(1) + arrays.steps_by_context[chosen] * np.float32(1 / STEADY))
        step_by_match = rate * error / np.sqrt(np.float32(1) + arrays.steps_by_match[by_match] * np.float32(1 / STEADY))
        arrays.steps_by_context[chosen] += np.float32(1)
        arrays.steps_by_match[by_match] += np.float32(1)
        for x in range(INPUTS):
            arrays.by_context[chosen, x] += step * work.inputs_LX[i, x]
            arrays.by_match[by_match, x] += step_by_match * work.inputs_LX[i, x]
        row, came = 0 if trees.prefix_E[edge] == END else CONTEXTS, np.float32(bit * WHOLE)
        for k in range(CONTEXTS):
            number, at = (row + k) * 256 + work.states_LK[i, k], work.lines_LK[line, k] + place
            times, chance = arrays.chances[number] & np.uint32(1023), np.float32(arrays.chances[number] >> np.uint32(10))
            chance += (came - chance) * SHARES[times]
            arrays.chances[number] = np.uint32(chance) << np.uint32(10) | np.uint32(times + (times < STATE_LIMIT))
            arrays.lines[at] = AFTER[bit, arrays.lines[at]]
        opinion = work.match_L[i]
        if opinion >= 0:
            times = arrays.match_seen[opinion]
            arrays.match_chances[opinion] += (np.float32(bit) - arrays.match_chances[opinion]) * SHARES[times]
            arrays.match_seen[opinion] = times + (times < MATCH_LIMIT)


@inlined()
def _advance(arrays: Arrays, trees: Trees, number: int, token: int) -> None:
    """A token becomes history; where nothing is followed, what was read before in this place is looked up."""
    history, text, mask = arrays.history, arrays.text, np.int64(len(arrays.text) - 1)
    last, word, before, inside = history[LAST], history[IN_WORD], history[BEFORE], np.uint64(0)
    matched, length, at = np.int64(history[MATCHED]), np.int64(history[LENGTH]), np.int64(history[SEEN])
    if arrays.boundary[token]:
        last, word, before, length = np.uint64(0), np.uint64(0), np.uint64(0), 0
    arrays.begins[at & mask] = 2 if arrays.boundary[token] else max(arrays.begins[at & mask], 1)
    for letter in range(trees.text_start_TV[number, token], trees.text_start_TV[number, token + 1]):
        byte = trees.text[letter]
        length = length + 1 if length and text[matched & mask] == byte else 0
        matched += 1
        text[at & mask] = byte
        at += 1
        arrays.begins[at & mask] = 0
        last, word, before = _read(last, word, before, byte)
        inside = (inside + np.uint64(byte) + np.uint64(1)) * MIXER
    key = (last & np.uint64((1 << 8 * SHORTEST) - 1)) * MULTIPLIER
    slot = np.int64((key ^ key >> np.uint64(31)) * MIXER >> np.uint64(40)) & len(arrays.table) - 1
    candidate = arrays.table[slot]
    if length == 0 and candidate > 0 and at - candidate < mask - LONGEST:
        while length < min(LONGEST, candidate) and text[candidate - 1 - length & mask] == text[at - 1 - length & mask]:
            length += 1
        matched, length = candidate, length if length >= SHORTEST else 0
    arrays.table[slot] = at
    history[LAST], history[IN_WORD], history[BEFORE] = last, word, before
    history[SEEN], history[MATCHED], history[LENGTH] = np.uint64(at), np.uint64(matched), np.uint64(length)
    history[TOKEN_BEFORE], history[TOKEN] = history[TOKEN], inside


@njit(nogil=True)
def follow(
    arrays: Arrays, trees: Trees, targets: np.ndarray, trees_N: np.ndarray, paths_ND: np.ndarray, nll: np.ndarray, rate: float
) -> np.ndarray:
    """Each target's loss with the mixture, (N,) float32; behind each everything learns from it.

    The next target's lines are asked of the memory while this one is learnt from.
    """
    longest = paths_ND.shape[1]
    mixed, work, begin, end = np.empty(len(nll), np.float32), _work(longest), np.int64(0), np.int64(0)
    for i in range(len(nll) + 1):
        if i:
            _weigh(arrays, trees, work, begin, end)
            mixed[i - 1] = nll[i - 1] - _gain(trees, work, begin, end)
            _advance(arrays, trees, trees_N[i - 1], targets[i - 1])
        base, placed = longest - begin, np.int64(0)
        if i < len(nll):
            placed = _place(arrays, trees, trees_N[i], targets[i], paths_ND, i, work, base, 0)
        if i:
            _learn(arrays, trees, work, begin, end, np.float32(rate))
        begin, end = base, placed
    return mixed


@njit(nogil=True)
def law(arrays: Arrays, trees: Trees, number: int, longest: int, sums: np.ndarray) -> np.ndarray:
    """The log-probability of every token that may come next, (V,), from sums of the network's masses (tree.py); nothing changes.

    In the order of bytes a token shares its first decisions with the one before.
    """
    work, logits_ND, first_V = _work(longest + 1), np.empty((1, longest), np.float32), trees.first_TV[number]
    logq_V, before = np.empty(len(trees.order_TV[number])), -1
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
            right, left = sums[trees.high_E[e]] - sums[trees.middle_E[e]], sums[trees.middle_E[e]] - sums[trees.low_E[e]]
            logits_ND[0, d] = math.log(np.float64(right)) - math.log(np.float64(left))
        begin = work.number_D[shared] if shared else 0
        end = _place(arrays, trees, number, token, logits_ND, 0, work, 0, shared)
        work.number_D[count] = end
        _weigh(arrays, trees, work, begin, end)
        low, high, place = trees.same_TV2[number, token, 0], trees.same_TV2[number, token, 1], trees.place_TV[number, token]
        nats = math.log(np.float64(sums[place + 1] - sums[place])) - math.log(np.float64(sums[high] - sums[low]))
        for d in range(count):
            at = work.number_D[d]
            logit = work.total_L[at] if work.number_D[d + 1] > at else logits_ND[0, d]
            nats -= math.log1p(math.exp(-np.float64(logit) if trees.right_E[first + d] else np.float64(logit)))
        logq_V[token] = nats
        before = token
    return logq_V
