"""Show the parameters and tensors of a model.bin, read from the file alone."""

import argparse
import json
from pathlib import Path

from stages.common.cli_errors import user_errors
from stages.pack.file import container
from stages.pack.stats import layers_tsv


def main(argv: list[str] | None = None) -> None:
    """Print the model's parameters and a table of its tensors; a file that is not valid exits with code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.inspect_model",
        description="Print the tensors and the parameters of a model.bin. Nothing but the file is read.",
    )
    parser.add_argument("file", type=Path, help="a model.bin")
    path: Path = parser.parse_args(argv).file
    with user_errors("inspect_model"):
        blob = path.read_bytes()
        contents = container.parse(blob)
    print(layers_tsv.text_table(layers_tsv.stats_of_file(contents.tensors, len(blob))), end="")
    print(f"model: {json.dumps(contents.model, sort_keys=True)}")


if __name__ == "__main__":
    main()
