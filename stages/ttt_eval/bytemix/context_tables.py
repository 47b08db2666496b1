"""Where what is known about a token's decisions is kept: by the bytes before each, eight contexts of them, and by the longest match.

The contexts are the last one to four bytes and the last six, the word so far with the last byte, and with the word before, and the token's
bytes so far behind the last two tokens. What a context knows lies in lines of 16 bytes, found by a hash: a check, and a byte for each of
the 15 places that half a byte has (or, for the end of a token, for its length).

Shapes: T trees, V ids, E decisions of all paths, L decisions of two tokens, K contexts.
"""

from typing import Any, NamedTuple

import numpy as np

from stages.scoring.byte_tree import END, Trees
from stages.ttt_eval.bytemix.simd import WIDTH, inlined, prefetch

ORDERS = (1, 2, 3, 4, 6)  # order 5 was worth 0.00003 bpb
MASKS = np.array([(1 << 8 * order) - 1 for order in ORDERS], np.uint64)
WORD, WORDS, PAIR = len(ORDERS), len(ORDERS) + 1, len(ORDERS) + 2  # numbers of the other contexts
CONTEXTS = len(ORDERS) + 3
NETWORK, ALWAYS = (
    CONTEXTS + 1,
    CONTEXTS + 2,
)  # inputs behind those of the contexts and the match; the last is nothing
STATES = 64  # of a place: up to seven ones and seven zeros
SURE = np.float32(
    6.0
)  # a network's logit from which on a decision is its alone: half of all are, and nothing is lost by it
LINE, LINES = 16, 1 << 14  # bytes; lines of a context: few, so that what was read long ago is forgotten
SHORTEST, LONGEST = 6, 32  # of a match, bytes; longer ones are alike
MOST_TEXT, MOST_PLACES = 1 << 25, 1 << 22  # that a match is looked for in: bytes, and places
EDGES = np.array([0.5, 1.5, 3.0, 5.0])  # between which |logit| of the network chooses weights
KNOWN = 8  # classes of how many contexts are known
LENGTHS = np.array([1, 12, 20, 32])  # from which on a match is of the next class
CLASSES = len(LENGTHS) + 1
SETS, SETS_BY_MATCH = 2 * KNOWN * (len(EDGES) + 1), 2 * CLASSES * 8 * 2  # of weights
NO_MATCH = 2 * CONTEXTS * STATES  # the opinion that nothing is learnt of; those of the match lie behind it
ENDS, ENDS_BOUNDARY = 0x100, 0x200  # beside a byte of the text: before it a token ended; one without text
MULTIPLIER, MIXER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
BYTE, HIGH, CHECK, ONE = np.uint64(255), np.uint64(32), np.uint64(24), np.uint64(1)
NO_HALF = np.uint8(99)
SIGNED: Any = np.int64  # numbers of 64 bits without a sign become floats beside others

PREFIXES = range(16, 256)
BITS = np.array(
    [0, *(prefix.bit_length() - 1 for prefix in range(1, 256))], np.uint8
)  # of a byte that a prefix knows
HALF = np.array(
    [0] + 15 * [1] + [p >> p.bit_length() - 5 for p in PREFIXES], np.uint8
)  # which line a prefix is in
PLACE = np.array(
    [*range(16), *(p & (1 << p.bit_length() - 5) - 1 | 1 << p.bit_length() - 5 for p in PREFIXES)], np.uint8
)  # and where
SPREAD = (np.arange(32, dtype=np.uint64) * MIXER >> HIGH).astype(np.uint32)  # of the halves over the lines
CLASS_OF_LENGTH = (np.arange(LONGEST + 1)[:, None] >= LENGTHS).sum(1).astype(np.uint8)
SURENESS = (np.arange(2 * int(SURE) + 1)[:, None] / 2 >= EDGES).sum(1).astype(np.uint8)  # by twice a logit

SEEN, LAST, IN_WORD, BEFORE, TOKEN, TOKEN_BEFORE, MATCHED, LENGTH = range(8)
# of `history`: bytes read; the last eight; hashes of the word so far, the one before, the last two tokens; the match's place and length
NUMBER, IN_LINE, PLACE_IN_LINE, FIRST_OPINION, OPINION_OF_MATCH, IS_RIGHT, BY_CONTEXT, BY_MATCH = range(8)
FIELDS = 8  # of a decision: of the path; which of the token's lines; where; opinions; its side; which weights
START, FOUND, CHECKED = 0, CONTEXTS, 2 * CONTEXTS
OF_LINE = (
    3 * CONTEXTS
)  # numbers: where it lies in each context, or nowhere if it is another's; what it must begin with


class Paths(NamedTuple):
    """What is read of the trees."""

    first_TV: np.ndarray  # int64 (T, V+1)
    text_start_TV: np.ndarray  # int64 (T, V+1)
    text: np.ndarray  # uint8
    steps: np.ndarray  # uint8 (4 E,): depth, prefix and side of a decision, and nothing
    boundary_V: np.ndarray  # bool: ids without text, behind which everything begins anew


