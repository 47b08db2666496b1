"""Read the outputs of all stages for a submission, and check that they belong to one run.

No metric is trusted that can be computed again: scores come from ledgers, sizes from the files on
disk. Anything inconsistent (a ledger of another stream, a metric of another run, a failed audit) is
a ValueError, since a submission mixed from two runs would look like any other.
"""

import csv
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import brotli
import numpy as np
from sentencepiece import SentencePieceProcessor

from stages.common import ledger, paired_bootstrap, shards
from stages.common.bpb import bits_per_byte, load_tokenizer
from stages.common.json_object import read_json_object
from stages.scoring.stream import open_validation_stream

STAGES = ("tokenize", "train", "calibrate", "pack", "sliding_eval", "ttt_eval", "bundle", "audit")
SCORER_METRICS = {"sliding_eval": "sliding_bpb", "ttt_eval": "ttt_bpb"}  # stage -> key of its metrics.json
REFERENCE_BYTES = 4_000_000  # of text compressed with brotli 11, which takes about 2 s per megabyte

TableRow = dict[str, str]


@dataclass(frozen=True)
class EvaluationScore:
    """One evaluation, computed from its ledger."""

    bpb: float
    nats_per_token: float
    chunks: list[TableRow]  # chunks.tsv


@dataclass(frozen=True)
class Coverage:
    """Amount of validation text that was scored."""

    targets: int
    bytes: int
    documents: int


@dataclass(frozen=True)
class Reference:
    """A general-purpose compressor on the same text, to give the score a scale; not a claim."""

    brotli_bpb: float  # brotli, quality 11, one stream over the documents in order
    bytes: int  # of text compressed: all, or the first REFERENCE_BYTES


@dataclass(frozen=True)
class Artifacts:
    """Inputs of a submission."""

    code: bytes  # train_gpt.py
    model: bytes  # model.bin
    layers: list[TableRow]  # pack/layers.tsv
    losses: list[TableRow]  # train/loss.tsv
    manifest: dict[str, Any]
    hashes: dict[str, str]  # sha256 of the files that the numbers depend on
    verdicts: list[dict[str, Any]]  # of the audit
    metrics: dict[str, dict[str, Any]]  # by stage
    timing: dict[str, dict[str, Any]]  # by stage
    logs: dict[str, str]  # by stage
    requirements: bytes
    coverage: Coverage
    reference: Reference
    scores: dict[str, EvaluationScore]  # by scorer
    ttt_gain: paired_bootstrap.Difference  # bpb of ttt_eval minus bpb of sliding_eval

    @property
    def bytes_total(self) -> int:
        """Counted bytes: the two files on disk."""
        return len(self.code) + len(self.model)


def load_artifacts(folders: Mapping[str, Path], requirements: Path, claimed: str) -> Artifacts:
    """Read the artifact folders of all stages, given by name of stage.

    `requirements` is the lock file; `claimed` is the scorer whose audit must have passed. Raises
    ValueError for a missing file or an inconsistency.
    """
    # The validation stream, from which every score is computed again.
    tokenizer_file = require_file(folders, "tokenize", "tokenizer.model")
    tokenizer = load_tokenizer(tokenizer_file)
    stream = open_validation_stream(folders["tokenize"] / "val", tokenizer_file)
    tokens = stream.tokens
    counted_bytes = stream.counted_bytes
    documents = paired_bootstrap.document_of_target(tokens, tokenizer.bos_id())

    # The counted files; their sizes must be those that the stages reported.
    metrics = {}
    for stage in STAGES:
        if stage != "tokenize":
            metrics[stage] = read_json_object(require_file(folders, stage, "metrics.json"))
    code = require_file(folders, "bundle", "train_gpt.py").read_bytes()
    model = require_file(folders, "pack", "model.bin").read_bytes()
    _require_equal("bundle", "bytes_code", metrics, len(code))
    _require_equal("pack", "bytes_model", metrics, len(model))

    # The scores, from the ledgers; they too must be the reported ones.
    ledgers = {}
    scores = {}
    for scorer, metric in SCORER_METRICS.items():
        nll = ledger.read(require_file(folders, scorer, "nll.npy"), len(counted_bytes))
        bpb = bits_per_byte(nll, counted_bytes)
        _require_equal(scorer, metric, metrics, bpb)
        chunks = read_table(require_file(folders, scorer, "chunks.tsv"))
        scores[scorer] = EvaluationScore(bpb, float(nll.mean(dtype=np.float64)), chunks)
        ledgers[scorer] = nll
    ttt_gain = paired_bootstrap.paired_difference(
        ledgers["sliding_eval"], ledgers["ttt_eval"], counted_bytes, documents
    )

    # Everything else is passed on as it is.
    manifest = require_file(folders, "tokenize", "manifest.json")
    timing = {}
    logs = {}
    for stage in STAGES:
        timing[stage] = read_json_object(require_file(folders, stage, "timing.json"))
        logs[stage] = require_file(folders, stage, "log.txt").read_text(encoding="utf-8")

    # Hashes name the files themselves, so that anyone can compare their own.
    return Artifacts(
        code=code,
        model=model,
        layers=read_table(require_file(folders, "pack", "layers.tsv")),
        losses=read_table(require_file(folders, "train", "loss.tsv")),
        manifest=read_json_object(manifest),
        hashes={
            "train_gpt.py": sha256(code),
            "model.bin": sha256(model),
            "manifest.json": sha256(manifest.read_bytes()),
            "tokenizer.model": sha256(tokenizer_file.read_bytes()),
            "requirements.txt": sha256(requirements.read_bytes()),
        },
        verdicts=_read_verdicts(require_file(folders, "audit", "report.json"), claimed),
        metrics=metrics,
        timing=timing,
        logs=logs,
        requirements=requirements.read_bytes(),
        coverage=Coverage(len(counted_bytes), int(counted_bytes.sum()), int(documents.max()) + 1),
        reference=brotli_reference(tokens, tokenizer),
        scores=scores,
        ttt_gain=ttt_gain,
    )


