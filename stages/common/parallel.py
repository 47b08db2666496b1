"""Processes, devices and determinism: everything that differs between one CPU, one GPU and torchrun.

A stage with `parallel.nproc` above 1 that torchrun has not started runs torchrun over its own
command, so that `python -m stages.train` and `torchrun --nproc-per-node=8 -m stages.train` are the
same run. On several machines the user starts torchrun on each. Only rank 0 writes outputs.

When ranks fail, the user should read one line with the cause. It is printed by:

    user error on all ranks            rank 0 (stages/common/stage.py)
    user error on one rank only        the process that ran torchrun, from torchrun's error file
    death of a rank, same machine      the process that ran torchrun, which ends the other ranks
    death of a rank, other machine     local rank 0, from the rendezvous or the failure detector
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
from stages.common.concurrency import die_with_parent
from stages.common.config import reject, require_positive
from stages.common.failure_detector import FailureDetector, connect

# From the start of the first rank to that of the last. They start together and import torch; the
# audit also reads the validation text.
RENDEZVOUS_TIMEOUT = timedelta(minutes=2)
CONNECT_TIMEOUT_SECONDS = 10.0  # for rank 0's machine, whose store is known to be open
# Timeouts of a collective, on the device and on the host. A rank that dies is noticed at once
# (failure_detector.py), so these are for one that hangs, and may be generous: ranks compile side by
# side, and wait on the host for rank 0 while it packs.
DEVICE_TIMEOUT = timedelta(minutes=10)
HOST_TIMEOUT = timedelta(minutes=30)
# How long a rank reports nothing about the end of a rank on its own machine. torchrun sees that end
# too, stops the other ranks, and names the cause; a rank that exited first would be taken for it.
# torchrun looks ten times a second, but a killed process that held a GPU takes longer to go.
LOCAL_REPORT_DELAY_SECONDS = 4.0
USER_ERROR = 2  # exit code of a stage that stops because of something the user can mend
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


def relaunch_under_torchrun(params: ParallelParams, program: str, arguments: list[str]) -> None:
    """Run `program`, a module or a .py file, under torchrun and exit.

    Does nothing if one process is enough, or if torchrun has started this one.
    A rank's user error is raised again in this process; the death of a rank is a ChildProcessError.
    """
    if params.nproc == 1 or "RANK" in os.environ:
        return

    die_with_parent()
    for child in active_children():  # forked for this process's own work, which its ranks do instead
        child.terminate()
    os.environ.setdefault("OMP_NUM_THREADS", str(params.threads))  # torchrun warns when it chooses
    module = [] if program.endswith(".py") else ["-m"]
    torchrun_arguments = ["--standalone", f"--nproc-per-node={params.nproc}", *module, program, *arguments]
    try:
        torchrun.run(torchrun.parse_args(torchrun_arguments))
    except ChildFailedError as failed:
        raise _first_failure(failed) from None
    except SignalException as stopped:
        raise SystemExit(128 + stopped.sigval) from None
    raise SystemExit(0)


@contextlib.contextmanager
def distributed(params: ParallelParams, compiles: bool = False) -> Iterator[World]:
    """Set up the device, determinism and, under torchrun, the process groups.

    The groups are torn down at the end. `compiles` allows torch.compile where `parallel.compile`
    asks for it: training does, evaluation does not.
    """
    die_with_parent()
    rank = int(os.environ.get("RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    device = _device(params, int(os.environ.get("LOCAL_RANK", "0")))
    dtype = activation_dtype(params, device)
    uses_compiler = compiles and params.compile and device.type == "cuda"
    set_determinism(params, device, uses_compiler)
    with _process_groups(rank, size, device) as host_group:
        kernels = uses_kernels(params, device)
        yield World(rank, size, device, dtype, uses_compiler, host_group, kernels=kernels)


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


def write_torchelastic_error(reason: str) -> None:
    """Write the reason of this rank's end to torchrun's error file, if torchrun started this process."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        record = {"message": {"message": reason, "extraInfo": {"timestamp": str(int(time.time()))}}}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(record), encoding="utf-8")


def announce_failure(reason: str) -> None:
    """Tell ranks that wait for this one in the rendezvous why it will not come."""
    if _torchrun_hosts_the_store():
        with contextlib.suppress(ConnectionError, dist.DistError):  # the store's machine may be gone
            _open_store().set(f"ready/{os.environ['RANK']}", reason)


