"""B12: a span of the stream is encoded with `predict` and `observe`, and decoded by another process.

A decoder exists only for a lawful score: it has the artifact, the tokens before and the file, so
everything it needs is a function of these (C1); its code lengths must be those of one distribution
(C2); it learns from a token once that is known (C3); and it gets each once, in order (C4). The size of
the file is compared with the losses that were claimed for the same targets.

The range coder runs in the audit: the process that decodes is asked for its distributions alone, and is
handed each token after the audit has decoded it. It is given the tokens before the span, so that a span
may cross a boundary far into the stream. With `start` = 1 the span is the beginning of the stream, and
nothing but the first token is given.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from stages.audit import probe_runner
from stages.audit.checks.normalisation import log_sum_exp
from stages.audit.verdict import Check, Numbers, Verdict
from stages.common import range_coder
from stages.common.range_coder import RangeDecoder, RangeEncoder
from stages.common.scorer import Scorer

ROUND_TRIP = Check(
    "B12",
    "decoder round trip",
    conditions=("C1", "C2", "C3", "C4"),
    sees="scores for which no decoder can exist: a claim below the size of the file, "
    "by more than {bits:.1f} bits over the span; predictions that another process does not repeat",
    blind="targets outside the span; a decoder that reads its answers from the disk (B14) "
    "or carries them in the artifact (B15)",
)


class EncodedSpan(NamedTuple):
    """A span of the stream in the range coder's file."""

    span: np.ndarray  # (count,) uint16
    start: int  # its position in the stream
    claimed_nats: np.ndarray  # (count,) float32
    payload: bytes
    vocab_size: int


def encode_span(
    scorer: Scorer, tokens: np.ndarray, start: int, count: int, ledger: np.ndarray | None
) -> EncodedSpan:
    """Encode tokens[start : start + count] of the stream (N,) uint16, start 1 or more, with a fresh scorer.

    The claimed losses are those of `ledger`, (N-1,) float32, or without one those of score_stream.
    """
    count = min(count, len(tokens) - start)
    span = tokens[start : start + count]
    for token in tokens[:start].tolist():
        scorer.observe(token)

    if ledger is None:
        claimed_nats = probe_runner.checked_score(scorer.fork(), span)
    else:
        claimed_nats = ledger[start - 1 : start - 1 + count]
    return EncodedSpan(span, start, claimed_nats, encode(scorer, span), scorer.vocab_size)


def decode_span(scorer: Scorer, given: np.ndarray, payload: bytes, count: int) -> np.ndarray:
    """Decode `count` tokens, uint16, with a fresh scorer that is given the tokens (start,) before them."""
    for token in given.tolist():
        scorer.observe(token)
    return decode(scorer, payload, count)


def judge(
    subject: str, encoded: EncodedSpan, decode_elsewhere: Callable[[], np.ndarray], tolerance: float
) -> Verdict:
    """B12: the file is as large as was claimed at most, and another process decodes it.

    decode_elsewhere: called if the file has the right size; returns the tokens. tolerance: nats per
    target by which `predict` may differ from the claimed losses.
    """
    # Bits that were claimed, and bits of the file.
    count = len(encoded.span)
    claimed_bits = float(encoded.claimed_nats.sum(dtype=np.float64)) / math.log(2)
    bits = 8.0 * len(encoded.payload)
    bound = range_coder.max_overhead_bits(count, encoded.vocab_size) + count * tolerance / math.log(2)

    # The file must not be larger than the claim; False if the claim is NaN.
    check = ROUND_TRIP.fill(bits=bound)
    numbers: Numbers = {"saw": bits, "expected": claimed_bits, "bound": bound}
    numbers["positions"] = (encoded.start, encoded.start + count - 1)
    size = f"{count} targets in {len(encoded.payload)} bytes"
    if not bits <= claimed_bits + bound:
        excess = f"{bits - claimed_bits:.1f} bits more than claimed"
        evidence = f"{size}, {excess}: the claim is not a code length"
        return Verdict.failed(check, subject, evidence, **numbers)

    # The other process must decode it.
    size = f"{size}, {bits - claimed_bits:+.1f} bits against the claim"
    wrong = np.flatnonzero(decode_elsewhere() != encoded.span)
    if len(wrong):
        evidence = (
            f"{size}; another process decoded token number {wrong[0]} wrongly: "
            "its distribution was not the encoder's"
        )
        return Verdict.failed(check, subject, evidence, **numbers)
    return Verdict.passed(check, subject, f"{size}; another process decoded them", **numbers)


def encode(scorer: Scorer, tokens: np.ndarray) -> bytes:
    """Encode tokens (n,) uint16, which the scorer observes one by one."""
    encoder = RangeEncoder()
    for token in tokens.tolist():
        encoder.code(_cumulative(scorer), token)
        scorer.observe(token)
    return encoder.finish()


def decode(scorer: Scorer, payload: bytes, count: int) -> np.ndarray:
    """Decode `count` tokens, uint16, which the scorer observes one by one."""
    decoder = RangeDecoder(payload)
    found = np.empty(count, dtype=np.uint16)
    for i in range(count):
        found[i] = decoder.code(_cumulative(scorer))
        scorer.observe(int(found[i]))
    return found


def _cumulative(scorer: Scorer) -> np.ndarray:
    """Normalise the scorer's next prediction, and quantise it to cumulative frequencies (V + 1,)."""
    predicted = probe_runner.checked_predict(scorer)
    try:
        return range_coder.cumulative_frequencies(predicted - log_sum_exp(predicted))
    except ValueError as error:
        raise probe_runner.ProtocolError(f"predict: {error}") from error
