"""Everything the pipeline made, read back and held against itself.

Nothing is taken from a metric that can be computed again: scores come from ledgers, sizes from the files on disk. What does not fit
together (a ledger of another stream, a metric of another run, an audit that failed) is a ValueError, since a submission of mixed runs would
look like any other.
"""

import csv
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import brotli
import numpy as np
from sentencepiece import SentencePieceProcessor

from stages.common import ledger, paired_bootstrap, shards
from stages.common.bpb import bits_per_byte, byte_table, load_tokenizer, target_bytes

STAGES = ("tokenize", "train", "calibrate", "pack", "sliding_eval", "ttt_eval", "bundle", "audit")
REFERENCE_BYTES = 4_000_000  # brotli 11 takes about 2 s for a megabyte
SCORERS = {"sliding_eval": "sliding_bpb", "ttt_eval": "ttt_bpb"}

Row = dict[str, str]


@dataclass(frozen=True)
class Score:
    """One evaluation, computed from its ledger."""

    bpb: float
    nats_per_token: float
    chunks: list[Row]


@dataclass(frozen=True)
class Coverage:
    """What was scored."""

    targets: int
    bytes: int
    documents: int


@dataclass(frozen=True)
class Reference:
    """What a general compressor makes of the same text: a scale for the score, and no claim."""

    brotli_bpb: float  # brotli, quality 11, one stream over the documents in order
    bytes: int  # of text that it was given: all, or the first REFERENCE_BYTES


@dataclass(frozen=True)
class Artifacts:
    """The inputs of a submission."""

    code: bytes  # train_gpt.py
    model: bytes  # model.bin
    layers: list[Row]
    losses: list[Row]
    manifest: dict[str, Any]
    hashes: dict[str, str]  # sha256 of the files that the numbers depend on
    verdicts: list[dict[str, Any]]
    metrics: dict[str, dict[str, Any]]
    timing: dict[str, dict[str, Any]]
    logs: dict[str, str]
    requirements: bytes
    coverage: Coverage
    reference: Reference
    scores: dict[str, Score]
    gain: paired_bootstrap.Difference  # bpb of ttt_eval minus that of sliding_eval

    @property
    def bytes_total(self) -> int:
        """The counted bytes: the two files on disk."""
        return len(self.code) + len(self.model)


def load(folders: Mapping[str, Path], requirements: Path, claimed: str) -> Artifacts:
    """Read the artifact folders of all stages; `claimed` is the scorer whose audit must have passed."""
    tokenizer = load_tokenizer(file(folders, "tokenize", "tokenizer.model"))
    tokens, counted_bytes = _stream(folders["tokenize"], tokenizer)
    documents = paired_bootstrap.document_of_target(tokens, tokenizer.bos_id())
    metrics = {stage: _json(file(folders, stage, "metrics.json")) for stage in STAGES if stage != "tokenize"}
    ledgers = {
        scorer: ledger.read(file(folders, scorer, "nll.npy"), len(counted_bytes)) for scorer in SCORERS
    }
    code, model = (
        file(folders, *name).read_bytes() for name in (("bundle", "train_gpt.py"), ("pack", "model.bin"))
    )
    _same("bundle", "bytes_code", metrics, len(code))
    _same("pack", "bytes_model", metrics, len(model))
    scores: dict[str, Score] = {}
    for scorer, metric in SCORERS.items():
        nll = ledgers[scorer]
        bpb = bits_per_byte(nll, counted_bytes)
        _same(scorer, metric, metrics, bpb)
        scores[scorer] = Score(
            bpb, float(nll.mean(dtype=np.float64)), table(file(folders, scorer, "chunks.tsv"))
        )
    manifest = file(folders, "tokenize", "manifest.json")
    return Artifacts(
        code=code,
        model=model,
        layers=table(file(folders, "pack", "layers.tsv")),
        losses=table(file(folders, "train", "loss.tsv")),
        manifest=_json(manifest),
        hashes={
            "train_gpt.py": sha256(code),
            "model.bin": sha256(model),
            "manifest.json": sha256(manifest.read_bytes()),
            "tokenizer.model": sha256(file(folders, "tokenize", "tokenizer.model").read_bytes()),
            "requirements.txt": sha256(requirements.read_bytes()),
        },
        verdicts=_verdicts(file(folders, "audit", "report.json"), claimed),
        metrics=metrics,
        timing={stage: _json(file(folders, stage, "timing.json")) for stage in STAGES},
        logs={stage: file(folders, stage, "log.txt").read_text(encoding="utf-8") for stage in STAGES},
        requirements=requirements.read_bytes(),
        coverage=Coverage(len(counted_bytes), int(counted_bytes.sum()), int(documents.max()) + 1),
        reference=brotli_reference(tokens, tokenizer),
        scores=scores,
        gain=paired_bootstrap.paired_difference(
            ledgers["sliding_eval"], ledgers["ttt_eval"], counted_bytes, documents
        ),
    )


