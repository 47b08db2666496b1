"""The byte mixture once more, with dictionaries and float64: what stages/ttt_eval/bytemix/mixer.py computes where no two lines collide."""

import math
from collections import defaultdict
from typing import Any

import numpy as np

from stages.scoring.byte_tree import END, Trees
from stages.ttt_eval.bytemix.context_tables import (
    ALWAYS,
    CLASSES,
    CONTEXTS,
    EDGES,
    KNOWN,
    LENGTHS,
    LONGEST,
    NETWORK,
    ORDERS,
    SHORTEST,
    STATES,
    SURE,
)
from stages.ttt_eval.bytemix.mixer import AFTER, FEWEST, GRID_BITS, LIMIT, STEADY, WHOLE

MATCH = CONTEXTS
NOTHING = 0.5 * WHOLE  # the chance that an opinion is made of where nothing is known


def logit(chance: float) -> float:
    """Of the middle of the cell of a grid that a chance of 22 bits lies in."""
    cell = int(chance * (1 << GRID_BITS) / (1 << 22))
    return math.log((cell + 0.5) / ((1 << GRID_BITS) - cell - 0.5))


def is_letter(byte: int) -> bool:
    return 97 <= byte | 32 <= 122 or byte >= 128


class SlowMixture:
    def __init__(self, boundary: np.ndarray, rate: float) -> None:
        self.boundary, self.rate = boundary, rate
        self.lines: dict[Any, dict[Any, int]] = {}
        self.chances: dict[Any, list[float]] = {}
        self.by_context: Any = defaultdict(lambda: np.eye(ALWAYS + 1)[NETWORK])
        self.by_match: Any = defaultdict(lambda: np.zeros(ALWAYS + 1))
        self.steps: Any = defaultdict(int)
        self.read, self.word, self.before, self.pair = b"\0" * 8, b"", b"", (b"", b"")
        self.text, self.where = bytearray(), dict[bytes, int]()
        self.begins: Any = defaultdict(int)
        self.matched, self.length = 0, 0

    def _after(self, inside: bytes) -> tuple[bytes, bytes, bytes]:
        read, word, before = self.read, self.word, self.before
        for byte in inside:
            read = (read + bytes([byte]))[-8:]
            if is_letter(byte):
                word += bytes([byte | 32])
            else:
                word, before = b"", word or before
        return read, word, before

    def _contexts(self, inside: bytes) -> list[Any]:
        read, word, before = self._after(inside)
        return [*(read[-k:] for k in ORDERS), (word, read[-1:]), (word, before), (inside, *self.pair)]

    def _opinion(self, prefix: int, inside: bytes) -> tuple[Any, float] | None:
        """Of the match: its key, and the chance it starts with."""
        at, length = self.matched + len(inside), min(self.length + len(inside), LONGEST)
        if not self.length or self.text[self.matched : at] != inside or at >= len(self.text):
            return None
        wrong = 1 / (length / 4 + 3)
        if prefix == END:
            ends = self.begins[at] == 2 if not inside else self.begins[at] > 0
            return (ends, length, "end"), 0.2 if ends else 0.8
        known = prefix.bit_length() - 1
        if (self.text[at] | 256) >> 8 - known != prefix:
            return None
        bit = self.text[at] >> 7 - known & 1
        return (bit, length), 1 - wrong if bit else wrong

    def _chance(self, key: Any, start: float) -> list[float]:
        return self.chances.setdefault(key, [int(start * WHOLE), FEWEST])

    def gain(self, trees: Trees, number: int, token: int, path: np.ndarray) -> float:
        """What a token's loss is less by; then everything learns from it."""
        text = bytes(trees.text[trees.text_start_TV[number, token] : trees.text_start_TV[number, token + 1]])
        first, nats, learnt = trees.first_TV[number, token], 0.0, []
        for e in range(first, trees.first_TV[number, token + 1]):
            z, prefix, inside = float(path[e - first]), int(trees.prefix_E[e]), text[: trees.depth_E[e]]
            if abs(z) >= SURE:
                continue
            known_bits = max(0, prefix.bit_length() - 1)
            half = "end" if prefix == END else "high" if known_bits < 4 else ("low", prefix >> known_bits - 4)
            place = min(len(inside), 14) if prefix == END else prefix
            lines = [(k, context, half) for k, context in enumerate(self._contexts(inside))]
            states = [self.lines.get(line, {}).get(place, 0) for line in lines]
            keys = [(prefix == END, k, state) for k, state in enumerate(states)]
            starts = [(state % 8 + 0.4) / (state // 8 + state % 8 + 0.8) for state in states]
            opinions = [self._chance(key, start) for key, start in zip(keys, starts, strict=True)]
            match = self._opinion(prefix, inside)
            matched = self._chance(("match", match[0]), match[1]) if match else None
            x = np.array(
                [
                    *(logit(p if state else NOTHING) for (p, _), state in zip(opinions, states, strict=True)),
                    0,
                    z,
                    0.25,
                ]
            )
            x[MATCH] = logit(matched[0] if matched else NOTHING)
            known = sum(line in self.lines for line in lines)
            length = int((self.length + len(inside) >= LENGTHS).sum()) if match else 0
            chosen = (
                prefix == END,
                int((abs(z) >= EDGES).sum()),
                (known * (KNOWN - 1) + CONTEXTS - 1) // CONTEXTS,
            )
            by_match = (prefix == END, length, known_bits, z > 0)
            assert length < CLASSES
            share = min(1.0, float(SURE) - abs(z))
            total = share * float((self.by_context[chosen] + self.by_match[by_match]) @ x) + (1 - share) * z
            bit = int(trees.right_E[e])
            side = 1 if bit else -1
            nats += math.log1p(math.exp(-side * z)) - math.log1p(math.exp(-side * total))
            error = share * (bit - 1 / (1 + math.exp(-total)))
            learnt.append((bit, error, x, chosen, by_match, lines, place, states, opinions, matched))
        for bit, error, x, chosen, by_match, lines, place, states, opinions, matched in learnt:
            for weights, name in ((self.by_context, chosen), (self.by_match, by_match)):
                weights[name] = (
                    weights[name] + self.rate * error / math.sqrt(1 + self.steps[name] / STEADY) * x
                )
                self.steps[name] += 1
            for line, state, opinion in zip(lines, states, opinions, strict=True):
                if state:
                    self._learn(opinion, bit)
                kept = self.lines.setdefault(line, {})
                kept[place] = int(AFTER[bit * STATES + kept.get(place, 0)])
            if matched:
                self._learn(matched, bit)
        self._advance(token, text)
        return nats

    @staticmethod
    def _learn(chance: list[float], came: int) -> None:
        """Its grid is fine, but the logit's is not: a cell is as much as 1 at the edge."""
        chance[0] = math.floor(chance[0] + (came * WHOLE - chance[0]) / (chance[1] + 1.5))
        chance[1] = min(chance[1] + 1, LIMIT)

    def _advance(self, token: int, text: bytes) -> None:
        if self.boundary[token]:
            self.read, self.word, self.before, self.length = b"\0" * 8, b"", b"", 0
        at = len(self.text)
        self.begins[at] = 2 if self.boundary[token] else max(1, self.begins[at])
        self.read, self.word, self.before = self._after(text)
        for byte in text:
            going_on = self.length and self.matched < len(self.text) and self.text[self.matched] == byte
            self.length = self.length + 1 if going_on else 0
            self.matched += 1
            self.text.append(byte)
        last, candidate = self.read[-SHORTEST:], self.where.get(self.read[-SHORTEST:], 0)
        if self.length == 0 and candidate:
            while (
                self.length < min(LONGEST, candidate)
                and self.text[candidate - 1 - self.length] == self.text[-1 - self.length]
            ):
                self.length += 1
            self.matched, self.length = candidate, self.length if self.length >= SHORTEST else 0
        self.where[last] = len(self.text)
        self.pair = (self.pair[1], text)
