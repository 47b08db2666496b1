"""Seconds of an evaluation's start: each step of the stage, timed from the start of its process.

    python -m benchmarks.start sliding_eval --params FILE --model FILE --val FOLDER --tokenizer FILE \\
        --output FOLDER

The options are those of the stage (sliding_eval or ttt_eval). Kernels are compiled into an empty cache.
Lines of the process that decodes the model are indented.
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

# Functions of the module stages.scoring.evaluate, or that it calls, which are timed.
TIMED = (
    "PendingModel",
    "open_stream_for_model",
    "build_model",
    "warm_up_kernels",
    "score",
    "write_results",
)
INDENT = 28 * " "


@functools.cache
def beginning() -> float:
    """Seconds since boot at which this process, or the one that it was forked from, was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - clock.process_seconds()


def now() -> float:
    """Seconds since `beginning`."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - beginning()


@contextlib.contextmanager
def timed(name: str) -> Iterator[None]:
    """Print when the work inside began and ended, and how long it took."""
    began = now()
    yield
    ended = now()
    print(f"{began:7.2f} to {ended:7.2f}, {ended - began:6.2f} s: {name}", flush=True)


def in_time(holder: Any, name: str, label: str = "") -> None:
    """Replace a function of the module or class `holder` by one that is timed."""
    function = getattr(holder, name)

    def call(*arguments: Any, **named: Any) -> Any:
        with timed(label or name):
            return function(*arguments, **named)

    setattr(holder, name, call)


def decode_in_time() -> None:
    """Time the process that decodes: its imports, its compiling, and its decoding, which waits for both."""
    serve = decode_process._serve

    def call(*arguments: Any) -> None:
        with timed(INDENT + "imports of the process that decodes"):
            event = importlib.import_module("numba.core.event")
            codec = importlib.import_module("stages.pack.entropy.codecs")
            importlib.import_module("stages.pack.forms")
        in_time(codec, "compile_ahead", INDENT + "compile_ahead")
        in_time(decode_process, "thread_map", INDENT + "decode, compiling awaited")
        with event.install_timer(
            "numba:compile", lambda seconds: print(f"{INDENT}{seconds:.2f} s of compiling", flush=True)
        ):
            serve(*arguments)

    setattr(decode_process, "_serve", call)  # noqa: B010  (mypy does not let a module's function be assigned to)


def main() -> None:
    """Run the stage with its steps timed."""
    # The process that decodes is started before the stage is imported, as the stage itself does it.
    print(f"{now():7.2f}: begun", flush=True)
    decode_in_time()
    begun = decode_process.DecodeProcess()
    with timed("imports"):
        stage: Any = importlib.import_module(f"stages.{sys.argv[1]}.stage")
        evaluate: Any = importlib.import_module("stages.scoring.evaluate")
        launch = importlib.import_module("stages.common.stage").launch

    in_time(evaluate.PendingModel, "wait")
    for name in TIMED:
        in_time(evaluate, name)

    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        launch(stage.STAGE, functools.partial(stage.main, decoder=begun), sys.argv[2:])


if __name__ == "__main__":
    main()
