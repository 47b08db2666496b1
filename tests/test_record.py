"""Two seeds through the real pipeline on tiny parameters, as experiments: merged, checked and rebuilt.

Neither their order nor a repetition changes a byte.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_repository import call, commit, make_repository

SEEDS = (42, 999)
NAMES = [f"seed-{seed}" for seed in SEEDS]
PYTHON = sys.executable

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("pipeline")]


def record_of(folder: Path) -> dict[str, Any]:
    (made,) = (path for path in (folder / "records").iterdir() if path.is_dir())
    files: dict[str, Any] = {path.name: path.read_bytes() for path in made.iterdir() if path.suffix != ".log"}
    summary = json.loads(files.pop("submission.json"))
    return files | {
        "submission.json": {
            key: value for key, value in summary.items() if key not in summary["not_reproducible"]
        }
    }


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A repository in which the seeds have run one after the other, merged into a record."""
    folder = make_repository(tmp_path_factory.mktemp("record") / "first")
    for seed, name in zip(SEEDS, NAMES, strict=True):
        call(folder, "dvc", "exp", "run", "--temp", "-n", name, "-S", f"seed={seed}")
    call(folder, PYTHON, "-m", "tools.record", *NAMES)
    yield folder
    shutil.rmtree(folder.parent, ignore_errors=True)


def test_the_order_of_seeds_and_a_run_before_change_no_byte(first: Path, tmp_path: Path) -> None:
    second = make_repository(tmp_path / "second")
    call(second, "dvc", "repro")  # seed 42, so that its experiment finds everything done
    commit(second, "the pipeline has run")
    for seed, name in reversed(list(zip(SEEDS, NAMES, strict=True))):
        call(second, "dvc", "exp", "run", "--temp", "-n", name, "-S", f"seed={seed}")
    call(second, PYTHON, "-m", "tools.record", *NAMES)
    assert record_of(first) == record_of(second)


def test_the_record_is_clean(first: Path) -> None:
    (made,) = (path for path in (first / "records").iterdir() if path.is_dir())
    assert "nothing was found" in call(first, PYTHON, "-m", "tools.check_record", str(made)).stdout


def test_a_rebuilt_record_has_equal_bytes(first: Path) -> None:
    (made,) = (path for path in (first / "records").iterdir() if path.is_dir())
    said = call(first, PYTHON, "-m", "tools.rebuild", str(made), "--seed", str(SEEDS[1])).stdout
    assert f"seed {SEEDS[1]}: equal: " in said
    assert "to the last digit" in said
