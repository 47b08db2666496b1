"""Where the audit looks: drawn from the hash of what is audited, so that the report repeats and nobody can aim between the probes.

The key is a hash over the artifact, the code and the validation shards. Whoever changes one of them to move the positions has another
artifact. Draws are raw words of PCG64, whose sequence NumPy guarantees, and so are the same under every version of it.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

# One of seven groups crosses a chunk's edge. There test-time training runs once for each position, so it has one; the others have three.
KINDS = ("chunk", "window", "document", "random", "window", "document", "random")
POSITIONS_PER_GROUP = 3
BLOCK = 1 << 20


class Draw:
    """A repeatable source of positions and ids, one for each purpose."""

    def __init__(self, key: bytes, purpose: str) -> None:
        seed = hashlib.sha256(key + purpose.encode()).digest()
        self._words = np.random.PCG64(int.from_bytes(seed[:16], "little"))

    def below(self, bound: int, count: int) -> np.ndarray:
        """`count` whole numbers in [0, bound), int64."""
        return (self._words.random_raw(count) % np.uint64(bound)).astype(np.int64)

    def one(self, low: int, high: int) -> int:
        """A whole number in [low, high)."""
        return low + int(self.below(high - low, 1)[0])

    def order(self, count: int) -> np.ndarray:
        """A permutation of `count` things."""
        return np.argsort(self._words.random_raw(count), kind="stable")


class Edges(NamedTuple):
    """Where a scorer's machinery changes gear, as its parameters declare it; None where it has no such thing."""

    window: int | None  # targets that one window adds (the stride)
    chunk: int | None  # targets between two updates


@dataclass(frozen=True)
class Group:
    """A segment [start, stop) of token positions, and the positions in it after which the future is replaced."""

    kind: str
    start: int
    stop: int
    positions: tuple[int, ...]


def key_of(paths: Iterable[Path]) -> bytes:
    """The key of a set of files: a hash over each one's hash, in the order given."""
    together = hashlib.sha256()
    for path in paths:
        one = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                one.update(block)
        together.update(one.digest())
    return together.digest()


def perturbation_groups(
    key: bytes, tokens: np.ndarray, bos: int, edges: Edges, count: int, segment: int
) -> list[Group]:
    """About `count` positions in segments spread over the stream, around edges of every kind and anywhere."""
    draw = Draw(key, "perturbation")
    length = min(segment, len(tokens) - 1)
    if length < 8:
        raise ValueError(f"the stream has {len(tokens)} tokens; an audit needs at least 9")
    kinds = [KINDS[i % len(KINDS)] for i in range(-(-count // POSITIONS_PER_GROUP))]
    groups = []
    for kind, stratum in zip(kinds, draw.order(len(kinds)).tolist(), strict=True):
        low = 3 + (len(tokens) - 6) * stratum // len(kinds)
        anchor = draw.one(low, max(low + 1, 3 + (len(tokens) - 6) * (stratum + 1) // len(kinds)))
        edge = _nearest_edge(kind, anchor, tokens, bos, edges)
        groups.append(
            _group(
                draw,
                kind if edge is not None else "random",
                anchor if edge is None else edge,
                len(tokens),
                length,
            )
        )
    return groups


def distribution_positions(key: bytes, length: int, count: int) -> list[int]:
    """`count` target positions, at least half of them in the last quarter of a stream of `length` tokens, evenly spread and jittered."""
    draw = Draw(key, "distribution")
    early, late_from = count // 2, 1 + 3 * (length - 1) // 4
    found = [*_stratified(draw, 1, late_from, early), *_stratified(draw, late_from, length, count - early)]
    return sorted(set(found))


def spread(key: bytes, purpose: str, length: int, count: int) -> list[int]:
    """`count` target positions in the later half of a stream of `length` tokens, where caches are full, each with a token behind it."""
    return _stratified(Draw(key, f"place {purpose}"), 1 + (length - 1) // 2, length - 1, count)


def recomputed_stretches(key: bytes, length: int, share: float, segment: int) -> list[tuple[int, int]]:
    """Disjoint ranges of target positions that hold `share` of them, one in each of as many equal parts of the stream."""
    draw, targets = Draw(key, "recomputed"), length - 1
    if share >= 1:
        return [(1, length)]
    count = -(-round(share * targets) // segment)
    stretches = []
    for i in range(count):
        low, high = 1 + targets * i // count, 1 + targets * (i + 1) // count
        size = min(segment, high - low)
        start = draw.one(low, high - size + 1)
        stretches.append((start, start + size))
    return stretches


def _group(draw: Draw, kind: str, anchor: int, length: int, segment: int) -> Group:
    start = min(max(1, anchor - segment // 4 - draw.one(0, segment // 2)), length - segment)
    stop = start + segment
    last = stop - 2  # something must follow
    wanted = [anchor - 1, anchor, anchor + 1] if kind != "random" else []
    wanted = [wanted[draw.one(0, len(wanted))]] if kind == "chunk" else wanted
    chosen = {position for position in wanted if start <= position <= last}
    while len(chosen) < (1 if kind == "chunk" else POSITIONS_PER_GROUP):
        chosen.add(draw.one(start, last + 1))
    return Group(kind, start, stop, tuple(sorted(chosen)))


def _nearest_edge(kind: str, anchor: int, tokens: np.ndarray, bos: int, edges: Edges) -> int | None:
    """The edge of that kind nearest to the anchor: the position of the first target behind it."""
    if kind == "document":
        candidates = np.flatnonzero(tokens[2:-2] == bos) + 2
    else:
        step = {"window": edges.window, "chunk": edges.chunk}.get(kind)
        candidates = np.arange(1 + step, len(tokens) - 2, step) if step else np.empty(0, dtype=np.int64)
    return int(candidates[np.abs(candidates - anchor).argmin()]) if len(candidates) else None


def _stratified(draw: Draw, low: int, high: int, count: int) -> list[int]:
    span = high - low
    return [
        draw.one(low + span * i // count, max(low + span * i // count + 1, low + span * (i + 1) // count))
        for i in range(count)
    ]
