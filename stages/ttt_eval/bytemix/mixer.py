"""A model of bytes, mixed with a network's decisions (PAQ's logistic mixing, Mahoney 2005).

It is #1916 without what was wrong with it. The network gives its logit of each decision on a token's
path through the byte tree (scoring/byte_tree.py). The byte model is mixed in, and the gain of all
decisions is taken from the loss:

    loss = -log p(v) + sum over the path of (log n - log m)

where n and m are the network's and the mixed probability of the side taken. Until something is
learned, m is n, and the loss is the network's to the last bit. m depends on nothing but the prefix
and the token's own bytes so far.

A decision is a bit of the next byte, or whether the token ends. For each,
every context (context_tables.py) gives a bit history, and the match model (text_history.py) an
event and a length. An adaptive probability for each bit history, and for each event and length,
turns them into logits. A dot product with learned weights joins these with the network's logit. Two
sets of weights are added: one chosen by how many contexts are known and how certain the network is,
one by the length of the match and the bits of the byte so far. Weights start as the network alone.
Decisions of which the network is certain are left to it, and nothing is learned from them.

Everything learns only after the token is scored, so the probability of a token is that of a
distribution over all tokens. `ByteMixer.distribution` computes the whole of it with the same
functions; `distribution` is compared with what is charged by check B3
(stages/audit/checks/normalisation.py).

Shapes: N targets, D decisions of the longest path, V vocabulary, K contexts, H bit histories,
I inputs, S sets of weights.
"""

import copy
import math
from typing import Any, NamedTuple

import numpy as np

from stages.common.jit import jit_entry, jit_inline
from stages.scoring.byte_tree import END, ByteTrees, cumulative_mass
from stages.ttt_eval.bytemix import context_tables as contexts
from stages.ttt_eval.bytemix.context_tables import N_CONTEXTS, N_HISTORIES, SLOT_SET
from stages.ttt_eval.bytemix.simd import WIDTH, add_scaled, dot
from stages.ttt_eval.bytemix.text_history import (
    BITS_OF_PREFIX,
    MAX_MATCH,
    N_MATCH_PREDICTIONS,
    NO_MATCH,
    TextHistory,
    TokenPaths,
    append_byte,
    append_token,
    current_prefix,
    match_continues,
    match_prediction,
    new_text_history,
    token_paths,
)

# Columns of a row of inputs: one for each context, then these.
MATCH_INPUT = N_CONTEXTS
NETWORK_INPUT = N_CONTEXTS + 1
BIAS_INPUT = N_CONTEXTS + 2
# Always 0 in a row of inputs; in a row of weights, how often it was updated. simd.add_scaled counts
# in the last column.
UPDATES = WIDTH - 1
assert UPDATES == BIAS_INPUT + 1
BIAS = np.float32(0.25)

# From this |logit| on a decision is left to the network. Half of all are, and nothing is lost by it.
CERTAIN_LOGIT = np.float32(6.0)
MAX_LOGIT = np.float32(18.0)  # largest |logit| of a mixed decision

# A set of context weights is chosen by END or bit, the network's certainty, and the number of known
# contexts.
CERTAINTY_EDGES = np.array([0.5, 1.5, 3.0, 5.0])  # |logit| of the network between two classes
N_CERTAINTIES = len(CERTAINTY_EDGES) + 1
N_KNOWN_CLASSES = 8
# A set of match weights is chosen by END or bit, the length of the match, the number of bits of the
# byte so far (8 values), and the network's side (2 values).
MATCH_LENGTH_EDGES = np.array([1, 12, 20, 32])  # bytes between two classes; class 0: none
N_LENGTH_CLASSES = len(MATCH_LENGTH_EDGES) + 1

