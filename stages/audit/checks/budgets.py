"""Budgets and data: sizes of the counted files, both clocks, no validation document in the training data.

A verdict that passes does not contain measured seconds, so that the report has the same bytes on a
faster machine.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stages.audit.checks.tokenizer_model import tokenizer_excess_bytes
from stages.audit.verdict import Check, Verdict, Words
from stages.common import shards

TOLERATED_EXCESS_BYTES = 1024  # of a tokenizer: options that later versions of SentencePiece may add

SIZES = Check(
    "budget",
    "bytes",
    conditions=("budget",),
    sees="artifacts over the cap, sizes that were typed instead of measured",
    blind="other files that a run would need (B14)",
    words=Words(bound="saw <= expected"),
)
TOKENIZER_FILE = Check(
    "B11",
    "tokenizer file",
    conditions=("metric", "budget"),
    sees="data in a tokenizer that no tokenizer needs: unknown fields, long texts, unused tables",
    blind="data in the texts and scores of pieces",
)
CLOCKS = {
    phase: Check(
        "budget",
        f"{phase} clock",
        conditions=("budget",),
        sees="runs over their time",
        blind="a timer that was started late: the clean room (B14) measures from outside",
        words=Words(saw="within", expected="within"),
    )
    for phase in ("training", "evaluation")
}
DISJOINT = Check(
    "B15",
    "train and val disjoint",
    conditions=("data",),
    sees="whole documents of val in train, hashes that belong to other val shards",
    blind="passages shared by different documents; training data that documents.u64 does not list",
)
VAL_SHARDS = Check(
    "B6",
    "official val shards",
    conditions=("C4", "data"),
    sees="shards left out, added or changed after they were made",
    blind="whether the manifest's shards are the challenge's",
)


def check_sizes(sizes: Mapping[str, int], budget_bytes: int) -> Verdict:
    """Budget: the counted files together, in bytes on disk, are within the cap."""
    total = sum(sizes.values())
    parts = " + ".join(f"{size} ({name})" for name, size in sizes.items())
    evidence = f"{parts} = {total} bytes on disk, at most {budget_bytes} allowed"
    return Verdict.of(SIZES, "files", total <= budget_bytes, evidence, saw=total, expected=budget_bytes)


def check_tokenizer_file(path: Path) -> Verdict:
    """B11: a SentencePiece model holds only its pieces, options and rules."""
    excess = tokenizer_excess_bytes(path)
    size = path.stat().st_size
    evidence = f"{excess} of {size} bytes of the tokenizer are not those of its pieces, options and rules"
    return Verdict.of(
        TOKENIZER_FILE,
        "files",
        excess <= TOLERATED_EXCESS_BYTES,
        evidence,
        saw=excess,
        expected=0,
        bound=TOLERATED_EXCESS_BYTES,
    )


def check_clock(phase: str, subject: str, seconds: float | None, budget_seconds: float) -> Verdict:
    """Budget: a phase, one of CLOCKS, took no longer than allowed.

    seconds: None if its timing file does not hold them. Only a failure states them.
    """
    check = CLOCKS[phase]
    if seconds is None:
        evidence = f"{phase} seconds were not recorded"
        return Verdict.cannot_tell(check, subject, evidence, bound=budget_seconds)
    if 0 <= seconds <= budget_seconds:
        evidence = f"{phase} within {budget_seconds:g} seconds: yes"
        return Verdict.passed(check, subject, evidence, bound=budget_seconds)
    evidence = f"{phase} took {seconds:.1f} seconds, {budget_seconds:g} are allowed"
    return Verdict.failed(check, subject, evidence, saw=seconds, bound=budget_seconds)


def document_hashes(tokens: np.ndarray, bos: int) -> np.ndarray:
    """Hash each document of a stream (N,) uint16; returns (D,) uint64 in stream order.

    The hash is the first eight bytes of sha256 over the document's token ids: little-endian uint16, BOS
    included.
    """
    prefixes = [
        hashlib.sha256(document.astype("<u2").tobytes()).digest()[:8]
        for document in shards.documents(tokens, bos)
    ]
    return np.frombuffer(b"".join(prefixes), dtype="<u8")


def check_disjoint(
    val_hashes: np.ndarray, listed_hashes: np.ndarray, train_count: int | None, val_count: int | None
) -> Verdict:
    """B15: documents.u64 lists the val documents of the shards, and none of them is a train document.

    val_hashes: (D,) uint64, of the val shards; listed_hashes: (T + D,) uint64, the content of
    documents.u64, first train's and then val's; train_count, val_count: T and D as the manifest states
    them.
    """
    if train_count is None or val_count is None:
        evidence = "the manifest does not say how many train and val documents documents.u64 lists"
        return Verdict.cannot_tell(DISJOINT, "files", evidence, expected=0, bound=0)

    # First that the file belongs to these shards, then that the two sides share no document.
    train, listed_val = listed_hashes[:train_count], listed_hashes[train_count:]
    shared = int(np.isin(val_hashes, train).sum())

    # The first of the faults that there are.
    fault = ""
    if len(listed_hashes) != train_count + val_count:
        states = f"{train_count} + {val_count}"
        fault = f"documents.u64 holds {len(listed_hashes)} hashes, the manifest says {states}"
    elif not np.array_equal(np.sort(val_hashes), np.sort(listed_val)):
        listed = f"documents.u64 does not list the {len(val_hashes)} documents of the val shards"
        fault = f"{listed}: it belongs to other data"
    elif shared:
        share = f"{shared} of {len(val_hashes)} val documents have the hash of a train document"
        fault = f"{share} (by chance: probability 1e-10 or less)"

    evidence = fault
    if not fault:
        none = f"none of {len(val_hashes)} val documents has the hash"
        evidence = f"{none} of one of {train_count} train documents"
    return Verdict.of(DISJOINT, "files", not fault, evidence, saw=shared, expected=0, bound=0)


def check_shards(recorded: Mapping[str, str] | None, found: Mapping[str, str]) -> Verdict:
    """B6: the val shards are exactly those of the manifest. Both arguments map names to sha256."""
    if recorded is None:
        evidence = "the manifest does not list the val shards"
        return Verdict.cannot_tell(VAL_SHARDS, "files", evidence, saw=len(found), bound=0)

    evidence = f"the {len(found)} val shards have the sha256 of the manifest"
    different = sorted(name for name in {*recorded, *found} if recorded.get(name) != found.get(name))
    if different:
        evidence = f"val shards differ from the manifest: {', '.join(different)}"

    # The numbers of shards.
    return Verdict.of(
        VAL_SHARDS, "files", not different, evidence, saw=len(found), expected=len(recorded), bound=0
    )


def measured_seconds(timing: Mapping[str, Any], key: str) -> float | None:
    """Read a measured time; None if it is missing or not a number."""
    value = timing.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def manifest_entries(
    manifest: Mapping[str, Any],
) -> tuple[dict[str, str] | None, tuple[int | None, int | None]]:
    """Read the sha256 of each val shard, by file name, and the numbers of train and val documents.

    None for each that it does not state.
    """
    listed = manifest.get("shards")
    if not isinstance(listed, dict):
        return None, (None, None)
    val = {
        name.removeprefix("val/"): str(entry.get("sha256"))
        for name, entry in listed.items()
        if name.startswith("val/")
    }
    return val, (_count_documents(listed, "train/"), _count_documents(listed, "val/"))


def _count_documents(listed: Mapping[str, Mapping[str, Any]], side: str) -> int | None:
    entries = [entry for name, entry in listed.items() if name.startswith(side)]
    counts = [entry["documents"] for entry in entries if isinstance(entry.get("documents"), int)]
    return sum(counts) if counts and len(counts) == len(entries) else None
