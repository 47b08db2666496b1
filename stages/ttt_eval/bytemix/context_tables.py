"""Hash tables from contexts to bit histories, as in PAQ and lpaq.

A context is a part of the text before a decision: the last 1, 2, 3, 4 or 6 bytes; the word so far
with the last byte, or with the previous word; or the current token's bytes so far with the last two
tokens. Each of the N_CONTEXTS contexts has a hash table of its own. A table consists of slots of 16
bytes. A slot belongs to one context and one half of the next byte (a nibble): the first byte is a
check that the slot is not another context's, the other 15 are the bit histories of the 15 bit
prefixes in that nibble. The end of a token has a slot as well, with one bit history for each number
of bytes in the token.

A bit history is one byte: how often, lately, a 0 and a 1 followed. NEXT_HISTORY says how it
changes.

Shapes: K contexts.
"""

from typing import Any

import numpy as np

from stages.common.jit import jit_inline
from stages.scoring.byte_tree import END
from stages.ttt_eval.bytemix.simd import prefetch
from stages.ttt_eval.bytemix.text_history import HASH_MULTIPLIER, HASH_MULTIPLIER_2, ONE, Prefix

ORDERS = (1, 2, 3, 4, 6)  # lengths of the byte contexts; order 5 was worth 0.00003 bpb
ORDER_MASKS = np.array([(1 << 8 * order) - 1 for order in ORDERS], np.uint64)
WORD = len(ORDERS)  # number of the context: the word so far, with the last byte
TWO_WORDS = WORD + 1  # ... the word so far, with the previous word
TWO_TOKENS = WORD + 2  # ... the token's bytes so far, with the last two tokens
N_CONTEXTS = WORD + 3

SLOT_BYTES = 16  # a check and 15 bit histories; four slots are a cache line
SLOTS_PER_CONTEXT = 1 << 14  # few, so that what was read long ago is forgotten
BYTE = np.uint64(255)
SLOT_SHIFT = np.uint64(32)  # to the bits of a context's hash that choose the slot
CHECK_SHIFT = np.uint64(24)  # to the bits that are the check

MAX_BIT_COUNT = 7  # largest count of one bit in a history
KEPT_BIT_COUNT = 2  # when one bit follows, a larger count of the other moves halfway to this
N_HISTORIES = 64  # two counts of three bits

# Nibbles of the next byte: 0 is the end of the token, 1 the high nibble, 16 ... 31 the low nibble
# after that high nibble.
NO_NIBBLE = np.uint8(99)
N_NIBBLES = 32
LONG_PREFIXES = range(16, 256)  # bit prefixes that contain the high nibble


def _nibbles_and_nodes() -> tuple[np.ndarray, np.ndarray]:
    """The nibble of each bit prefix, and its byte in that nibble's slot; both (256,) uint8."""
    nibble = np.ones(256, np.uint8)
    node = np.arange(256, dtype=np.uint8)
    nibble[0] = 0
    for prefix in LONG_PREFIXES:
        low_bits = prefix.bit_length() - 5
        nibble[prefix] = prefix >> low_bits
        node[prefix] = prefix & (1 << low_bits) - 1 | 1 << low_bits
    return nibble, node


NIBBLE_OF_PREFIX, NODE_OF_PREFIX = _nibbles_and_nodes()
# Spreads a context's slots for different nibbles over the table.
NIBBLE_HASH = (np.arange(N_NIBBLES, dtype=np.uint64) * HASH_MULTIPLIER_2 >> SLOT_SHIFT).astype(np.uint32)

# The slots of all contexts for one nibble, one record. Positions are those of a slot's first byte
# in the table.
SLOT_SET = np.dtype(
    [
        ("start", np.uint32, (N_CONTEXTS,)),  # where a context's slot is
        ("found", np.uint32, (N_CONTEXTS,)),  # the same, or the empty slot where another context has it
        ("check", np.uint32, (N_CONTEXTS,)),  # first byte of the context's slot, never 0
    ]
)


