"""Entry point of train_gpt.py: with `eval`, fork the decode process before torch is imported."""

import sys
from typing import Any

from stages.pack.file.decode_process import DecodeProcess


def main(parameters: dict[str, Any]) -> None:
    """Run the command line of train_gpt.py with the parameters that the file contains."""
    decoder = DecodeProcess() if sys.argv[1:2] == ["eval"] else None
    from stages.bundle.program import cli  # imports torch

    cli.main(parameters, decoder)