def require_file(folders: Mapping[str, Path], stage: str, name: str) -> Path:
    """Return the path of a file in a stage's folder; the ValueError for a missing one says how to make it."""
    path = folders[stage] / name
    if not path.exists():
        raise ValueError(
            f"{path} does not exist: run `dvc repro {stage}` first,"
            f" or name another folder with --{stage.replace('_', '-')}"
        )
    return path


def read_table(path: Path) -> list[TableRow]:
    """Return the rows of a TSV, each a mapping by the names in the header."""
    with path.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def sha256(data: bytes) -> str:
    """Return the hash that submission.json gives for a file, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def brotli_reference(tokens: np.ndarray, tokenizer: SentencePieceProcessor) -> Reference:
    """Compress the text of the documents in `tokens` (N,) with brotli 11.

    Brotli begins with its own dictionary of English words and has no other training.
    """
    text = bytearray()
    for document in shards.documents(tokens, tokenizer.bos_id()):
        text += tokenizer.decode(document[1:].tolist()).encode("utf-8")
        if len(text) >= REFERENCE_BYTES:
            break
    compressed_text = bytes(text[:REFERENCE_BYTES])
    compressed_bytes = len(brotli.compress(compressed_text, quality=11))
    return Reference(8 * compressed_bytes / max(1, len(compressed_text)), len(compressed_text))


def _require_equal(stage: str, key: str, metrics: Mapping[str, Mapping[str, Any]], found: float) -> None:
    """Raise ValueError unless the stage reported the number that its files give."""
    reported = metrics[stage].get(key)
    if reported != found:
        raise ValueError(
            f"{stage}/metrics.json says {key} {reported}, its files say {found}:"
            f" they are of two runs; run `dvc repro {stage}`"
        )


def _read_verdicts(path: Path, claimed: str) -> list[dict[str, Any]]:
    """Read the audit's verdicts; ValueError if one failed, or if none is on the claimed scorer."""
    verdicts = read_json_object(path).get("verdicts")
    if not isinstance(verdicts, list) or not verdicts:
        raise ValueError(f"{path} holds no verdicts; run `dvc repro audit`")

    for verdict in verdicts:
        if not isinstance(verdict, dict) or verdict.get("outcome") not in ("pass", "fail", "cannot tell"):
            raise ValueError(f"{path}: {verdict!r} is not a verdict; run `dvc repro audit`")
        if verdict["outcome"] == "fail":
            raise ValueError(
                f"the audit failed, so there is nothing to hand in:"
                f" {verdict['subject']}, {verdict['name']}: {verdict['evidence']}"
            )

    if not any(verdict["subject"] == claimed for verdict in verdicts):
        raise ValueError(
            f"{path} has no verdict on {claimed}, the scorer of the claim (parameter scorer);"
            " run `dvc repro audit`"
        )
    return verdicts
