"""Relaunching under torchrun: a command that needs several ranks runs torchrun over itself.

A stage with `parallel.nproc` above 1 that torchrun has not started runs torchrun over its own
command, so that `python -m stages.train` and `torchrun --nproc-per-node=8 -m stages.train` are the
same run. The command's process is then torchrun's agent: it starts the ranks, looks ten times a
second if they run, and stops all when one has failed. On several machines the user starts torchrun
on each.

Which process prints the one line with the cause, when a rank has failed:

    user error on rank 0, or on all ranks  rank 0 (stage.py)
    user error on another rank only        the agent, from torchrun's error file
    death of a rank, same machine          the agent
    any of these on another machine        local rank 0 (rendezvous.py, failure_detector.py)

If the user typed `torchrun`, the agent prints torchrun's own report instead of that line.
"""

import logging
import os
from multiprocessing import active_children

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from stages.common.cli_errors import USER_ERROR
from stages.common.concurrency import die_with_parent
from stages.common.parallel import ParallelParams


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
    # The agent logs the rank that failed and each signal that it sends; the one line here says more.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    torchrun_arguments = ["--standalone", f"--nproc-per-node={params.nproc}", *module, program, *arguments]
    try:
        run(parse_args(torchrun_arguments))
    except ChildFailedError as failed:
        raise _first_failure(failed) from None
    except SignalException as stopped:
        raise SystemExit(128 + stopped.sigval) from None
    raise SystemExit(0)


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
