"""The text read so far: hashes of its end, from which contexts are made, and a match model.

The match model (PAQ) looks for an earlier place where the last MIN_MATCH bytes or more were the
same, and predicts that the text goes on as it did there. Of a text longer than the ring, the last
part is kept.
"""

from typing import Any, NamedTuple

import numpy as np

from stages.common.jit import jit_inline
from stages.scoring.byte_tree import END, ByteTrees

MIN_MATCH = 6  # bytes that must agree before a match counts
MAX_MATCH = 32  # bytes; longer matches are treated alike
MAX_RING_BYTES = 1 << 25  # text kept for matches
MAX_MATCH_POSITIONS = 1 << 22  # entries of the table from MIN_MATCH bytes to a position

# Flags in the high byte of a cell of the ring, next to a byte of the text.
TOKEN_ENDED = 0x100  # before this byte a token ended
CONTROL_TOKEN_ENDED = 0x200  # before this byte there was a control token, which has no text

# Odd factors that spread a hash over 64 bits; the first is 2^64 over the golden ratio (Knuth 6.4).
HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
HASH_MULTIPLIER_2 = np.uint64(0xD6E8FEB86659FD93)
ONE = np.uint64(1)
LAST_MATCH_BYTES = np.uint64((1 << 8 * MIN_MATCH) - 1)  # mask of the last MIN_MATCH bytes

# Bits of the next byte that a bit prefix (byte_tree.py) contains; 0 for END, which is prefix 0.
BITS_OF_PREFIX = np.array([0, *(prefix.bit_length() - 1 for prefix in range(1, 256))], np.uint8)

# Predictions of the match model, as indices of the mixer's table of probabilities: 0 for none, then
# for each of four predicted events the lengths 0 ... MAX_MATCH.
NO_MATCH = 0
MATCH_EVENTS = 4  # the next bit is 0; it is 1; the token ends; it goes on
N_MATCH_PREDICTIONS = 1 + MATCH_EVENTS * (MAX_MATCH + 1)

# State of the text, one record. Hashes are 0 for an empty text.
TEXT_STATE = np.dtype(
    [
        ("length", np.int64),  # bytes read
        ("last_bytes", np.uint64),  # the last eight, the latest in the lowest bits
        ("word_hash", np.uint64),  # of the letters at the end
        ("previous_word_hash", np.uint64),  # of the word before
        ("token_hash", np.uint64),  # of the last token's bytes
        ("previous_token_hash", np.uint64),
        ("match_position", np.int64),  # position of the byte that the match predicts
        ("match_length", np.int64),  # bytes that agree before it; 0 without a match
    ]
)


class TextHistory(NamedTuple):
    """The text and the match model."""

    state: np.ndarray  # TEXT_STATE (1,)
    ring: np.ndarray  # uint16, a power of two of them: the last bytes, with flags
    match_table: np.ndarray  # uint32: the last position after MIN_MATCH bytes, by their hash


class Prefix(NamedTuple):
    """Hashes of the text up to a byte of the current token."""

    last_bytes: np.uint64
    word_hash: np.uint64
    previous_word_hash: np.uint64
    token_hash: np.uint64


class TokenPaths(NamedTuple):
    """The columns of the byte trees that the compiled loops read, next to each other in memory.

    Shapes: T trees, V ids, E decisions of all paths.
    """

    path_start_TV: np.ndarray  # int64 (T, V+1): first decision of each id's path
    text_start_TV: np.ndarray  # int64 (T, V+1): first byte of each id's text
    text: np.ndarray  # uint8
    steps_E: np.ndarray  # PATH_STEP
    boundary_V: np.ndarray  # bool: control tokens, which have no text; after one, the text begins again


PATH_STEP = np.dtype(
    [("depth", np.uint8), ("bit_prefix", np.uint8), ("goes_right", np.uint8), ("unused", np.uint8)]
)


def token_paths(trees: ByteTrees) -> TokenPaths:
    """Copy the columns that the compiled loops read."""
    steps_E = np.zeros(len(trees.depth_E), PATH_STEP)
    steps_E["depth"] = trees.depth_E
    steps_E["bit_prefix"] = trees.bit_prefix_E
    steps_E["goes_right"] = trees.goes_right_E
    return TokenPaths(trees.path_start_TV, trees.text_start_TV, trees.text, steps_E, trees.boundary_V)


def new_text_history(text_bytes: int) -> TextHistory:
    """An empty history, sized for about `text_bytes` bytes."""
    ring_size = min(1 << max(10, text_bytes.bit_length()), MAX_RING_BYTES)
    return TextHistory(
        state=np.zeros(1, TEXT_STATE),
        ring=np.zeros(ring_size, np.uint16),
        match_table=np.zeros(min(ring_size >> 2, MAX_MATCH_POSITIONS), np.uint32),
    )


@jit_inline
def current_prefix(text: TextHistory) -> Prefix:
    """The hashes before the first byte of a new token."""
    state = text.state[0]
    return Prefix(state.last_bytes, state.word_hash, state.previous_word_hash, np.uint64(0))


