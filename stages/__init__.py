"""The stages of the pipeline, one package each, and the packages common and scoring that they share.

Importing this package does two things that must come before numpy and torch are imported. It pins
the instruction set, so that results do not depend on the CPU (common/instruction_set.py). And it
checks that the interpreter can run a stage at all: DVC starts `python` from PATH, which may not be
the interpreter of the project's environment, and one line that says so is better than a traceback
from the middle of an import.
"""

import sys
from importlib.util import find_spec

from stages.common import instruction_set

instruction_set.pin()

_missing = [name for name in ("torch", "numpy", "yaml") if find_spec(name) is None]
if _missing:
    sys.stderr.write(
        f"error: {sys.executable} lacks {', '.join(_missing)}; activate the project's environment"
        " (`make environment`, then `. .venv/bin/activate`) and run the command again\n"
    )
    raise SystemExit(2)
