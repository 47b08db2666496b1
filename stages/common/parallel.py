"""One rank's view of a run: parameters, device, determinism, process groups and collectives.

Everything that differs between one CPU, one GPU and torchrun. `distributed()` sets a rank up and
yields its `World`, whose collectives work with one process too. torchrun starts the ranks
(torchrun.py), which wait for each other (rendezvous.py) and end together (failure_detector.py).
Only rank 0 writes outputs.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Protocol

import torch
import torch.distributed as dist

from stages.common import cpu_math, rendezvous
from stages.common.concurrency import die_with_parent
from stages.common.config import reject, require_positive
from stages.common.failure_detector import (
    FailureDetector,
    is_local_rank_zero,
    report_delay,
    report_failure,
)

# Timeouts of a collective, on the device and on the host. A rank that dies is noticed at once
# (failure_detector.py), so these are for one that hangs, and may be generous: ranks compile side by
# side, and wait on the host for rank 0 while it packs.
DEVICE_TIMEOUT = timedelta(minutes=10)
HOST_TIMEOUT = timedelta(minutes=30)
# torch 2.13 renamed both, and warns when it is called by the names that 2.11 has.
_reduce_scatter = (
    dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
)
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


@dataclass(frozen=True)
class ParallelParams:
    """The section `parallel`: it changes the speed and the last bits of results, not what is computed."""

    nproc: int
    threads: int
    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["auto", "float32", "bfloat16"]
    deterministic: bool
    compile: bool
    kernels: bool

    def __post_init__(self) -> None:
        require_positive(self, "nproc", "threads")
        if self.device == "cpu" and self.dtype == "bfloat16":
            reject("dtype", "bfloat16 needs device cuda; on CPU everything is float32")


class Work(Protocol):
    """A running collective, as in torch.distributed; its tensors must not be touched before `wait`."""

    def wait(self) -> object:
        """Wait for the result.

        With gloo the host waits; with NCCL only the work that is queued on the device after this
        call.
        """


class CompletedWork:
    """A collective that is complete already, as in a run of one process."""

    def wait(self) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them.

    Shapes of the collectives: n rows of one rank, W ranks.
    """

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype
    compile: bool
    # gloo, for values on the host: agreeing on them need not wait for the GPU. None for one
    # process.
    host_group: dist.ProcessGroup | None
    kernels: bool = False  # fused kernels instead of plain operations
    is_local_rank_zero: bool = True  # on one process of each machine

    @property
    def is_main(self) -> bool:
        """True on the process that writes the outputs."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce `tensor` in place with SUM over all ranks."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def mean_(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce `tensor` in place with the mean over all ranks."""
        return self.sum_(tensor).div_(self.size) if self.size > 1 else tensor

    def reduce_scatter_mean(self, output: torch.Tensor, input: torch.Tensor) -> Work:
        """Start to reduce `input` (W * n, ...) over all ranks.

        `output` (n, ...) gets this rank's rows of the mean.
        """
        if self.size > 1:
            return _reduce_scatter(output, input, op=dist.ReduceOp.AVG, async_op=True)
        return _copy(output, input)

    def all_gather(self, output: torch.Tensor, input: torch.Tensor) -> Work:
        """Start to gather every rank's `input` (n, ...) into `output` (W * n, ...).

        `input` may be this rank's rows of `output`.
        """
        if self.size > 1:
            return _all_gather(output, input, async_op=True)
        return _copy(output, input)

    def max_of(self, value: float) -> float:
        """The largest of a number over all ranks, reduced on the host."""
        if self.size == 1:
            return value
        largest = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.host_group)
        return float(largest.item())

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.host_group)

    def synchronize(self) -> None:
        """Wait until the device has finished all work that was put on it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextlib.contextmanager
def distributed(params: ParallelParams, compiles: bool = False) -> Iterator[World]:
    """Set up the device, determinism and, under torchrun, the process groups.

    The groups are torn down at the end. `compiles` allows torch.compile where `parallel.compile`
    asks for it: training does, evaluation does not.
    """
    # This process among the ranks that torchrun started, if it did.
    die_with_parent()
    rank = int(os.environ.get("RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    device = _device(params, int(os.environ.get("LOCAL_RANK", "0")))
    dtype = activation_dtype(params, device)

    uses_compiler = compiles and params.compile and device.type == "cuda"
    set_determinism(params, device, uses_compiler)

    with _process_groups(rank, size, device) as host_group:
        kernels = uses_kernels(params, device)
        yield World(
            rank,
            size,
            device,
            dtype,
            uses_compiler,
            host_group,
            kernels=kernels,
            is_local_rank_zero=is_local_rank_zero(),
        )


def set_determinism(params: ParallelParams, device: torch.device, compiles: bool) -> None:
    """Fix the instruction set, the number of threads, TF32, and the algorithms.

    Deterministic algorithms are used always on CPU, and on request on CUDA.
    """
    cpu_math.require_avx2()
    cpu_math.install()
    torch.set_num_threads(params.threads)
    # torch would fill new tensors, which are all written before they are read; that takes 2 % of a
    # step. (The attribute is a property of the module, which mypy does not see.)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_tf32 = not params.deterministic
    torch.backends.cudnn.allow_tf32 = not params.deterministic

    deterministic = params.deterministic or device.type == "cpu"
    if deterministic and device.type == "cuda":
        # cuBLAS reads this when the first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if compiles:
        torch.use_deterministic_algorithms(deterministic)
    else:
        # The same effect on code that is not compiled, without importing the compiler, which takes
        # two seconds.
        torch.set_deterministic_debug_mode("error" if deterministic else "default")


@contextlib.contextmanager
def _process_groups(rank: int, size: int, device: torch.device) -> Iterator[dist.ProcessGroup | None]:
    """Set up the process groups and the failure detector; yields the host group, None for one process."""
    if size == 1:
        yield None
        return

    store, connections = rendezvous.connect_ranks(rank, size)
    with FailureDetector(rank, connections, report_delay, report_failure):
        # The groups are set up through this store, where ranks wait for each other as in a
        # collective; init_process_group leaves the timeout of a store that it is given as it is.
        store.set_timeout(DEVICE_TIMEOUT)
        gpu = device if device.type == "cuda" else None
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=DEVICE_TIMEOUT,
            device_id=gpu,
        )
        yield dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
        # Not after an error: NCCL would wait for the other ranks. The process ends, and its groups
        # with it.
        dist.destroy_process_group()


def _copy(output: torch.Tensor, input: torch.Tensor) -> Work:
    if output.data_ptr() != input.data_ptr():
        output.copy_(input)
    return CompletedWork()


def _device(params: ParallelParams, local_rank: int) -> torch.device:
    if params.device == "cpu" or (params.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("parallel.device: it is cuda, but torch sees no CUDA device; use cpu or auto")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"parallel.nproc: process {local_rank} has no GPU of its own,"
            f" {torch.cuda.device_count()} are visible"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def uses_kernels(params: ParallelParams, device: torch.device) -> bool:
    """True if the fused kernels run; they are written for bfloat16 on CUDA."""
    return params.kernels and device.type == "cuda" and activation_dtype(params, device) == torch.bfloat16


def activation_dtype(params: ParallelParams, device: torch.device) -> torch.dtype:
    """The dtype of activations on a device; a ValueError for bfloat16 on CPU."""
    if params.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if params.dtype == "bfloat16" and device.type == "cpu":
        raise ValueError("parallel.dtype: bfloat16 needs a CUDA device; on CPU everything is float32")
    return torch.bfloat16 if params.dtype == "bfloat16" else torch.float32
