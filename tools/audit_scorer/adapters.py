"""Adapt an external scorer to the protocol that the audit uses (stages/common/scorer.py).

Two kinds are accepted. A stepwise scorer has `predict`, `observe` and `fork`, and perhaps a fast
`score_stream`; without it, losses are read from predictions. A replay scorer has `score_stream`
alone: a fork of it is a new scorer from the factory that scores the same tokens again, which is why
its prefixes are kept short.

An error that the external code raises becomes a ScorerError, so that it is not taken for an error of
the audit's own files or options.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from stages.audit.probe_runner import ProtocolError

STEPWISE_METHODS = ("predict", "observe", "fork")
# Errors that somebody else's code may raise.
SCORER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class ScorerError(Exception):
    """The audited scorer or its factory raised an error; it could not be audited.

    That is not a failed check.
    """


@contextlib.contextmanager
def scorer_errors() -> Iterator[None]:
    """Context manager around a call of the external code: raise a ScorerError that names its error."""
    try:
        yield
    except SCORER_ERRORS as error:
        raise ScorerError(f"raised {type(error).__name__}: {error}") from error


class StepwiseScorer:
    """Adapter of a scorer with predict, observe and fork; `score_stream` is its own if it has one."""

    predicts = True

    def __init__(self, inner: Any, vocab_size: int, has_observed: bool = False) -> None:
        self.inner = inner
        self.vocab_size = vocab_size
        self.has_observed = has_observed  # the first token of a stream has no loss
        self.scope = getattr(inner, "scope", "stream")

    def predict(self) -> np.ndarray:
        """Return natural log-probabilities of the next token, (V,) float64."""
        with scorer_errors():
            return np.asarray(self.inner.predict(), dtype=np.float64)

    def observe(self, token: int) -> None:
        """Append a token."""
        with scorer_errors():
            self.inner.observe(token)
        self.has_observed = True

    def fork(self) -> "StepwiseScorer":
        """Return an independent copy."""
        with scorer_errors():
            inner = self.inner.fork()
        return StepwiseScorer(inner, self.vocab_size, self.has_observed)

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Append tokens (n,) and return their losses in nats, float32; (n-1,) at the start of the stream."""
        if hasattr(self.inner, "score_stream"):
            with scorer_errors():
                scored = np.asarray(self.inner.score_stream(tokens), dtype=np.float32)
            self.has_observed = self.has_observed or bool(len(tokens))
            return scored

        losses = []
        for token in tokens.tolist():
            if self.has_observed:
                losses.append(-float(self.predict()[token]))
            self.observe(token)
        return np.array(losses, dtype=np.float32)


class ReplayScorer:
    """Adapter of a scorer with score_stream alone: its state is its tokens, and each call runs them again."""

    predicts = False

    def __init__(
        self, factory: Callable[[], Any], vocab_size: int, observed: np.ndarray | None = None
    ) -> None:
        self.factory = factory
        self.vocab_size = vocab_size
        if observed is None:
            self.observed = np.empty(0, dtype=np.uint16)
            with scorer_errors():
                self.scope = getattr(factory(), "scope", "stream")
        else:
            self.observed = observed
            self.scope = "stream"  # never read of a fork

    def predict(self) -> np.ndarray:
        """Raise an error: no check that needs predict() is run."""
        raise ProtocolError("this scorer has no predict()")

    def observe(self, token: int) -> None:
        """Append a token."""
        self.observed = np.append(self.observed, np.uint16(token))

    def fork(self) -> "ReplayScorer":
        """Return an independent copy."""
        return ReplayScorer(self.factory, self.vocab_size, self.observed)

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Append tokens (n,) and return their losses in nats, float32; (n-1,) at the start of the stream."""
        self.observed = np.concatenate([self.observed, tokens.astype(np.uint16)])
        with scorer_errors():
            losses = np.asarray(self.factory().score_stream(self.observed), dtype=np.float32)
        targets = len(self.observed) - 1
        if losses.shape != (targets,):
            raise ProtocolError(
                f"score_stream of {len(self.observed)} tokens returned {losses.shape}, expected ({targets},)"
            )
        new_targets = min(len(tokens), targets)
        return losses[targets - new_targets :]


def adapt_scorer(factory: Callable[[], Any], vocab_size: int) -> StepwiseScorer | ReplayScorer:
    """Return an adapter for the scorers of a factory; ValueError if they are of neither kind."""
    with scorer_errors():
        inner = factory()
    declared = getattr(inner, "vocab_size", vocab_size)
    if declared != vocab_size:
        raise ValueError(
            f"the scorer has vocab_size {declared}, the tokenizer {vocab_size} ids:"
            " they do not belong together"
        )

    missing = [name for name in STEPWISE_METHODS if not callable(getattr(inner, name, None))]
    if not missing:
        return StepwiseScorer(inner, vocab_size)
    if callable(getattr(inner, "score_stream", None)):
        return ReplayScorer(factory, vocab_size)
    raise ValueError(
        f"the scorer lacks {', '.join(missing)}, and it has no score_stream either;"
        " see docs/audit.md for what it needs"
    )
