"""Options, fixtures and the clean-up that every test gets."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import stages  # noqa: F401  (pins the instruction set, which numpy and torch read when they are imported)

# isort: split
import numpy as np
import pytest
import torch
import torch.distributed as dist

from stages.common import cpu_math
from stages.common.bpb import ByteTable
from tests import byte_inputs

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = {
    "slow": "run it with `make test ARGS=--slow`",
    "gpu": "run it on a machine with a CUDA device, with `make test ARGS=--gpu`",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    for name in OPTIONS:
        parser.addoption(f"--{name}", action="store_true", help=f"also run the tests marked {name}")


def pytest_configure() -> None:
    """Set what numba and Triton read from the environment when they are imported.

    Stages that tests start inherit it. Compiled loops check array bounds. Without a GPU, Triton's kernels run
    in its interpreter.
    """
    cpu_math.install()
    os.environ.setdefault("NUMBA_BOUNDSCHECK", "1")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for name, how in OPTIONS.items():
        if not config.getoption(f"--{name}"):
            skip = pytest.mark.skip(reason=f"marked {name}: {how}")
            for item in items:
                if name in item.keywords:
                    item.add_marker(skip)


@pytest.fixture(autouse=True)
def _clean_torch() -> Iterator[None]:
    """Give each test the same start, and restore what it changed.

    That is: default dtype, random states, threads, determinism, process group.
    """
    dtype, deterministic = torch.get_default_dtype(), torch.get_deterministic_debug_mode()
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.set_num_threads(1)  # the tests run side by side
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.set_default_dtype(dtype)
    torch.set_deterministic_debug_mode(deterministic)
    torch.set_rng_state(torch_state)
    np.random.set_state(numpy_state)
    random.setstate(python_state)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree under test."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text and tokenizers, which are kept next to the repository and not in it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no shared data: this test reads ../shared/data next to the repository")
    return folder


@pytest.fixture(scope="module")
def tokenised(tmp_path_factory: pytest.TempPathFactory) -> tuple[ByteTable, np.ndarray]:
    """A tokenizer's byte table, and its tokens of some texts."""
    return byte_inputs.tokenised_texts(tmp_path_factory.mktemp("tokenizer"))
