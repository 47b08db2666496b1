"""Show the parameters and tensors of a model.bin, read from the file alone."""

import argparse
import json
import os
import sys
from pathlib import Path

from stages.common.cli_errors import user_errors
from stages.pack.file import container
from stages.pack.stats import layers_tsv
from tools import errors_name, require_file


def main(argv: list[str] | None = None) -> None:
    """Print the model's parameters and a table of its tensors; a file that is not valid exits with code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.inspect_model",
        description="Print the tensors and the parameters of a model.bin. Nothing but the file is read.",
    )
    parser.add_argument("file", type=Path, help="a model.bin")
    path: Path = parser.parse_args(argv).file
    with user_errors("inspect_model"):
        blob = require_file(path, "run `dvc repro pack` first, or name another").read_bytes()
        with errors_name(path):
            contents = container.parse(blob)

    try:
        print(layers_tsv.text_table(layers_tsv.stats_of_file(contents.tensors, len(blob))), end="")
        print(f"model: {json.dumps(contents.model, sort_keys=True)}", flush=True)
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe. Python flushes again at exit, which must
        # not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