# The classes as tables: by twice the network's |logit|, by the number of known contexts, by the
# match's prediction.
CERTAINTY = (np.arange(2 * int(CERTAIN_LOGIT) + 1)[:, None] / 2 >= CERTAINTY_EDGES).sum(1).astype(np.uint8)
KNOWN_CLASS = (np.arange(N_CONTEXTS + 1) * (N_KNOWN_CLASSES - 1) + N_CONTEXTS - 1) // N_CONTEXTS
_LENGTHS = np.append(0, np.arange(N_MATCH_PREDICTIONS - 1) % (MAX_MATCH + 1))
LENGTH_CLASS = (_LENGTHS[:, None] >= MATCH_LENGTH_EDGES).sum(1).astype(np.uint8)

# An adaptive probability (an entry of lpaq's StateMap) is an uint32: 22 bits of probability above a
# count of 10 bits.
COUNT_BITS = 10
COUNT_MASK = np.uint32(1023)
MAX_PROB = (1 << 22) - 2  # largest probability, times 2^22
INITIAL_COUNT = 4  # observations that an initial probability counts as
MAX_PROB_COUNT = 127  # observations after which old ones are forgotten
FROZEN = 1023  # as a count: the probability never changes
# Share of an error that a probability moves by after `count` observations, times 2^16.
ADAPTATION_Q16 = np.append(65536 / (np.arange(FROZEN) + 1.5), 0).astype(np.int64)

# Logits of probabilities, PAQ's "stretch", on a grid of 12 bits.
STRETCH_BITS = 12
STRETCH_SHIFT = np.uint32(32 - STRETCH_BITS)  # from an adaptive probability to its cell of the grid
_GRID = (np.arange(1 << STRETCH_BITS) + 0.5) / (1 << STRETCH_BITS)
STRETCH = np.log(_GRID / (1 - _GRID)).astype(np.float32)

# Updates of a set of weights after which its steps shrink with the root of their number.
STEADY_UPDATES = np.float32(1024)
# Decisions whose ratios are multiplied before a logarithm is taken. None of the ratios is below
# e^-18, so their product does not underflow.
BLOCK = 16

# Adaptive probabilities of a 1 by context and bit history: a record, so that the compiler knows its
# shape.
HISTORY_PROBS = np.dtype([("by_context_KH", np.uint32, (N_CONTEXTS, N_HISTORIES))])

# A decision that is mixed, one record.
DECISION = np.dtype(
    [
        ("step", np.uint32),  # its index in the token's path
        ("slot_set_index", np.uint32),  # its SLOT_SET in the buffers
        ("node", np.uint32),  # byte of its bit histories in a slot
        ("is_bit", np.uint32),  # 0 for the end of a token
        ("goes_right", np.uint32),  # the side that the token's path takes
        ("match", np.uint32),  # the match model's prediction, an index; NO_MATCH for none
        ("context_set", np.uint32),  # set of weights chosen by the contexts
        ("match_set", np.uint32),  # ... and by the match
        ("histories", np.uint8, (N_CONTEXTS,)),  # bit histories of the contexts
    ]
)


class MixerState(NamedTuple):
    """State that is updated after each token."""

    text: TextHistory
    tables: np.ndarray  # uint8: slots of bit histories (context_tables.new_tables)
    history_probs: np.ndarray  # HISTORY_PROBS (2,): for END, and for bits
    match_probs: np.ndarray  # uint32: adaptive probability of a 1 by the match model's prediction
    context_weights_SI: np.ndarray  # float32
    match_weights_SI: np.ndarray  # float32


class DecisionBuffers(NamedTuple):
    """The decisions of a token that are mixed, in the order of its path.

    While a stream is scored there is room for two tokens, one in each half:

        half 0                           half 1
        token i - 1: scored, learned     token i: gathered, its slots prefetched
        token i + 1: gathered            token i: scored, learned
    """

    decisions: np.ndarray  # DECISION
    network_logits: np.ndarray  # float64: the network's logit of the side that the path takes
    mixed_logits: np.ndarray  # float64: the mixed logit of that side
    errors: np.ndarray  # float64: the mixture's probability of the other side, the error to learn from
    inputs_DI: np.ndarray  # float32
    slot_sets: np.ndarray  # SLOT_SET; the decisions of a nibble share one
    keys_K: np.ndarray  # uint64: hashes of the contexts