def paths_of(trees: Trees) -> Paths:
    """The same numbers, closer together."""
    columns = trees.depth_E, trees.prefix_E, trees.right_E.astype(np.uint8), np.zeros_like(trees.depth_E)
    return Paths(
        trees.first_TV, trees.text_start_TV, trees.text, np.stack(columns, 1).ravel(), trees.boundary_V
    )


class Arrays(NamedTuple):
    """All that learns, as compiled functions take it."""

    lines: np.ndarray  # uint8: those of one context behind those of the other, and one that is empty for good
    chances: np.ndarray  # uint32: of a one, by END or bit, context and state, then by match: 22 bits above 10 of how often it was seen
    weights: (
        np.ndarray
    )  # float32, rows: by what is known, then by match; in the last place the decisions so far
    ring: np.ndarray  # uint16: the text
    table: np.ndarray  # uint32: where a text of SHORTEST bytes was last followed
    history: np.ndarray  # (8,) uint64


class Work(NamedTuple):
    """The decisions of a token that are not the network's alone, in the order of the path; twice, one half for each of two tokens."""

    fields: np.ndarray  # uint32 (FIELDS L,)
    own: np.ndarray  # float64 (L,): the network's logit of the side taken ...
    mixed: np.ndarray  # float64 (L,): ... and the mixed one, in whose place comes its error
    inputs: np.ndarray  # float32, rows
    states: np.ndarray  # uint8 (K L,)
    lines: np.ndarray  # uint32 (OF_LINE L,): the token's lines
    keys_K: np.ndarray  # uint64: hashes of the contexts


def work_for(decisions: int) -> Work:
    """Room for so many decisions."""
    return Work(
        np.zeros(FIELDS * decisions, np.uint32),
        np.zeros(decisions),
        np.zeros(decisions),
        np.zeros(WIDTH * decisions, np.float32),
        np.zeros(CONTEXTS * decisions, np.uint8),
        np.zeros(OF_LINE * decisions, np.uint32),
        np.zeros(CONTEXTS, np.uint64),
    )


@inlined()
def _hashed(text: Any, byte: Any) -> Any:
    """The hash of a text behind one byte more."""
    return (text + np.uint64(byte) + ONE) * MIXER


@inlined()
def _read(last: Any, word: Any, before: Any, byte: Any) -> tuple[Any, Any, Any]:
    """The last bytes, the word so far and the one before, behind one byte more."""
    last = last << np.uint64(8) | np.uint64(byte)
    small = np.uint64(byte) | np.uint64(32)
    if np.uint64(97) <= small <= np.uint64(122) or small >= np.uint64(128):
        return last, _hashed(word, small), before
    return last, np.uint64(0), word if word else before


@inlined()
def _keys(last: Any, word: Any, before: Any, inside: Any, history: np.ndarray, keys_K: np.ndarray) -> None:
    """Hashes of the contexts."""
    for k in range(len(ORDERS)):
        keys_K[k] = last & MASKS[k]
    keys_K[WORD] = word + (last & BYTE)
    keys_K[WORDS] = word * MULTIPLIER + before
    keys_K[PAIR] = (inside * MULTIPLIER + history[TOKEN_BEFORE]) * MIXER + history[TOKEN]
    for k in range(CONTEXTS):
        keys_K[k] = (keys_K[k] ^ keys_K[k] >> np.uint64(29)) * MULTIPLIER


@inlined()
def _find(lines: np.ndarray, work: Work, line: int, half: Any) -> None:
    """The lines that the contexts have for half a byte, and what a line must begin with to be theirs."""
    size = (len(lines) - LINE) // CONTEXTS  # of one context's
    for k in range(CONTEXTS):
        start = SIGNED((np.uint32(work.keys_K[k] >> HIGH) ^ SPREAD[half]) & np.uint32(size - LINE)) + k * size
        work.lines[line * OF_LINE + START + k] = start
        work.lines[line * OF_LINE + CHECKED + k] = np.uint32(work.keys_K[k] >> CHECK & BYTE | ONE)
        prefetch(lines, start)


@inlined()
def _match(cell: Any, length: Any, prefix: Any, depth: Any) -> int:
    """The number of the match's opinion about a decision, by the place that it has come to in its text and its length so far."""
    if prefix == END:
        ends = cell & ENDS_BOUNDARY if depth == 0 else cell & ENDS
        return NO_MATCH + 1 + (2 if ends else 3) * (LONGEST + 1) + length
    byte = SIGNED(cell) & 255 | 256
    if byte >> 8 - BITS[prefix] != prefix:
        return NO_MATCH
    return NO_MATCH + 1 + (byte >> 7 - BITS[prefix] & 1) * (LONGEST + 1) + length


