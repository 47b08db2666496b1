"""Where the seconds of an evaluation's start go: the stage itself, its steps timed from the start of the process.

    python -m benchmarks.start sliding_eval --params FILE --model FILE --val FOLDER --tokenizer FILE --output FOLDER

Options are the stage's (sliding_eval or ttt_eval). Kernels are compiled into an empty cache; what the process that decodes
does is indented.
"""

import contextlib
import functools
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from stages.common import clock
from stages.pack.file import decode_process

OF_THE_STAGE = ("Unpacking", "read_stream", "scorer_of", "score", "write_results")
OF_EVALUATE = ("model_for", "rehearse")
INDENT = 28 * " "


@functools.cache
def beginning() -> float:
    """When this process, or the one of which it is a fork, was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - clock.process_seconds()


def now() -> float:
    """Seconds since then."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - beginning()


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Print when, and for how long."""
    began = now()
    yield
    ended = now()
    print(f"{began:7.2f} to {ended:7.2f}, {ended - began:6.2f} s: {what}", flush=True)


def in_time(holder: Any, name: str, what: str = "") -> None:
    """Time every call of what `holder` calls by this name."""
    function = getattr(holder, name)

    def call(*arguments: Any, **named: Any) -> Any:
        with timed(what or name):
            return function(*arguments, **named)

    setattr(holder, name, call)


def decode_in_time() -> None:
    """Time the other process: its imports, its compiling, and its decoding, which waits for that."""
    serve = decode_process._serve

    def call(*arguments: Any) -> None:
        with timed(INDENT + "imports of the process that decodes"):
            event = importlib.import_module("numba.core.event")
            codec = importlib.import_module("stages.pack.entropy.codecs")
            importlib.import_module("stages.pack.file.tensors")
        in_time(codec, "compile_ahead", INDENT + "compile_ahead")
        in_time(decode_process, "in_threads", INDENT + "decode, compiling awaited")
        with event.install_timer(
            "numba:compile", lambda seconds: print(f"{INDENT}{seconds:.2f} s of compiling", flush=True)
        ):
            serve(*arguments)

    setattr(decode_process, "_serve", call)  # noqa: B010  (mypy does not let a module's function be assigned to)


def main() -> None:
    """The stage, with its steps timed."""
    print(f"{now():7.2f}: begun", flush=True)
    decode_in_time()
    begun = decode_process.Decoder()
    with timed("imports"):
        stage: Any = importlib.import_module(f"stages.{sys.argv[1]}.__main__")
        evaluate = importlib.import_module("stages.scoring.evaluate")
    stage.DECODER = begun
    in_time(stage.Unpacking, "state")
    for name in OF_THE_STAGE:
        in_time(stage, name)
    for name in OF_EVALUATE:
        in_time(evaluate, name)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        stage.command.launch(stage.STAGE, stage.main, sys.argv[2:])


if __name__ == "__main__":
    main()
