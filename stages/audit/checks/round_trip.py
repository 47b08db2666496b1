"""B12: a stretch of the stream is arithmetic-coded with `predict` and `observe` alone, and decoded by a process that never saw it.

A decoder exists only for a lawful score: it has the artifact, what came before and the file, so whatever it needs is a function of these
(C1), its codes must be those of one distribution (C2), it learns from a token once it is known (C3) and gets each once, in order (C4). The
file's bits are held against what was claimed for the same targets.

What came before the stretch is given to the decoder, so that a stretch may lie across an edge far into the stream; with `start` = 1 it is
the stream's prefix, and nothing is given but its first token.
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
from stages.audit.audit_scorer import Factory
from stages.audit.checks.decoder import FOUND, GIVEN, NO_SCORER, PAYLOAD, TASK, encode
from stages.audit.scorer_recipe import Recipe
from stages.audit.verdict import Outcome, Verdict
from stages.common import range_coder


class Elsewhere(NamedTuple):
    """What another process decoded; None, and why, when it did not, and whether it came as far as to have a scorer."""

    found: np.ndarray | None
    trouble: str = ""
    began: bool = True


def check_round_trip(
    subject: str,
    factory: Factory,
    recipe: Recipe,
    tokens: np.ndarray,
    start: int,
    count: int,
    ledger: np.ndarray | None,
    tolerance: float,
    patience_seconds: float = 600.0,
) -> Verdict:
    """Code and decode tokens[start : start + count] of the stream, (N,) uint16, with 1 <= start.

    The claim is `ledger`, (N-1,) float32, or without one what `score_stream` says here; `tolerance`, in nats a target, is how closely
    `predict` repeats it.
    """
    count = min(count, len(tokens) - start)
    stretch, n_targets = tokens[start : start + count], len(tokens) - 1
    scorer = factory(n_targets)
    for token in tokens[:start].tolist():
        scorer.observe(token)
    claimed = (
        probe_runner.score(scorer.fork(), stretch)
        if ledger is None
        else ledger[start - 1 : start - 1 + count]
    )
    payload = encode(scorer, stretch)
    bits, claim = 8.0 * len(payload), float(claimed.sum(dtype=np.float64)) / math.log(2)
    bound = range_coder.overhead_bits(count, scorer.vocab_size) + count * tolerance / math.log(2)
    size = f"{count} targets in {len(payload)} bytes"
    if bits <= claim + bound:  # not so with a claim that is no number
        elsewhere = _decode_elsewhere(recipe, tokens[:start], payload, count, n_targets, patience_seconds)
        result, evidence = _judge(f"{size}, {bits - claim:+.1f} bits against the claim", stretch, elsewhere)
    else:
        result, evidence = (
            "fail",
            f"{size}, {bits - claim:.1f} bits more than claimed: the claim is no code length",
        )
    return Verdict(
        check="B12",
        name="decoder round trip",
        subject=subject,
        conditions=("C1", "C2", "C3", "C4"),
        outcome=result,
        evidence=evidence,
        saw=bits,
        expected=claim,
        bound=bound,
        positions=(start, start + count - 1),
        sees=f"scores that no decoder could be built on: a claim below what the file takes, by more than {bound:.1f} bits over the stretch",
        blind="targets outside the stretch; a decoder that reads its answers from the disk (B14) or carries them in the artifact (B15)",
    )


def _judge(size: str, stretch: np.ndarray, elsewhere: Elsewhere) -> tuple[Outcome, str]:
    if elsewhere.found is None:
        return (
            "fail" if elsewhere.began else "cannot tell",
            f"{size}; a fresh process did not decode them: {elsewhere.trouble}",
        )
    wrong = np.flatnonzero(elsewhere.found != stretch)
    if len(wrong):
        return (
            "fail",
            f"{size}; a fresh process lost the thread at number {wrong[0]}: its distribution was not the coder's",
        )
    return "pass", f"{size}; a fresh process decoded them"


def _decode_elsewhere(
    recipe: Recipe, given: np.ndarray, payload: bytes, count: int, n_targets: int, patience_seconds: float
) -> Elsewhere:
    """What a process in a folder with nothing but its task makes of the payload."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = {"factory": recipe.factory, "words": recipe.words, "n_targets": n_targets, "count": count}
        (folder / TASK).write_text(json.dumps(task), encoding="utf-8")
        np.save(folder / GIVEN, given)
        (folder / PAYLOAD).write_bytes(payload)
        paths = [str(Path(path).absolute()) for path in sys.path]
        program = f"import sys; sys.path[:] = {paths!r}; from stages.audit.checks import decoder; decoder.decode_here()"
        command = [sys.executable, "-c", program]
        try:
            ended = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, check=False, timeout=patience_seconds
            )
        except subprocess.TimeoutExpired:
            return Elsewhere(None, f"it was not done after {patience_seconds:g} seconds", began=False)
        if ended.returncode or not (folder / FOUND).exists():
            said = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
            return Elsewhere(None, said, began=ended.returncode != NO_SCORER)
        return Elsewhere(np.load(folder / FOUND))
