"""Parse training logs, in the forms that records of the challenge and this project use.

Logs of the challenge are printed by forty scripts that descend from one; ours are the log lines of
the stages. Each fact has a few patterns, the last matching line counts, and a fact that no line
states is None.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

NUMBER = r"(\d[\d,_]*)"
DECIMAL = r"(\d+(?:\.\d+)?)"
FLAGS = re.IGNORECASE | re.MULTILINE

# Patterns of integer facts, in order of preference: the challenge's forms, then those of this
# project.
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
# Patterns with the factor that converts the printed unit to seconds.
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
# Groups: label, loss in nats, bpb.
SCORE = re.compile(rf"^(.*?)\bval_loss:\s*{DECIMAL}\s+val_bpb:\s*{DECIMAL}", FLAGS)
# Groups: label, bpb.
CADDIE_SCORE = re.compile(rf"\b(sliding_eval|ttt_eval): {DECIMAL} bpb over ", FLAGS)
# Labels of scores that are printed during training, or before quantisation.
DIAGNOSTIC = re.compile(r"pre-?quant|^\s*(?:step[ :]*)?\d+/\d+", FLAGS)
DISABLED_SETTING = re.compile(r"^\s*(\w+):\s*(False|0)\s*$", re.MULTILINE)


class LoggedScore(NamedTuple):
    """A line with a score."""

    label: str
    loss: float | None  # nats per token
    bpb: float
    is_diagnostic: bool  # not a score of the model that was handed in


@dataclass(frozen=True)
class Log:
    """Facts of one log; None: not stated."""

    name: str
    text: str
    seed: int | None = None
    bytes_code: int | None = None
    bytes_model: int | None = None
    bytes_total: int | None = None
    steps: int | None = None
    tokens: int | None = None  # scored
    bytes: int | None = None  # scored
    shards: int | None = None  # of training data
    epochs: int | None = None  # of test-time training
    documents: int | None = None
    train_seconds: float | None = None
    hessian_seconds: float | None = None
    eval_seconds: float | None = None
    scores: tuple[LoggedScore, ...] = ()
    disabled_settings: frozenset[str] = field(default=frozenset())  # names of settings that are False or 0

    @property
    def final_scores(self) -> tuple[LoggedScore, ...]:
        """Scores of the model that was handed in."""
        return tuple(score for score in self.scores if not score.is_diagnostic)

    @property
    def scored_bytes(self) -> float | None:
        """Bytes that the last score was divided by: as stated, or tokens * loss / ln 2 / bpb."""
        last = next((score for score in reversed(self.final_scores) if score.loss), None)
        if self.bytes is not None or last is None or not self.tokens:
            return self.bytes
        return self.tokens * (last.loss or 0.0) / math.log(2) / last.bpb


def parse_log(name: str, text: str) -> Log | None:
    """Return the facts of a log; None if the text is not one: it has no score and no end of training."""
    integers: dict[str, int | None] = {
        key: _find_integer(text, patterns) for key, patterns in INTEGERS.items()
    }
    scores = []
    for match in SCORE.finditer(text):
        is_diagnostic = bool(DIAGNOSTIC.search(match[1]))
        scores.append(LoggedScore(match[1].strip(), float(match[2]), float(match[3]), is_diagnostic))
    for match in CADDIE_SCORE.finditer(text):
        scores.append(LoggedScore(match[1], None, float(match[2]), is_diagnostic=False))
    if not scores and integers["steps"] is None:
        return None

    # A seed in the file's name takes precedence.
    seed_in_name = re.search(r"seed[_-]?(\d+)", name, re.IGNORECASE)
    if seed_in_name:
        integers["seed"] = int(seed_in_name[1])

    seconds = {key: _find_seconds(text, patterns) for key, patterns in SECONDS.items()}
    disabled = frozenset(match[1] for match in DISABLED_SETTING.finditer(text))
    return Log(name, text, **integers, **seconds, scores=tuple(scores), disabled_settings=disabled)  # type: ignore[arg-type]


def parse_integer(text: str) -> int:
    """Return an integer that may have separators.

    >>> parse_integer("15,996,321")
    15996321
    """
    return int(re.sub(r"[,_]", "", text))


def _find_integer(text: str, patterns: Sequence[str]) -> int | None:
    """Return the last number that the first matching pattern finds."""
    for pattern in patterns:
        found = re.findall(pattern, text, FLAGS)
        if found:
            return parse_integer(found[-1])
    return None


def _find_seconds(text: str, patterns: Sequence[tuple[str, float]]) -> float | None:
    """Return the last duration that the first matching pattern finds."""
    for pattern, factor in patterns:
        found = re.findall(pattern, text, FLAGS)
        if found:
            return float(found[-1]) * factor
    return None
