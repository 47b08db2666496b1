"""python -m stages.pack.inspect model.bin: what a model file holds, from the file alone.

Not part of the pipeline, so that it stands beside the stage and not in its command.
"""

import argparse
import json
import sys
from pathlib import Path

from stages.pack import container, layers


def main(argv: list[str] | None = None) -> None:
    """Print the model's parameters and a table of the tensors; exits 2, with one line, on a file that is not lawful."""
    parser = argparse.ArgumentParser(prog="python -m stages.pack.inspect", description="Say what a model.bin holds.")
    parser.add_argument("file", type=Path, help="a model.bin")
    path: Path = parser.parse_args(argv).file
    try:
        blob = path.read_bytes()
        contents = container.read(blob)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: inspect: {error}\n")
        raise SystemExit(2) from None
    print(layers.aligned(layers.rows_of(contents.entries, len(blob))), end="")
    print(f"model: {json.dumps(contents.model, sort_keys=True)}")


if __name__ == "__main__":
    main()