def is_local_rank_zero() -> bool:
    """True on the one rank of this machine that prints what all its ranks know."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextlib.contextmanager
def _process_groups(rank: int, size: int, device: torch.device) -> Iterator[dist.ProcessGroup | None]:
    """Set up the process groups and the failure detector; yields the host group, None for one process."""
    if size == 1:
        yield None
        return

    # Wait for all ranks, and connect each with rank 0.
    try:
        store = _rendezvous(rank, size)
        connections = connect(
            rank, size, os.environ["MASTER_ADDR"], store, RENDEZVOUS_TIMEOUT.total_seconds()
        )
    except dist.DistNetworkError as error:
        raise ConnectionError(_unreachable(error)) from None

    with FailureDetector(rank, connections, _report_delay, _report_failure):
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


def _rendezvous(rank: int, size: int) -> Store:
    """Wait until every rank has arrived; returns the store that they share.

    A ConnectionError when a rank does not arrive in time, or has announced that it will not.
    """
    keys = [f"ready/{other}" for other in range(size)]
    store = _open_store()
    store.set(keys[rank], "")
    try:
        store.wait(keys, RENDEZVOUS_TIMEOUT)
    except dist.DistStoreError:
        absent = [other for other, key in enumerate(keys) if not store.check([key])]
        waited = f"{RENDEZVOUS_TIMEOUT.total_seconds():.0f} s"
        raise ConnectionError(
            f"ranks {absent} of {size} did not arrive within {waited};"
            " the output on their machine may say why"
        ) from None

    # A rank that failed before the rendezvous has put its reason there (announce_failure).
    for other, key in enumerate(keys):
        reason = store.get(key).decode()
        if reason:
            time.sleep(_report_delay(other))
            raise ConnectionError(f"rank {other} failed: {reason}")

    # The process groups are set up through this store, where ranks wait for each other as in a
    # collective; init_process_group leaves the timeout of a store that it is given as it is.
    store.set_timeout(DEVICE_TIMEOUT)
    return store


def _open_store() -> Store:
    """Connect to the key-value store on rank 0's machine."""
    if _torchrun_hosts_the_store():
        # The store is open by now. Check that it can be reached: torch's own client would retry for
        # minutes, and print each attempt.
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            socket.create_connection(address, CONNECT_TIMEOUT_SECONDS).close()
        except OSError as error:
            raise ConnectionError(_unreachable(error)) from None
    store, _, _ = next(rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
    return PrefixStore(f"caddie/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _unreachable(error: Exception) -> str:
    address = os.environ["MASTER_ADDR"]
    cause = str(error).splitlines()[0]
    return f"rank 0's machine, {address}, does not answer ({cause}); the output there may say why"


def _torchrun_hosts_the_store() -> bool:
    """True if torchrun opened the store before it started the ranks; otherwise rank 0 opens it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _report_delay(other: int) -> float:
    """Seconds to wait before this rank reports that rank `other` has failed, and exits.

    Time for torchrun to report it first if it ran on this machine, and for local rank 0 to print
    the message before the other ranks exit.
    """
    first_of_machine = int(os.environ["RANK"]) - int(os.environ.get("LOCAL_RANK", "0"))
    is_local = 0 <= other - first_of_machine < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    seconds = LOCAL_REPORT_DELAY_SECONDS if is_local else 0.0
    if not is_local_rank_zero():
        seconds += 1.0
    return seconds


def _report_failure(reason: str) -> None:
    """Print why another rank's failure ends this one, and leave it for torchrun."""
    with contextlib.suppress(OSError):  # a full disk or a closed terminal must not keep this rank alive
        if is_local_rank_zero():
            sys.stderr.write(f"error: {reason}\n")
            sys.stderr.flush()
        write_torchelastic_error(reason)


def _first_failure(failed: ChildFailedError) -> BaseException:
    """The exception to raise for a failed torchrun, which names the rank that ended first and how."""
    rank, first = failed.get_first_failure()
    record = first.error_file_data["message"]
    if first.exitcode == USER_ERROR and isinstance(record, dict):  # from write_torchelastic_error
        rank_zero_printed_it = 0 in failed.failures and failed.failures[0].exitcode == USER_ERROR
        if rank_zero_printed_it:
            return SystemExit(USER_ERROR)
        return ValueError(f"rank {rank} failed: {record['message']}")
    if first.exitcode < 0:
        return ChildProcessError(f"rank {rank} (process {first.pid}) was killed by {first.signal_name()}")
    return ChildProcessError(
        f"rank {rank} (process {first.pid}) ended with exit code {first.exitcode}; the lines above say why"
    )


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
