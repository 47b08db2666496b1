"""Processes, devices and determinism: everything that differs between one CPU, one GPU and torchrun.

A stage with `parallel.nproc` above 1 that was not started by torchrun runs torchrun over the same command, so that
`python -m stages.train` and `torchrun --nproc-per-node=8 -m stages.train` are the same run. Over several machines torchrun is started by
hand, on each; rank 0 alone writes.
"""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import active_children
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch.distributed import run as torchrun
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.rendezvous import rendezvous

from stages.common import cpu_math
from stages.common.config import reject, require_positive
from stages.common.failure_detector import Lifeline, connect, end_with_parent

# From the first rank's start to the last one's. They start together and import torch; the audit reads the validation text as well.
MEETING = timedelta(minutes=2)
ANSWER_SECONDS = 10.0  # of a machine that is known to be there
# Of a collective. A rank that dies is noticed at once (failure_detector.py), so these are for one that hangs, and may be generous: ranks
# compile side by side, and wait on the host for rank 0 while it packs.
DEVICE_PATIENCE, HOST_PATIENCE = timedelta(minutes=10), timedelta(minutes=30)
# How long a rank says nothing of the end of one on its machine: torchrun sees that end too, stops the others, and names the cause; a
# rank that spoke at once would be taken for it. torchrun looks ten times a second, but a killed process that held a GPU is slow to go.
SILENCE_SECONDS = 4.0
USER_ERROR = 2  # the exit code of a stage that stops for what a user can mend
# torch 2.13 renamed both, and warns when it is called by the names that 2.11 has.
_reduce_scatter = (
    dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
)
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


@dataclass(frozen=True)
class ParallelParams:
    """The section `parallel`: it changes speed, and the last bits of results, but not what is computed."""

    nproc: int  # processes on this machine, one for each GPU
    threads: int  # threads of one process on CPU; part of a result's identity (sums are split over them)
    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["auto", "float32", "bfloat16"]  # of activations; auto is float32 on CPU, bfloat16 on CUDA
    deterministic: bool  # deterministic kernels only; on CPU always on
    compile: bool  # torch.compile of training on CUDA; on CPU never
    kernels: bool  # fused kernels, on CUDA in bfloat16; elsewhere the plain operations

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
    host_group: (
        dist.ProcessGroup | None
    )  # gloo: for host values, so that agreeing on them does not wait for the GPU
    kernels: bool = False  # fused kernels instead of plain operations

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
    """Run `program`, a module or a .py file, under torchrun and exit, when `nproc` asks for several and this is none of them.

    What a rank says of a user's error is an error of this process too; a rank that dies in another way is a ChildProcessError.
    """
    if params.nproc == 1 or "RANK" in os.environ:
        return
    end_with_parent()
    for idle in active_children():  # a process that only starts others has no use for its own
        idle.terminate()
    os.environ.setdefault("OMP_NUM_THREADS", str(params.threads))  # torchrun warns when it chooses
    module = [] if program.endswith(".py") else ["-m"]
    try:
        torchrun.run(
            torchrun.parse_args(
                ["--standalone", f"--nproc-per-node={params.nproc}", *module, program, *arguments]
            )
        )
    except ChildFailedError as failed:
        raise _reason(failed) from None
    except SignalException as stopped:
        raise SystemExit(128 + stopped.sigval) from None
    raise SystemExit(0)


@contextlib.contextmanager
def world(params: ParallelParams, compiles: bool = False) -> Iterator[World]:
    """Set up device, determinism and, under torchrun, the process group; tear the group down at the end. `compiles`: what trains, may."""
    end_with_parent()
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = _device(params, int(os.environ.get("LOCAL_RANK", "0")))
    dtype = activation_dtype(params, device)
    compiles = compiles and params.compile and device.type == "cuda"
    set_determinism(params, device, compiles)
    with _company(rank, size, device) as host_group:
        yield World(rank, size, device, dtype, compiles, host_group, kernels=uses_kernels(params, device))


def set_determinism(params: ParallelParams, device: torch.device, compiles: bool) -> None:
    """Instruction set, threads, TF32, and deterministic algorithms (always on CPU, on request on CUDA)."""
    cpu_math.require_avx2()
    cpu_math.install()
    torch.set_num_threads(params.threads)
    # Filling what is written to before it is read takes a fiftieth of a step's time. (The module's attribute is a property.)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_tf32 = not params.deterministic
    torch.backends.cudnn.allow_tf32 = not params.deterministic
    deterministic = params.deterministic or device.type == "cpu"
    if deterministic and device.type == "cuda":
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS reads it when the first handle is made
    if compiles:
        torch.use_deterministic_algorithms(deterministic)
    else:  # the same for what is not compiled, without importing the compiler: two seconds of each stage
        torch.set_deterministic_debug_mode("error" if deterministic else "default")


