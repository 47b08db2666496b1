"""Tokens to a file and back by `predict` and `observe`, and what a fresh process does that is given such a file: B12's decoder.

It imports no more than it needs, so that what it takes for a scorer of a few lines is not the start of a framework.
"""

import importlib
import json
import sys
from pathlib import Path

import numpy as np

from stages.audit import probe_runner
from stages.common import range_coder
from stages.common.range_coder import Decoder, Encoder
from stages.common.scorer import Scorer

TASK, GIVEN, PAYLOAD, FOUND = "task.json", "given.npy", "payload.bin", "found.npy"  # in the decoder's folder
NO_SCORER = 3  # exit code of a decoder that could not make the scorer


def encode(scorer: Scorer, tokens: np.ndarray) -> bytes:
    """The tokens as a file, which the scorer observes one by one."""
    encoder = Encoder()
    for token in tokens.tolist():
        encoder.code(_starts(scorer), token)
        scorer.observe(token)
    return encoder.finish()


def decode(scorer: Scorer, payload: bytes, count: int) -> np.ndarray:
    """So many tokens of a file, (count,) uint16."""
    decoder, found = Decoder(payload), np.empty(count, dtype=np.uint16)
    for i in range(count):
        found[i] = decoder.code(_starts(scorer))
        scorer.observe(int(found[i]))
    return found


def decode_here() -> None:
    """What the fresh process does: decode the payload in its folder."""
    task = json.loads(Path(TASK).read_text(encoding="utf-8"))
    module, _, function = task["factory"].partition(":")
    try:
        scorer = getattr(importlib.import_module(module), function)(task["n_targets"], *task["words"])
    except (ImportError, AttributeError, TypeError, ValueError, OSError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        raise SystemExit(NO_SCORER) from None
    for token in np.load(GIVEN).tolist():
        scorer.observe(token)
    np.save(FOUND, decode(scorer, Path(PAYLOAD).read_bytes(), task["count"]))


def _starts(scorer: Scorer) -> np.ndarray:
    try:
        return range_coder.cumulative(probe_runner.distribution(scorer))
    except ValueError as error:
        raise probe_runner.BrokenProtocol(f"predict: {error}") from error
