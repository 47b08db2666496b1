"""Processes, devices and determinism: everything that differs between one CPU, one GPU and torchrun.

A stage with `parallel.nproc` above 1 that was not started by torchrun replaces itself with torchrun over the same command, so that
`python -m stages.train` and `torchrun --nproc-per-node=8 -m stages.train` are the same run.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.distributed as dist

from stages.config import reject, require_positive

_PR_SET_PDEATHSIG = 1  # prctl(2)
# torch 2.13 renamed both, and warns when it is called by the names that 2.11 has.
_reduce_scatter = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


@dataclass(frozen=True)
class ParallelParams:
    """The section `parallel`: it changes speed, and the last bits of results, but not what is computed."""

    nproc: int  # processes on this machine, one for each GPU
    threads: int  # threads of one process on CPU; part of a result's identity (sums are split over them)
    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["auto", "float32", "bfloat16"]  # of activations; auto is float32 on CPU, bfloat16 on CUDA
    deterministic: bool  # deterministic kernels only; on CPU always on
    compile: bool  # torch.compile on CUDA; on CPU never

    def __post_init__(self) -> None:
        require_positive(self, "nproc", "threads")
        if self.device == "cpu" and self.dtype == "bfloat16":
            reject("dtype", "bfloat16 needs device cuda; on CPU everything is float32")


class Handle(Protocol):
    """A collective under way: its tensors are the caller's again after `wait`."""

    def wait(self) -> object:
        """Until the result is there, for whatever is asked of the device next."""


class _Done:
    """The handle of what had not to be asked of anyone."""

    def wait(self) -> None:
        """Nothing is under way."""


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype
    compile: bool
    host_group: dist.ProcessGroup | None  # gloo: for host values, so that agreeing on them does not wait for the GPU

    @property
    def is_main(self) -> bool:
        """Whether this process writes the outputs."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce `tensor` in place with SUM over all ranks."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def mean_(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce `tensor` in place with the mean over all ranks."""
        return self.sum_(tensor).div_(self.size) if self.size > 1 else tensor

    def reduce_scatter_mean(self, output: torch.Tensor, input: torch.Tensor) -> Handle:
        """Begin to fill `output` (n, ...) with the mean over all ranks of this rank's rows of `input` (W * n, ...)."""
        if self.size > 1:
            return _reduce_scatter(output, input, op=dist.ReduceOp.AVG, async_op=True)
        return _copy(output, input)

    def all_gather(self, output: torch.Tensor, input: torch.Tensor) -> Handle:
        """Begin to fill `output` (W * n, ...) with every rank's `input` (n, ...), which may be this rank's rows of `output`."""
        if self.size > 1:
            return _all_gather(output, input, async_op=True)
        return _copy(output, input)

    def max_of(self, value: float) -> float:
        """The largest of a host value over all ranks, agreed on the host."""
        if self.size == 1:
            return value
        held = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(held, op=dist.ReduceOp.MAX, group=self.host_group)
        return float(held.item())

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.host_group)

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def relaunch_under_torchrun(params: ParallelParams, program: str, arguments: list[str]) -> None:
    """Replace this process by torchrun over `program`, a module or a .py file, when `nproc` asks for several and this is none of them."""
    if params.nproc == 1 or "RANK" in os.environ:
        return
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={params.nproc}"]
    torchrun += [program] if program.endswith(".py") else ["-m", program]
    os.execv(sys.executable, [sys.executable, *torchrun, *arguments])


@contextlib.contextmanager
def world(params: ParallelParams) -> Iterator[World]:
    """Set up device, determinism and, under torchrun, the process group; tear the group down at the end."""
    end_with_parent()
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = _device(params, int(os.environ.get("LOCAL_RANK", "0")))
    dtype = activation_dtype(params, device)
    set_determinism(params, device)
    host_group = None
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)
        host_group = dist.new_group(backend="gloo")
    try:
        yield World(rank, size, device, dtype, params.compile and device.type == "cuda", host_group)
    finally:
        if size > 1:
            dist.destroy_process_group()


def set_determinism(params: ParallelParams, device: torch.device) -> None:
    """Threads, TF32, and deterministic algorithms (always on CPU, on request on CUDA)."""
    torch.set_num_threads(params.threads)
    torch.backends.cuda.matmul.allow_tf32 = not params.deterministic
    torch.backends.cudnn.allow_tf32 = not params.deterministic
    deterministic = params.deterministic or device.type == "cpu"
    if deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when the first handle is made
    torch.use_deterministic_algorithms(deterministic)


def end_with_parent() -> None:
    """Ask the kernel to end this process with its parent: a killed `dvc` must not leave a training behind (treeverse/dvc#5818)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _copy(output: torch.Tensor, input: torch.Tensor) -> Handle:
    if output.data_ptr() != input.data_ptr():
        output.copy_(input)
    return _Done()


def _device(params: ParallelParams, local_rank: int) -> torch.device:
    if params.device == "cpu" or (params.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("parallel.device: cuda was asked for and torch sees no CUDA device; use cpu or auto")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(f"parallel.nproc: process {local_rank} has no GPU of its own, {torch.cuda.device_count()} are visible")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def activation_dtype(params: ParallelParams, device: torch.device) -> torch.dtype:
    """The dtype of activations that `parallel.dtype` means on a device."""
    if params.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if params.dtype == "bfloat16" and device.type == "cpu":
        raise ValueError("parallel.dtype: bfloat16 needs a CUDA device; on CPU everything is float32")
    return torch.bfloat16 if params.dtype == "bfloat16" else torch.float32
