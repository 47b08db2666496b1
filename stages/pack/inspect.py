"""python -m stages.pack.inspect model.bin: what a model file holds, from the file alone.

Not part of the pipeline, so that it stands beside the stage and not in its command.
"""

import argparse
import json
from pathlib import Path

from stages.misuse import refusing
from stages.pack import container, layers


def main(argv: list[str] | None = None) -> None:
    """Print the model's parameters and a table of the tensors; exits 2, with one line, on a file that is not lawful."""
    parser = argparse.ArgumentParser(prog="python -m stages.pack.inspect", description="Say what a model.bin holds.")
    parser.add_argument("file", type=Path, help="a model.bin")
    path: Path = parser.parse_args(argv).file
    with refusing("inspect"):
        blob = path.read_bytes()
        contents = container.read(blob)
    print(layers.aligned(layers.rows_of(contents.entries, len(blob))), end="")
    print(f"model: {json.dumps(contents.model, sort_keys=True)}")


if __name__ == "__main__":
    main()
