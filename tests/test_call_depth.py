"""experiments/call_depth.py: stacks that are recorded at end points, and their summary."""

import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from experiments import call_depth
from experiments._walks import Part, Recorder

SOURCE = """
def enter(pool):
    outside()
    return [middle(pool) for _ in range(2)]

def middle(pool):
    return pool.submit(work, 1).result()

def work(steps):
    return work(steps - 1) if steps else end()

def end():
    return 1

def outside():
    return 0
"""


def made_tree(folder: Path) -> ModuleType:
    """Write a module to folder/stages and import it."""
    (folder / "stages").mkdir()
    path = folder / "stages/made.py"
    path.write_text(SOURCE)
    specification = importlib.util.spec_from_file_location("made_for_call_depth", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def recorded(folder: Path, ends: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    module = made_tree(folder)
    recorder = Recorder(Part(("made.py:enter",), ends, "action"), folder / "stages")

    def action() -> None:
        module.outside()
        with ThreadPoolExecutor(1) as pool:
            module.enter(pool)

    return recorder.run(action)


def test_a_stack_goes_on_in_the_thread_that_does_the_work(tmp_path: Path) -> None:
    ends = {
        "the end": ("other.py:end", "made.py:end > compiled"),
        "by way of middle": ("made.py:middle ... made.py:work",),
    }
    found = recorded(tmp_path, ends)
    entered = ["made.py:enter", "made.py:middle", "made.py:work", "made.py:work"]  # without the comprehension
    assert found["stacks"] == {
        "the end": [*entered, "made.py:end", "made.py:compiled"],
        "by way of middle": entered,
    }
    assert found["files"] == ["made.py"]
    assert sys.getprofile() is None


def test_an_end_point_that_is_not_reached_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"made\.py:outside \.\.\. made\.py:end was not reached"):
        recorded(tmp_path, {"the end": ("made.py:outside ... made.py:end",)})


def test_the_summary_counts_frames_and_files() -> None:
    parts = [
        {"stacks": {"one": ["a.py:f", "b.py:g"], "two": ["a.py:f"]}, "files": ["a.py", "b.py", "c.py"]},
        {"stacks": {"three": ["d.py:f", "d.py:g", "d.py:h"]}, "files": ["a.py", "d.py"]},
    ]
    summary = call_depth.summarise(parts)
    assert summary["frames"] == {"one": 2, "two": 1, "three": 3}
    assert (summary["deepest"], summary["files_on_the_way"], summary["files_touched"]) == (3, 3, 4)
    assert "| walk | 3 | 3 | 4 | one 2, two 1, three 3 |" in call_depth.report("tree", {"walk": summary})
