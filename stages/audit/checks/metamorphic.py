"""C2, by changes that must not matter (B10).

Three variants of a scorer, for those who can build them. *Permuted ids*: with the ids permuted, in the
scorer and in the stream, the losses stay the same. *No memory*: if its memory has weight zero, the
number of hash buckets does not matter. *One bucket*: if every context falls into one bucket, a memory
knows nothing, and any gain is probability that was counted twice (#770, #779 and 33 more: one bucket
gave 0 bits per byte); on ids drawn at random that gain is bounded as in canary.py.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from stages.audit import probe_runner
from stages.audit.checks import canary
from stages.audit.precision import Precision, difference
from stages.audit.probe_runner import Cost
from stages.audit.sampling import KeyedRng
from stages.audit.verdict import Check, Verdict
from stages.common.scorer import Scorer

PERMUTED_IDS = Check(
    "B10",
    "other names for the ids",
    conditions=("C2",),
    sees="ids whose number matters, gains from hash collisions, a memory that acts when it is off",
    blind="cheats that treat all ids and buckets alike (B3)",
)
WITHOUT_MEMORY = dataclasses.replace(PERMUTED_IDS, name="a memory of no weight")
ONE_BUCKET = dataclasses.replace(canary.UNIFORM_CANARY, number="B10", name="one bucket")
BUCKETS = (1, 1 << 10, 1 << 16)  # numbers of hash buckets that are compared


class Variants(NamedTuple):
    """Factories of other versions of one scorer, at the empty prefix; None for one that cannot be built."""

    permuted_ids: Callable[[np.ndarray], Scorer] | None = (
        None  # called with (V,): id a becomes permutation[a]
    )
    with_buckets: Callable[[int], Scorer] | None = None  # called with the number of hash buckets
    without_memory: Callable[[int], Scorer] | None = None  # the same, and the memory has weight 0


NO_VARIANTS = Variants()


def check(
    subject: str,
    variants: Variants,
    key: bytes,
    tokens: np.ndarray,
    base: np.ndarray,
    vocab_size: int,
    precision: Precision,
    canary_bits: float,
) -> list[Verdict]:
    """B10: one verdict for each variant that can be built.

    tokens: (n + 1,) uint16, the beginning of the stream; base: (n,) float32, the plain scorer's losses
    of tokens[1:]; canary_bits: as in canary.judge.
    """
    verdicts = []
    if variants.permuted_ids is not None:
        permutation = KeyedRng(key, "names").permutation(vocab_size)
        losses = _score_from_start(variants.permuted_ids(permutation), permutation[tokens])
        verdicts.append(_judge_equal(PERMUTED_IDS, subject, base, losses, precision.loss_tolerance))

    if variants.without_memory is not None:
        first, *others = [_score_from_start(variants.without_memory(buckets), tokens) for buckets in BUCKETS]
        farthest = max(others, key=lambda other: float(np.abs(difference(other, first)).max()))
        verdicts.append(_judge_equal(WITHOUT_MEMORY, subject, first, farthest, precision.rounding))

    if variants.with_buckets is not None:
        known = canary.draw_canary("uniform", key, len(tokens), tokens, vocab_size)
        scorer = variants.with_buckets(1)
        scorer.observe(int(tokens[0]))
        won = canary.bits_won(
            known.logp, probe_runner.checked_score(scorer, known.tokens), precision.sum_tolerance
        )
        result = canary.CanaryResult("uniform, one bucket", 1, won)
        verdicts.append(canary.judge(ONE_BUCKET, subject, [result], canary_bits))
    return verdicts


def max_cost(tokens: int) -> Cost:
    """Cost of all variants on the first `tokens` of the stream."""
    permuted_ids = Cost(calls=1, targets=tokens)
    without_memory = permuted_ids * len(BUCKETS)
    one_bucket = Cost(calls=1, targets=1 + tokens)
    return permuted_ids + without_memory + one_bucket


def _score_from_start(scorer: Scorer, tokens: np.ndarray) -> np.ndarray:
    scorer.observe(int(tokens[0]))
    return probe_runner.checked_score(scorer, tokens[1:].astype(np.uint16))


def _judge_equal(
    check: Check, subject: str, base: np.ndarray, varied: np.ndarray, tolerance: float
) -> Verdict:
    """Compare the losses (n,) of a variant with those of the plain scorer."""
    different = np.abs(difference(base, varied))
    worst = int(different.argmax())
    return Verdict.of(
        check,
        subject,
        bool(different[worst] <= tolerance),
        f"{len(base)} targets from the stream's start, as they are and with {check.name}: "
        f"largest difference {different[worst]:.1e} nats",
        saw=float(varied[worst]),
        expected=float(base[worst]),
        bound=tolerance,
        positions=(worst + 1,),
    )
