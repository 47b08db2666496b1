"""The coder in another process: the same streams and errors for several callers; its death is noticed."""

import dataclasses
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from stages.pack.artifact import pack
from stages.pack.entropy import codecs
from stages.pack.file import container
from stages.pack.file.container import Form
from stages.pack.file.encode_process import EncodeProcess
from tests.pack_inputs import AT_RATE, CORRECTED, MODEL, PACK, SILENT, hessians_of, trained_like, with_budget

FORM = Form("lattice", 1)
BY = ("adaptive", 11)  # family and quality


@pytest.fixture(scope="module")
def encode() -> Iterator[EncodeProcess]:
    codecs.compile_ahead("adaptive")  # so that no thread of ours compiles while the process is forked
    with EncodeProcess() as encoder:
        yield encoder


def raw_of(levels_RC: np.ndarray) -> tuple[bytes, ...]:
    rows, columns = levels_RC.shape
    return levels_RC.astype("<i2").tobytes(), np.float32(1).tobytes(), bytes(rows), bytes(columns)


def test_streams_are_those_that_this_process_makes(encode: EncodeProcess) -> None:
    random = np.random.Generator(np.random.PCG64(0))
    every = [np.rint(5 * random.standard_normal((20 + i, 30))) for i in range(12)]

    def one(levels_RC: np.ndarray) -> None:
        raw = raw_of(levels_RC)
        assert encode(FORM, levels_RC.shape, raw, *BY) == container.encode_streams(
            FORM, levels_RC.shape, raw, *BY
        )

    with ThreadPoolExecutor(12) as pool:  # more than there are cores
        list(pool.map(one, every))


def test_an_error_is_the_callers_and_the_process_goes_on(encode: EncodeProcess) -> None:
    beyond, within = np.full((2, 3), -32768), np.zeros((2, 3))
    for _ in range(2 * (os.cpu_count() or 1)):
        with pytest.raises(ValueError, match="a level is beyond 32767"):
            encode(FORM, beyond.shape, raw_of(beyond), *BY)
    assert len(encode(FORM, within.shape, raw_of(within), *BY)) == 4


def test_files_are_the_same_either_way(encode: EncodeProcess) -> None:
    state = trained_like()
    hessians = hessians_of(state)
    at_rate = with_budget(20_000, AT_RATE)
    for params in (
        at_rate,
        dataclasses.replace(at_rate, **CORRECTED),
        dataclasses.replace(PACK, codec=AT_RATE.codec),
    ):
        there = pack(state, hessians, MODEL, params, SILENT, encode)
        assert there == pack(state, hessians, MODEL, params, SILENT)


def test_a_killed_process_is_noticed() -> None:
    levels_RC = np.zeros((2, 3))
    with EncodeProcess() as encoder:
        pid = encoder._process.pid
        assert pid is not None
        assert len(encoder(FORM, levels_RC.shape, raw_of(levels_RC), *BY)) == 4
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ChildProcessError, match="the process that encodes the weights ended"):
            encoder(FORM, levels_RC.shape, raw_of(levels_RC), *BY)
