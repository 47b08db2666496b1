"""Check scores, counts and clocks: submission.json against the logs, the logs against known facts.

Known facts are the counts of the challenge's validation text, its budgets, and the wrong counts of
known defects (docs/defects.md).
"""

import re
import statistics
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from stages.common.challenge import (
    CASEOPS_VALIDATION_TARGETS,
    MAX_EVALUATION_SECONDS,
    MAX_TRAINING_SECONDS,
    MIN_RECORD_SEEDS,
    VALIDATION_BYTES,
    VALIDATION_TARGETS,
)
from tools.check_record.finding import Finding, format_value
from tools.check_record.folder import README, SUMMARY, RecordFolder, with_canonical_names
from tools.check_record.logs import Log

# Targets of the challenge's validation set by tokenizer, as accepted logs count them.
TOKENS = {
    VALIDATION_TARGETS: "SP8192",
    CASEOPS_VALIDATION_TARGETS: "CaseOps",
    47_853_343: "CaseOps with the tail",
}
BYTES_TOLERANCE = 5e-4  # relative; accepted counts of the same text differ by 4e-5
# Wrong counts of known defects.
WRONG_TOKENS = {9_662_464: "the first 10,000 documents", 36_562_944: "a partition that lost shards"}
WRONG_BYTES = {
    164_594_398: "CaseOps' transformed text, the sidecar off",
    157_319_833: "byte-fallback pieces counted as three bytes",
}
SPACES_COUNTED_TWICE = (1.15, 1.18)  # counted bytes / bytes, about, if every leading space counts twice
SUBSET_TOKENS = (3_000_000, 5_000_000, 8_000_000)
TRAIN_SHARDS = (80, 128)  # of SP8192, as the logs of accepted records show them
SUBSET = re.compile(
    r"\bsubset\b|\bfirst [\d,.]+ ?[kM]? (?:val )?(?:tokens|docs|documents|targets)"
    r"|\bprefix of [\d,.]+|\bppm_mix\b",
    re.IGNORECASE,
)
# Error of a rounded number, in units of its last digit: 0.5, and a little more since numbers are
# binary.
ROUNDING_SLACK = 0.51


def findings(folder: RecordFolder) -> Iterator[Finding]:
    """Yield every finding about seeds, scores, counts and clocks."""
    yield from _seeds(folder)
    yield from _seed_scores(folder)
    yield from _means(folder)
    for log in folder.logs:
        yield from _counts(folder, log)
        yield from _clocks(folder, log)

    # Clocks that submission.json states: by seed, of the record, and in the field `measured`.
    for seed, row in folder.seed_results.items():
        yield from _stated_clocks(folder, f"seed {seed}: ", row)
    yield from _stated_clocks(folder, "", with_canonical_names(folder.summary))
    measured = folder.summary.get("measured")
    if isinstance(measured, dict):
        for seed, row in measured.items():
            if isinstance(row, dict):
                yield from _stated_clocks(folder, f"seed {seed}: ", with_canonical_names(row))
    yield from _subsets(folder)


def equals_rounded(stated: float, exact: float, text: str | None = None) -> bool:
    """Tell if `stated` is `exact` rounded to the digits in which it is written.

    Its digits are those of `text`, or else the shortest that give the number.
    """
    return abs(stated - exact) <= ROUNDING_SLACK * _last_digit(text if text is not None else repr(stated))


def _last_digit(number: str) -> float:
    """Return the value of one in the last written digit.

    >>> _last_digit("1.081"), _last_digit("2e-05")
    (0.001, 1e-05)
    """
    exponent = Decimal(number).as_tuple().exponent
    return 10.0 ** min(0, exponent) if isinstance(exponent, int) else 1.0


def _seeds(folder: RecordFolder) -> Iterator[Finding]:
    claimed = folder.claimed_seeds
    logged = {log.seed for log in folder.logs if log.seed is not None}
    for seed in claimed:
        if folder.log_of(seed) is None:
            yield Finding(SUMMARY, f"seed {seed} is claimed, but there is no log of it", "#2124, #1902")
    if claimed:
        for seed in sorted(logged - set(claimed)):
            yield Finding(
                SUMMARY,
                f"there is a log of seed {seed}, which the record leaves out",
                "#1769: the best five of seven",
            )
    if folder.is_record and 0 < len(claimed) < MIN_RECORD_SEEDS:
        yield Finding(SUMMARY, f"{len(claimed)} seeds; a record needs {MIN_RECORD_SEEDS}", "#1902, #2124")
    if not folder.logs:
        yield Finding("logs", "there is none: no figure can be checked", "#2124")


