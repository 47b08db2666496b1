"""The coder in another process: the same streams and errors for several callers; its death is noticed."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from stages.pack.artifact import pack
from stages.pack.entropy import codecs
from stages.pack.file.container import EncodedStream
from stages.pack.file.encode_process import EncodeProcess
from stages.pack.file.stream_encoder import StreamEncoder
from stages.pack.forms import TrellisForm
from tests.pack_inputs import (
    AT_RATE,
    CORRECTED,
    ENCODER,
    MODEL,
    PACK,
    SILENT,
    hessians_of,
    trained_like,
    with_budget,
)

BY = ("adaptive", 11)  # family and quality


@pytest.fixture(scope="module")
def process() -> Iterator[EncodeProcess]:
    codecs.compile_ahead("adaptive")  # so that no thread of ours compiles while the process is forked
    with EncodeProcess() as encoder:
        yield encoder


def encode(encoder: StreamEncoder, levels_RC: np.ndarray) -> tuple[EncodedStream, ...]:
    """Encode levels on the uniform grid, with a step of one."""
    rows, columns = levels_RC.shape
    raw = levels_RC.astype("<i2").tobytes(), np.float32(1).tobytes(), bytes(rows), bytes(columns)
    return encoder.encode(TrellisForm(1).layouts(levels_RC.shape), raw, *BY)


def test_streams_are_those_that_this_process_makes(process: EncodeProcess) -> None:
    random = np.random.Generator(np.random.PCG64(0))
    every = [np.rint(5 * random.standard_normal((20 + i, 30))) for i in range(12)]

    def one(levels_RC: np.ndarray) -> None:
        assert encode(process, levels_RC) == encode(ENCODER, levels_RC)

    with ThreadPoolExecutor(12) as pool:  # more than there are cores
        list(pool.map(one, every))


def test_an_error_is_the_callers_and_the_process_goes_on(process: EncodeProcess) -> None:
    beyond, within = np.full((2, 3), -32768), np.zeros((2, 3))
    for _ in range(2 * (os.cpu_count() or 1)):
        with pytest.raises(ValueError, match="a level is beyond 32767"):
            encode(process, beyond)
    assert len(encode(process, within)) == 4


def test_files_are_the_same_either_way(process: EncodeProcess) -> None:
    state = trained_like()
    hessians = hessians_of(state)
    at_rate = with_budget(20_000, AT_RATE)
    for params in (
        at_rate,
        dataclasses.replace(at_rate, **CORRECTED),
        dataclasses.replace(PACK, codec=AT_RATE.codec),
    ):
        there = pack(state, hessians, MODEL, params, process, SILENT)
        assert there == pack(state, hessians, MODEL, params, ENCODER, SILENT)


def test_a_killed_process_is_noticed() -> None:
    levels_RC = np.zeros((2, 3))
    with EncodeProcess() as encoder:
        pid = encoder._process.pid
        assert pid is not None
        assert len(encode(encoder, levels_RC)) == 4
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ChildProcessError, match="the process that encodes the weights ended"):
            encode(encoder, levels_RC)


def test_it_ends_with_its_context_even_while_it_compiles() -> None:
    started = time.monotonic()
    with EncodeProcess() as encoder:
        assert encoder._process.is_alive()
    assert not encoder._process.is_alive()
    assert time.monotonic() - started < 2


def test_the_command_forks_before_it_imports_torch() -> None:
    """The process has neither torch nor the parent's threads; `--help` does not wait for its compiling."""
    program = """
        import sys
        from stages.common import concurrency
        from stages.pack.file import encode_process

        def fork(function, *arguments):
            print("torch" in sys.modules)
            return concurrency.fork_process(function, *arguments)

        encode_process.fork_process = fork
        sys.argv = ["stages.pack", "--help"]
        from stages.pack.__main__ import main
        main()
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    first, usage = ended.stdout.split("\n", 1)
    assert first == "False"
    assert usage.startswith("usage: python -m stages.pack")
