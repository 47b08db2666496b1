"""Check the README of a record: its figures against submission.json and the logs."""

import re
from collections.abc import Iterator

from tools.check_record.finding import Finding, format_value
from tools.check_record.folder import README, SUMMARY, RecordFolder
from tools.check_record.logs import DECIMAL, Log, parse_integer
from tools.check_record.scores import equals_rounded

MIN_BYTES = 100_000  # an integer in a table that is above this may be a size


def findings(folder: RecordFolder) -> Iterator[Finding]:
    """Yield a finding for each figure that the logs do not have."""
    yield from _headline(folder)
    yield from _table_rows(folder)
    yield from _epochs(folder)
    yield from _steps(folder)


def _steps(folder: RecordFolder) -> Iterator[Finding]:
    logged = {log.steps for log in folder.logs if log.steps is not None}
    for stated in re.findall(r"\b(\d[\d,]{3,}) steps in\b", folder.readme):
        if logged and parse_integer(stated) not in logged:
            listed = ", ".join(map(format_value, sorted(logged)))
            yield Finding(README, f"says {stated} steps, the logs {listed}", "#1858")


def _headline(folder: RecordFolder) -> Iterator[Finding]:
    """Compare the first val_bpb of the text with submission.json; either may be rounded."""
    found = re.search(rf"val_bpb\W{{0,8}}{DECIMAL}", folder.readme)
    stated = folder.summary.get("val_bpb")
    if found is None or not isinstance(stated, (int, float)):
        return
    headline = float(found[1])
    if not equals_rounded(headline, stated, found[1]) and not equals_rounded(stated, headline):
        yield Finding(README, f"its val_bpb is {found[1]}, that of {SUMMARY} {stated}", "#1923, #2118")


def _table_rows(folder: RecordFolder) -> Iterator[Finding]:
    """Compare the rows of tables that have a seed in the first column with the log of that seed."""
    header: list[str] = []
    for line in folder.readme.splitlines():
        cells: list[str] = []
        if line.strip().startswith("|"):
            cells = [cell.strip(" *`") for cell in line.strip().strip("|").split("|")]

        seed = re.fullmatch(r"(?:seed )?(\d+)", cells[0]) if cells else None
        if not seed:
            is_ruler = set("".join(cells)) <= set("-: ")  # the line |---|---| below a header
            if cells and not is_ruler:
                header = cells
            continue

        log = folder.log_of(int(seed[1]))
        if log is not None:
            for title, cell in zip(header, cells, strict=False):
                yield from _cell(int(seed[1]), title.lower(), cell, log)


def _cell(seed: int, title: str, cell: str, log: Log) -> Iterator[Finding]:
    number = re.match(rf"{DECIMAL}$", cell)
    integer = re.match(r"(\d[\d,]*)(?: bytes| B)?$", cell)
    if re.search("bp[bp]", title) and number and log.scores:
        bpb = float(cell)
        if not any(equals_rounded(bpb, s.bpb, cell) or equals_rounded(s.bpb, bpb) for s in log.scores):
            yield Finding(README, f"seed {seed}: {title} {cell} is not in its log", "#1715, #2118")
    elif "step" in title and integer and log.steps is not None and parse_integer(integer[1]) != log.steps:
        yield Finding(README, f"seed {seed}: {cell} steps, its log says {format_value(log.steps)}", "#1858")
    elif integer and parse_integer(integer[1]) > MIN_BYTES and log.bytes_total is not None:
        sizes = {log.bytes_total, log.bytes_model, log.bytes_code}
        if parse_integer(integer[1]) not in sizes and re.search("byte|artifact|size|total", title):
            total = format_value(log.bytes_total)
            yield Finding(README, f"seed {seed}: {cell} bytes, its log says {total}", "#1858")


def _epochs(folder: RecordFolder) -> Iterator[Finding]:
    """Compare the epochs of test-time training that README and submission.json state with the logs."""
    logged = {log.epochs for log in folder.logs if log.epochs is not None}
    for file, text in ((README, folder.readme), (SUMMARY, str(folder.summary))):
        for stated in re.findall(r"\b(\d+)[ -]?ep(?:och)?s?\b", text):
            if logged and int(stated) not in logged:
                listed = ", ".join(map(str, sorted(logged)))
                yield Finding(file, f"says {stated} epochs, the logs say {listed}", "#1858")
                break  # one finding per file is enough