def _seed_scores(folder: RecordFolder) -> Iterator[Finding]:
    """Compare each seed's score and steps with its log."""
    for seed, row in folder.seed_results.items():
        log = folder.log_of(seed)
        if "val_bpb" not in row or log is None or not log.scores:
            continue

        bpb = row["val_bpb"]
        if not any(equals_rounded(bpb, s.bpb) or equals_rounded(s.bpb, bpb) for s in log.final_scores):
            logged = ", ".join(str(score.bpb) for score in log.final_scores) or "only diagnostics"
            yield Finding(
                SUMMARY, f"seed {seed}: val_bpb {bpb} is not in its log, which has {logged}", "#2118"
            )

        steps = row.get("steps", with_canonical_names(folder.summary).get("steps"))
        if isinstance(steps, int) and log.steps is not None and steps != log.steps:
            message = f"seed {seed}: {format_value(steps)} steps, its log says {format_value(log.steps)}"
            yield Finding(SUMMARY, message, "#1858")


def _means(folder: RecordFolder) -> Iterator[Finding]:
    """Compare the stated mean and deviation with the scores of the seeds."""
    scores = [row["val_bpb"] for row in folder.seed_results.values() if "val_bpb" in row]
    summary: dict[str, Any] = folder.summary
    mean = summary.get("val_bpb")
    deviation = summary.get("val_bpb_std")
    if not isinstance(mean, (int, float)):
        yield Finding(SUMMARY, "states no val_bpb", "rules: val_bpb is reported")
        return

    # The scores of the seeds are rounded themselves, which moves their mean by at most `slack`.
    slack = ROUNDING_SLACK * max((_last_digit(repr(score)) for score in scores), default=1.0)
    if scores:
        exact = statistics.fmean(scores)
        if not equals_rounded(mean, exact) and abs(mean - exact) > slack:
            yield Finding(SUMMARY, f"val_bpb {mean} is not the mean of its seeds, {exact:.8f}", "#2118")

    # Rounding moves the deviation by at most slack * sqrt(n / (n - 1)), which is less than 2 * slack.
    if isinstance(deviation, (int, float)) and len(scores) > 1:
        exact = statistics.stdev(scores)
        if not equals_rounded(deviation, exact) and abs(deviation - exact) > 2 * slack:
            yield Finding(
                SUMMARY,
                f"val_bpb_std {deviation} is not the sample deviation of its seeds, {exact:.8f}",
                "#2118",
            )

    # Without results by seed, the score must be in the only log.
    scored_logs = [log for log in folder.logs if log.final_scores]
    if not scores and len(scored_logs) == 1:
        log = scored_logs[0]
        if not any(equals_rounded(mean, score.bpb) for score in log.final_scores):
            yield Finding(SUMMARY, f"val_bpb {mean} is not in {log.name}", "#2118")


def _counts(folder: RecordFolder, log: Log) -> Iterator[Finding]:
    """Check the tokens and bytes that were scored.

    A folder of another track may declare its own text; all others must have scored the challenge's.
    """
    if not log.final_scores:
        return
    declared = folder.summary.get("coverage")
    if isinstance(declared, dict) and not folder.is_record:
        for key, logged in (("targets", log.tokens), ("bytes", log.bytes)):
            if logged is not None and declared.get(key) != logged:
                stated = format_value(declared.get(key))
                message = f"scored {format_value(logged)} {key}, {SUMMARY} declares {stated}"
                yield Finding(log.name, message, "#1923")
        return

    yield from _tokens(log)
    scored_bytes = log.scored_bytes
    if scored_bytes is None or _is_official(scored_bytes):
        return

    # A wrong number of bytes: name the defect that gives this number, if it is known.
    reason = "another text, or another count of it"
    low, high = SPACES_COUNTED_TWICE
    if low < scored_bytes / VALIDATION_BYTES < high:
        reason = "leading spaces counted twice"
    for size, words in WRONG_BYTES.items():
        if abs(scored_bytes / size - 1) < BYTES_TOLERANCE:
            reason = words

    # The number is either stated, or follows from the loss and the bits per byte.
    source = "its val_bytes" if log.bytes is not None else "its loss and bpb"
    excess = scored_bytes / VALIDATION_BYTES - 1
    message = (
        f"{source} mean {scored_bytes:,.0f} bytes, the challenge's text has"
        f" {format_value(VALIDATION_BYTES)} ({excess:+.2%}): {reason}"
    )
    yield Finding(log.name, message, "#1698, #1184, #2138")


