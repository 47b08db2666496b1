"""Budgets and data: sizes of the counted files, both clocks, and that no validation document was trained on.

Measured seconds never enter a verdict that passes, so that the report has the same bytes on a faster machine.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from stages.audit.verdict import Outcome, Verdict, outcome
from stages.common import shards


def check_sizes(sizes: Mapping[str, int], budget_bytes: int) -> Verdict:
    """The counted files on disk, together, against the cap."""
    total = sum(sizes.values())
    parts = " + ".join(f"{size} ({name})" for name, size in sizes.items())
    return Verdict(
        check="budget",
        name="bytes",
        subject="files",
        conditions=("budget",),
        outcome=outcome(total <= budget_bytes),
        evidence=f"{parts} = {total} bytes on disk, at most {budget_bytes} allowed",
        saw=total,
        expected=budget_bytes,
        bound="saw <= expected",
        positions=(),
        sees="artifacts over the cap, sizes that were typed instead of measured",
        blind="files outside the counted two that a run would need (B14)",
    )


def check_clock(what: str, subject: str, seconds: float | None, budget_seconds: float) -> Verdict:
    """A measured time against its budget; `seconds` is None where the timing file does not hold it."""
    within = seconds is not None and 0 <= seconds <= budget_seconds
    evidence = f"{what} within {budget_seconds:g} seconds: yes"
    if seconds is None:
        evidence = f"{what} seconds were not recorded"
    elif not within:
        evidence = f"{what} took {seconds:.1f} seconds, {budget_seconds:g} are allowed"
    return Verdict(
        check="budget",
        name=f"{what} clock",
        subject=subject,
        conditions=("budget",),
        outcome="cannot tell" if seconds is None else outcome(within),
        evidence=evidence,
        saw="within" if within else "over" if seconds is not None else "unknown",
        expected="within",
        bound=budget_seconds,
        positions=(),
        sees="runs over their time",
        blind="a timer started late: the clean room (B14) measures from outside",
    )


def document_hashes(tokens: np.ndarray, bos: int) -> np.ndarray:
    """The first eight bytes of sha256 over each document's token ids (BOS included, little-endian uint16), (D,) uint64, in stream order."""
    prefixes = [
        hashlib.sha256(document.astype("<u2").tobytes()).digest()[:8]
        for document in shards.documents(tokens, bos)
    ]
    return np.frombuffer(b"".join(prefixes), dtype="<u8")


def check_disjoint(
    val: np.ndarray, documents: np.ndarray, train_count: int | None, val_count: int | None
) -> Verdict:
    """B15: the val documents' own hashes are those that documents.u64 lists, and none is among train's."""
    result: Outcome = "cannot tell"
    evidence, shared = "the manifest does not say how many train and val documents documents.u64 lists", 0
    if train_count is not None and val_count is not None:
        train, listed = documents[:train_count], documents[train_count:]
        shared = int(np.isin(val, train).sum())
        if len(documents) != train_count + val_count:
            result, evidence = (
                "fail",
                f"documents.u64 holds {len(documents)} hashes, the manifest says {train_count} + {val_count}",
            )
        elif not np.array_equal(np.sort(val), np.sort(listed)):
            result, evidence = (
                "fail",
                f"documents.u64 does not list the {len(val)} documents of the val shards: it belongs to other data",
            )
        elif shared:
            result, evidence = (
                "fail",
                f"{shared} of {len(val)} val documents have the hash of a train document (by chance: 1e-10 or less)",
            )
        else:
            result, evidence = (
                "pass",
                f"none of {len(val)} val documents has the hash of one of {train_count} train documents",
            )
    return Verdict(
        check="B15",
        name="train and val disjoint",
        subject="files",
        conditions=("data",),
        outcome=result,
        evidence=evidence,
        saw=shared,
        expected=0,
        bound=0,
        positions=(),
        sees="whole documents of val in train, hashes that belong to other val shards",
        blind="passages shared by different documents; training data that documents.u64 does not list",
    )


def check_shards(recorded: Mapping[str, str] | None, found: Mapping[str, str]) -> Verdict:
    """The val shards are, byte for byte, those that the manifest names: both map a shard's name to its sha256."""
    same = recorded is not None and dict(recorded) == dict(found)
    evidence = f"the {len(found)} val shards have the sha256 of the manifest"
    if recorded is None:
        evidence = "the manifest does not list the val shards"
    elif not same:
        odd = sorted(name for name in {*recorded, *found} if recorded.get(name) != found.get(name))
        evidence = f"val shards differ from the manifest: {', '.join(odd)}"
    return Verdict(
        check="B6",
        name="official val shards",
        subject="files",
        conditions=("C4", "data"),
        outcome="cannot tell" if recorded is None else outcome(same),
        evidence=evidence,
        saw=len(found),
        expected=len(recorded or {}),
        bound=0,
        positions=(),
        sees="shards left out, added or changed after they were made",
        blind="whether the manifest's shards are the challenge's",
    )


def seconds_of(timing: Mapping[str, Any], key: str) -> float | None:
    """A measured time, or None where it is not there or no number."""
    value = timing.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def manifest_entries(
    manifest: Mapping[str, Any],
) -> tuple[dict[str, str] | None, tuple[int | None, int | None]]:
    """Of the manifest: sha256 of each val shard by file name, and how many train and val documents; None where it does not say."""
    listed = manifest.get("shards")
    if not isinstance(listed, dict):
        return None, (None, None)
    val = {
        name.removeprefix("val/"): str(entry.get("sha256"))
        for name, entry in listed.items()
        if name.startswith("val/")
    }
    return val, (_documents(listed, "train/"), _documents(listed, "val/"))


def _documents(listed: Mapping[str, Mapping[str, Any]], side: str) -> int | None:
    entries = [entry for name, entry in listed.items() if name.startswith(side)]
    counts = [entry["documents"] for entry in entries if isinstance(entry.get("documents"), int)]
    return sum(counts) if counts and len(counts) == len(entries) else None
