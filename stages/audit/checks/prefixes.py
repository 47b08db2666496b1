"""C1 and C4 for a scorer without predict(): do its losses need what comes later (B1)?

Such a scorer holds a whole call's tokens while it scores them. So it is run again and again, each time in
a process that has seen nothing, on a prefix of random length, or on that prefix with random tokens after
it; the losses of the prefix must be those of the ledger. A process cannot know what comes after its
prefix, nor what other processes were shown, so a loss that needs a later token cannot be repeated by a
prefix that ends before that token.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from stages.audit import probe_runner
from stages.audit.checks import canary
from stages.audit.precision import Precision, difference
from stages.audit.probe_runner import Cost
from stages.audit.sampling import KeyedRng
from stages.audit.verdict import Check, Verdict
from stages.common.scorer import Scorer

PREFIXES = Check(
    "B1",
    "prefixes in fresh processes",
    conditions=("C1", "C3", "C4", "metric"),
    sees="losses that need a token after the end of a prefix: second passes, training before scoring, tables "
    "of answers that one run leaves for another, scorers that are lawful on a short stream",
    blind="look-ahead that reaches past none of the ends; what a loss takes from its own token (B3)",
)
UNIFORM_TAILS = dataclasses.replace(canary.UNIFORM_CANARY, name="uniform ids after prefixes")
KINDS = ("truncated", "other text after it")


class ShownPrefix(NamedTuple):
    """Stream that a fresh scorer is shown, of which the first `length` tokens are the audited stream's."""

    kind: str  # one of KINDS
    length: int
    tokens: np.ndarray  # (n,) uint16


def draw(key: bytes, tokens: np.ndarray, vocab_size: int, count: int) -> list[ShownPrefix]:
    """Draw `count` prefixes of a stream (N,), one that ends in each of as many equal parts, and all of it.

    Kinds alternate. The shortest is first: no process may know what a later one is shown.
    """
    rng = KeyedRng(key, "prefixes")
    length = len(tokens)
    prefixes: list[ShownPrefix] = []
    for part in range(count):
        low = 2 + (length - 2) * part // count
        high = 2 + (length - 2) * (part + 1) // count
        end = rng.integer(low, max(low + 1, high))
        kind = KINDS[len(prefixes) % len(KINDS)]
        other = rng.below(vocab_size, length - end).astype(tokens.dtype)
        shown = tokens[:end] if kind == KINDS[0] else np.concatenate([tokens[:end], other])
        prefixes.append(ShownPrefix(kind, end, shown))
    return [*prefixes, ShownPrefix(KINDS[0], length, tokens)]


def cost_of(count: int, length: int) -> Cost:
    """Upper bound of the cost of `count` prefixes of a stream of `length` tokens, and of all of it."""
    return Cost(calls=1, targets=length) * (1 + count)


def score(prefix: ShownPrefix, fresh: Callable[[], Scorer]) -> np.ndarray:
    """Score a prefix with a fresh scorer; returns the losses of all that it is shown, float32."""
    losses = fresh().score_stream(prefix.tokens)
    if losses.shape != (len(prefix.tokens) - 1,):
        raise probe_runner.ProtocolError(
            f"score_stream of {len(prefix.tokens)} tokens returned {losses.shape}, "
            f"expected ({len(prefix.tokens) - 1},)"
        )
    return losses


def judge(
    subject: str,
    prefixes: Sequence[ShownPrefix],
    losses: Sequence[np.ndarray],
    ledger: np.ndarray | None,
    precision: Precision,
) -> Verdict:
    """B1: the losses of each prefix are those of the ledger, (N-1,) float32, None without a complete one.

    losses: of each prefix, and of what follows it.
    """
    if ledger is None:
        evidence = "there is no complete ledger to compare with prefixes"
        return Verdict.cannot_tell(PREFIXES, subject, evidence, bound=precision.loss_tolerance)

    # The worst loss of each prefix.
    worst = []
    for prefix, scored in zip(prefixes, losses, strict=True):
        different = np.abs(difference(ledger[: prefix.length - 1], scored[: prefix.length - 1]))
        at = int(different.argmax())
        worst.append((float(different[at]), prefix, at, float(scored[at])))
    largest, prefix, at, scored_again = max(worst, key=lambda entry: entry[0])
    failed = [entry for entry in worst if not entry[0] <= precision.loss_tolerance]
    shortest, longest = prefixes[0].length, prefixes[-1].length

    # Evidence: how far the losses differ, and in how many prefixes by too much.
    evidence = (
        f"{len(prefixes)} prefixes of {shortest} to {longest} tokens, each scored in a process of its own: "
        f"largest difference from the ledger {largest:.1e} nats"
    )
    if failed:
        evidence += f", with the first {prefix.length} tokens ({prefix.kind}); {len(failed)} prefixes differ"

    return Verdict.of(
        PREFIXES,
        subject,
        not failed,
        evidence,
        # The two losses that differ most.
        saw=float(ledger[at]),
        expected=scored_again,
        bound=precision.loss_tolerance,
        positions=(at + 1,),
    )


def judge_tails(
    subject: str,
    prefixes: Sequence[ShownPrefix],
    losses: Sequence[np.ndarray],
    vocab_size: int,
    bits: float,
    rounding: float,
) -> Verdict:
    """B7: on the uniform ids that follow prefixes no scorer wins more than `bits` bits.

    These are canaries anywhere in the stream, where the other probes do not come.
    """
    results = []
    for prefix, scored in zip(prefixes, losses, strict=True):
        tail = scored[prefix.length - 1 :]
        if len(tail):
            logp = np.full(len(tail), -np.log(vocab_size))
            won = canary.bits_won(logp, tail, rounding)
            results.append(canary.CanaryResult(f"after {prefix.length}", prefix.length, won))
    if not results:
        return Verdict.cannot_tell(UNIFORM_TAILS, subject, "no prefix was long enough", bound=bits)
    return canary.judge(UNIFORM_TAILS, subject, results, bits)
