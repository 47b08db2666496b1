"""The README of a folder: its figures against submission.json and the logs."""

import re
from collections.abc import Iterator

from tools.check_record.finding import Finding, shown
from tools.check_record.folder import README, SUMMARY, Folder
from tools.check_record.logs import DECIMAL, Log, whole
from tools.check_record.scores import agrees


def findings(folder: Folder) -> Iterator[Finding]:
    """Figures of the README that the logs do not have."""
    yield from _headline(folder)
    yield from _rows(folder)
    yield from _epochs(folder)
    for text in re.findall(r"\b(\d[\d,]{3,}) steps in\b", folder.readme):
        steps = {log.steps for log in folder.logs if log.steps is not None}
        if steps and whole(text) not in steps:
            yield Finding(
                README, f"says {text} steps, the logs {', '.join(map(shown, sorted(steps)))}", "#1858"
            )


def _headline(folder: Folder) -> Iterator[Finding]:
    found = re.search(rf"val_bpb\W{{0,8}}{DECIMAL}", folder.readme)
    stated = folder.summary.get("val_bpb")
    if (
        found
        and isinstance(stated, (int, float))
        and not agrees(float(found[1]), stated, found[1])
        and not agrees(stated, float(found[1]))
    ):
        yield Finding(README, f"its val_bpb is {found[1]}, that of {SUMMARY} {stated}", "#1923, #2118")


def _rows(folder: Folder) -> Iterator[Finding]:
    """Tables with a seed in the first column."""
    header: list[str] = []
    for line in folder.readme.splitlines():
        cells = (
            [cell.strip(" *`") for cell in line.strip().strip("|").split("|")]
            if line.strip().startswith("|")
            else []
        )
        seed = re.fullmatch(r"(?:seed )?(\d+)", cells[0]) if cells else None
        if not seed:
            header = cells if cells and not set("".join(cells)) <= set("-: ") else header
            continue
        log = folder.log_of(int(seed[1]))
        if log is not None:
            for title, cell in zip(header, cells, strict=False):
                yield from _cell(int(seed[1]), title.lower(), cell, log)


def _cell(seed: int, title: str, cell: str, log: Log) -> Iterator[Finding]:
    number = re.match(rf"{DECIMAL}$", cell)
    integer = re.match(r"(\d[\d,]*)(?: bytes| B)?$", cell)
    if re.search("bp[bp]", title) and number and log.scores:
        if not any(
            agrees(float(cell), score.bpb, cell) or agrees(score.bpb, float(cell)) for score in log.scores
        ):
            yield Finding(README, f"seed {seed}: {title} {cell} is not in its log", "#1715, #2118")
    elif "step" in title and integer and log.steps is not None and whole(integer[1]) != log.steps:
        yield Finding(README, f"seed {seed}: {cell} steps, its log says {shown(log.steps)}", "#1858")
    elif integer and whole(integer[1]) > 100_000 and log.bytes_total is not None:
        sizes = {log.bytes_total, log.bytes_model, log.bytes_code}
        if whole(integer[1]) not in sizes and re.search("byte|artifact|size|total", title):
            yield Finding(
                README, f"seed {seed}: {cell} bytes, its log says {shown(log.bytes_total)}", "#1858"
            )


def _epochs(folder: Folder) -> Iterator[Finding]:
    ran = {log.epochs for log in folder.logs if log.epochs is not None}
    for where, text in ((README, folder.readme), (SUMMARY, str(folder.summary))):
        for said in re.findall(r"\b(\d+)[ -]?ep(?:och)?s?\b", text):
            if ran and int(said) not in ran:
                yield Finding(
                    where, f"says {said} epochs, the logs say {', '.join(map(str, sorted(ran)))}", "#1858"
                )
                break
