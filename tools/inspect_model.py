"""Print what a model.bin holds, from the file alone: `python -m tools.inspect_model model.bin`."""

import argparse
import json
from pathlib import Path

from stages.common.cli_errors import refusing
from stages.pack.file import container
from stages.pack.stats import layers_tsv


def main(argv: list[str] | None = None) -> None:
    """Print the model's parameters and a table of the tensors; exits 2, with one line, on a file that is not lawful."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.inspect_model", description="Say what a model.bin holds."
    )
    parser.add_argument("file", type=Path, help="a model.bin")
    path: Path = parser.parse_args(argv).file
    with refusing("inspect_model"):
        blob = path.read_bytes()
        contents = container.read(blob)
    print(layers_tsv.aligned(layers_tsv.rows_of(contents.entries, len(blob))), end="")
    print(f"model: {json.dumps(contents.model, sort_keys=True)}")


if __name__ == "__main__":
    main()
