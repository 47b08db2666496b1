"""Encode tokens with `predict` and `observe`, and decode them in a fresh process (B12).

`decode_task` is the program of that process. This module imports as little as possible, so that
decoding with a scorer of a few lines does not start a framework.
"""

import importlib
import json
import sys
from pathlib import Path

import numpy as np

from stages.audit import probe_runner
from stages.common import range_coder
from stages.common.range_coder import RangeDecoder, RangeEncoder
from stages.common.scorer import Scorer

# Files in the working folder of the decoding process.
TASK = "task.json"  # factory, its arguments, and the numbers of targets
GIVEN = "given.npy"  # (n,) uint16: tokens before the encoded ones
PAYLOAD = "payload.bin"
FOUND = "found.npy"  # written by the process: (count,) uint16
NO_SCORER = 3  # exit code of a process that could not build the scorer


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


def decode_task() -> None:
    """Decode the payload in the working folder; exits with NO_SCORER if the scorer cannot be built."""
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


def _cumulative(scorer: Scorer) -> np.ndarray:
    """Quantise the scorer's next prediction to the cumulative counts (V + 1,) of the range coder."""
    try:
        return range_coder.cumulative_frequencies(probe_runner.checked_predict(scorer))
    except ValueError as error:
        raise probe_runner.ProtocolError(f"predict: {error}") from error
