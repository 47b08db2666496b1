"""The command line and the results file that benchmarks and experiments have in common."""

import argparse
import json
from pathlib import Path
from typing import Any


def command_line(description: str | None) -> argparse.ArgumentParser:
    """A parser whose --help prints a module's docstring as it is written."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=formatter)


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write a JSON file whose keys are sorted, so that two runs can be compared line by line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")
