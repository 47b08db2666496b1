"""Pseudo-random positions that the audit examines; the seed is a hash of everything that is audited.

The report therefore repeats exactly, and nobody can cheat only between the probes: whoever changes the
artifact, the code or the validation shards to move the positions has another artifact. Random numbers
are raw words of PCG64, whose sequence NumPy guarantees, so they are the same under every version of
NumPy.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

# The groups of perturbed positions take these kinds in turn. Only one of seven is at a chunk boundary,
# because test-time training runs once for each position there; it has one position, and the others have
# three.
KINDS = ("chunk", "window", "document", "random", "window", "document", "random")
POSITIONS_PER_GROUP = 3
SHORTEST_SEGMENT = 8  # targets: a boundary, its neighbours and a future to replace
READ_BYTES = 1 << 20  # read from a file at a time while it is hashed


class KeyedRng:
    """Random number generator seeded by a key and a purpose: each purpose has its own sequence."""

    def __init__(self, key: bytes, purpose: str) -> None:
        seed = hashlib.sha256(key + purpose.encode()).digest()
        self._words = np.random.PCG64(int.from_bytes(seed[:16], "little"))

    def below(self, bound: int, count: int) -> np.ndarray:
        """Draw `count` integers in [0, bound), int64 (count,)."""
        return (self._words.random_raw(count) % np.uint64(bound)).astype(np.int64)

    def integer(self, low: int, high: int) -> int:
        """Draw one integer in [low, high)."""
        return low + int(self.below(high - low, 1)[0])

    def permutation(self, count: int) -> np.ndarray:
        """Draw a permutation of 0 ... count - 1, int64 (count,)."""
        return np.argsort(self._words.random_raw(count), kind="stable")


class Boundaries(NamedTuple):
    """Periods after which a scorer's batches or weights change, as its parameters say; None without."""

    window: int | None  # targets that one window adds (the stride)
    chunk: int | None  # targets between two updates of the weights


@dataclass(frozen=True)
class PerturbationGroup:
    """Segment [start, stop) of token positions, and positions in it after which the future is replaced."""

    kind: str  # one of KINDS
    start: int
    stop: int
    positions: tuple[int, ...]


def hash_files(paths: Iterable[Path]) -> bytes:
    """Hash a sequence of files: sha256 over the sha256 of each, in the order given."""
    together = hashlib.sha256()
    for path in paths:
        one = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                one.update(block)
        together.update(one.digest())
    return together.digest()