class Targets(NamedTuple):
    """Tokens to score, and the network's scores of them.

    The logits must be those of the whole distribution. Scores that were queried with hints leave the
    hints out (scoring/queries.py), until `NgramTilt.score_and_learn_`, with the rate 0 if no tilt is
    wanted, has put them back. With logits that leave something out, losses would be too low.
    """

    tokens_N: np.ndarray  # int64
    trees_N: np.ndarray  # int64: the byte tree that each is in
    logits_ND: np.ndarray  # float32: the network's logit of the right side at each decision of a path
    nll_N: np.ndarray  # float32: the network's loss, nats


class Target(NamedTuple):
    """One token to score."""

    token: int
    tree: int
    logits_D: np.ndarray


def decision_buffers(decisions: int) -> DecisionBuffers:
    """Buffers for this number of decisions."""
    return DecisionBuffers(
        decisions=np.zeros(decisions, DECISION),
        network_logits=np.zeros(decisions),
        mixed_logits=np.zeros(decisions),
        errors=np.zeros(decisions),
        inputs_DI=np.zeros((decisions, WIDTH), np.float32),
        slot_sets=np.zeros(decisions, SLOT_SET),
        keys_K=np.zeros(N_CONTEXTS, np.uint64),
    )


def _adaptive(prob: np.ndarray) -> np.ndarray:
    """Adaptive probabilities that start at these."""
    return (prob * MAX_PROB).astype(np.uint32) << COUNT_BITS | INITIAL_COUNT


def _initial_history_probs() -> np.ndarray:
    """HISTORY_PROBS (2,): a history's share of ones. That of the empty history never changes."""
    zeros, ones = np.divmod(np.arange(N_HISTORIES), 8)
    probs_H = _adaptive((ones + 0.4) / (zeros + ones + 0.8))
    probs_H[0] |= FROZEN
    history_probs = np.zeros(2, HISTORY_PROBS)
    history_probs["by_context_KH"] = probs_H
    return history_probs


def _initial_match_probs() -> np.ndarray:
    """By the match model's prediction (text_history.py): the longer the match, the surer.

    That of NO_MATCH is 1/2 and never changes.
    """
    # The four events in their order: the next bit is 0, it is 1, the token ends, it does not end.
    wrong = 1 / (np.arange(MAX_MATCH + 1) / 4 + 3)
    ends = np.full(MAX_MATCH + 1, 0.2)
    probs = _adaptive(np.concatenate(([0.5], wrong, 1 - wrong, ends, 1 - ends)))
    probs[NO_MATCH] |= FROZEN
    return probs


