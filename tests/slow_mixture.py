"""The byte mixer again, with dictionaries and float64: an independent reference for its compiled loops.

It computes what stages/ttt_eval/bytemix/mixer.py computes as long as no two slots collide.
"""

import math
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np

from stages.scoring.byte_tree import END, ByteTrees
from stages.ttt_eval.bytemix.context_tables import N_CONTEXTS, NEXT_HISTORY, ORDERS
from stages.ttt_eval.bytemix.mixer import (
    BIAS,
    BIAS_INPUT,
    CERTAIN_LOGIT,
    CERTAINTY_EDGES,
    INITIAL_COUNT,
    MATCH_LENGTH_EDGES,
    MAX_PROB,
    MAX_PROB_COUNT,
    N_KNOWN_CLASSES,
    N_LENGTH_CLASSES,
    NETWORK_INPUT,
    STEADY_UPDATES,
    STRETCH_BITS,
)
from stages.ttt_eval.bytemix.text_history import MAX_MATCH, MIN_MATCH

EVEN = 0.5 * MAX_PROB  # where nothing is known


def stretch(prob: float) -> float:
    """The logit of the middle of the grid's cell that a probability, times 2^22, is in."""
    cell = int(prob * (1 << STRETCH_BITS) / (1 << 22))
    return math.log((cell + 0.5) / ((1 << STRETCH_BITS) - cell - 0.5))


def is_letter(byte: int) -> bool:
    return 97 <= byte | 32 <= 122 or byte >= 128


class AdaptiveProb:
    """The probability of a 1, times MAX_PROB, and the number of observations that it counts as."""

    def __init__(self, prob: float) -> None:
        self.prob = math.floor(prob * MAX_PROB)
        self.count = INITIAL_COUNT

    def learn(self, bit: int) -> None:
        """Round on a fine grid. That of `stretch` is coarse: near 0 and 1 a cell is up to 1 wide."""
        self.prob = math.floor(self.prob + (bit * MAX_PROB - self.prob) / (self.count + 1.5))
        self.count = min(self.count + 1, MAX_PROB_COUNT)


class Learned(NamedTuple):
    """A decision that was scored, and all that learns from it."""

    bit: int
    error: float
    inputs: np.ndarray  # (I,)
    context_set: tuple[Any, ...]
    match_set: tuple[Any, ...]
    slots: list[Any]  # one for each context
    node: int
    histories: list[int]
    probs: list[AdaptiveProb]
    match_prob: AdaptiveProb | None


