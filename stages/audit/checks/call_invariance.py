"""All four conditions: scores do not depend on how the stream is divided into calls (B13, B5).

*Pieces*: one call of score_stream against several of other lengths, some of a single token. *Trace*:
calls of predict(), and scoring instead of observing, must leave the same state. That shows the order of
events as far as it can be seen from outside: a scorer that updates in predict() and not in observe()
ends in another state. *Rerun*: a second scorer from the same factory starts with the same
losses.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stages.audit import probe_runner
from stages.audit.precision import difference
from stages.audit.probe_runner import Cost
from stages.audit.sampling import KeyedRng
from stages.audit.verdict import Check, Verdict
from stages.common.scorer import Scorer

PIECES = Check(
    "B13",
    "whole or in pieces",
    conditions=("C1", "C3", "C4"),
    sees="scores that depend on how much of the stream a call holds: second passes, "
    "the better of two runs, caches of one rank",
    blind="other batch sizes, other numbers of processes (not varied here)",
)
RERUN = Check(
    "B13",
    "a second run",
    conditions=("C1", "C4"),
    sees="seeds from the clock, state that outlives a scorer, one run chosen of several",
    blind="differences between machines, and later in the stream",
)
TRACE = Check(
    "B5",
    "reading leaves no trace",
    conditions=("C3", "C4"),
    sees="updates made by predict(); a fast path that learns other things than observe() does",
    blind="state that never changes a prediction nearby",
)
PREDICTED_TOKENS = 3  # tokens before each of which predict() is called in the trace test
CUTS = 3  # random places where a span is divided into calls, in addition to the one after its first token


class SplitResult(NamedTuple):
    """Results of the ways to score one span of n targets."""

    whole: np.ndarray  # (n,) float32: losses in one call
    pieces: np.ndarray  # (n,) float32: losses in several calls
    # Largest difference of predict() after the span's first tokens were observed, in nats, if they were ...
    after_predicting: float  # ... observed with a predict() before each
    after_scoring: float  # ... or scored instead


@dataclass(frozen=True)
class CallSplit:
    """Probe: score the span [start, stop) in one call, and in calls that end at the cuts."""

    start: int
    stop: int
    cuts: tuple[int, ...]  # ascending offsets from start
    predicts: bool  # the scorer has predict()

    @property
    def cost(self) -> Cost:
        """Work that `run` asks for."""
        return self.cost_of(self.stop - self.start, len(self.cuts), self.predicts)

    @staticmethod
    def cost_of(span: int, cuts: int, predicts: bool) -> Cost:
        """Cost of `span` targets: scored whole and in pieces, and the first of them shown in three ways."""
        cost = Cost(calls=1, targets=span) + Cost(calls=1 + cuts, targets=span)
        if predicts:
            traced = min(span, PREDICTED_TOKENS + 1)
            observed = Cost(targets=traced)
            predicted_and_observed = Cost(targets=traced, predictions=traced)
            scored = Cost(calls=1, targets=traced)
            cost += observed + predicted_and_observed + scored + Cost(predictions=3)
        return cost

    def run(self, scorer: Scorer, tokens: np.ndarray) -> SplitResult:
        """Score the span in each way, from forks; tokens: (N,) uint16."""
        span = tokens[self.start : self.stop]
        whole = probe_runner.checked_score(scorer.fork(), span)

        fork = scorer.fork()
        bounds = [0, *self.cuts, len(span)]
        pieces = [probe_runner.checked_score(fork, span[a:b]) for a, b in itertools.pairwise(bounds)]

        after_predicting = 0.0
        after_scoring = 0.0
        if self.predicts:
            after_predicting, after_scoring = self._traces(scorer, span[: PREDICTED_TOKENS + 1])
        return SplitResult(whole, np.concatenate(pieces), after_predicting, after_scoring)

    def _traces(self, scorer: Scorer, tokens: np.ndarray) -> tuple[float, float]:
        """Compare predict() after tokens (n,) were only observed, predicted and observed, or scored."""
        observing = scorer.fork()
        predicting = scorer.fork()
        scoring = scorer.fork()
        for token in tokens.tolist():
            observing.observe(token)
            probe_runner.checked_predict(predicting)
            predicting.observe(token)
        probe_runner.checked_score(scoring, tokens)

        base = probe_runner.checked_predict(observing)
        return (
            _largest_difference(probe_runner.checked_predict(predicting), base),
            _largest_difference(probe_runner.checked_predict(scoring), base),
        )


def probes(key: bytes, positions: list[int], length: int, segment: int, predicts: bool) -> list[CallSplit]:
    """Build one probe for each position of a stream of `length` tokens, with a span of half a segment.

    The first piece is a single token; the others end anywhere.
    """
    rng = KeyedRng(key, "pieces")
    splits = []
    for position in positions:
        size = min(max_span(segment), length - position)
        cuts: set[int] = set()
        if size > 1:
            cuts = {1, *(rng.integer(1, size) for _ in range(CUTS))}
        splits.append(CallSplit(position, position + size, tuple(sorted(cuts)), predicts))
    return splits


def max_span(segment: int) -> int:
    """Targets of a probe's span, unless the stream ends within it."""
    return max(2, segment // 2)


def judge_pieces(
    subject: str, splits: list[CallSplit], results: list[SplitResult], tolerance: float
) -> Verdict:
    """B13: calls of other lengths give the same losses, within `tolerance` nats."""
    # Spans with a target that differs too much.
    differences = [np.abs(difference(result.whole, result.pieces)) for result in results]
    failed = [
        split.start + int(of_span.argmax())
        for split, of_span in zip(splits, differences, strict=True)
        if of_span.max() > tolerance
    ]
    targets = sum(map(len, differences))

    # The target with the largest difference.
    worst = int(np.argmax([of_span.max() for of_span in differences]))
    at = int(differences[worst].argmax())

    return Verdict.of(
        PIECES,
        subject,
        not failed,
        f"{targets} targets in {len(results)} spans, one call against several: "
        f"largest difference {differences[worst].max():.1e} nats",
        saw=float(results[worst].pieces[at]),
        expected=float(results[worst].whole[at]),
        bound=tolerance,
        positions=tuple(failed or (split.start for split in splits)),
    )


def judge_trace(
    subject: str, splits: list[CallSplit], results: list[SplitResult], tolerance: float
) -> Verdict:
    """B5: neither predict() nor scoring instead of observing changes what the scorer learns."""
    after_predicting = max(result.after_predicting for result in results)
    after_scoring = max(result.after_scoring for result in results)

    # A NaN is a failure too.
    failed = [
        split.start
        for split, result in zip(splits, results, strict=True)
        if not max(result.after_predicting, result.after_scoring) <= tolerance
    ]

    return Verdict.of(
        TRACE,
        subject,
        not failed,
        f"after {len(results)} spans predict() differs by {after_predicting:.1e} nats at most "
        f"when it was also called on the way, "
        f"by {after_scoring:.1e} when the span was scored instead of observed",
        # The largest difference of all.
        saw=max(max(result.after_predicting, result.after_scoring) for result in results),
        expected=0.0,
        bound=tolerance,
        positions=tuple(failed or (split.start for split in splits)),
    )


def judge_rerun(subject: str, first: np.ndarray, second: np.ndarray, rounding: float) -> Verdict:
    """B13: two scorers of one factory give the same losses, float32 (n,), on the stream's first segment.

    They may differ by `rounding` nats: the order of a sum may differ from run to run on a GPU.
    """
    different = np.flatnonzero(probe_runner.differs(second, first, rounding))
    at = int(different[0]) if len(different) else 0
    return Verdict.of(
        RERUN,
        subject,
        not len(different),
        f"{len(first)} targets from the stream's start by two scorers of one factory: "
        f"{len(different)} losses differ by more than round-off",
        saw=float(second[at]),
        expected=float(first[at]),
        bound=rounding,
        positions=(at + 1,) if len(different) else (),
    )


def _largest_difference(one: np.ndarray, other: np.ndarray) -> float:
    """Compare two distributions (V,) in nats; equal infinities do not differ, NaN differs from everything."""
    return float(np.abs(difference(one, other)).max())