def _next_histories() -> np.ndarray:
    """The history after each bit, (2, N_HISTORIES) uint8.

    A history is the count of zeros in bits 3 to 5, and of ones in bits 0 to 2.
    """
    after = np.zeros((2, N_HISTORIES), np.uint8)
    for history in range(N_HISTORIES):
        for bit in (0, 1):
            counts = [history >> 3, history & 7]
            counts[bit] = min(counts[bit] + 1, MAX_BIT_COUNT)
            other = counts[1 - bit]
            if other > KEPT_BIT_COUNT:
                counts[1 - bit] = (other + KEPT_BIT_COUNT) // 2
            after[bit, history] = counts[0] << 3 | counts[1]
    return after


NEXT_HISTORY = _next_histories()


def new_tables(slots_per_context: int) -> np.ndarray:
    """Empty tables of all contexts, one after another, and an empty slot at the end; uint8."""
    return np.zeros((N_CONTEXTS * slots_per_context + 1) * SLOT_BYTES, np.uint8)


@jit_inline
def node_in_slot(bit_prefix: Any, depth: int) -> Any:
    """Byte of a decision's bit history in its slot; for END by the bytes of the token, up to 14."""
    if bit_prefix == END:
        return min(depth, SLOT_BYTES - 2) + 1
    return NODE_OF_PREFIX[bit_prefix]


@jit_inline
def hash_contexts(prefix: Prefix, text_state: Any, keys_K: np.ndarray) -> None:
    """Fill the contexts' hashes after `prefix`; `text_state` has those of the last two tokens."""
    for k in range(len(ORDERS)):
        keys_K[k] = prefix.last_bytes & ORDER_MASKS[k]
    keys_K[WORD] = prefix.word_hash + (prefix.last_bytes & BYTE)
    keys_K[TWO_WORDS] = prefix.word_hash * HASH_MULTIPLIER + prefix.previous_word_hash
    tokens_hash = prefix.token_hash * HASH_MULTIPLIER + text_state.previous_token_hash
    keys_K[TWO_TOKENS] = tokens_hash * HASH_MULTIPLIER_2 + text_state.token_hash
    for k in range(N_CONTEXTS):
        keys_K[k] = (keys_K[k] ^ keys_K[k] >> np.uint64(29)) * HASH_MULTIPLIER


@jit_inline
def prefetch_slots(tables: np.ndarray, keys_K: np.ndarray, nibble: Any, slots: Any) -> None:
    """Compute the slots of all contexts for a nibble, into the SLOT_SET `slots`, and prefetch them."""
    table_bytes = (len(tables) - SLOT_BYTES) // N_CONTEXTS
    for k in range(N_CONTEXTS):
        slot_hash = np.uint32(keys_K[k] >> SLOT_SHIFT) ^ NIBBLE_HASH[nibble]
        start = np.int64(slot_hash & np.uint32(table_bytes - SLOT_BYTES)) + k * table_bytes
        slots.start[k] = start
        slots.check[k] = np.uint32(keys_K[k] >> CHECK_SHIFT & BYTE | ONE)
        prefetch(tables, start)


@jit_inline
def find_slots(tables: np.ndarray, slots: Any) -> int:
    """Set `slots.found`, and return the number of contexts that have a slot."""
    known = 0
    empty_slot = np.uint32(len(tables) - SLOT_BYTES)
    for k in range(N_CONTEXTS):
        start = slots.start[k]
        is_own = np.uint32(tables[start]) == slots.check[k]
        slots.found[k] = start if is_own else empty_slot
        known += is_own
    return known


@jit_inline
def claim_slots(tables: np.ndarray, slots: Any) -> None:
    """Clear the slots that belong to other contexts, and make them these contexts' own."""
    for k in range(N_CONTEXTS):
        start = slots.start[k]
        if slots.found[k] != start:
            for node in range(1, SLOT_BYTES):
                tables[start + np.uint32(node)] = np.uint8(0)
            tables[start] = np.uint8(slots.check[k])
