"""C1 and C4: does a score depend on what comes after it, and does the ledger (B1)?

Two tests that need each other. *Perturbation*: two forks of one scorer score the same segment, but for one the tokens behind t are
others, at the same length; the losses up to t must be the same, but for rounding. It sees every dependence that reaches no further than
the segment.
*Recomputation*: a scorer that is shown the stream a segment at a time must return the losses of the ledger, which was written with the
whole stream at hand. What leaned on tokens behind the segment cannot agree, so it sees what perturbation does not.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stages.audit import probe_runner
from stages.audit.sampling import Draw, Group
from stages.audit.verdict import Outcome, Verdict, outcome
from stages.common.scorer import Scorer

SUFFIXES = ("random ids", "other text", "another document", "moved boundaries")
BOUNDARIES = 2  # put into a future whose own are taken away


class Moved(NamedTuple):
    """What replacing the future did: the first target position whose loss moved, and the two losses there; None when none did."""

    position: int
    suffix: str
    first: int | None
    before: float
    after: float


class Segment(NamedTuple):
    """What a perturbation probe saw."""

    base: np.ndarray  # (L,) float32: losses of the segment as it is
    moved: list[Moved]


@dataclass(frozen=True)
class Perturbation:
    """A probe: the segment of a group, once as it is and once for each position with another future."""

    group: Group
    futures: tuple[
        tuple[str, np.ndarray], ...
    ]  # for each position, the kind of future and its tokens up to the segment's end

    @property
    def start(self) -> int:
        """The first token of the segment."""
        return self.group.start

    def run(self, scorer: Scorer, tokens: np.ndarray) -> Segment:
        """Score the segment and its variants from forks."""
        segment = tokens[self.group.start : self.group.stop]
        base = probe_runner.score(scorer.fork(), segment)
        moved = []
        for position, (suffix, future) in zip(self.group.positions, self.futures, strict=True):
            kept = position + 1 - self.group.start
            nll = probe_runner.score(scorer.fork(), np.concatenate([segment[:kept], future]))
            different = np.flatnonzero(probe_runner.moved(nll[:kept], base[:kept]))
            first = int(different[0]) if len(different) else None
            before, after = (0.0, 0.0) if first is None else (float(base[first]), float(nll[first]))
            moved.append(
                Moved(position, suffix, None if first is None else self.group.start + first, before, after)
            )
        return Segment(base, moved)


def probes(
    key: bytes, groups: list[Group], tokens: np.ndarray, vocab_size: int, bos: int
) -> list[Perturbation]:
    """One probe for each group; the futures are by turns random ids, text from elsewhere, another document, and documents of other lengths.

    The last (B1b) is the future itself with its boundaries moved: what sorts documents by length, or reads where they end, shows there.
    """
    draw = Draw(key, "future")
    made = []
    turn = 0
    for group in groups:
        futures = []
        for position in group.positions:
            suffix = SUFFIXES[turn % len(SUFFIXES)]
            future = _future(draw, suffix, tokens[position + 1 : group.stop], tokens, vocab_size, bos)
            if (
                future[0] == tokens[position + 1]
            ):  # the token next to t must change: most that looks ahead looks there
                future[0] = (int(future[0]) + draw.one(1, vocab_size)) % vocab_size
            futures.append((suffix, future))
            turn += 1
        made.append(Perturbation(group, tuple(futures)))
    return made


def judge_perturbation(subject: str, groups: list[Group], segments: list[Segment]) -> Verdict:
    """B1, first half: nothing moved."""
    found = [moved for segment in segments for moved in segment.moved]
    guilty = [moved for moved in found if moved.first is not None]
    positions = tuple(sorted(moved.position for moved in found))
    saw, expected = 0.0, 0.0
    edges = ", ".join(
        f"{sum(group.kind == kind for group in groups)} at {kind}"
        for kind in sorted({group.kind for group in groups})
    )
    evidence = f"{len(found)} futures replaced in {len(groups)} segments ({edges}): no loss at or before the change moved"
    if guilty:
        worst = guilty[0]
        positions, saw, expected = (
            tuple(sorted({moved.position for moved in guilty})),
            worst.after,
            worst.before,
        )
        evidence = (
            f"with {worst.suffix} behind position {worst.position}, the loss of target {worst.first} moved from {worst.before:.6g} "
            f"to {worst.after:.6g} nats ({len(guilty)} of {len(found)} replaced futures moved a score)"
        )
    return Verdict(
        check="B1",
        name="future perturbation",
        subject=subject,
        conditions=("C1", "C3", "C4"),
        outcome=outcome(not guilty),
        evidence=evidence,
        saw=saw,
        expected=expected,
        bound=probe_runner.ROUNDING,
        positions=positions,
        sees="any dependence of a score on later tokens of the same segment: look-ahead, second passes, training before scoring, "
        "documents sorted by length",
        blind="validation text in the artifact, dependence on the target itself (B2, B3), tokens beyond the segment (recomputation)",
    )


def judge_recomputation(
    subject: str,
    ledger: np.ndarray | None,
    losses: np.ndarray,
    groups: list[Group],
    segments: list[Segment],
    tolerances: tuple[float, float],
) -> Verdict:
    """B1, second half: losses from segments that saw no future against the ledger; tolerances for one loss and for the mean."""
    again = losses.copy()
    for group, segment in zip(groups, segments, strict=True):
        again[group.start - 1 : group.stop - 1] = segment.base
    held = np.flatnonzero(~np.isnan(losses) | _covered(groups, len(losses)))
    each, mean = tolerances
    share = len(held) / len(losses)
    evidence = "there is no complete ledger to hold against recomputed losses"
    result: Outcome = "cannot tell"
    saw, expected = 0.0, 0.0
    positions: tuple[int, ...] = ()
    if ledger is not None:
        difference = ledger[held].astype(np.float64) - again[held].astype(np.float64)
        worst = int(np.nan_to_num(np.abs(difference), nan=np.inf).argmax())
        largest, offset = float(np.abs(difference).max()), float(difference.mean())
        saw, expected, positions = (
            float(ledger[held[worst]]),
            float(again[held[worst]]),
            (int(held[worst]) + 1,),
        )
        result = outcome(largest <= each and abs(offset) <= mean)
        evidence = (
            f"{len(held)} of {len(losses)} targets ({share:.1%}) scored again without their future: largest difference {largest:.1e} nats "
            f"(bound {each:.0e}), mean {offset:+.1e} (bound {mean:.0e})"
        )
    return Verdict(
        check="B1",
        name="ledger without the future",
        subject=subject,
        conditions=("C1", "C3", "C4", "metric"),
        outcome=result,
        evidence=evidence,
        saw=saw,
        expected=expected,
        bound=each,
        positions=positions,
        sees="a ledger that another scorer wrote, a second pass, or one that used tokens behind the segment; edited losses",
        blind=f"targets not scored again: of k false losses placed at random, none is among them with probability {1 - share:.3f}^k",
    )


def _future(
    draw: Draw, suffix: str, future: np.ndarray, tokens: np.ndarray, vocab_size: int, bos: int
) -> np.ndarray:
    length = len(future)
    if suffix == "moved boundaries":
        moved = np.where(future == bos, (bos + draw.one(1, vocab_size)) % vocab_size, future).astype(
            tokens.dtype
        )
        moved[draw.below(length, BOUNDARIES)] = bos
        return moved
    if suffix == "random ids" or length >= len(tokens):
        return draw.below(vocab_size, length).astype(tokens.dtype)
    begin = draw.one(0, len(tokens) - length)
    if suffix == "another document":
        starts = np.flatnonzero(tokens[: len(tokens) - length] == bos)
        begin = int(starts[draw.one(0, len(starts))]) if len(starts) else begin
    return tokens[begin : begin + length].copy()


def _covered(groups: list[Group], targets: int) -> np.ndarray:
    covered = np.zeros(targets, dtype=bool)
    for group in groups:
        covered[group.start - 1 : group.stop - 1] = True
    return covered
