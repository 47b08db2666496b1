"""What train_gpt.py does first: with `eval`, it begins the process that decodes. Only then it imports torch, with all that needs it."""

import sys
from typing import Any

from stages.pack.file.decode_process import Decoder


def main(parameters: dict[str, Any]) -> None:
    """The command line of train_gpt.py, with the parameters that it carries."""
    decoder = Decoder() if sys.argv[1:2] == ["eval"] else None
    from stages.bundle.program import cli

    cli.main(parameters, decoder)
