"""Baseline of a claim: a row of data/leaderboard.yaml, or another record of this project with its ledgers."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stages.common import ledger, paired_bootstrap, student_t
from stages.common.challenge import VALIDATION_BYTES
from stages.common.json_object import read_json_object
from stages.scoring.stream import ValidationStream, open_validation_stream
from tools.compare import revisions
from tools.record import leaderboard, significance
from tools.record.record import bytes_per_token, is_official

RECORDS_FOLDER = Path("records")
SUMMARY = "submission.json"


def claim_against(summary: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the field `claim` of a record's submission.json, against the record or the row called `name`."""
    for folder in (Path(name), RECORDS_FOLDER / name):
        if (folder / SUMMARY).is_file():
            return _against_record(summary, folder)
    return _against_row(summary, leaderboard.read_leaderboard().row(name))


def seed_statistics_of(summary: Mapping[str, Any]) -> student_t.SeedStatistics:
    """Return mean and deviation of val_bpb over the seeds of a record."""
    return student_t.seed_statistics([result["val_bpb"] for result in summary["seed_results"].values()])


def _against_row(summary: Mapping[str, Any], row: leaderboard.LeaderboardRow) -> dict[str, Any]:
    assert row.mean is not None
    if not is_official(summary):
        scored = summary["coverage"]["bytes"]
        raise ValueError(
            f"{row.name} was scored on the challenge's {VALIDATION_BYTES:,} bytes, this record on"
            f" {scored:,} of other text: the two cannot be compared;"
            " name a record of this project instead"
        )
    theirs = student_t.SeedStatistics(row.mean, row.deviation, row.seeds)
    tests = significance.over_seeds(seed_statistics_of(summary), theirs, bytes_per_token(summary))
    source = {"name": row.name, "source": leaderboard.PULL_REQUESTS + row.source, "status": row.status}
    return {"against": source | theirs._asdict()} | significance.as_json(tests)


def _against_record(summary: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    other = read_json_object(folder / SUMMARY)
    for key in ("commits", "seed_results", "coverage", "scorer"):
        if key not in other:
            raise ValueError(f"{folder / SUMMARY} has no {key}: it is not a record that this project merged")

    # Over documents: the ledgers of both records.
    with tempfile.TemporaryDirectory() as scratch:
        stream = _fetch_shared_stream(summary, other, folder, Path(scratch))
        our_ledgers = _fetch_ledgers(summary, stream.targets, Path(scratch))
        their_ledgers = _fetch_ledgers(other, stream.targets, Path(scratch))
    documents = paired_bootstrap.document_of_target(stream.tokens, stream.table.bos)
    gain = significance.paired_gain(our_ledgers, their_ledgers, stream.counted_bytes, documents)

    # Over seeds: their means and deviations.
    ours = seed_statistics_of(summary)
    theirs = seed_statistics_of(other)
    bytes_each = bytes_per_token(summary)
    tests = [
        *significance.over_seeds(ours, theirs, bytes_each),
        *significance.over_documents(gain, bytes_each),
    ]
    source = {"name": folder.name, "source": folder.as_posix(), "status": "record"}
    against = source | theirs._asdict()
    return {"against": against, "paired": gain._asdict()} | significance.as_json(tests)


def _fetch_shared_stream(
    summary: Mapping[str, Any], other: Mapping[str, Any], folder: Path, scratch: Path
) -> ValidationStream:
    """Fetch the stream that both records scored from DVC; ValueError if they scored different ones."""
    for path in revisions.STREAM_PATHS:
        ours = _output_hash(summary, path)
        theirs = _output_hash(other, path)
        if ours != theirs:
            raise ValueError(
                f"{folder.name} scored another {path} ({theirs}) than this record ({ours}): not comparable"
            )

    commit = next(iter(summary["commits"].values()))["run"]
    fetched = []
    for path in revisions.STREAM_PATHS:
        fetched.append(scratch / Path(path).name)
        revisions.fetch_output(commit, path, fetched[-1])
    val, tokenizer = fetched
    return open_validation_stream(val, tokenizer)


def _fetch_ledgers(summary: Mapping[str, Any], targets: int, scratch: Path) -> list[np.ndarray]:
    """Return the claimed scorer's ledger of each seed, (targets,) each."""
    ledgers = []
    for seed, commits in summary["commits"].items():
        file = scratch / f"{commits['run']}-{seed}.npy"
        path = f"artifacts/{summary['scorer']}/{revisions.LEDGER_FILE}"
        revisions.fetch_output(commits["run"], path, file)
        ledgers.append(ledger.read(file, targets))
    return ledgers


def _output_hash(summary: Mapping[str, Any], path: str) -> str:
    """Return the hash of an output that all runs of a record share."""
    outputs = next(iter(summary["provenance"]["outputs_md5"].values()))
    return str(outputs.get(path, "absent"))