class SlowByteMixer:
    def __init__(self, boundary_V: np.ndarray, rate: float) -> None:
        self.boundary_V = boundary_V
        self.rate = rate
        self.slots: dict[Any, dict[int, int]] = {}  # bit histories by slot, then node
        self.probs: dict[Any, AdaptiveProb] = {}
        self.context_weights: Any = defaultdict(lambda: np.eye(BIAS_INPUT + 1)[NETWORK_INPUT])
        self.match_weights: Any = defaultdict(lambda: np.zeros(BIAS_INPUT + 1))
        self.updates: Any = defaultdict(int)  # of a set of weights

        # The text, and its end as contexts see it.
        self.text = bytearray()
        self.last_bytes = b"\0" * 8
        self.word = b""
        self.previous_word = b""
        self.last_tokens = (b"", b"")
        self.borders: Any = defaultdict(int)  # by position: 1 after a token, 2 after a control token

        # The match.
        self.positions = dict[bytes, int]()  # after the last MIN_MATCH bytes
        self.match_position = 0
        self.match_length = 0

    def _extended(self, token_bytes: bytes) -> tuple[bytes, bytes, bytes]:
        """Last bytes, word and previous word after more bytes."""
        last_bytes, word, previous_word = self.last_bytes, self.word, self.previous_word
        for byte in token_bytes:
            last_bytes = (last_bytes + bytes([byte]))[-8:]
            if is_letter(byte):
                word += bytes([byte | 32])
            else:
                previous_word = word or previous_word
                word = b""
        return last_bytes, word, previous_word

    def _contexts(self, token_bytes: bytes) -> list[Any]:
        last_bytes, word, previous_word = self._extended(token_bytes)
        orders = [last_bytes[-order:] for order in ORDERS]
        words = [(word, last_bytes[-1:]), (word, previous_word)]
        return [*orders, *words, (token_bytes, *self.last_tokens)]

    def _match_prob(self, prefix: int, token_bytes: bytes) -> AdaptiveProb | None:
        """The probability of the match model's prediction; None without one."""
        position = self.match_position + len(token_bytes)
        length = min(self.match_length + len(token_bytes), MAX_MATCH)
        agrees = self.text[self.match_position : position] == token_bytes
        if not self.match_length or not agrees or position >= len(self.text):
            return None

        if prefix == END:
            border = self.borders[position]
            ends = border == 2 if not token_bytes else border > 0
            return self._prob(("ends", ends, length), 0.2 if ends else 0.8)

        known_bits = prefix.bit_length() - 1
        if (self.text[position] | 256) >> 8 - known_bits != prefix:
            return None
        bit = self.text[position] >> 7 - known_bits & 1
        wrong = 1 / (length / 4 + 3)
        return self._prob(("bit", bit, length), 1 - wrong if bit else wrong)

    def _prob(self, key: Any, initial: float) -> AdaptiveProb:
        return self.probs.setdefault(key, AdaptiveProb(initial))

    def gain(self, trees: ByteTrees, tree: int, token: int, logits_D: np.ndarray) -> float:
        """The nats by which a token's loss becomes less; everything learns from it after that."""
        text = bytes(trees.text[trees.text_start_TV[tree, token] : trees.text_start_TV[tree, token + 1]])
        first = trees.path_start_TV[tree, token]
        nats = 0.0
        learned = []
        for e in range(first, trees.path_start_TV[tree, token + 1]):
            logit = float(logits_D[e - first])
            if abs(logit) >= CERTAIN_LOGIT:
                continue
            prefix = int(trees.bit_prefix_E[e])
            decision, mixed_logit = self._mix(logit, prefix, text[: trees.depth_E[e]])

            bit = int(trees.goes_right_E[e])
            side = 1 if bit else -1
            nats += math.log1p(math.exp(-side * logit)) - math.log1p(math.exp(-side * mixed_logit))
            error = decision.error * (bit - 1 / (1 + math.exp(-mixed_logit)))
            learned.append(decision._replace(bit=bit, error=error))

        for decision in learned:
            self._learn(decision)
        self._append(token, text)
        return nats

    def _mix(self, logit: float, prefix: int, token_bytes: bytes) -> tuple[Learned, float]:
        """A decision, with its mixing weight in place of its error, and its mixed logit."""
        known_bits = max(0, prefix.bit_length() - 1)
        if prefix == END:
            nibble: Any = "end"
            node = min(len(token_bytes), 14)
        else:
            nibble = "high" if known_bits < 4 else ("low", prefix >> known_bits - 4)
            node = prefix

        # Inputs.
        slots = [(k, context, nibble) for k, context in enumerate(self._contexts(token_bytes))]
        histories = [self.slots.get(slot, {}).get(node, 0) for slot in slots]
        probs = []
        inputs = []
        for k, history in enumerate(histories):
            zeros, ones = divmod(history, 8)
            prob = self._prob((prefix == END, k, history), (ones + 0.4) / (zeros + ones + 0.8))
            probs.append(prob)
            inputs.append(stretch(prob.prob if history else EVEN))
        match_prob = self._match_prob(prefix, token_bytes)
        inputs += [stretch(match_prob.prob if match_prob else EVEN), logit, float(BIAS)]
        inputs_I = np.array(inputs)

        # Weights.
        known = sum(slot in self.slots for slot in slots)
        known_class = (known * (N_KNOWN_CLASSES - 1) + N_CONTEXTS - 1) // N_CONTEXTS
        certainty = int((abs(logit) >= CERTAINTY_EDGES).sum())
        context_set = (prefix == END, certainty, known_class)
        match_length = self.match_length + len(token_bytes)
        length_class = int((match_length >= MATCH_LENGTH_EDGES).sum()) if match_prob else 0
        assert length_class < N_LENGTH_CLASSES
        match_set = (prefix == END, length_class, known_bits, logit > 0)

        weights_I = self.context_weights[context_set] + self.match_weights[match_set]
        mixing_weight = min(1.0, float(CERTAIN_LOGIT) - abs(logit))
        mixed_logit = mixing_weight * float(weights_I @ inputs_I) + (1 - mixing_weight) * logit
        decision = Learned(
            0, mixing_weight, inputs_I, context_set, match_set, slots, node, histories, probs, match_prob
        )
        return decision, mixed_logit

    def _learn(self, decision: Learned) -> None:
        for weights, key in (
            (self.context_weights, decision.context_set),
            (self.match_weights, decision.match_set),
        ):
            step = self.rate * decision.error / math.sqrt(1 + self.updates[key] / STEADY_UPDATES)
            weights[key] = weights[key] + step * decision.inputs
            self.updates[key] += 1

        rows = zip(decision.slots, decision.histories, decision.probs, strict=True)
        for slot, history, prob in rows:
            if history:
                prob.learn(decision.bit)
            nodes = self.slots.setdefault(slot, {})
            nodes[decision.node] = int(NEXT_HISTORY[decision.bit, nodes.get(decision.node, 0)])
        if decision.match_prob:
            decision.match_prob.learn(decision.bit)

    def _append(self, token: int, text: bytes) -> None:
        """Append a token to the text, and continue the match or look for another."""
        start = len(self.text)
        if self.boundary_V[token]:
            self.last_bytes, self.word, self.previous_word = b"\0" * 8, b"", b""
            self.match_length = 0
            self.borders[start] = 2
        else:
            self.borders[start] = max(1, self.borders[start])

        self.last_bytes, self.word, self.previous_word = self._extended(text)
        self.last_tokens = (self.last_tokens[1], text)
        for byte in text:
            has_next = self.match_position < len(self.text)
            agrees = self.match_length > 0 and has_next and self.text[self.match_position] == byte
            self.match_length = self.match_length + 1 if agrees else 0
            self.match_position += 1
            self.text.append(byte)

        end = self.last_bytes[-MIN_MATCH:]
        candidate = self.positions.get(end, 0)
        if self.match_length == 0 and candidate:
            longest = min(MAX_MATCH, candidate)
            length = 0
            while length < longest and self.text[candidate - 1 - length] == self.text[-1 - length]:
                length += 1
            self.match_position = candidate
            self.match_length = length if length >= MIN_MATCH else 0
        self.positions[end] = len(self.text)