def leave_word(reason: str) -> None:
    """Leave the reason of this rank's end where torchrun, if it started this process, finds it for its summary."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        record = {"message": {"message": reason, "extraInfo": {"timestamp": str(int(time.time()))}}}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(record), encoding="utf-8")


def excuse(reason: str) -> None:
    """Tell the ranks that wait for this one, if there are any, why it will not come."""
    if _torchrun_holds_the_store():
        with contextlib.suppress(ConnectionError, dist.DistError):  # its machine may be gone
            _store().set(f"ready/{os.environ['RANK']}", reason)


def speaks_for_its_machine() -> bool:
    """Whether this process, of all ranks on its machine, says what every one of them knows."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextlib.contextmanager
def _company(rank: int, size: int, device: torch.device) -> Iterator[dist.ProcessGroup | None]:
    """The process groups and the lifeline of several ranks; gives the group of the hosts, None for a rank alone."""
    if size == 1:
        yield None
        return
    try:
        store = _meet(rank, size)
        lines = connect(rank, size, os.environ["MASTER_ADDR"], store, MEETING.total_seconds())
    except dist.DistNetworkError as error:
        raise ConnectionError(_unreachable(error)) from None
    with Lifeline(rank, lines, _stay, _speak):
        gpu = device if device.type == "cuda" else None
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=DEVICE_PATIENCE,
            device_id=gpu,
        )
        yield dist.new_group(backend="gloo", timeout=HOST_PATIENCE)
        dist.destroy_process_group()  # not after an error: NCCL would wait for the others; the process ends and its groups with it


def _meet(rank: int, size: int) -> Store:
    """Wait until every rank is there; a ConnectionError with the reason of one that will not come."""
    keys = [f"ready/{other}" for other in range(size)]
    store = _store()
    store.set(keys[rank], "")
    try:
        store.wait(keys, MEETING)
    except dist.DistStoreError:
        absent = [other for other, key in enumerate(keys) if not store.check([key])]
        waited = f"{MEETING.total_seconds():.0f} s"
        raise ConnectionError(
            f"ranks {absent} of {size} did not come within {waited}; the output on their machine may say why"
        ) from None
    for other, key in enumerate(keys):
        if word := store.get(key).decode():
            time.sleep(_stay(other))
            raise ConnectionError(f"rank {other} failed: {word}")
    store.set_timeout(DEVICE_PATIENCE)
    return store


def _store() -> Store:
    """What rank 0's machine keeps for all ranks."""
    if (
        _torchrun_holds_the_store()
    ):  # then it is there by now, and torch's own client would knock for long, and loudly
        try:
            socket.create_connection(
                (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), ANSWER_SECONDS
            ).close()
        except OSError as error:
            raise ConnectionError(_unreachable(error)) from None
    store, _, _ = next(rendezvous("env://", timeout=MEETING))
    return PrefixStore(f"caddie/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _unreachable(error: Exception) -> str:
    return f"rank 0's machine, {os.environ['MASTER_ADDR']}, does not answer ({str(error).splitlines()[0]}); the output there may say why"


def _torchrun_holds_the_store() -> bool:
    """Whether the store is there before any rank is; else rank 0 makes it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _stay(other: int) -> float:
    """Seconds that this rank outlives another's end; those that do not speak for their machine leave the one that does the time to."""
    first = int(os.environ["RANK"]) - int(os.environ.get("LOCAL_RANK", "0"))
    beside = first <= other < first + int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return (SILENCE_SECONDS if beside else 0.0) + (0.0 if speaks_for_its_machine() else 1.0)


def _speak(reason: str) -> None:
    with contextlib.suppress(OSError):  # a full disk or a closed terminal must not keep this rank alive
        if speaks_for_its_machine():
            sys.stderr.write(f"error: {reason}\n")
            sys.stderr.flush()
        leave_word(reason)


def _reason(failed: ChildFailedError) -> BaseException:
    """The exception that says in one line which rank ended first, and how."""
    rank, first = failed.get_first_failure()
    record = first.error_file_data["message"]
    if first.exitcode == USER_ERROR and isinstance(record, dict):  # what `leave_word` left
        said = 0 in failed.failures and failed.failures[0].exitcode == USER_ERROR
        return SystemExit(USER_ERROR) if said else ValueError(f"rank {rank} failed: {record['message']}")
    if first.exitcode < 0:
        return ChildProcessError(f"rank {rank} (process {first.pid}) was killed by {first.signal_name()}")
    return ChildProcessError(
        f"rank {rank} (process {first.pid}) ended with exit code {first.exitcode}; the lines above say why"
    )


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
        raise ValueError(
            f"parallel.nproc: process {local_rank} has no GPU of its own, {torch.cuda.device_count()} are visible"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def uses_kernels(params: ParallelParams, device: torch.device) -> bool:
    """Whether the fused kernels run: they are written for bfloat16 on CUDA."""
    return params.kernels and device.type == "cuda" and activation_dtype(params, device) == torch.bfloat16


def activation_dtype(params: ParallelParams, device: torch.device) -> torch.dtype:
    """The dtype of activations that `parallel.dtype` means on a device."""
    if params.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if params.dtype == "bfloat16" and device.type == "cpu":
        raise ValueError("parallel.dtype: bfloat16 needs a CUDA device; on CPU everything is float32")
    return torch.bfloat16 if params.dtype == "bfloat16" else torch.float32