@inlined()
def place(
    arrays: Arrays,
    paths: Paths,
    number: int,
    token: int,
    logits_ND: np.ndarray,
    row: int,
    work: Work,
    base: int,
    begin: int,
    step: int,
) -> int:
    """What follows from the text of a token's decisions, from `step` of its path on; what is learnt is asked for, and not read yet.

    Decisions before `begin` stay as another token with the same steps left them. The half that begins at `base` is filled; gives its end.
    """
    first, end = paths.first_TV[number, token], paths.first_TV[number, token + 1]
    history, mask = arrays.history, SIGNED(len(arrays.ring) - 1)
    last, word, before, inside = history[LAST], history[IN_WORD], history[BEFORE], np.uint64(0)
    matched, match_length, seen = SIGNED(history[MATCHED]), SIGNED(history[LENGTH]), SIGNED(history[SEEN])
    follows, depth, keyed, half = match_length > 0, 0, -1, NO_HALF
    count, letters = begin, paths.text_start_TV[number, token]
    line = SIGNED(work.fields[(begin - 1) * FIELDS + IN_LINE]) if begin > base else base - 1
    for d in range(step, end - first):
        logit, at = logits_ND[row, d], 4 * (first + d)
        if (
            not abs(logit) < SURE
        ):  # or no number: the rehearsal that compiles kernels answers with what it finds
            continue
        prefix = paths.steps[at + 1]
        while depth < paths.steps[at]:
            byte = paths.text[letters + depth]
            follows = (
                follows
                and np.uint8(arrays.ring[matched + depth & mask]) == byte
                and matched + depth + 1 < seen
            )
            last, word, before = _read(last, word, before, byte)
            inside = _hashed(inside, byte)
            depth += 1
        if keyed != depth:
            _keys(last, word, before, inside, history, work.keys_K)
            keyed, half = depth, NO_HALF
        if half != HALF[prefix]:
            half, line = HALF[prefix], line + 1
            _find(arrays.lines, work, line, half)
        opinion, length = NO_MATCH, min(match_length + depth, LONGEST)
        if follows:
            opinion = _match(arrays.ring[matched + depth & mask], length, prefix, depth)
        is_bit, right, field = SIGNED(prefix != END), SIGNED(paths.steps[at + 2]), count * FIELDS
        alike = is_bit * CLASSES + (CLASS_OF_LENGTH[length] if opinion != NO_MATCH else 0)
        work.fields[field + NUMBER], work.fields[field + IN_LINE], work.fields[field + IS_RIGHT] = (
            d,
            line,
            right,
        )
        work.fields[field + PLACE_IN_LINE] = PLACE[prefix] if is_bit else min(depth, LINE - 2) + 1
        work.fields[field + FIRST_OPINION] = is_bit * CONTEXTS * STATES
        work.fields[field + OPINION_OF_MATCH] = opinion
        work.fields[field + BY_CONTEXT] = (
            is_bit * (len(EDGES) + 1) + SURENESS[SIGNED(abs(logit) * 2)]
        ) * KNOWN
        work.fields[field + BY_MATCH] = SETS + (alike * 8 + BITS[prefix]) * 2 + (logit > 0)
        work.own[count] = logit if right else -logit
        work.inputs[count * WIDTH + NETWORK], work.inputs[count * WIDTH + ALWAYS] = logit, np.float32(0.25)
        count += 1
    return count


@inlined()
def advance(arrays: Arrays, paths: Paths, number: int, token: int) -> None:
    """A token becomes history; where nothing is followed, what was read before in this place is looked up."""
    history, ring, mask = arrays.history, arrays.ring, SIGNED(len(arrays.ring) - 1)
    last, word, before, inside = history[LAST], history[IN_WORD], history[BEFORE], np.uint64(0)
    matched, length, at = SIGNED(history[MATCHED]), SIGNED(history[LENGTH]), SIGNED(history[SEEN])
    if paths.boundary_V[token]:
        last, word, before, length = np.uint64(0), np.uint64(0), np.uint64(0), 0
    ring[at & mask] |= np.uint16(ENDS | ENDS_BOUNDARY if paths.boundary_V[token] else ENDS)
    for letter in range(paths.text_start_TV[number, token], paths.text_start_TV[number, token + 1]):
        byte = paths.text[letter]
        length = length + 1 if length and np.uint8(ring[matched & mask]) == byte else 0
        matched += 1
        ring[at & mask] = ring[at & mask] & np.uint16(ENDS | ENDS_BOUNDARY) | byte
        at += 1
        ring[at & mask] = 0
        last, word, before = _read(last, word, before, byte)
        inside = _hashed(inside, byte)
    key = (last & np.uint64((1 << 8 * SHORTEST) - 1)) * MULTIPLIER
    slot = SIGNED((key ^ key >> np.uint64(31)) * MIXER >> np.uint64(40)) & len(arrays.table) - 1
    candidate = SIGNED(arrays.table[slot])
    if length == 0 and candidate > 0 and at - candidate < mask - LONGEST:
        while length < min(LONGEST, candidate) and np.uint8(ring[candidate - 1 - length & mask]) == np.uint8(
            ring[at - 1 - length & mask]
        ):
            length += 1
        matched, length = candidate, length if length >= SHORTEST else 0
    arrays.table[slot] = at
    history[LAST], history[IN_WORD], history[BEFORE] = last, word, before
    history[SEEN], history[MATCHED], history[LENGTH] = np.uint64(at), np.uint64(matched), np.uint64(length)
    history[TOKEN_BEFORE], history[TOKEN] = history[TOKEN], inside
