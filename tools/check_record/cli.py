"""Does a record folder add up? `python -m tools.check_record FOLDER`, for any folder of the challenge.

The exit code is 0 where nothing was found, 1 with findings, 2 where there is nothing to check.
"""

import argparse
from pathlib import Path

from stages.common.cli_errors import refusing
from tools.check_record import readme, scores, sizes, source
from tools.check_record.finding import Finding
from tools.check_record.folder import SUMMARY, Folder, read


def findings(folder: Folder) -> list[Finding]:
    """What does not add up, each once."""
    found = [Finding(SUMMARY, folder.broken, "rules: submission.json")] if folder.broken else []
    for part in (sizes.findings, scores.findings, readme.findings, source.findings):
        found += part(folder)
    return list(dict.fromkeys(found))


def report(folder: Folder, found: list[Finding]) -> str:
    """What is printed."""
    seeds = ", ".join(map(str, folder.claimed_seeds)) or "none"
    read_from = f"{folder.path}: {len(folder.logs)} logs, seeds {seeds}, {'record track' if folder.is_record else 'not the record track'}"
    lines = [read_from, *(finding.line() for finding in found)]
    lines.append(f"{len(found)} findings" if found else "nothing was found")
    return "\n".join([*lines, "not seen from here: " + "; ".join(source.BLIND)])


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.check_record",
        description="Check the folder of a record: its submission.json, README, logs and code against each other and what is known.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of one record, by whomever")
    arguments = parser.parse_args(argv)
    with refusing("check_record"):
        folder = read(arguments.folder)
    found = findings(folder)
    print(report(folder, found))
    raise SystemExit(1 if found else 0)
