"""Where the seconds of an evaluation's start go: the stage itself, its steps timed from the start of the process.

    python -m benchmarks.start sliding_eval --params FILE --model FILE --val FOLDER --tokenizer FILE --output FOLDER

Options are the stage's (sliding_eval or ttt_eval). Kernels are compiled into an empty cache; the process that decodes has its own clock.
"""

import contextlib
import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from numba.core import event

from stages import clock, command
from stages.pack import apart
from stages.sliding_eval import evaluate

OF_THE_STAGE = ("Unpacking", "read_stream", "scorer_of", "score", "write_results")
OF_EVALUATE = ("model_for", "rehearse")


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Print when, and for how long."""
    began = clock.process_seconds()
    yield
    ended = clock.process_seconds()
    print(f"{began:7.2f} to {ended:7.2f}, {ended - began:6.2f} s: {what}", flush=True)


def in_time(holder: ModuleType | type, name: str) -> None:
    """Time every call of what `holder` calls by this name."""
    function = getattr(holder, name)

    def call(*arguments: Any, **named: Any) -> Any:
        with timed(name):
            return function(*arguments, **named)

    setattr(holder, name, call)


def decode_in_time() -> None:
    """Time the other process, and its compiling."""
    decode = apart._decode

    def report(seconds: float) -> None:
        print(f"{seconds:27.2f} s: of which compiling", flush=True)

    def call(*arguments: Any) -> None:
        with event.install_timer("numba:compile", report), timed("the process that decodes"):
            decode(*arguments)

    setattr(apart, "_decode", call)  # noqa: B010  (mypy does not let a module's function be assigned to)


def main() -> None:
    """The stage, with its steps timed."""
    print(f"{clock.process_seconds():7.2f}: imports are done", flush=True)
    stage = importlib.import_module(f"stages.{sys.argv[1]}.__main__")
    for name in OF_THE_STAGE:
        in_time(stage, name)
    for name in OF_EVALUATE:
        in_time(evaluate, name)
    in_time(apart.Unpacking, "state")
    decode_in_time()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        command.launch(stage.STAGE, stage.main, sys.argv[2:])


if __name__ == "__main__":
    main()
