"""One causal pass over a stream, with forks at the places that the checks ask for.

The walker is a single scorer that is shown the stream's tokens one after the other and never a token ahead. `observe` is the cheap way
forward (a sliding window does nothing there, test-time training only its updates), so late positions are reached without paying for an
evaluation. Inside the stretches that are to be recomputed it goes forward by `score_stream`, at most `segment` targets at a time: the
losses that it then returns cannot depend on anything behind the segment. Where a probe wants to begin, the walker is forked and the
probe does with the fork what it likes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from stages.common.scorer import Scorer


class Probe(Protocol):
    """Something to do with a scorer that has observed tokens[:start] and nothing more."""

    @property
    def start(self) -> int:
        """How many tokens the scorer has observed."""
        ...

    def run(self, scorer: Scorer, tokens: np.ndarray) -> Any:
        """What was seen; the scorer is the probe's own."""
        ...


ROUNDING = 1.0e-5  # nats: other boundaries behind a target may put it into a batch of another shape, whose sums differ in the last bits


class BrokenProtocol(ValueError):
    """A scorer did not return what the protocol promises."""


class Walk(NamedTuple):
    """What came of a walk: recomputed losses by target, NaN where none was asked for, and each probe's finding in the probes' order."""

    losses: np.ndarray  # (N-1,) float32
    findings: list[Any]


def walk(
    scorer: Scorer,
    tokens: np.ndarray,
    probes: Sequence[Probe],
    stretches: Sequence[tuple[int, int]],
    segment: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Walk:
    """Lead a fresh scorer over `tokens`, (N,) uint16, to the last place of interest.

    `stretches` are the disjoint, sorted half-open ranges of target positions (tokens indices) to recompute; `advance` is told how many
    tokens have gone by.
    """
    losses = np.full(len(tokens) - 1, np.nan, dtype=np.float32)
    findings: list[Any] = [None] * len(probes)
    waiting = sorted(range(len(probes)), key=lambda i: probes[i].start)
    inside = _membership(stretches, len(tokens))
    marks = {probe.start for probe in probes} | {edge for stretch in stretches for edge in stretch}
    scorer.observe(int(tokens[0]))
    at = 1
    for mark in sorted(marks):
        assert 1 <= mark <= len(tokens), f"a probe cannot start at {mark}"
        while at < mark:
            stop = min(at + segment, mark) if inside[at] else mark
            if inside[at]:
                losses[at - 1 : stop - 1] = score(scorer, tokens[at:stop])
            else:
                for token in tokens[at:stop].tolist():
                    scorer.observe(token)
            advance(stop - at)
            at = stop
        while waiting and probes[waiting[0]].start == at:
            i = waiting.pop(0)
            findings[i] = probes[i].run(scorer.fork(), tokens)
    assert not waiting
    return Walk(losses, findings)


def score(scorer: Scorer, tokens: np.ndarray) -> np.ndarray:
    """`score_stream` of a scorer that has observed something, held to its promise: one float32 for each token."""
    return _held_to("score_stream", scorer.score_stream(tokens), np.dtype(np.float32), tokens.shape)


def moved(losses: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Where two runs differ by more than rounding, (n,) bool; what is no number differs."""
    return ~(np.abs(losses.astype(np.float64) - base.astype(np.float64)) <= ROUNDING)


def distribution(scorer: Scorer) -> np.ndarray:
    """`predict`, held to its promise: one float64 for each id."""
    return _held_to("predict", scorer.predict(), np.dtype(np.float64), (scorer.vocab_size,)).copy()


def _held_to(what: str, returned: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    if not isinstance(returned, np.ndarray) or returned.dtype != dtype or returned.shape != shape:
        saw = (
            f"{returned.dtype} {returned.shape}"
            if isinstance(returned, np.ndarray)
            else type(returned).__name__
        )
        raise BrokenProtocol(f"{what} returned {saw}, expected {dtype} {shape}")
    return returned


def _membership(stretches: Sequence[tuple[int, int]], length: int) -> np.ndarray:
    inside = np.zeros(length + 1, dtype=bool)
    for start, stop in stretches:
        inside[start:stop] = True
    return inside
