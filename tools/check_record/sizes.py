"""Check sizes in bytes: submission.json against itself, the logs, and the files on disk."""

import hashlib
from collections.abc import Iterator

from stages.common.challenge import MAX_ARTIFACT_BYTES
from tools.check_record.finding import Finding, format_value
from tools.check_record.folder import CODE, SUMMARY, RecordFolder, with_canonical_names
from tools.check_record.logs import Log

MODEL_SUFFIXES = (".bin", ".ptz", ".pt", ".br", ".xz", ".lrz")
MIN_MODEL_BYTES = 1_000_000  # a smaller file is not taken for the model


def findings(folder: RecordFolder) -> Iterator[Finding]:
    """Yield every finding about sizes."""
    yield from _totals(folder)
    for log in folder.logs:
        yield from _log(log)
    yield from _seeds(folder)
    yield from _code_between_seeds(folder)
    yield from _code_on_disk(folder)
    yield from _model_on_disk(folder)


def _over_cap(size: int) -> str:
    return f"{format_value(size)} bytes are over the cap of {format_value(MAX_ARTIFACT_BYTES)}"


def _totals(folder: RecordFolder) -> Iterator[Finding]:
    """Check submission.json against itself: the total is the worst seed's, and the sum of its parts."""
    stated = with_canonical_names(folder.summary)
    total = stated.get("bytes_total")
    seed_totals = [row["bytes_total"] for row in folder.seed_results.values() if "bytes_total" in row]
    if total is not None and seed_totals and total != max(seed_totals):
        worst = format_value(max(seed_totals))
        message = f"bytes_total {format_value(total)} is not the worst seed's, which is {worst}"
        yield Finding(SUMMARY, message, "#1858")

    # The largest model and the largest code may be of two seeds, so the sum of any one seed is
    # accepted too.
    model = stated.get("bytes_model")
    code = stated.get("bytes_code")
    if total is not None and model is not None and code is not None and total != model + code:
        seed_sums = []
        for row in folder.seed_results.values():
            if {"bytes_model", "bytes_code"} <= row.keys():
                seed_sums.append(row["bytes_model"] + row["bytes_code"])
        if total not in seed_sums:
            parts = f"{format_value(model)} + {format_value(code)}"
            message = f"bytes_total {format_value(total)} is not model + code, {parts}"
            yield Finding(SUMMARY, message, "#1923")

    # The cap.
    sizes = {size for size in (total, *seed_totals) if size is not None}
    for size in sorted(sizes):
        if size > MAX_ARTIFACT_BYTES:
            yield Finding(SUMMARY, _over_cap(size), "#1959, #2082")
    if total is None and not seed_totals:
        yield Finding(SUMMARY, "states no size of the artifact", "rules: bytes are reported")


def _log(log: Log) -> Iterator[Finding]:
    """Check a log against itself."""
    if log.bytes_total is not None and log.bytes_total > MAX_ARTIFACT_BYTES:
        yield Finding(log.name, _over_cap(log.bytes_total), "#1835, #1959, #2082")
    if log.bytes_total is not None and log.bytes_model is not None and log.bytes_code is not None:
        parts = log.bytes_model + log.bytes_code
        if parts != log.bytes_total:
            message = f"total {format_value(log.bytes_total)} is not model + code, {format_value(parts)}"
            yield Finding(log.name, message, "#1923")


def _seeds(folder: RecordFolder) -> Iterator[Finding]:
    """Compare each seed's stated sizes with its log."""
    for seed, row in folder.seed_results.items():
        log = folder.log_of(seed)
        if log is None:
            continue
        for key in ("bytes_total", "bytes_model", "bytes_code"):
            logged = getattr(log, key)
            if key not in row or logged is None or row[key] == logged:
                continue
            hint = " (the model's alone)" if row[key] == log.bytes_model else ""
            message = (
                f"seed {seed}: {key} {format_value(row[key])}{hint}, its log says {format_value(logged)}"
            )
            yield Finding(SUMMARY, message, "#1858, #1923")


def _code_between_seeds(folder: RecordFolder) -> Iterator[Finding]:
    """Check that all seeds have code of one size."""
    by_log = {log.name: log.bytes_code for log in folder.logs if log.bytes_code is not None}
    by_seed = {}
    for seed, row in folder.seed_results.items():
        if "bytes_code" in row:
            by_seed[f"seed {seed}"] = row["bytes_code"]

    for file, sizes in (("logs", by_log), (SUMMARY, by_seed)):
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} {format_value(size)}" for name, size in sizes.items())
            yield Finding(
                file,
                f"the code has other sizes for other seeds: {listed};"
                " they ran different code, or packed the packed",
                "#1858, #1493",
            )


def _code_on_disk(folder: RecordFolder) -> Iterator[Finding]:
    """Check that the code in the folder is the code that was counted."""
    if folder.code is None:
        yield Finding(CODE, "is not there: nothing can be run or counted", "rules: the code counts")
        return

    # Its size; the first source that counts another one is named.
    stated = with_canonical_names(folder.summary)
    size = len(folder.code)
    counted = {f"{SUMMARY} counts": stated.get("bytes_code")}
    counted |= {f"{log.name} counts": log.bytes_code for log in folder.logs}
    wrong = {source: number for source, number in counted.items() if number is not None and number != size}
    if wrong:
        source, number = next(iter(wrong.items()))
        reason = "the file is not what was counted"
        if size > number:
            reason = "a raw source is shipped, but a wrapped one is counted"
        message = f"{format_value(size)} bytes on disk, {source} {format_value(number)}: {reason}"
        yield Finding(CODE, message, "#1858, #1530, #1835")

    # The total with this code, if it is not what was counted.
    logged_models = [log.bytes_model for log in folder.logs if log.bytes_model]
    model = max(logged_models, default=stated.get("bytes_model"))
    if model is not None and model + size > MAX_ARTIFACT_BYTES and wrong:
        total = format_value(model + size)
        message = (
            f"with the code on disk the artifact has {total} bytes, over {format_value(MAX_ARTIFACT_BYTES)}"
        )
        yield Finding(CODE, message, "#1858")

    # Its hash.
    hashes = folder.summary.get("sha256")
    stated_hash = hashes.get(CODE) if isinstance(hashes, dict) else None
    if stated_hash and stated_hash != hashlib.sha256(folder.code).hexdigest():
        yield Finding(CODE, f"has another sha256 than {SUMMARY} states", "#1493")


def _model_on_disk(folder: RecordFolder) -> Iterator[Finding]:
    """Check that a model in the folder has a size that was counted."""
    counted = {row["bytes_model"] for row in folder.seed_results.values() if "bytes_model" in row}
    counted |= {log.bytes_model for log in folder.logs if log.bytes_model is not None}
    for name, size in folder.files.items():
        if name.endswith(MODEL_SUFFIXES) and size > MIN_MODEL_BYTES and counted and size not in counted:
            listed = ", ".join(map(format_value, sorted(counted)))
            yield Finding(name, f"{format_value(size)} bytes on disk; counted were {listed}", "#1858")
