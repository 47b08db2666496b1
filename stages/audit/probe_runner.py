"""Runs the probes of all checks in one causal pass over the stream.

A single scorer is shown the tokens of the stream one after the other, and never a token ahead.
`observe` is the cheap way forward (a sliding window does nothing there, test-time training only its
updates), so late positions are reached without paying for an evaluation. Inside the spans that are to
be recomputed the scorer goes forward by `score_stream`, at most `segment` targets at a time: the losses
that it then returns cannot depend on anything after the segment. Where a probe starts, the scorer is
forked, and the probe may do anything with the fork.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from stages.audit.precision import difference
from stages.common.scorer import Scorer


@dataclass(frozen=True)
class Cost:
    """Work that is asked of a scorer and its forks. Forks themselves count as free."""

    calls: int = 0  # of score_stream
    targets: int = 0  # tokens that are scored or observed
    predictions: int = 0  # calls of predict

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.calls + other.calls, self.targets + other.targets, self.predictions + other.predictions
        )

    def __mul__(self, count: int) -> "Cost":
        return Cost(count * self.calls, count * self.targets, count * self.predictions)


class Probe(Protocol):
    """An experiment with a scorer that has observed tokens[:start] and nothing more."""

    @property
    def start(self) -> int:
        """Number of tokens that the scorer has observed."""
        ...

    @property
    def cost(self) -> Cost:
        """Work that `run` asks of the scorer; less only where the stream ends within the probe."""
        ...

    def run(self, scorer: Scorer, tokens: np.ndarray) -> Any:
        """Run the experiment and return its finding.

        scorer: a fork that the probe may change; tokens: (N,) uint16, the whole stream.
        """
        ...


class ProtocolError(ValueError):
    """A scorer did not return what the protocol promises (common/scorer.py)."""


class ProbeResults(NamedTuple):
    """Results of one pass."""

    losses: np.ndarray  # (N-1,) float32: recomputed losses by target, NaN where none was wanted
    findings: dict[str, list[Any]]  # by name of the group: one for each of its probes, in their order


def run_probes(
    scorer: Scorer,
    tokens: np.ndarray,
    groups: Mapping[str, Sequence[Probe]],
    spans: Sequence[tuple[int, int]],
    segment: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> ProbeResults:
    """Show a stream to a fresh scorer, and run each probe on the way.

    tokens: (N,) uint16; the pass ends at the last position of interest.

    groups: probes by the name under which their findings are returned.
    spans: disjoint, sorted half-open ranges of target positions (token indices) to recompute.
    advance: called with the number of tokens passed since its last call.
    """
    losses = np.full(len(tokens) - 1, np.nan, dtype=np.float32)
    findings: dict[str, list[Any]] = {name: [None] * len(probes) for name, probes in groups.items()}
    recomputed = _in_spans(spans, len(tokens))

    # The probes by where they start, each with the place of its finding.
    probes_at: defaultdict[int, list[tuple[str, int, Probe]]] = defaultdict(list)
    for name, probes in groups.items():
        for i, probe in enumerate(probes):
            probes_at[probe.start].append((name, i, probe))

    # Positions where something changes: a probe starts, or a span begins or ends.
    stops = set(probes_at)
    for span in spans:
        stops.update(span)

    scorer.observe(int(tokens[0]))
    position = 1
    for stop in sorted(stops):
        assert 1 <= stop <= len(tokens), f"a probe cannot start at {stop}"

        # Go forward to the stop: scoring inside a span, observing outside.
        while position < stop:
            end = min(position + segment, stop) if recomputed[position] else stop
            if recomputed[position]:
                losses[position - 1 : end - 1] = checked_score(scorer, tokens[position:end])
            else:
                for token in tokens[position:end].tolist():
                    scorer.observe(token)
            advance(end - position)
            position = end

        # Run the probes that start here.
        for name, i, probe in probes_at[stop]:
            findings[name][i] = probe.run(scorer.fork(), tokens)
    return ProbeResults(losses, findings)


def checked_score(scorer: Scorer, tokens: np.ndarray) -> np.ndarray:
    """Call `score_stream`; a ProtocolError unless it returns one float32 loss for each of tokens (n,).

    The scorer must have observed at least one token before.
    """
    return _checked("score_stream", scorer.score_stream(tokens), np.dtype(np.float32), tokens.shape)


def checked_predict(scorer: Scorer) -> np.ndarray:
    """Call `predict` and copy its result; a ProtocolError unless it is float64 (V,)."""
    return _checked("predict", scorer.predict(), np.dtype(np.float64), (scorer.vocab_size,)).copy()


def differs(losses: np.ndarray, base: np.ndarray, rounding: float) -> np.ndarray:
    """Mark losses (..., n) that differ from `base` by more than `rounding` nats (Precision.rounding).

    NaN always differs, equal infinities do not.
    """
    return np.abs(difference(losses, base)) > rounding


def _checked(method: str, returned: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    if isinstance(returned, np.ndarray) and returned.dtype == dtype and returned.shape == shape:
        return returned
    saw = (
        f"{returned.dtype} {returned.shape}" if isinstance(returned, np.ndarray) else type(returned).__name__
    )
    raise ProtocolError(f"{method} returned {saw}, expected {dtype} {shape}")


def _in_spans(spans: Sequence[tuple[int, int]], length: int) -> np.ndarray:
    """Mark the positions 0 ... length that are inside a span, (length + 1,) bool."""
    inside = np.zeros(length + 1, dtype=bool)
    for start, stop in spans:
        inside[start:stop] = True
    return inside