def file(folders: Mapping[str, Path], stage: str, name: str) -> Path:
    """A file of a stage's folder; a ValueError that says how to make it when it is not there."""
    path = folders[stage] / name
    if not path.exists():
        raise ValueError(
            f"{path} does not exist: run `dvc repro {stage}` first, or name another folder with --{stage.replace('_', '-')}"
        )
    return path


def table(path: Path) -> list[Row]:
    """The rows of a TSV by the names in its header."""
    with path.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def sha256(data: bytes) -> str:
    """The hash by which a file is named in submission.json."""
    return hashlib.sha256(data).hexdigest()


def brotli_reference(tokens: np.ndarray, tokenizer: SentencePieceProcessor) -> Reference:
    """Bits per byte of brotli 11 over the documents' text, which starts with its own dictionary of English and nothing else."""
    text = bytearray()
    for document in shards.documents(tokens, tokenizer.bos_id()):
        text += tokenizer.decode(document[1:].tolist()).encode("utf-8")
        if len(text) >= REFERENCE_BYTES:
            break
    given = bytes(text[:REFERENCE_BYTES])
    return Reference(8 * len(brotli.compress(given, quality=11)) / max(1, len(given)), len(given))


def _stream(folder: Path, tokenizer: SentencePieceProcessor) -> tuple[np.ndarray, np.ndarray]:
    """The validation stream and the bytes of each target."""
    byte_counts = byte_table(tokenizer)
    for path in shards.find(folder / "val"):
        shards.check_ids(path, byte_counts.vocab_size)
    tokens = shards.stream(folder / "val")
    shards.document_starts(tokens, byte_counts.bos)
    return tokens, target_bytes(tokens, byte_counts)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected a mapping")
    return value


def _same(stage: str, key: str, metrics: Mapping[str, Mapping[str, Any]], found: float) -> None:
    reported = metrics[stage].get(key)
    if reported != found:
        raise ValueError(
            f"{stage}/metrics.json says {key} {reported}, its files say {found}: they are of two runs; run `dvc repro {stage}`"
        )


def _verdicts(path: Path, claimed: str) -> list[dict[str, Any]]:
    """The audit's verdicts: none failed, and the claimed scorer was audited."""
    verdicts = _json(path).get("verdicts")
    if not isinstance(verdicts, list) or not verdicts:
        raise ValueError(f"{path} holds no verdicts; run `dvc repro audit`")
    for verdict in verdicts:
        if not isinstance(verdict, dict) or verdict.get("outcome") not in ("pass", "fail", "cannot tell"):
            raise ValueError(f"{path}: {verdict!r} is not a verdict; run `dvc repro audit`")
        if verdict["outcome"] == "fail":
            raise ValueError(
                f"the audit failed, so there is nothing to hand in: {verdict['subject']}, {verdict['name']}: {verdict['evidence']}"
            )
    if not any(verdict["subject"] == claimed for verdict in verdicts):
        raise ValueError(
            f"{path} has no verdict on {claimed}, the scorer of the claim (submission.scorer); run `dvc repro audit`"
        )
    return verdicts
