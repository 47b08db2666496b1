"""What a training log says, in whatever of the usual forms it says it.

Logs of the challenge are prints of forty scripts that descend from one; ours are the lines of stages. Each fact has a few patterns, the
last line that matches counts, and what no line says is None.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

NUMBER = r"(\d[\d,_]*)"
DECIMAL = r"(\d+(?:\.\d+)?)"
FLAGS = re.IGNORECASE | re.MULTILINE

INTEGERS = {
    "seed": (rf"^\s*seed:?\s*{NUMBER}\b", rf"\bSEED={NUMBER}"),
    "bytes_code": (
        rf"code size[^:\n]*:\s*{NUMBER}",
        rf"\+ {NUMBER} \(train_gpt\.py\)",
        rf"modules, .* {NUMBER} bytes packed",
    ),
    "bytes_model": (
        rf"serialized model [^:\n]*(?:\+|int\d|quant)[^:\n]*:\s*{NUMBER}",
        rf"{NUMBER} \(model\.bin\) \+",
    ),
    "bytes_total": (
        rf"total submission size [^:\n]*(?:\+|int\d|quant)[^:\n]*:\s*{NUMBER}",
        rf"\(train_gpt\.py\) = {NUMBER} bytes",
    ),
    "steps": (rf"stopping_early:.*\bstep:\s*{NUMBER}/", rf"\btrain: {NUMBER} steps in "),
    "tokens": (
        rf"\bval_tokens:\s*{NUMBER}",
        rf"val_loader:.*tokens:\s*{NUMBER}",
        rf"\btarget_tokens\W+{NUMBER}",
        rf" bpb over {NUMBER} targets",
    ),
    "bytes": (
        rf"\btarget_bytes\W+{NUMBER}",
        rf"\bval_bytes:\s*{NUMBER}",
        rf" bpb over [\d,]+ targets, {NUMBER} bytes",
    ),
    "shards": (rf"\btrain_shards:\s*{NUMBER}",),
    "epochs": (rf"\bttt_epochs:\s*{NUMBER}",),
    "documents": (rf"\b(?:num_docs|val_docs|docs):\s*{NUMBER}",),
}
# Seconds, and the factor of the unit that is printed.
SECONDS = {
    "train_seconds": (
        (rf"stopping_early:.*train_time:\s*{DECIMAL}ms", 1e-3),
        (rf"\btrain: [\d,]+ steps in {DECIMAL} s", 1.0),
    ),
    "hessian_seconds": ((rf"hessians? .*\bin {DECIMAL}\s*s", 1.0), (rf"data read for {DECIMAL} s", 1.0)),
    "eval_seconds": (
        (rf"total_eval_time:\s*{DECIMAL}\s*s", 1.0),
        (rf"\bval_bpb:.*eval_time:\s*{DECIMAL}ms", 1e-3),
    ),
}
SCORE = re.compile(rf"^(.*?)\bval_loss:\s*{DECIMAL}\s+val_bpb:\s*{DECIMAL}", FLAGS)
OURS = re.compile(rf"\b(sliding_eval|ttt_eval): {DECIMAL} bpb over ", FLAGS)
DIAGNOSTIC = re.compile(r"pre-?quant|^\s*(?:step[ :]*)?\d+/\d+", FLAGS)
SWITCH = re.compile(r"^\s*(\w+):\s*(False|0)\s*$", re.MULTILINE)


class Score(NamedTuple):
    """A line with a score; what is printed during training, or before quantisation, is a diagnostic."""

    label: str
    loss: float | None
    bpb: float
    diagnostic: bool


@dataclass(frozen=True)
class Log:
    """One log; None is not said."""

    name: str
    text: str
    seed: int | None = None
    bytes_code: int | None = None
    bytes_model: int | None = None
    bytes_total: int | None = None
    steps: int | None = None
    tokens: int | None = None
    bytes: int | None = None
    shards: int | None = None
    epochs: int | None = None
    documents: int | None = None
    train_seconds: float | None = None
    hessian_seconds: float | None = None
    eval_seconds: float | None = None
    scores: tuple[Score, ...] = ()
    off: frozenset[str] = field(default=frozenset())  # names of settings that are False or 0

    @property
    def final(self) -> tuple[Score, ...]:
        """The scores of what is handed in."""
        return tuple(score for score in self.scores if not score.diagnostic)

    @property
    def scored_bytes(self) -> float | None:
        """The bytes that the last score was divided by: as the log says, else from its loss, its bpb and the tokens."""
        last = next((score for score in reversed(self.final) if score.loss), None)
        if self.bytes is not None or last is None or not self.tokens:
            return self.bytes
        return self.tokens * (last.loss or 0.0) / math.log(2) / last.bpb


def parse(name: str, text: str) -> Log | None:
    """The facts of a log; None when the text is none: it has neither a score nor the end of a training."""
    facts: dict[str, int | None] = {key: _integer(text, patterns) for key, patterns in INTEGERS.items()}
    scores = tuple(
        Score(m[1].strip(), float(m[2]), float(m[3]), bool(DIAGNOSTIC.search(m[1])))
        for m in SCORE.finditer(text)
    )
    scores += tuple(Score(m[1], None, float(m[2]), False) for m in OURS.finditer(text))
    if not scores and facts["steps"] is None:
        return None
    named = re.search(r"seed[_-]?(\d+)", name, re.IGNORECASE)
    if named:
        facts["seed"] = int(named[1])
    seconds = {key: _seconds(text, patterns) for key, patterns in SECONDS.items()}
    return Log(
        name, text, **facts, **seconds, scores=scores, off=frozenset(m[1] for m in SWITCH.finditer(text))
    )  # type: ignore[arg-type]


def whole(text: str) -> int:
    """An integer with separators.

    >>> whole("15,996,321")
    15996321
    """
    return int(re.sub(r"[,_]", "", text))


def _integer(text: str, patterns: Sequence[str]) -> int | None:
    for pattern in patterns:
        found = re.findall(pattern, text, FLAGS)
        if found:
            return whole(found[-1])
    return None


def _seconds(text: str, patterns: Sequence[tuple[str, float]]) -> float | None:
    for pattern, factor in patterns:
        found = re.findall(pattern, text, FLAGS)
        if found:
            return float(found[-1]) * factor
    return None
