"""Check the folder of a record, by anybody: `python -m tools.check_record FOLDER`.

Exit code 0: nothing was found; 1: there are findings; 2: there is nothing to check.
"""

import argparse
from pathlib import Path

from stages.common.cli_errors import user_errors
from tools.check_record import readme, scores, sizes, source
from tools.check_record.finding import Finding
from tools.check_record.folder import SUMMARY, RecordFolder, read_folder


def findings(folder: RecordFolder) -> list[Finding]:
    """Return all findings, each once."""
    found = []
    if folder.summary_error:
        found.append(Finding(SUMMARY, folder.summary_error, "rules: submission.json"))
    for module in (sizes, scores, readme, source):
        found += module.findings(folder)
    return list(dict.fromkeys(found))


def format_report(folder: RecordFolder, found: list[Finding]) -> str:
    """Return the text to print: the files read, the findings, and what cannot be checked."""
    seeds = ", ".join(map(str, folder.claimed_seeds)) or "none"
    track = "record track" if folder.is_record else "not the record track"
    lines = [f"{folder.path}: {len(folder.logs)} logs, seeds {seeds}, {track}"]
    lines += [finding.line() for finding in found]
    lines.append(f"{len(found)} findings" if found else "nothing was found")
    lines.append("cannot be checked from files alone: " + "; ".join(source.NOT_CHECKED))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the report; exits with 1 if there are findings."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.check_record",
        description="Check the folder of a record, by anybody:"
        " submission.json, README, logs and code against each other and against known facts.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of one record")
    arguments = parser.parse_args(argv)
    with user_errors("check_record"):
        folder = read_folder(arguments.folder)
    found = findings(folder)
    print(format_report(folder, found))
    raise SystemExit(1 if found else 0)