def _is_official(counted_bytes: float) -> bool:
    return abs(counted_bytes / VALIDATION_BYTES - 1) <= BYTES_TOLERANCE


def _tokens(log: Log) -> Iterator[Finding]:
    """Compare the counts of tokens, documents and shards with those of the challenge's data."""
    # Scored tokens.
    if log.tokens is None:
        yield Finding(log.name, "does not say how many tokens were scored", "#1785, #1835, #1858")
    elif log.tokens in WRONG_TOKENS:
        message = f"scored {format_value(log.tokens)} tokens: {WRONG_TOKENS[log.tokens]}"
        yield Finding(log.name, message, "#1854, #1923, #2109")
    elif log.tokens in SUBSET_TOKENS:
        yield Finding(log.name, f"scored {format_value(log.tokens)} tokens, a subset", "#1785, #1835, #1858")
    elif log.tokens not in TOKENS and not (log.scored_bytes and _is_official(log.scored_bytes)):
        known = ", ".join(f"{format_value(count)} ({name})" for count, name in TOKENS.items())
        yield Finding(log.name, f"scored {format_value(log.tokens)} tokens; known are {known}", "#2109")

    # Documents are counted by their BOS tokens.
    if log.documents == 0:
        yield Finding(log.name, "no documents: BOS was not written", "#1736, #1769, #1779")

    # More training shards than exist may include validation data; fewer are an incomplete copy.
    if log.shards is not None and log.shards > max(TRAIN_SHARDS):
        yield Finding(
            log.name,
            f"{format_value(log.shards)} train shards, but there are {max(TRAIN_SHARDS)}:"
            " val documents may be in train",
            "#2018, #2130",
        )
    elif log.shards is not None and log.shards < min(TRAIN_SHARDS):
        yield Finding(
            log.name, f"{log.shards} train shards of {min(TRAIN_SHARDS)} or {max(TRAIN_SHARDS)}", "#1851"
        )


def _clocks(folder: RecordFolder, log: Log) -> Iterator[Finding]:
    """Compare the seconds in a log with the budgets."""
    if not folder.is_record:
        return
    if log.train_seconds is not None:
        calibration = log.hessian_seconds or 0.0
        if log.train_seconds > MAX_TRAINING_SECONDS:
            yield Finding(log.name, f"trained for {log.train_seconds:.1f} s", "#1908, #1945")
        elif log.train_seconds + calibration > MAX_TRAINING_SECONDS:
            total = (
                f"{log.train_seconds:.1f} s of training and {calibration:.1f} s of Hessians on training data"
            )
            yield Finding(log.name, f"{total} are over {MAX_TRAINING_SECONDS:g} s", "#1851, #1855, #2135")
    if log.eval_seconds is not None and log.eval_seconds > MAX_EVALUATION_SECONDS:
        yield Finding(log.name, f"evaluated for {log.eval_seconds:.1f} s", "#1129, #1933, #1972")


def _stated_clocks(folder: RecordFolder, prefix: str, row: dict[str, Any]) -> Iterator[Finding]:
    """Compare the seconds in a row of results with the budgets; `prefix` names the row in messages."""
    for key, budget in (("train_seconds", MAX_TRAINING_SECONDS), ("eval_seconds", MAX_EVALUATION_SECONDS)):
        seconds = row.get(key)
        if folder.is_record and isinstance(seconds, (int, float)) and seconds > budget:
            yield Finding(SUMMARY, f"{prefix}{key} {seconds} is over {budget:g}", "#1908, #1972")


def _subsets(folder: RecordFolder) -> Iterator[Finding]:
    """Search all texts for words about a score over a part of the text."""
    texts = {SUMMARY: str(folder.summary), README: folder.readme}
    texts |= {log.name: log.text for log in folder.logs}
    for file, text in texts.items():
        found = SUBSET.search(text)
        if found:
            yield Finding(file, f"says {found[0]!r}: a score over a part of the text", "#1785, #1835, #1858")
