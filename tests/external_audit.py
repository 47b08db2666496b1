"""Audits of the scorers in tests/zoo/external/ by the command, in this process."""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from stages.common import bpb, shards
from stages.tokenize import tokenizer
from tests.zoo.external.registry import ExternalScorer
from tools.audit_scorer import cli

PACKAGE = Path(__file__).resolve().parent / "zoo" / "external"
PACKAGE_NAME = "external"  # in the folder that contains it
VOCAB_SIZE = 320
TEXTS = [f"Document {i} says that {i * i} is the square of {i}, and nothing more.\n" * 2 for i in range(20)]
TARGETS = "12000"  # that an audit may ask for: the whole stream is certified
OLD_REPORT = '{"audit_passed": 1}'


class Ended(NamedTuple):
    """Exit code and report of an audit."""

    code: int
    report: Mapping[str, Any]  # empty if there is none
    failed: set[str]  # labels of the checks that failed


def write_stream(folder: Path) -> Path:
    """Write a stream of 1,232 tokens and its tokenizer; returns the folder."""
    (folder / "tokenizer.model").write_bytes(tokenizer.train(TEXTS * 2, VOCAB_SIZE, 1))
    processor = bpb.load_tokenizer(folder / "tokenizer.model")
    tokens = np.concatenate([[processor.bos_id(), *processor.encode(text)] for text in TEXTS])
    shards.write(folder / "val.bin", tokens.astype(np.uint16))
    return folder


def audit(scorer: ExternalScorer, stream: Path, output: Path) -> Ended:
    """Audit a scorer; a report of an earlier audit is in the output folder."""
    output.mkdir(parents=True)
    for name in ("report.json", "report.md"):
        (output / name).write_text(OLD_REPORT)
    more = [*scorer.options]
    if scorer.ledger:
        more += ["--claim", str(write_claim(scorer, stream, output))]

    words = ["--scorer", f"{PACKAGE_NAME}.{scorer.factory}", "--targets", TARGETS]
    words += ["--tokens", str(stream / "val.bin"), "--tokenizer", str(stream / "tokenizer.model")]
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--output", str(output), "--quiet", *more])

    path = output / "report.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    failed = {
        f"{verdict['check']} {verdict['name']}"
        for verdict in report.get("verdicts", [])
        if verdict["outcome"] == "fail"
    }
    return Ended(int(ended.value.code or 0), report, failed)


def write_claim(scorer: ExternalScorer, stream: Path, folder: Path) -> Path:
    """Write a claim with the ledger that a scorer makes here, in this process."""
    module = import_module(f"tests.zoo.external.{scorer.factory.partition(':')[0]}")
    tokens = np.array(shards.view(stream / "val.bin"))
    ledger = getattr(module, scorer.ledger)(len(tokens) - 1).score_stream(tokens)
    np.save(folder / "nll.npy", ledger)
    path = folder / "claim.json"
    path.write_text(json.dumps({"ledger": "nll.npy"}))
    return path


def outcome(report: Mapping[str, Any], label: str) -> str:
    """Find the outcome of a check in a report."""
    found = [
        verdict["outcome"]
        for verdict in report["verdicts"]
        if f"{verdict['check']} {verdict['name']}" == label
    ]
    return found[0] if found else "missing"
