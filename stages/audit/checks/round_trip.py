"""B12: a span of the stream is encoded with `predict` and `observe`, and decoded in a fresh process.

A decoder exists only for a lawful score: it has the artifact, the tokens before and the file, so
everything it needs is a function of these (C1); its code lengths must be those of one distribution
(C2); it learns from a token once that is known (C3); and it gets each once, in order (C4). The size of
the file is compared with the losses that were claimed for the same targets.

The decoder is given the tokens before the span, so that a span may cross a boundary far into the
stream. With `start` = 1 the span is the beginning of the stream, and nothing but the first token is
given.
"""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stages.audit import probe_runner
from stages.audit.audit_scorer import ScorerFactory
from stages.audit.checks.decoder import FOUND, GIVEN, NO_SCORER, PAYLOAD, TASK, encode
from stages.audit.scorer_recipe import Recipe
from stages.audit.verdict import Check, Numbers, Verdict
from stages.common import range_coder

ROUND_TRIP = Check(
    "B12",
    "decoder round trip",
    conditions=("C1", "C2", "C3", "C4"),
    sees="scores for which no decoder can exist: a claim below the size of the file, "
    "by more than {bits:.1f} bits over the span",
    blind="targets outside the span; a decoder that reads its answers from the disk (B14) "
    "or carries them in the artifact (B15)",
)


class FreshDecode(NamedTuple):
    """Result of decoding in another process."""

    found: np.ndarray | None  # (count,) uint16; None if it failed
    error: str = ""
    started: bool = True  # it got as far as building the scorer


def check_round_trip(
    subject: str,
    factory: ScorerFactory,
    recipe: Recipe,
    tokens: np.ndarray,
    start: int,
    count: int,
    ledger: np.ndarray | None,
    tolerance: float,
    timeout_seconds: float = 600.0,
) -> Verdict:
    """B12: encode tokens[start : start + count] of the stream (N,) uint16, and decode them elsewhere.

    start: 1 or more.

    The claimed losses are those of `ledger`, (N-1,) float32, or without one those of score_stream in
    this process; `predict` may differ from them by `tolerance` nats per target.
    """
    count = min(count, len(tokens) - start)
    span = tokens[start : start + count]
    n_targets = len(tokens) - 1
    scorer = factory(n_targets)
    for token in tokens[:start].tolist():
        scorer.observe(token)

    # Bits that were claimed, and bits of the file.
    if ledger is None:
        claimed_nats = probe_runner.checked_score(scorer.fork(), span)
    else:
        claimed_nats = ledger[start - 1 : start - 1 + count]
    claimed_bits = float(claimed_nats.sum(dtype=np.float64)) / math.log(2)
    payload = encode(scorer, span)
    bits = 8.0 * len(payload)
    bound = range_coder.max_overhead_bits(count, scorer.vocab_size) + count * tolerance / math.log(2)

    # The file must not be larger than the claim; False if the claim is NaN.
    check = ROUND_TRIP.fill(bits=bound)
    numbers: Numbers = {"saw": bits, "expected": claimed_bits, "bound": bound}
    numbers["positions"] = (start, start + count - 1)
    size = f"{count} targets in {len(payload)} bytes"
    if not bits <= claimed_bits + bound:
        excess = f"{bits - claimed_bits:.1f} bits more than claimed"
        evidence = f"{size}, {excess}: the claim is not a code length"
        return Verdict.failed(check, subject, evidence, **numbers)

    # A fresh process must decode it. One that did not get as far as that says nothing about the scorer.
    size = f"{size}, {bits - claimed_bits:+.1f} bits against the claim"
    decoded = _decode_elsewhere(recipe, tokens[:start], payload, count, n_targets, timeout_seconds)
    if decoded.found is None:
        evidence = f"{size}; a fresh process did not decode them: {decoded.error}"
        if not decoded.started:
            return Verdict.cannot_tell(check, subject, evidence, **numbers)
        return Verdict.failed(check, subject, evidence, **numbers)

    wrong = np.flatnonzero(decoded.found != span)
    if len(wrong):
        evidence = (
            f"{size}; a fresh process decoded token number {wrong[0]} wrongly: "
            "its distribution was not the encoder's"
        )
        return Verdict.failed(check, subject, evidence, **numbers)
    return Verdict.passed(check, subject, f"{size}; a fresh process decoded them", **numbers)


def _decode_elsewhere(
    recipe: Recipe, given: np.ndarray, payload: bytes, count: int, n_targets: int, timeout_seconds: float
) -> FreshDecode:
    """Decode the payload in a fresh process, in a folder that holds nothing but its task."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = {"factory": recipe.factory, "words": recipe.words, "n_targets": n_targets, "count": count}
        (folder / TASK).write_text(json.dumps(task), encoding="utf-8")
        np.save(folder / GIVEN, given)
        (folder / PAYLOAD).write_bytes(payload)

        # The process imports the same modules as this one.
        paths = [str(Path(path).absolute()) for path in sys.path]
        program = (
            f"import sys; sys.path[:] = {paths!r}; "
            "from stages.audit.checks import decoder; decoder.decode_task()"
        )

        # A process that was too slow is "cannot tell" and not a failure: it counts as not started.
        try:
            ended = subprocess.run(
                [sys.executable, "-c", program],
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
                timeout=timeout_seconds,
            )
        except subprocess.TimeoutExpired:
            return FreshDecode(None, f"it was not done after {timeout_seconds:g} seconds", started=False)

        if ended.returncode or not (folder / FOUND).exists():
            lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
            return FreshDecode(None, lines[-1], started=ended.returncode != NO_SCORER)
        return FreshDecode(np.load(folder / FOUND))