def perturbation_groups(
    key: bytes, tokens: np.ndarray, bos: int, boundaries: Boundaries, count: int, segment: int
) -> list[PerturbationGroup]:
    """Draw about `count` positions in segments spread over the stream, many of them at boundaries.

    tokens: (N,) uint16; segment: targets of one segment. A ValueError if the stream is too short.
    """
    length = len(tokens)
    segment = min(segment, length - 1)
    if segment < SHORTEST_SEGMENT:
        raise ValueError(f"the stream has {length} tokens; an audit needs at least {SHORTEST_SEGMENT + 1}")

    # One group in each of as many equal parts of the stream (strata), in random order.
    rng = KeyedRng(key, "perturbation")
    kinds = [KINDS[i % len(KINDS)] for i in range(-(-count // POSITIONS_PER_GROUP))]
    groups = []
    for kind, stratum in zip(kinds, rng.permutation(len(kinds)).tolist(), strict=True):
        low = 3 + (length - 6) * stratum // len(kinds)
        high = 3 + (length - 6) * (stratum + 1) // len(kinds)
        anchor = rng.integer(low, max(low + 1, high))

        # Move the group to the nearest boundary of its kind; without one it stays where it was drawn.
        boundary = _nearest_boundary(kind, anchor, tokens, bos, boundaries)
        if boundary is None:
            groups.append(_group(rng, "random", anchor, length, segment))
        else:
            groups.append(_group(rng, kind, boundary, length, segment))
    return groups


def distribution_positions(key: bytes, length: int, count: int) -> list[int]:
    """Draw up to `count` target positions of a stream of `length` tokens, evenly spread and jittered.

    At least half of them are in its last quarter.
    """
    rng = KeyedRng(key, "distribution")
    early = count // 2
    late_from = 1 + 3 * (length - 1) // 4
    positions = _stratified(rng, 1, late_from, early) + _stratified(rng, late_from, length, count - early)
    return sorted(set(positions))


def certified_positions(key: bytes, length: int, count: int) -> np.ndarray:
    """Draw one target position in each of `count` equal parts of a stream of `length` tokens, (n,) int64.

    All targets if there are no more than `count`, or if `count` is 0.
    """
    targets = length - 1
    if count == 0 or count >= targets:
        return np.arange(1, length)

    # Parts [edges[i], edges[i + 1]), each with its own draw.
    edges = 1 + targets * np.arange(count + 1) // count
    words = KeyedRng(key, "certified").below(1 << 32, count)
    return edges[:-1] + words * np.diff(edges) // (1 << 32)


def late_positions(key: bytes, purpose: str, length: int, count: int) -> list[int]:
    """Draw `count` target positions in the second half of a stream of `length` tokens.

    Caches are full there. At least one token follows each position.
    """
    return _stratified(KeyedRng(key, f"place {purpose}"), 1 + (length - 1) // 2, length - 1, count)


def recomputed_spans(key: bytes, length: int, share: float, segment: int) -> list[tuple[int, int]]:
    """Draw disjoint half-open ranges of target positions that hold `share` of all targets.

    The stream of `length` tokens is divided into equal parts; one range of at most `segment` targets
    is drawn in each.
    """
    if share >= 1:
        return [(1, length)]

    rng = KeyedRng(key, "recomputed")
    targets = length - 1
    count = -(-round(share * targets) // segment)
    spans = []
    for i in range(count):
        low = 1 + targets * i // count
        high = 1 + targets * (i + 1) // count
        size = min(segment, high - low)
        start = rng.integer(low, high - size + 1)
        spans.append((start, start + size))
    return spans


def _group(rng: KeyedRng, kind: str, anchor: int, length: int, segment: int) -> PerturbationGroup:
    """Place a segment around `anchor` at random, and choose the perturbed positions in it."""
    start = min(max(1, anchor - segment // 4 - rng.integer(0, segment // 2)), length - segment)
    stop = start + segment
    last = stop - 2  # a token to replace must follow

    # At a boundary: the positions before, at and after it; of a chunk's boundary one of the three.
    wanted = [anchor - 1, anchor, anchor + 1] if kind != "random" else []
    if kind == "chunk":
        wanted = [wanted[rng.integer(0, len(wanted))]]
    chosen = {position for position in wanted if start <= position <= last}

    # Fill up with random ones.
    while len(chosen) < (1 if kind == "chunk" else POSITIONS_PER_GROUP):
        chosen.add(rng.integer(start, last + 1))
    return PerturbationGroup(kind, start, stop, tuple(sorted(chosen)))


def _nearest_boundary(
    kind: str, anchor: int, tokens: np.ndarray, bos: int, boundaries: Boundaries
) -> int | None:
    """Find the boundary of that kind nearest to the anchor: the position of the first target after it."""
    if kind == "document":
        candidates = np.flatnonzero(tokens[2:-2] == bos) + 2
    else:
        period = {"window": boundaries.window, "chunk": boundaries.chunk}.get(kind)
        candidates = np.arange(1 + period, len(tokens) - 2, period) if period else np.empty(0, dtype=np.int64)
    return int(candidates[np.abs(candidates - anchor).argmin()]) if len(candidates) else None


def _stratified(rng: KeyedRng, low: int, high: int, count: int) -> list[int]:
    """Draw one integer in each of `count` equal parts of [low, high)."""
    span = high - low
    drawn = []
    for i in range(count):
        first = low + span * i // count
        after = low + span * (i + 1) // count
        drawn.append(rng.integer(first, max(first + 1, after)))
    return drawn
