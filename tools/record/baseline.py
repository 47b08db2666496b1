"""What a record is claimed to be better than: a row of data/leaderboard.yaml, or another record of this project, ledger by ledger."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.common import ledger, paired_bootstrap
from stages.common.clock import OFFICIAL_BYTES
from stages.scoring.evaluate import Stream, open_stream
from tools.compare import revisions
from tools.record import leaderboard, significance
from tools.record.record import bytes_per_token, is_official

RECORDS = Path("records")
SUMMARY = "submission.json"


def claim(summary: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The field `claim` of a record's submission.json, against the row or the record called `name`."""
    folder = next((path for path in (Path(name), RECORDS / name) if (path / SUMMARY).is_file()), None)
    return _against_record(summary, folder) if folder else _against_row(summary, leaderboard.read().row(name))


def ours(summary: Mapping[str, Any]) -> significance.Sample:
    """The runs of a record."""
    return significance.sample([result["val_bpb"] for result in summary["seed_results"].values()])


def _against_row(summary: Mapping[str, Any], row: leaderboard.Row) -> dict[str, Any]:
    assert row.mean is not None
    if not is_official(summary):
        scored = summary["coverage"]["bytes"]
        raise ValueError(
            f"{row.name} was scored on the challenge's {OFFICIAL_BYTES:,} bytes, this record on {scored:,} of other text:"
            " the two cannot be compared; name a record of this project instead"
        )
    theirs = significance.Sample(row.mean, row.deviation, row.seeds)
    answers = significance.over_seeds(ours(summary), theirs, bytes_per_token(summary))
    source = {"name": row.name, "source": leaderboard.PULLS + row.source, "status": row.status}
    return {"against": source | theirs._asdict()} | significance.as_json(answers)


def _against_record(summary: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    theirs = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    for key in ("commits", "seed_results", "coverage", "scorer"):
        if key not in theirs:
            raise ValueError(f"{folder / SUMMARY} has no {key}: it is no record that this project merged")
    with tempfile.TemporaryDirectory() as scratch:
        stream = _stream(summary, theirs, folder, Path(scratch))
        better, worse = (_ledgers(side, stream.targets, Path(scratch)) for side in (summary, theirs))
    documents = paired_bootstrap.document_of_target(stream.tokens, stream.table.bos)
    gain = significance.paired(better, worse, stream.counted_bytes, documents)
    bytes_each = bytes_per_token(summary)
    answers = [
        *significance.over_seeds(ours(summary), ours(theirs), bytes_each),
        *significance.over_documents(gain, bytes_each),
    ]
    found = {"name": folder.name, "source": folder.as_posix(), "status": "record"} | ours(theirs)._asdict()
    return {"against": found, "paired": gain._asdict()} | significance.as_json(answers)


def _stream(summary: Mapping[str, Any], theirs: Mapping[str, Any], folder: Path, scratch: Path) -> Stream:
    """The stream that both records scored, out of DVC's cache."""
    for path in revisions.STREAM:
        here, there = (_output(side, path) for side in (summary, theirs))
        if here != there:
            raise ValueError(
                f"{folder.name} scored another {path} ({there}) than this record ({here}): not comparable"
            )
    commit = next(iter(summary["commits"].values()))["run"]
    val, tokenizer = (scratch / Path(path).name for path in revisions.STREAM)
    for path, target in zip(revisions.STREAM, (val, tokenizer), strict=True):
        revisions.fetch(commit, path, target)
    return open_stream(val, tokenizer)


def _ledgers(summary: Mapping[str, Any], targets: int, scratch: Path) -> Sequence[np.ndarray]:
    """The claimed scorer's ledger of each seed."""
    found = []
    for seed, commits in summary["commits"].items():
        file = scratch / f"{commits['run']}-{seed}.npy"
        revisions.fetch(commits["run"], f"artifacts/{summary['scorer']}/{revisions.FILE}", file)
        found.append(ledger.read(file, targets))
    return found


def _output(summary: Mapping[str, Any], path: str) -> str:
    """The hash of a shared output of a record's runs."""
    outputs = next(iter(summary["provenance"]["outputs_md5"].values()))
    return str(outputs.get(path, "absent"))