class ByteMixer:
    """The byte model of one stream; `text_bytes`, about the stream's size, sizes its tables.

    `rate` is the learning rate of the weights.
    """

    def __init__(
        self,
        trees: ByteTrees,
        text_bytes: int,
        rate: float,
        slots_per_context: int = contexts.SLOTS_PER_CONTEXT,
    ) -> None:
        self.trees = trees
        self.rate = rate
        self.paths = token_paths(trees)
        context_weights_SI = np.zeros((2 * N_CERTAINTIES * N_KNOWN_CLASSES, WIDTH), np.float32)
        context_weights_SI[:, NETWORK_INPUT] = 1.0
        self.state = MixerState(
            text=new_text_history(text_bytes),
            tables=contexts.new_tables(slots_per_context),
            history_probs=_initial_history_probs(),
            match_probs=_initial_match_probs(),
            context_weights_SI=context_weights_SI,
            match_weights_SI=np.zeros((2 * N_LENGTH_CLASSES * 8 * 2, WIDTH), np.float32),
        )

    def copy(self) -> "ByteMixer":
        """An independent copy."""
        twin = copy.copy(self)
        twin.state = copy.deepcopy(self.state)
        return twin

    def score_and_learn(
        self, tokens_N: np.ndarray, trees_N: np.ndarray, logits_ND: np.ndarray, nll_N: np.ndarray
    ) -> np.ndarray:
        """Each target's loss with the mixture, (N,) float32 nats; learns from it after it is scored.

        The arrays are those of `Targets`.
        """
        mixed_nll_N = np.empty(len(nll_N), np.float32)
        buffers = decision_buffers(2 * logits_ND.shape[1])
        targets = Targets(tokens_N, trees_N, logits_ND, nll_N)
        _score_and_learn(self.state, self.paths, buffers, targets, np.float32(self.rate), mixed_nll_N)
        return mixed_nll_N

    def distribution(self, logp_V: np.ndarray, tree: int) -> np.ndarray:
        """Mix into log-probabilities of the next token, (V,) float64; nothing is learned.

        `tree` is the index of the byte tree that the next token is in.
        """
        mass_V1 = cumulative_mass(logp_V, self.trees.sorted_ids_TV[tree])
        mixed_logp_V = np.empty_like(logp_V)
        longest_path = self.trees.longest_path
        logits_D = np.empty(longest_path, np.float32)
        buffers = decision_buffers(longest_path)
        _distribution(self.state, self.paths, buffers, self.trees, tree, mass_V1, logits_D, mixed_logp_V)
        return mixed_logp_V


@jit_inline
def _gather_decisions(
    state: MixerState,
    paths: TokenPaths,
    buffers: DecisionBuffers,
    target: Target,
    step: int,
    begin: int,
    first_slot_set_index: int,
) -> int:
    """Gather a token's decisions from index `step` of its path on: hashes, slots, fixed features.

    The slots are prefetched and not read yet, nor is anything else that learns. Decisions are
    written to the buffers from `begin` on, slot sets from `first_slot_set_index` on. Returns the
    end of the decisions.
    """
    text_state = state.text.state[0]
    first = paths.path_start_TV[target.tree, target.token]
    path_length = paths.path_start_TV[target.tree, target.token + 1] - first
    text_start = paths.text_start_TV[target.tree, target.token]

    prefix = current_prefix(state.text)
    depth = 0  # bytes of the token in `prefix`
    matches = text_state.match_length > 0  # these bytes agree with the match
    hashed_depth = -1  # depth of the hashes in keys_K
    nibble = contexts.NO_NIBBLE  # of the current slots
    slot_set_index = first_slot_set_index - 1
    end = begin
    for d in range(step, path_length):
        # Skip certain decisions, and NaN: while kernels are compiled ahead, logits are arbitrary.
        logit = target.logits_D[d]
        if not abs(logit) < CERTAIN_LOGIT:
            continue

        # Read the token's bytes up to the one that is decided.
        path_step = paths.steps_E[first + d]
        bit_prefix = path_step.bit_prefix
        while depth < path_step.depth:
            byte = paths.text[text_start + depth]
            matches = matches and match_continues(state.text, text_state.match_position + depth, byte)
            prefix = append_byte(prefix, byte)
            depth += 1

        # Compute where the slots of its nibble are.
        if hashed_depth != depth:
            contexts.hash_contexts(prefix, text_state, buffers.keys_K)
            hashed_depth = depth
            nibble = contexts.NO_NIBBLE
        if nibble != contexts.NIBBLE_OF_PREFIX[bit_prefix]:
            nibble = contexts.NIBBLE_OF_PREFIX[bit_prefix]
            slot_set_index += 1
            slot_set = buffers.slot_sets[slot_set_index]
            contexts.prefetch_slots(state.tables, buffers.keys_K, nibble, slot_set)

        match = NO_MATCH
        if matches:
            match = match_prediction(state.text, depth, bit_prefix)

        # Write the decision, and choose its sets of weights as far as they do not depend on the slots.
        is_bit = np.int64(bit_prefix != END)
        decision = buffers.decisions[end]
        decision.step = d
        decision.slot_set_index = slot_set_index
        decision.node = contexts.node_in_slot(bit_prefix, depth)
        decision.is_bit = is_bit
        decision.goes_right = path_step.goes_right
        decision.match = match

        certainty = CERTAINTY[np.int64(abs(logit) * 2)]
        length_class = is_bit * N_LENGTH_CLASSES + LENGTH_CLASS[match]
        decision.context_set = (is_bit * N_CERTAINTIES + certainty) * N_KNOWN_CLASSES
        decision.match_set = (length_class * 8 + BITS_OF_PREFIX[bit_prefix]) * 2 + (logit > 0)

        # The network's part of its inputs.
        buffers.network_logits[end] = logit if path_step.goes_right else -logit
        buffers.inputs_DI[end, NETWORK_INPUT] = logit
        buffers.inputs_DI[end, BIAS_INPUT] = BIAS
        end += 1
    return end


