"""benchmarks/two_trees.py: the comparison of outputs and seconds, and its table."""

import json
from pathlib import Path

import pytest

from benchmarks import two_trees
from benchmarks.two_trees import StageRun


def stage_run(tree: str, seconds: float, exit_code: int = 0, **outputs: str) -> StageRun:
    return StageRun(tree, exit_code, seconds, {"process_seconds": seconds - 0.5}, outputs)


def four_runs(*models: str) -> list[StageRun]:
    """Runs in the order old, new, new, old with these digests of one output."""
    old, new, new_again, old_again = models
    return [
        stage_run("old", 2.0, model=old),
        stage_run("new", 3.0, model=new),
        stage_run("new", 5.0, model=new_again),
        stage_run("old", 4.0, model=old_again),
    ]


def test_equal_outputs_and_the_seconds_of_each_tree() -> None:
    summary = two_trees.compare(four_runs("a", "a", "a", "a"))
    assert summary["equal"]
    assert summary["differ"] == []
    assert summary["old"]["min_seconds"] == 2.0
    assert summary["new"]["median_seconds"] == 4.0
    assert summary["new"]["process_seconds"] == 3.5
    assert summary["ratio_of_min_seconds"] == 1.5
    assert summary["ratio_of_median_seconds"] == pytest.approx(4 / 3)


def test_an_output_that_differs_between_the_trees() -> None:
    summary = two_trees.compare(four_runs("a", "b", "b", "a"))
    assert not summary["equal"]
    assert summary["differ"] == ["model"]
    assert summary["old"]["differ_between_repetitions"] == summary["new"]["differ_between_repetitions"] == []
    assert two_trees.outcome(summary) == "DIFFERENT: model"


def test_an_output_that_differs_between_repetitions() -> None:
    summary = two_trees.compare(four_runs("a", "a", "b", "a"))
    assert summary["new"]["differ_between_repetitions"] == ["model"]
    assert two_trees.outcome(summary) == "DIFFERENT: model (between repetitions)"


def test_an_absent_output_a_failed_process_and_none_at_all_are_not_equal() -> None:
    absent = two_trees.compare([stage_run("old", 1.0, a="1", b="2"), stage_run("new", 1.0, a="1")])
    failed = two_trees.compare([stage_run("old", 1.0, a="1"), stage_run("new", 1.0, exit_code=2, a="1")])
    nothing = two_trees.compare([stage_run("old", 1.0), stage_run("new", 1.0)])
    assert two_trees.outcome(absent) == "DIFFERENT: b"
    assert two_trees.outcome(failed) == "DIFFERENT: exit code 2"
    assert two_trees.outcome(nothing) == "DIFFERENT: no outputs"


def test_the_table_has_a_row_for_each_case() -> None:
    cases = {
        "pack": two_trees.compare(four_runs("a", "a", "a", "a")),
        "ttt_eval, LoRA": two_trees.compare(four_runs("a", "b", "b", "a")),
    }
    header, *rows = two_trees.table(cases).splitlines()
    assert header.split("  ")[0] == "case"
    assert [" ".join(row.split()) for row in rows] == [
        "pack 2.00 3.00 3.00 4.00 2.50 3.50 1.500 1.333 equal",
        "ttt_eval, LoRA 2.00 3.00 3.00 4.00 2.50 3.50 1.500 1.333 DIFFERENT: model",
    ]


def write_outputs(folder: Path, seconds: float, evidence: str) -> dict[str, str]:
    clock = {"check": "B14", "name": "wall clock", "evidence": f"{seconds} s"}
    verdicts = [clock, {"check": "B1", "name": "causality", "evidence": evidence}]
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps({"verdicts": verdicts}))
    (folder / "timing.json").write_text(json.dumps({"process_seconds": seconds, "date": "today"}))
    (folder / "log.txt").write_text(f"done in {seconds}")
    return two_trees.read_outputs(folder)


def test_what_is_measured_is_not_compared(tmp_path: Path) -> None:
    first = write_outputs(tmp_path / "first", 1.5, "no loss changed")
    assert list(first) == ["report.json"]
    assert two_trees.read_timing(tmp_path / "first") == {"process_seconds": 1.5}
    assert write_outputs(tmp_path / "slower", 2.5, "no loss changed") == first
    assert write_outputs(tmp_path / "other", 1.5, "a loss changed") != first
