"""Bytes: what is stated against what the logs say and what lies on the disk."""

import hashlib
from collections.abc import Iterator

from tools.check_record.finding import CAP, Finding, shown
from tools.check_record.folder import CODE, SUMMARY, Folder, renamed
from tools.check_record.logs import Log

MODELS = (".bin", ".ptz", ".pt", ".br", ".xz", ".lrz")
LEAST_MODEL = 1_000_000  # bytes of a file that may be the model


def findings(folder: Folder) -> Iterator[Finding]:
    """Every finding about sizes."""
    yield from _totals(folder)
    for log in folder.logs:
        yield from _log(log)
    yield from _seeds(folder)
    yield from _code_between_seeds(folder)
    yield from _code_on_disk(folder)
    yield from _model_on_disk(folder)


def _totals(folder: Folder) -> Iterator[Finding]:
    """submission.json against itself: the total is the worst seed's, and the sum of its parts."""
    stated = renamed(folder.summary)
    total = stated.get("bytes_total")
    seeds = [row["bytes_total"] for row in folder.seed_results.values() if "bytes_total" in row]
    if total is not None and seeds and total != max(seeds):
        yield Finding(
            SUMMARY,
            f"bytes_total {shown(total)} is not the worst seed's, which is {shown(max(seeds))}",
            "#1858",
        )
    parts = [stated.get("bytes_model"), stated.get("bytes_code")]
    if total is not None and None not in parts and total != sum(filter(None, parts)):
        sums = [
            row["bytes_model"] + row["bytes_code"]
            for row in folder.seed_results.values()
            if {"bytes_model", "bytes_code"} <= row.keys()
        ]
        if total not in sums:
            yield Finding(
                SUMMARY,
                f"bytes_total {shown(total)} is not model + code, {shown(parts[0])} + {shown(parts[1])}",
                "#1923",
            )
    for size in sorted({size for size in (total, *seeds) if size is not None and size > CAP}):
        yield Finding(SUMMARY, f"{shown(size)} bytes are over the cap of {shown(CAP)}", "#1959, #2082")
    if total is None and not seeds:
        yield Finding(SUMMARY, "states no size of the artifact", "rules: bytes are reported")


def _log(log: Log) -> Iterator[Finding]:
    """A log against itself."""
    if log.bytes_total is not None and log.bytes_total > CAP:
        yield Finding(
            log.name,
            f"{shown(log.bytes_total)} bytes are over the cap of {shown(CAP)}",
            "#1835, #1959, #2082",
        )
    if log.bytes_total is not None and log.bytes_model is not None and log.bytes_code is not None:
        parts = log.bytes_model + log.bytes_code
        if parts != log.bytes_total:
            yield Finding(
                log.name, f"total {shown(log.bytes_total)} is not model + code, {shown(parts)}", "#1923"
            )


def _seeds(folder: Folder) -> Iterator[Finding]:
    """Each seed's stated sizes against its log."""
    for seed, row in folder.seed_results.items():
        log = folder.log_of(seed)
        for key in ("bytes_total", "bytes_model", "bytes_code"):
            said = getattr(log, key) if log else None
            if key not in row or said is None or row[key] == said:
                continue
            mixed = " (the model's alone)" if log and row[key] == log.bytes_model else ""
            yield Finding(
                SUMMARY,
                f"seed {seed}: {key} {shown(row[key])}{mixed}, its log says {shown(said)}",
                "#1858, #1923",
            )


def _code_between_seeds(folder: Folder) -> Iterator[Finding]:
    """One record has one code."""
    by_log = {log.name: log.bytes_code for log in folder.logs if log.bytes_code is not None}
    by_seed = {
        f"seed {seed}": row["bytes_code"] for seed, row in folder.seed_results.items() if "bytes_code" in row
    }
    for where, sizes in (("logs", by_log), (SUMMARY, by_seed)):
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} {shown(size)}" for name, size in sizes.items())
            yield Finding(
                where,
                f"the code has other sizes for other seeds: {listed}; they ran different code, or packed the packed",
                "#1858, #1493",
            )


def _code_on_disk(folder: Folder) -> Iterator[Finding]:
    """The code that is shipped is the code that is counted."""
    if folder.code is None:
        yield Finding(CODE, "is not there: nothing can be run or counted", "rules: the code counts")
        return
    size = len(folder.code)
    stated = renamed(folder.summary).get("bytes_code")
    counted = {f"{SUMMARY} counts": stated} | {f"{log.name} counts": log.bytes_code for log in folder.logs}
    wrong = {who: number for who, number in counted.items() if number is not None and number != size}
    if wrong:
        who, number = next(iter(wrong.items()))
        raw = (
            "a raw source is shipped where a wrapped one is counted"
            if size > number
            else "the file is not what was counted"
        )
        yield Finding(
            CODE, f"{shown(size)} bytes on disk, {who} {shown(number)}: {raw}", "#1858, #1530, #1835"
        )
    worst = max(
        (log.bytes_model for log in folder.logs if log.bytes_model),
        default=renamed(folder.summary).get("bytes_model"),
    )
    if worst is not None and worst + size > CAP and wrong:
        yield Finding(
            CODE,
            f"with the code on disk the artifact has {shown(worst + size)} bytes, over {shown(CAP)}",
            "#1858",
        )
    stated_hash = (
        (folder.summary.get("sha256") or {}).get(CODE)
        if isinstance(folder.summary.get("sha256"), dict)
        else None
    )
    if stated_hash and stated_hash != hashlib.sha256(folder.code).hexdigest():
        yield Finding(CODE, f"has another sha256 than {SUMMARY} states", "#1493")


def _model_on_disk(folder: Folder) -> Iterator[Finding]:
    """A model that is shipped has a size that was counted."""
    stated = {row["bytes_model"] for row in folder.seed_results.values() if "bytes_model" in row}
    stated |= {log.bytes_model for log in folder.logs if log.bytes_model is not None}
    for name, size in folder.files.items():
        if name.endswith(MODELS) and size > LEAST_MODEL and stated and size not in stated:
            yield Finding(
                name,
                f"{shown(size)} bytes on disk; counted were {', '.join(map(shown, sorted(stated)))}",
                "#1858",
            )