@jit_inline
def _mixing_weight(logit: Any) -> Any:
    """Share of the mixture in a decision: 1 up to a network's |logit| of 5, then linear to 0 at 6.

    The ramp keeps the loss continuous: rounding errors of the network must not make it jump.
    """
    return min(1.0, CERTAIN_LOGIT - abs(logit))


@jit_inline
def _mix(state: MixerState, buffers: DecisionBuffers, begin: int, end: int) -> None:
    """Compute the mixed logits of the decisions [begin, end), of the side that the path takes."""
    # Look up the inputs of all decisions first, so that the loads from memory overlap.
    current_slot_set_index = -1
    known = 0
    for i in range(begin, end):
        decision = buffers.decisions[i]
        slot_set = buffers.slot_sets[decision.slot_set_index]
        if np.int64(decision.slot_set_index) != current_slot_set_index:
            current_slot_set_index = np.int64(decision.slot_set_index)
            known = contexts.find_slots(state.tables, slot_set)

        probs_KH = state.history_probs[decision.is_bit].by_context_KH
        for k in range(N_CONTEXTS):
            history = state.tables[slot_set.found[k] + decision.node]
            decision.histories[k] = history
            prob = probs_KH[k, history]
            buffers.inputs_DI[i, k] = STRETCH[prob >> STRETCH_SHIFT]
        buffers.inputs_DI[i, MATCH_INPUT] = STRETCH[state.match_probs[decision.match] >> STRETCH_SHIFT]
        # Complete the set of weights begun in _gather_decisions.
        decision.context_set += np.uint32(KNOWN_CLASS[known])

    # With the inputs known, take the dot products.
    for i in range(begin, end):
        decision = buffers.decisions[i]
        logit = dot(
            state.context_weights_SI,
            np.int64(decision.context_set),
            state.match_weights_SI,
            np.int64(decision.match_set),
            buffers.inputs_DI,
            i,
        )

        # Take the logit of the path's side, in float64, and blend it with the network's.
        logit = np.float64(min(max(logit, -MAX_LOGIT), MAX_LOGIT))
        network_logit = buffers.network_logits[i]
        weight = _mixing_weight(network_logit)
        side_logit = logit if decision.goes_right else -logit
        buffers.mixed_logits[i] = side_logit * weight + network_logit * (1 - weight)


@jit_inline(fastmath=True)
def _exp(x: Any) -> Any:
    """e^x with a relative error below 1e-10, for |x| up to 18.

    The Taylor series of e^(x / 64), squared six times: only additions and multiplications, so that
    LLVM can vectorise it.
    """
    x = x * (1 / 64)
    y = 1 + x * (1 / 8 + x * (1 / 72))
    y = 1 + x * (
        1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040) * y)))))
    )
    for _ in range(6):
        y = y * y
    return y


