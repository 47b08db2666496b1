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


def check_round_trip(
    subject: str,
    encoding: Scorer,
    decoding: Scorer,
    tokens: np.ndarray,
    start: int,
    count: int,
    ledger: np.ndarray | None,
    tolerance: float,
) -> Verdict:
    """B12: encode tokens[start : start + count] of the stream (N,) uint16, and decode them elsewhere.

    encoding, decoding: scorers in two processes that have observed nothing; start: 1 or more. The
    claimed losses are those of `ledger`, (N-1,) float32, or without one those of score_stream in the
    encoding process; `predict` may differ from them by `tolerance` nats per target.
    """
    # Both are at the beginning of the span.
    count = min(count, len(tokens) - start)
    span = tokens[start : start + count]
    for scorer in (encoding, decoding):
        for token in tokens[:start].tolist():
            scorer.observe(token)

    # Bits that were claimed, and bits of the file.
    if ledger is None:
        claimed_nats = probe_runner.checked_score(encoding.fork(), span)
    else:
        claimed_nats = ledger[start - 1 : start - 1 + count]
    claimed_bits = float(claimed_nats.sum(dtype=np.float64)) / math.log(2)
    payload = encode(encoding, span)
    bits = 8.0 * len(payload)
    bound = range_coder.max_overhead_bits(count, encoding.vocab_size) + count * tolerance / math.log(2)

    # The file must not be larger than the claim; False if the claim is NaN.
    check = ROUND_TRIP.fill(bits=bound)
    numbers: Numbers = {"saw": bits, "expected": claimed_bits, "bound": bound}
    numbers["positions"] = (start, start + count - 1)
    size = f"{count} targets in {len(payload)} bytes"
    if not bits <= claimed_bits + bound:
        excess = f"{bits - claimed_bits:.1f} bits more than claimed"
        evidence = f"{size}, {excess}: the claim is not a code length"
        return Verdict.failed(check, subject, evidence, **numbers)

    # The other process must decode it.
    size = f"{size}, {bits - claimed_bits:+.1f} bits against the claim"
    wrong = np.flatnonzero(decode(decoding, payload, count) != span)
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
