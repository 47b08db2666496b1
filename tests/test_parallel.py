"""Processes that work together: collectives, runs over several machines, and what happens when a process dies."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.factories import world

ROOT = Path(__file__).resolve().parent.parent
COLLECTIVES = """
import sys
import torch
from tests.factories import PARALLEL
from stages.parallel import world

with world(PARALLEL) as here:
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.arange(here.size * 2 * 3).reshape(here.size * 2, 3)
        mine = slice(2 * here.rank, 2 * here.rank + 2)
        ranks_mean = (here.size + 1) / 2

        mean = torch.empty(2, 3, dtype=dtype)
        here.reduce_scatter_mean(mean, (rows * (here.rank + 1)).to(dtype)).wait()
        assert torch.equal(mean, (rows[mine] * ranks_mean).to(dtype)), mean

        inside, outside = torch.zeros(2, here.size * 2, 3, dtype=dtype).unbind()
        inside[mine] = rows[mine].to(dtype)
        for handle in [here.all_gather(inside, inside[mine]), here.all_gather(outside, rows[mine].to(dtype))]:
            handle.wait()
        assert torch.equal(inside, rows.to(dtype)) and torch.equal(outside, inside), (inside, outside)
    sys.stdout.write(f"rank {here.rank} of {here.size} agrees\\n")
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_slices_of_a_mean_and_all_slices_on_every_rank(ranks: int, tmp_path: Path) -> None:
    script = tmp_path / "collectives.py"
    script.write_text(COLLECTIVES, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == [f"rank {rank} of {ranks} agrees" for rank in range(ranks)]
    assert "deprecated" not in result.stderr


def test_alone_a_process_copies_only_what_lies_elsewhere() -> None:
    alone, rows = world(), torch.arange(6.0).reshape(2, 3)
    for collective in (alone.reduce_scatter_mean, alone.all_gather):
        elsewhere = torch.zeros(2, 3)
        collective(elsewhere, rows).wait()
        assert torch.equal(elsewhere, rows)
        before = rows._version
        collective(rows, rows.view(2, 3)).wait()
        assert rows._version == before