@jit_inline
def _extend_hash(text_hash: Any, byte: Any) -> Any:
    return (text_hash + np.uint64(byte) + ONE) * HASH_MULTIPLIER_2


@jit_inline
def append_byte(prefix: Prefix, byte: Any) -> Prefix:
    """The hashes after one more byte. A word is of letters, in lower case, and bytes above 127."""
    last_bytes = prefix.last_bytes << np.uint64(8) | np.uint64(byte)
    token_hash = _extend_hash(prefix.token_hash, byte)

    lower_case = np.uint64(byte) | np.uint64(32)
    if np.uint64(97) <= lower_case <= np.uint64(122) or lower_case >= np.uint64(128):
        word_hash = _extend_hash(prefix.word_hash, lower_case)
        return Prefix(last_bytes, word_hash, prefix.previous_word_hash, token_hash)
    previous_word_hash = prefix.word_hash if prefix.word_hash else prefix.previous_word_hash
    return Prefix(last_bytes, np.uint64(0), previous_word_hash, token_hash)


@jit_inline
def match_continues(text: TextHistory, position: int, byte: Any) -> bool:
    """True if the text has this byte at `position`, and another one after it."""
    is_same = np.uint8(text.ring[position & len(text.ring) - 1]) == byte
    return is_same and position + 1 < text.state[0].length


@jit_inline
def match_prediction(text: TextHistory, depth: int, bit_prefix: Any) -> int:
    """Index of the match model's prediction for a decision.

    The token's `depth` bytes before the decision agree with the match. If the bits of the next byte
    so far do not, the index is NO_MATCH.
    """
    state = text.state[0]
    cell = text.ring[state.match_position + depth & len(text.ring) - 1]
    if bit_prefix == END:
        ends = cell & CONTROL_TOKEN_ENDED if depth == 0 else cell & TOKEN_ENDED
        event = 2 if ends else 3
    else:
        byte = np.int64(cell) & 255 | 256  # with a leading one, as a bit prefix has it
        bits = BITS_OF_PREFIX[bit_prefix]
        if byte >> 8 - bits != bit_prefix:
            return NO_MATCH
        event = byte >> 7 - bits & 1
    return 1 + event * (MAX_MATCH + 1) + min(state.match_length + depth, MAX_MATCH)


@jit_inline
def append_token(text: TextHistory, paths: TokenPaths, tree: int, token: int) -> None:
    """Append a token's bytes to the text, and continue the match or look for another."""
    state = text.state[0]
    ring = text.ring
    mask = len(ring) - 1
    prefix = current_prefix(text)
    position = state.length
    match_position = state.match_position
    match_length = state.match_length

    # Mark the border between tokens. After a control token nothing of the text before it counts.
    if paths.boundary_V[token]:
        prefix = Prefix(np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0))
        match_length = 0
        ring[position & mask] |= np.uint16(TOKEN_ENDED | CONTROL_TOKEN_ENDED)
    else:
        ring[position & mask] |= np.uint16(TOKEN_ENDED)

    # Read the bytes.
    for letter in range(paths.text_start_TV[tree, token], paths.text_start_TV[tree, token + 1]):
        byte = paths.text[letter]
        agrees = match_length > 0 and np.uint8(ring[match_position & mask]) == byte
        match_length = match_length + 1 if agrees else 0
        match_position += 1

        # The next cell is cleared: in a full ring it has an old byte.
        ring[position & mask] = ring[position & mask] & np.uint16(TOKEN_ENDED | CONTROL_TOKEN_ENDED) | byte
        position += 1
        ring[position & mask] = 0
        prefix = append_byte(prefix, byte)

    # Without a match, look up the last MIN_MATCH bytes, and count how many more agree.
    key = (prefix.last_bytes & LAST_MATCH_BYTES) * HASH_MULTIPLIER
    match_hash = (key ^ key >> np.uint64(31)) * HASH_MULTIPLIER_2 >> np.uint64(40)
    slot = np.int64(match_hash) & len(text.match_table) - 1
    candidate = np.int64(text.match_table[slot])
    if match_length == 0 and candidate > 0 and position - candidate < mask - MAX_MATCH:
        longest = min(MAX_MATCH, candidate)
        while match_length < longest:
            earlier_byte = np.uint8(ring[candidate - 1 - match_length & mask])
            if earlier_byte != np.uint8(ring[position - 1 - match_length & mask]):
                break
            match_length += 1

        # Fewer bytes agree where hashes collide.
        match_position = candidate
        if match_length < MIN_MATCH:
            match_length = 0
    text.match_table[slot] = position

    # Write the state back.
    state.length = position
    state.last_bytes = prefix.last_bytes
    state.word_hash = prefix.word_hash
    state.previous_word_hash = prefix.previous_word_hash
    state.previous_token_hash = state.token_hash
    state.token_hash = prefix.token_hash
    state.match_position = match_position
    state.match_length = match_length
