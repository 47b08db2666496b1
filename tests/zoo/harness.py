"""Runs the audit on a scorer of the zoo; the scorer's ledger is its own run over the whole stream.

The scorers run in this process, and the whole stream is certified.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stages.audit import precision, sampling
from stages.audit.audit_scorer import (
    AuditCase,
    AuditedStream,
    ClaimedEvaluation,
    ScorerFactory,
    audit_scorer,
    certify_scorer,
    judge_certified,
)
from stages.audit.checks import coverage
from stages.audit.checks.metamorphic import NO_VARIANTS, Variants
from stages.audit.params import AuditParams
from stages.audit.verdict import Verdict, failures
from stages.common import bpb, ledger, shards
from stages.common.progress import Logger
from stages.common.scorer import Scorer
from tests import factories
from tests.zoo import lawful

PARAMS = dataclasses.replace(factories.AUDIT, substitutions=lawful.VOCAB)
KEY = hashlib.sha256(b"an artifact").digest()
BOUNDARIES = sampling.Boundaries(window=16, chunk=512)
TOKENS = lawful.random_stream()
BYTES = (TOKENS[1:] != lawful.BOS).astype(np.int64)  # (N-1,): one byte for each target except BOS
CHUNK_TARGETS = 500  # of a row of chunks.tsv
SHAVED = np.float32(0.99)  # factor by which an edited ledger is multiplied


class Adapted:
    """Adapter to the protocol: scorers may return tensors and other types, and have no `vocab_size`."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.vocab_size = lawful.VOCAB
        self.precision = getattr(inner, "precision", precision.DEFAULT)
        self.scope = getattr(inner, "scope", "stream")
        self.predicts = getattr(inner, "predicts", True)

    def predict(self) -> np.ndarray:
        return np.asarray(self.inner.predict(), dtype=np.float64)

    def observe(self, token: int) -> None:
        self.inner.observe(token)

    def fork(self) -> "Adapted":
        return Adapted(self.inner.fork())

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(self.inner.score_stream(tokens), dtype=np.float32)


def count_decoded_bytes(tokens: np.ndarray = TOKENS) -> coverage.DocumentBytes:
    """Count one byte for each token except BOS, by document."""
    per_document = np.array([len(document) - 1 for document in shards.documents(tokens, lawful.BOS)])
    return coverage.DocumentBytes(per_document, np.zeros(len(per_document), dtype=bool))


def chunk_table(nll: np.ndarray, folder: Path) -> str:
    """Write chunks.tsv as an evaluation does, and return its text."""
    ledger.write_chunks(folder / "chunks.tsv", nll, BYTES, CHUNK_TARGETS)
    return (folder / "chunks.tsv").read_text()


def audit(
    factory: ScorerFactory,
    folder: Path,
    edit: Callable[[np.ndarray], np.ndarray] = lambda nll: nll,
    params: AuditParams = PARAMS,
    key: bytes = KEY,
    variants: Variants = NO_VARIANTS,
    tokens: np.ndarray = TOKENS,
) -> list[Verdict]:
    """Audit a scorer with its own ledger, after `edit` has changed it; returns all verdicts."""
    nll = edit(factory(len(tokens) - 1).score_stream(tokens))

    # A ledger of the wrong length still needs a table and a number.
    target_bytes = (tokens[1:] != lawful.BOS).astype(np.int64)
    whole = nll if len(nll) == len(target_bytes) else np.resize(nll, len(target_bytes))
    chunks = chunk_table(whole, folder) if tokens is TOKENS else None
    declared = precision.PRECISIONS[getattr(factory, "precision", precision.DEFAULT)]
    claim = ClaimedEvaluation(nll, chunks, bpb.bits_per_byte(whole, target_bytes), declared)

    stream = AuditedStream(tokens, lawful.BOS, target_bytes, count_decoded_bytes(tokens), lawful.PIECES)
    name = getattr(factory, "__name__", "scorer")

    def adapted(n_targets: int) -> Scorer:
        return Adapted(factory(n_targets))

    case = AuditCase(name, adapted, stream, BOUNDARIES, key, params, variants)
    logger = Logger(is_main=False)
    losses = certify_scorer(case, adapted, nll, logger)
    return audit_scorer(case, claim, logger) + judge_certified(case, losses, declared, claim)


def failed_checks(verdicts: list[Verdict]) -> set[str]:
    """Name the checks that failed: number and name."""
    return {verdict.check.label for verdict in failures(verdicts)}
