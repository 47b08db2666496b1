"""Scores, counts and clocks: submission.json and README against the logs, the logs against what is known of the challenge's text."""

import re
import statistics
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from stages.common.clock import OFFICIAL_BYTES
from tools.check_record.finding import BUDGET_SECONDS, Finding, shown
from tools.check_record.folder import README, SUMMARY, Folder, renamed
from tools.check_record.logs import Log

# Targets of the challenge's validation set by tokenizer, as accepted logs count them, with and without the tail.
TOKENS = {40_540_160: "SP8192", 47_851_520: "CaseOps", 47_853_343: "CaseOps with the tail"}
BYTES_TOLERANCE = 5e-4  # counts of the same text differ by 4e-5
WRONG_TOKENS = {9_662_464: "the first 10,000 documents", 36_562_944: "a partition that lost shards"}
WRONG_BYTES = {
    164_594_398: "CaseOps' transformed text, the sidecar off",
    157_319_833: "byte-fallback pieces counted as three bytes",
}
SUBSET_TOKENS = (3_000_000, 5_000_000, 8_000_000)
TRAIN_SHARDS = (80, 128)  # of SP8192, as the logs of accepted records show them
SUBSET = re.compile(
    r"\bsubset\b|\bfirst [\d,.]+ ?[kM]? (?:val )?(?:tokens|docs|documents|targets)|\bprefix of [\d,.]+|\bppm_mix\b",
    re.IGNORECASE,
)
LEAST_SEEDS = 3


def findings(folder: Folder) -> Iterator[Finding]:
    """Every finding about scores, counts, clocks and seeds."""
    yield from _seeds(folder)
    yield from _seed_scores(folder)
    yield from _means(folder)
    for log in folder.logs:
        yield from _counts(folder, log)
        yield from _clocks(folder, log)
    for seed, row in folder.seed_results.items():
        yield from _stated_clocks(folder, f"seed {seed}: ", row)
    yield from _stated_clocks(folder, "", renamed(folder.summary))
    measured = folder.summary.get("measured")
    for seed, row in measured.items() if isinstance(measured, dict) else ():
        yield from _stated_clocks(folder, f"seed {seed}: ", renamed(row) if isinstance(row, dict) else {})
    yield from _subsets(folder)


def agrees(stated: float, seen: float, text: str | None = None) -> bool:
    """Whether `stated` is `seen`, rounded to the digits in which it is written (`text`, else the shortest that give it back)."""
    return abs(stated - seen) <= 0.51 * _last_digit(text if text is not None else repr(stated))


def _last_digit(number: str) -> float:
    """What one in the last written digit is worth.

    >>> _last_digit("1.081"), _last_digit("2e-05")
    (0.001, 1e-05)
    """
    exponent = Decimal(number).as_tuple().exponent
    return 10.0 ** min(0, exponent) if isinstance(exponent, int) else 1.0


def _seeds(folder: Folder) -> Iterator[Finding]:
    claimed, logged = folder.claimed_seeds, {log.seed for log in folder.logs}
    for seed in claimed:
        if folder.log_of(seed) is None:
            yield Finding(SUMMARY, f"seed {seed} is claimed, and no log is of it", "#2124, #1902")
    for seed in sorted(seed for seed in logged if seed is not None and claimed and seed not in claimed):
        yield Finding(
            SUMMARY,
            f"a log of seed {seed} lies here, and the record leaves it out",
            "#1769: the best five of seven",
        )
    if folder.is_record and 0 < len(claimed) < LEAST_SEEDS:
        yield Finding(SUMMARY, f"{len(claimed)} seeds; a record needs {LEAST_SEEDS}", "#1902, #2124")
    if not folder.logs:
        yield Finding("logs", "there is none: no figure can be checked", "#2124")


def _seed_scores(folder: Folder) -> Iterator[Finding]:
    for seed, row in folder.seed_results.items():
        log = folder.log_of(seed)
        if "val_bpb" not in row or log is None or not log.scores:
            continue
        if not any(
            agrees(row["val_bpb"], score.bpb) or agrees(score.bpb, row["val_bpb"]) for score in log.final
        ):
            seen = ", ".join(str(score.bpb) for score in log.final) or "only diagnostics"
            yield Finding(
                SUMMARY, f"seed {seed}: val_bpb {row['val_bpb']} is not in its log, which has {seen}", "#2118"
            )
        steps = row.get("steps", renamed(folder.summary).get("steps"))
        if isinstance(steps, int) and log.steps is not None and steps != log.steps:
            yield Finding(
                SUMMARY, f"seed {seed}: {shown(steps)} steps, its log says {shown(log.steps)}", "#1858"
            )


def _means(folder: Folder) -> Iterator[Finding]:
    scores = [row["val_bpb"] for row in folder.seed_results.values() if "val_bpb" in row]
    stated: dict[str, Any] = folder.summary
    mean, deviation = stated.get("val_bpb"), stated.get("val_bpb_std")
    if not isinstance(mean, (int, float)):
        yield Finding(SUMMARY, "states no val_bpb", "rules: val_bpb is reported")
        return
    slack = 0.51 * max((_last_digit(repr(score)) for score in scores), default=1.0)
    if scores and not agrees(mean, statistics.fmean(scores)) and abs(mean - statistics.fmean(scores)) > slack:
        yield Finding(
            SUMMARY, f"val_bpb {mean} is not the mean of its seeds, {statistics.fmean(scores):.8f}", "#2118"
        )
    if isinstance(deviation, (int, float)) and len(scores) > 1:
        found = statistics.stdev(scores)
        if not agrees(deviation, found) and abs(deviation - found) > 2 * slack:
            yield Finding(
                SUMMARY,
                f"val_bpb_std {deviation} is not the sample deviation of its seeds, {found:.8f}",
                "#2118",
            )
    single = [log for log in folder.logs if log.final]
    if not scores and len(single) == 1 and not any(agrees(mean, score.bpb) for score in single[0].final):
        yield Finding(SUMMARY, f"val_bpb {mean} is not in {single[0].name}", "#2118")