@jit_inline(fastmath=True)
def _set_errors_and_sum_gain(buffers: DecisionBuffers, begin: int, end: int) -> float:
    """Set the errors of the decisions [begin, end), and return the nats that mixing them gains.

    The gain is the network's loss in these decisions less the mixture's. An error is the mixture's
    probability of the side that the path does not take.
    """
    nats = 0.0
    for first in range(begin, end, BLOCK):
        ratio = 1.0
        for i in range(first, min(first + BLOCK, end)):
            odds_against = _exp(-buffers.mixed_logits[i])
            prob = 1 / (1 + odds_against)
            ratio *= (1 + _exp(-buffers.network_logits[i])) * prob
            buffers.errors[i] = odds_against * prob
        nats += math.log(ratio)
    return nats


@jit_inline
def _updated_prob(adaptive_prob: Any, bit: Any) -> Any:
    """An adaptive probability after one more bit, 0 or 1."""
    count = adaptive_prob & COUNT_MASK
    prob = np.int64(adaptive_prob - count)  # still shifted by COUNT_BITS
    error = bit * (MAX_PROB << COUNT_BITS) - prob
    change = (error * ADAPTATION_Q16[count] >> 16) & ~np.int64(COUNT_MASK)
    return np.uint32(np.int64(adaptive_prob) + change) + np.uint32(count < MAX_PROB_COUNT)


@jit_inline(fastmath=True)
def _steadiness(weights_SI: np.ndarray, s: int) -> Any:
    """Divisor of a set's steps: 1 at first, later the root of the number of its updates."""
    return np.sqrt(np.float32(1) + weights_SI[s, UPDATES] / STEADY_UPDATES)


@jit_inline(fastmath=True)
def _learn(state: MixerState, buffers: DecisionBuffers, begin: int, end: int, rate: Any) -> None:
    """Update histories, probabilities and weights from the decisions [begin, end) and their errors."""
    current_slot_set_index = -1
    for i in range(begin, end):
        decision = buffers.decisions[i]
        slot_set = buffers.slot_sets[decision.slot_set_index]
        if np.int64(decision.slot_set_index) != current_slot_set_index:
            current_slot_set_index = np.int64(decision.slot_set_index)
            contexts.claim_slots(state.tables, slot_set)

        # Weights: gradient descent on the loss.
        bit = np.int64(decision.goes_right)
        error = rate * np.float32(buffers.errors[i] * _mixing_weight(buffers.network_logits[i]))
        error = error if bit else -error
        context_set = np.int64(decision.context_set)
        match_set = np.int64(decision.match_set)
        context_step = error / _steadiness(state.context_weights_SI, context_set)
        match_step = error / _steadiness(state.match_weights_SI, match_set)
        add_scaled(state.context_weights_SI, context_set, buffers.inputs_DI, i, context_step)
        add_scaled(state.match_weights_SI, match_set, buffers.inputs_DI, i, match_step)

        # Probabilities and bit histories.
        probs_KH = state.history_probs[decision.is_bit].by_context_KH
        for k in range(N_CONTEXTS):
            history = decision.histories[k]
            probs_KH[k, history] = _updated_prob(probs_KH[k, history], bit)
            state.tables[slot_set.start[k] + decision.node] = contexts.NEXT_HISTORY[bit, history]
        state.match_probs[decision.match] = _updated_prob(state.match_probs[decision.match], bit)


