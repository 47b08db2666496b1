"""What an outside scorer offers, made into what the audit asks for.

Two kinds are accepted. One has `predict`, `observe` and `fork`, and perhaps a fast `score_stream`; without it, scores are read from
predictions. The other has `score_stream` alone: a copy of it in some state is a new scorer from the factory that is shown the same tokens
again, which is why its prefixes are kept short.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from stages.audit.probe_runner import BrokenProtocol

STEPS = ("predict", "observe", "fork")


class Stepping:
    """A scorer by its three steps; `score_stream` is its own where it has one."""

    predicts = True

    def __init__(self, inner: Any, vocab_size: int, begun: bool = False) -> None:
        self.inner, self.vocab_size, self.begun = inner, vocab_size, begun
        self.scope = getattr(inner, "scope", "stream")

    def predict(self) -> np.ndarray:
        """Natural log-probabilities of the next token, (V,) float64."""
        return np.asarray(self.inner.predict(), dtype=np.float64)

    def observe(self, token: int) -> None:
        """Append a token."""
        self.inner.observe(token)
        self.begun = True

    def fork(self) -> "Stepping":
        """An independent copy."""
        return Stepping(self.inner.fork(), self.vocab_size, self.begun)

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Losses in nats, float32."""
        if hasattr(self.inner, "score_stream"):
            scored = np.asarray(self.inner.score_stream(tokens), dtype=np.float32)
            self.begun = self.begun or bool(len(tokens))
            return scored
        losses = []
        for token in tokens.tolist():
            if self.begun:
                losses.append(-float(self.predict()[token]))
            self.observe(token)
        return np.array(losses, dtype=np.float32)


class Replaying:
    """A scorer that has only `score_stream`: its state is the tokens it was shown, and each answer a new run."""

    predicts = False

    def __init__(self, make: Callable[[], Any], vocab_size: int, shown: np.ndarray | None = None) -> None:
        self.make, self.vocab_size = make, vocab_size
        self.shown = np.empty(0, dtype=np.uint16) if shown is None else shown
        self.scope = getattr(make(), "scope", "stream") if shown is None else "stream"

    def predict(self) -> np.ndarray:
        """Not there: no check that needs it is run."""
        raise BrokenProtocol("this scorer has no predict()")

    def observe(self, token: int) -> None:
        """Remember the token."""
        self.shown = np.append(self.shown, np.uint16(token))

    def fork(self) -> "Replaying":
        """An independent copy."""
        return Replaying(self.make, self.vocab_size, self.shown)

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Losses of these tokens behind all that was shown, nats, float32."""
        self.shown = np.concatenate([self.shown, tokens.astype(np.uint16)])
        scored = np.asarray(self.make().score_stream(self.shown), dtype=np.float32)
        wanted = min(len(tokens), len(self.shown) - 1)
        if scored.shape != (len(self.shown) - 1,):
            raise BrokenProtocol(
                f"score_stream of {len(self.shown)} tokens returned {scored.shape}, expected ({len(self.shown) - 1},)"
            )
        return scored[len(scored) - wanted :]


def adapt(make: Callable[[], Any], vocab_size: int) -> Stepping | Replaying:
    """The scorer that `make` gives, by what it offers; a ValueError when that is neither of the two kinds."""
    inner = make()
    missing = [name for name in STEPS if not callable(getattr(inner, name, None))]
    declared = getattr(inner, "vocab_size", vocab_size)
    if declared != vocab_size:
        raise ValueError(
            f"the scorer has vocab_size {declared}, the tokenizer {vocab_size} ids: they do not belong together"
        )
    if not missing:
        return Stepping(inner, vocab_size)
    if callable(getattr(inner, "score_stream", None)):
        return Replaying(make, vocab_size)
    raise ValueError(
        f"the scorer lacks {', '.join(missing)}, and it has no score_stream either; see docs/audit.md for what it needs"
    )