def _counts(folder: Folder, log: Log) -> Iterator[Finding]:
    """Tokens and bytes that were scored: the declared ones where a folder of another track declares them, else the challenge's."""
    if not log.final:
        return
    declared = folder.summary.get("coverage")
    if isinstance(declared, dict) and not folder.is_record:
        for key, said in (("targets", log.tokens), ("bytes", log.bytes)):
            if said is not None and declared.get(key) != said:
                yield Finding(
                    log.name,
                    f"scored {shown(said)} {key}, {SUMMARY} declares {shown(declared.get(key))}",
                    "#1923",
                )
        return
    yield from _tokens(log)
    seen = log.scored_bytes
    if seen is None or _is_official(seen):
        return
    known = next(
        (words for size, words in WRONG_BYTES.items() if abs(seen / size - 1) < BYTES_TOLERANCE), None
    )
    what = "its val_bytes" if log.bytes is not None else "its loss and bpb"
    reason = known or (
        "leading spaces counted twice"
        if 1.15 < seen / OFFICIAL_BYTES < 1.18
        else "another text, or another count of it"
    )
    message = f"{what} mean {seen:,.0f} bytes, the challenge's text has {shown(OFFICIAL_BYTES)} ({seen / OFFICIAL_BYTES - 1:+.2%}): {reason}"
    yield Finding(log.name, message, "#1698, #1184, #2138")


def _is_official(counted_bytes: float) -> bool:
    return abs(counted_bytes / OFFICIAL_BYTES - 1) <= BYTES_TOLERANCE


def _tokens(log: Log) -> Iterator[Finding]:
    if log.tokens is None:
        yield Finding(log.name, "does not say how many tokens were scored", "#1785, #1835, #1858")
    elif log.tokens in WRONG_TOKENS:
        yield Finding(
            log.name, f"scored {shown(log.tokens)} tokens: {WRONG_TOKENS[log.tokens]}", "#1854, #1923, #2109"
        )
    elif log.tokens in SUBSET_TOKENS:
        yield Finding(log.name, f"scored {shown(log.tokens)} tokens, a subset", "#1785, #1835, #1858")
    elif log.tokens not in TOKENS and not (log.scored_bytes and _is_official(log.scored_bytes)):
        known = ", ".join(f"{shown(count)} ({name})" for count, name in TOKENS.items())
        yield Finding(log.name, f"scored {shown(log.tokens)} tokens; known are {known}", "#2109")
    if log.documents == 0:
        yield Finding(log.name, "no documents: BOS was not written", "#1736, #1769, #1779")
    if log.shards is not None and log.shards > max(TRAIN_SHARDS):
        yield Finding(
            log.name,
            f"{shown(log.shards)} train shards, where there are {max(TRAIN_SHARDS)}: val documents may be in train",
            "#2018, #2130",
        )
    elif log.shards is not None and log.shards < min(TRAIN_SHARDS):
        yield Finding(
            log.name, f"{log.shards} train shards of {min(TRAIN_SHARDS)} or {max(TRAIN_SHARDS)}", "#1851"
        )


def _clocks(folder: Folder, log: Log) -> Iterator[Finding]:
    if not folder.is_record:
        return
    if log.train_seconds is not None:
        calibration = log.hessian_seconds or 0.0
        if log.train_seconds > BUDGET_SECONDS:
            yield Finding(log.name, f"trained for {log.train_seconds:.1f} s", "#1908, #1945")
        elif log.train_seconds + calibration > BUDGET_SECONDS:
            total = (
                f"{log.train_seconds:.1f} s of training and {calibration:.1f} s of Hessians on training data"
            )
            yield Finding(log.name, f"{total} are over {BUDGET_SECONDS:g} s", "#1851, #1855, #2135")
    if log.eval_seconds is not None and log.eval_seconds > BUDGET_SECONDS:
        yield Finding(log.name, f"evaluated for {log.eval_seconds:.1f} s", "#1129, #1933, #1972")


def _stated_clocks(folder: Folder, who: str, row: dict[str, Any]) -> Iterator[Finding]:
    for key in ("train_seconds", "eval_seconds"):
        seconds = row.get(key)
        if folder.is_record and isinstance(seconds, (int, float)) and seconds > BUDGET_SECONDS:
            yield Finding(SUMMARY, f"{who}{key} {seconds} is over {BUDGET_SECONDS:g}", "#1908, #1972")


def _subsets(folder: Folder) -> Iterator[Finding]:
    """Words that mark a score over a part of the text."""
    texts = {SUMMARY: str(folder.summary), README: folder.readme} | {
        log.name: log.text for log in folder.logs
    }
    for where, text in texts.items():
        found = SUBSET.search(text)
        if found:
            yield Finding(where, f"says {found[0]!r}: a score over a part of the text", "#1785, #1835, #1858")
