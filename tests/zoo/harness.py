"""How a scorer of the zoo is tried: its ledger is its own run over the whole stream, and the audit is the pipeline's."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from stages.audit import sampling
from stages.audit.audit_scorer import Claim, Factory, Stream, audit_scorer
from stages.audit.checks import coverage
from stages.audit.checks.metamorphic import NONE, Variants
from stages.audit.params import AuditParams
from stages.audit.verdict import Verdict, convicted
from stages.common import bpb, ledger, shards
from stages.common.progress import Report
from tests.zoo import lawful

PARAMS = AuditParams(
    perturbations=21,
    segment_targets=64,
    recomputed_share=0.1,
    trained_share=1.0,
    graph_documents=5,
    handed_stretches=3,
    canary_targets=256,
    sampled_targets=256,
    canary_bits=64.0,
    distributions=16,
    substitutions=lawful.VOCAB,
    decoded_targets=0,
    shingle_rate=0,
    clean_room=False,
    loss_tolerance=1e-4,
    bfloat16_loss_tolerance=0.5,
    bfloat16_mean_tolerance=1e-3,
    mean_tolerance=1e-6,
    sum_tolerance=1e-5,
    evaluation_budget_seconds=600.0,
)
KEY = hashlib.sha256(b"an artifact").digest()
EDGES = sampling.Edges(window=16, chunk=512)
TOKENS = lawful.stream()
BYTES = (TOKENS[1:] != lawful.BOS).astype(np.int64)
CHUNK = 500
SHAVED = np.float32(0.99)  # what an edited ledger is multiplied by


def counted(tokens: np.ndarray = TOKENS) -> coverage.DocumentBytes:
    """A byte for each token but BOS, by document."""
    per_document = np.array([len(document) - 1 for document in shards.documents(tokens, lawful.BOS)])
    return coverage.DocumentBytes(per_document, np.zeros(len(per_document), dtype=bool))


def chunk_table(nll: np.ndarray, folder: Path) -> str:
    """What an evaluation would write."""
    ledger.write_chunks(folder / "chunks.tsv", nll, BYTES, CHUNK)
    return (folder / "chunks.tsv").read_text()


def audit(
    factory: Factory,
    folder: Path,
    edit: Callable[[np.ndarray], np.ndarray] = lambda nll: nll,
    params: AuditParams = PARAMS,
    key: bytes = KEY,
    variants: Variants = NONE,
    tokens: np.ndarray = TOKENS,
) -> list[Verdict]:
    """All verdicts on a scorer, with its ledger edited."""
    nll = edit(factory(len(tokens) - 1).score_stream(tokens))
    size = (tokens[1:] != lawful.BOS).astype(np.int64)
    whole = nll if len(nll) == len(size) else np.resize(nll, len(size))
    chunks = chunk_table(whole, folder) if tokens is TOKENS else None
    claim = Claim(nll, chunks, bpb.bits_per_byte(whole, size), (1e-4, 1e-6))
    stream = Stream(tokens, lawful.BOS, size, counted(tokens), lawful.PIECES)
    name = getattr(factory, "__name__", "scorer")
    return audit_scorer(name, factory, stream, claim, EDGES, key, params, Report(is_main=False), variants)


def failed(verdicts: list[Verdict]) -> set[str]:
    """The checks that convict."""
    return {f"{verdict.check} {verdict.name}" for verdict in convicted(verdicts)}
