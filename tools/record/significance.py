"""Significance of a claim: the challenge asks that a record be better by 0.005 nats, with p < 0.01.

The README of the challenge does not say if its nats are per token or per byte, and both readings
are in use, so both are tested and stated (0.005 nats per token of SP8192 are 0.00194 bpb, per byte
0.00721). Two sources of chance are tested: the seeds (Welch's one-sided t test over runs) and, if
the ledgers of both records are available, the documents (one-sided, paired). A claim holds if every
test that was possible shows it.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from stages.common.challenge import MIN_RECORD_GAIN_NATS, RECORD_P_VALUE
from stages.common.student_t import SeedStatistics, upper_tail, welch

MAX_SEEDS = 1000  # for seeds_needed; nobody would run more
UNITS = ("token", "byte")


class PairedGain(NamedTuple):
    """Gain on the same documents; losses were averaged over seeds first."""

    gain_bpb: float
    error_bpb: float  # standard error over documents
    documents: int


class ClaimTest(NamedTuple):
    """One test of a claim, with its result."""

    unit: str  # "token" or "byte"
    chance: str  # "seeds" or "documents"
    margin_bpb: float
    gain_bpb: float
    p: float
    shown: bool
    # Of ours, at the observed mean and deviation. None: not up to MAX_SEEDS, or a test over
    # documents.
    seeds_needed: int | None


def margins(bytes_per_token: float) -> dict[str, float]:
    """Return MIN_RECORD_GAIN_NATS in bits per byte, by unit.

    >>> {unit: round(bpb, 5) for unit, bpb in margins(3.72663).items()}
    {'token': 0.00194, 'byte': 0.00721}
    """
    bits = MIN_RECORD_GAIN_NATS / math.log(2)
    return {"token": bits / bytes_per_token, "byte": bits}


def seeds_needed(ours: SeedStatistics, theirs: SeedStatistics, margin_bpb: float) -> int | None:
    """Return how many seeds of ours would show the margin if mean and deviation stayed as observed."""
    if theirs.mean - ours.mean <= margin_bpb:
        return None
    for seeds in range(2, MAX_SEEDS + 1):
        if welch(ours._replace(seeds=seeds), theirs, margin_bpb) < RECORD_P_VALUE:
            return seeds
    return None


def over_seeds(ours: SeedStatistics, theirs: SeedStatistics, bytes_per_token: float) -> list[ClaimTest]:
    """Test the claim against other seeds: one test per unit."""
    gain = theirs.mean - ours.mean
    tests = []
    for unit, margin in margins(bytes_per_token).items():
        p = welch(ours, theirs, margin)
        needed = seeds_needed(ours, theirs, margin)
        tests.append(ClaimTest(unit, "seeds", margin, gain, p, p < RECORD_P_VALUE, needed))
    return tests


def over_documents(gain: PairedGain, bytes_per_token: float) -> list[ClaimTest]:
    """Test the claim against other documents: one test per unit."""
    tests = []
    for unit, margin in margins(bytes_per_token).items():
        excess = gain.gain_bpb - margin
        p = float(excess <= 0)  # if there is no scatter at all
        if gain.error_bpb:
            p = upper_tail(excess / gain.error_bpb, gain.documents - 1)
        tests.append(ClaimTest(unit, "documents", margin, gain.gain_bpb, p, p < RECORD_P_VALUE, None))
    return tests


def paired_gain(
    ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], counted_bytes: np.ndarray, documents: np.ndarray
) -> PairedGain:
    """Return the gain of our ledgers over theirs, paired by document, with its standard error.

    Every ledger, and `counted_bytes` and `documents` (number of each target's document), are
    (N-1,). The gain is a ratio of sums over documents (bits over bytes), so its error is that of
    the residuals bits - gain * bytes.
    """
    count = int(documents.max()) + 1
    if count < 2:
        raise ValueError("one document shows no spread: a claim by ledgers needs two")
    difference = np.mean(theirs, axis=0, dtype=np.float64) - np.mean(ours, axis=0, dtype=np.float64)
    bits = np.bincount(documents, difference / math.log(2), minlength=count)
    size = np.bincount(documents, counted_bytes, minlength=count)
    gain = bits.sum() / size.sum()
    residuals = bits - gain * size
    error = math.sqrt(count / (count - 1) * float(residuals @ residuals)) / size.sum()
    return PairedGain(float(gain), float(error), count)


def verdict(tests: Sequence[ClaimTest]) -> str:
    """Say in words what the tests show, in one sentence per unit."""
    sentences = []
    for unit in UNITS:
        sentences.append(_sentence(unit, [test for test in tests if test.unit == unit]))
    return " ".join(sentences)


def as_json(tests: Sequence[ClaimTest]) -> dict[str, Any]:
    """Return the figures and the verdict."""
    return {
        "nats": MIN_RECORD_GAIN_NATS,
        "level": RECORD_P_VALUE,
        "tests": [test._asdict() for test in tests],
        "verdict": verdict(tests),
    }


def _sentence(unit: str, tests: Sequence[ClaimTest]) -> str:
    first = tests[0]
    p_values = ", ".join(f"p = {test.p:.2g} over {test.chance}" for test in tests)
    shown = "shown" if all(test.shown for test in tests) else "not shown"
    statement = (
        f"Better by {MIN_RECORD_GAIN_NATS} nats per {unit}"
        f" ({first.margin_bpb:.5f} bpb; the gain is {first.gain_bpb:+.5f}): {shown}, {p_values}"
    )
    if first.gain_bpb <= first.margin_bpb:
        return f"{statement}; no number of seeds shows it, since the gain is not above that."
    needed = next((test.seeds_needed for test in tests if test.chance == "seeds"), None)
    if needed:
        return f"{statement}; at this mean and deviation it takes {needed} seeds."
    return f"{statement}; {MAX_SEEDS} seeds would not show it."
