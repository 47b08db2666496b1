"""All four conditions at once: the same stream gives the same scores however it is handed over (B13, and B5 from outside).

*Pieces*: one call against calls of other lengths, some of them of a single token. *Trace*: what has only been looked at (`predict`) or
was scored instead of observed must leave the same state behind. That is the order of events as far as it shows without the scorer's
help: a scorer that updates when it is asked, and not when it is told, ends in another state. *Again*: a second scorer from the same
factory begins with the same bits.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stages.audit import probe_runner
from stages.audit.sampling import Draw
from stages.audit.verdict import Verdict, outcome
from stages.common.scorer import Scorer

LOOKS = 3  # tokens before each of which predict() is read


class Handed(NamedTuple):
    """What the ways to hand over one stretch came to."""

    whole: np.ndarray  # (L,) float32: losses in one call
    pieces: np.ndarray  # (L,) float32: in several
    looked: float  # largest difference between predictions behind the stretch: looked at on the way, or not
    scored: float  # and: scored, or observed


@dataclass(frozen=True)
class Handing:
    """A probe: the stretch [start, stop), and where it is cut."""

    start: int
    stop: int
    cuts: tuple[int, ...]
    predicts: bool  # whether the scorer has predict()

    def run(self, scorer: Scorer, tokens: np.ndarray) -> Handed:
        """Hand it over in each way, from forks."""
        stretch = tokens[self.start : self.stop]
        whole = probe_runner.score(scorer.fork(), stretch)
        handed = scorer.fork()
        bounds = [0, *self.cuts, len(stretch)]
        pieces = [probe_runner.score(handed, stretch[a:b]) for a, b in itertools.pairwise(bounds)]
        looked, scored = self._traces(scorer, stretch[: LOOKS + 1]) if self.predicts else (0.0, 0.0)
        return Handed(whole, np.concatenate(pieces), looked, scored)

    def _traces(self, scorer: Scorer, few: np.ndarray) -> tuple[float, float]:
        plain, looking, scoring = scorer.fork(), scorer.fork(), scorer.fork()
        for token in few.tolist():
            plain.observe(token)
            probe_runner.distribution(looking)
            looking.observe(token)
        probe_runner.score(scoring, few)
        after = probe_runner.distribution(plain)
        return _apart(probe_runner.distribution(looking), after), _apart(
            probe_runner.distribution(scoring), after
        )


def probes(key: bytes, positions: list[int], length: int, segment: int, predicts: bool) -> list[Handing]:
    """One probe for each position, half a segment long; the first piece is a single token, the others end anywhere."""
    draw = Draw(key, "pieces")
    made = []
    for position in positions:
        size = min(max(2, segment // 2), length - position)
        cuts = {1, *(draw.one(1, size) for _ in range(3))} if size > 1 else set()
        made.append(Handing(position, position + size, tuple(sorted(cuts)), predicts))
    return made


def judge_pieces(subject: str, stretches: list[Handing], seen: list[Handed], tolerance: float) -> Verdict:
    """B13: calls of other lengths give the same losses."""
    apart = [np.nan_to_num(np.abs(one.whole.astype(np.float64) - one.pieces), nan=np.inf) for one in seen]
    worst = int(np.argmax([difference.max() for difference in apart]))
    at = int(apart[worst].argmax())
    guilty = [
        stretch.start + int(d.argmax())
        for stretch, d in zip(stretches, apart, strict=True)
        if not d.max() <= tolerance
    ]
    count = sum(len(difference) for difference in apart)
    return Verdict(
        check="B13",
        name="whole or in pieces",
        subject=subject,
        conditions=("C1", "C3", "C4"),
        outcome=outcome(not guilty),
        evidence=f"{count} targets in {len(seen)} stretches, one call against several: largest difference {apart[worst].max():.1e} nats",
        saw=float(seen[worst].pieces[at]),
        expected=float(seen[worst].whole[at]),
        bound=tolerance,
        positions=tuple(guilty) if guilty else tuple(stretch.start for stretch in stretches),
        sees="scores that depend on how much of the stream a call holds: second passes, the better of two runs, rank-local caches",
        blind="other batch sizes, other numbers of processes (not asked for here)",
    )


def judge_trace(subject: str, stretches: list[Handing], seen: list[Handed], tolerance: float) -> Verdict:
    """B5, without the scorer's help: neither a look nor a score is an update."""
    worst = max(max(one.looked, one.scored) for one in seen)
    guilty = [
        stretch.start
        for stretch, one in zip(stretches, seen, strict=True)
        if not max(one.looked, one.scored) <= tolerance
    ]
    looked, scored = max(one.looked for one in seen), max(one.scored for one in seen)
    return Verdict(
        check="B5",
        name="reading leaves no trace",
        subject=subject,
        conditions=("C3", "C4"),
        outcome=outcome(not guilty),
        evidence=f"behind {len(seen)} stretches predict() differs by {looked:.1e} nats at most when it was read on the way, "
        f"by {scored:.1e} when the stretch was scored instead of observed",
        saw=worst,
        expected=0.0,
        bound=tolerance,
        positions=tuple(guilty) if guilty else tuple(stretch.start for stretch in stretches),
        sees="updates made by asking; a fast path that learns other things than observe() does",
        blind="state that never shows in a prediction nearby",
    )


def judge_again(subject: str, first: np.ndarray, second: np.ndarray) -> Verdict:
    """B13: two scorers of one factory agree to the last bit on the stream's first segment."""
    moved = np.flatnonzero(first.view(np.uint32) != second.view(np.uint32))
    at = int(moved[0]) if len(moved) else 0
    return Verdict(
        check="B13",
        name="a second run",
        subject=subject,
        conditions=("C1", "C4"),
        outcome=outcome(not len(moved)),
        evidence=f"{len(first)} targets from the stream's start by two scorers of one factory: {len(moved)} losses differ",
        saw=float(second[at]),
        expected=float(first[at]),
        bound=0,
        positions=(at + 1,) if len(moved) else (),
        sees="seeds from the clock, state that outlives a scorer, one run chosen of several",
        blind="what differs between machines, and further on in the stream",
    )


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):
        return float(
            np.nan_to_num(np.abs(one - other), nan=0.0 if np.array_equal(one, other) else np.inf).max()
        )
