"""Several ranks for the price of one start: a process that has imported torch forks them.

A test calls `agree("tests.MODULE:function", sizes)`; the function takes its rank's `World` and asserts.
"""

import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from stages.common.parallel import World, distributed
from tests.factories import PARALLEL

ROOT = Path(__file__).resolve().parent.parent


def agree(function: str, sizes: Sequence[int]) -> None:
    """Run `module:function` on as many ranks as each of `sizes` says; every rank must return."""
    command = [sys.executable, "-m", "tests.ranks", function, *map(str, sizes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == sorted(
        f"rank {rank} of {size} agrees" for size in sizes for rank in range(size)
    )
    assert "deprecated" not in result.stderr


def as_rank(function: Callable[[World], None], rank: int, size: int, port: int) -> None:
    """Run `function` as one rank, in a forked process, with the environment that torchrun would set."""
    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    place = {**ours, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    with distributed(PARALLEL) as world:
        function(world)
        os.write(1, f"rank {world.rank} of {world.size} agrees\n".encode())


def main(name: str, *sizes: str) -> None:
    """Fork the ranks of each size and wait for them; exits 1 when one does not return."""
    module, _, function = name.partition(":")
    work = getattr(importlib.import_module(module), function)
    for size in map(int, sizes):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(size):
            if (child := os.fork()) == 0:
                as_rank(work, rank, size, port)
                raise SystemExit(0)
            children.append(child)
        if any(os.waitpid(child, 0)[1] for child in children):
            raise SystemExit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