@jit_entry
def _score_and_learn(
    state: MixerState,
    paths: TokenPaths,
    buffers: DecisionBuffers,
    targets: Targets,
    rate: Any,
    mixed_nll_N: np.ndarray,
) -> None:
    """Score and learn target by target, software-pipelined.

    The slots of target i are prefetched while target i - 1 is learned from. The decisions of target
    i - 1 are [begin, end) of the buffers; those of target i go into the other half.
    """
    half = targets.logits_ND.shape[1]
    begin = np.int64(0)
    end = np.int64(0)
    for i in range(len(targets.nll_N) + 1):
        if i > 0:
            # Score target i - 1. Its slots are in the cache by now.
            _mix(state, buffers, begin, end)
            mixed_nll_N[i - 1] = targets.nll_N[i - 1] - _set_errors_and_sum_gain(buffers, begin, end)
            append_token(state.text, paths, targets.trees_N[i - 1], targets.tokens_N[i - 1])

        # Hash the contexts of target i and prefetch its slots, into the other half.
        next_begin = half - begin
        next_end = next_begin
        if i < len(targets.nll_N):
            target = Target(targets.tokens_N[i], targets.trees_N[i], targets.logits_ND[i])
            next_end = _gather_decisions(state, paths, buffers, target, np.int64(0), next_begin, next_begin)

        if i > 0:
            # Learn from target i - 1 while the prefetches are under way.
            _learn(state, buffers, begin, end, rate)
        begin = next_begin
        end = next_end


@jit_entry
def _distribution(
    state: MixerState,
    paths: TokenPaths,
    buffers: DecisionBuffers,
    trees: ByteTrees,
    tree: int,
    mass_V1: np.ndarray,
    logits_D: np.ndarray,
    logp_V: np.ndarray,
) -> None:
    """Fill `logp_V`, the log-probabilities of all tokens.

    In the order of their bytes, each token shares its first decisions with the one before.
    `logits_D` is a buffer.
    """
    first_V = trees.path_start_TV[tree]
    previous = -1
    end = np.int64(0)
    for token in trees.sorted_ids_TV[tree]:
        first = first_V[token]
        path_length = first_V[token + 1] - first

        # Count the decisions shared with the previous token's path: those about the same ids.
        shared = 0
        if previous >= 0:
            other = first_V[previous]
            most = min(path_length, first_V[previous + 1] - other)
            while (
                shared < most
                and trees.low_E[first + shared] == trees.low_E[other + shared]
                and trees.high_E[first + shared] == trees.high_E[other + shared]
            ):
                shared += 1

        # The network's logits of the others, from its masses of both sides.
        for d in range(shared, path_length):
            e = first + d
            right_mass = mass_V1[trees.high_E[e]] - mass_V1[trees.middle_E[e]]
            left_mass = mass_V1[trees.middle_E[e]] - mass_V1[trees.low_E[e]]
            logits_D[d] = math.log(np.float64(right_mass)) - math.log(np.float64(left_mass))

        # Gather and mix the decisions that are not in the buffers yet.
        begin = np.int64(0)
        while begin < end and np.int64(buffers.decisions[begin].step) < shared:
            begin += 1
        first_slot_set_index = np.int64(0)
        if begin > 0:
            first_slot_set_index = np.int64(buffers.decisions[begin - 1].slot_set_index) + 1
        target = Target(token, tree, logits_D)
        end = _gather_decisions(state, paths, buffers, target, shared, begin, first_slot_set_index)
        _mix(state, buffers, begin, end)

        # The token's share among the ids of the same bytes, times the probabilities of its decisions.
        low = trees.same_bytes_TV2[tree, token, 0]
        high = trees.same_bytes_TV2[tree, token, 1]
        rank = trees.rank_TV[tree, token]
        own_mass = mass_V1[rank + 1] - mass_V1[rank]
        logp = math.log(np.float64(own_mass)) - math.log(np.float64(mass_V1[high] - mass_V1[low]))

        i = 0  # the next decision in the buffers
        for d in range(path_length):
            logit = np.float64(logits_D[d])
            if i < end and np.int64(buffers.decisions[i].step) == d:
                mixed_logit = buffers.mixed_logits[i]
                logit = mixed_logit if buffers.decisions[i].goes_right else -mixed_logit
                i += 1
            logp -= math.log1p(math.exp(-logit if trees.goes_right_E[first + d] else logit))
        logp_V[token] = logp
        previous = token
