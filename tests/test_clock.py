"""The throughput of an evaluation, and its projection to another one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.common import challenge, clock, shards
from stages.common.scorer import TimedScorer
from stages.scoring.evaluate import score
from stages.scoring.stream import ValidationStream
from stages.sliding_eval.scorer import SlidingScorer
from stages.ttt_eval.sgd.scorer import TTTScorer
from tests.factories import SLIDING, TINY, TTT, make_world, random_model, two_byte_table
from tools import plan

RUN: dict[str, Any] = {
    "startup_seconds": 30.0,
    "warm_up_targets": 1000,
    "targets_per_second": 20_000.0,
    "ranks": 2,
}


def stream(count: int) -> ValidationStream:
    tokens = np.random.Generator(np.random.PCG64(0)).integers(4, TINY.vocab_size, count).astype(np.uint16)
    tokens[0] = 1
    return ValidationStream(tokens, np.full(count - 1, 2, dtype=np.int64), two_byte_table())


def scorers(targets: int) -> list[TimedScorer]:
    return [
        SlidingScorer(random_model(6), SLIDING, make_world()),
        TTTScorer(random_model(6), SLIDING, TTT, make_world(), targets),
    ]


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("count", [9, 29, 33, 34, 200])
def test_timing_the_warm_up_apart_changes_no_bit(kind: int, count: int) -> None:
    of = stream(count)
    plain, timed = scorers(of.targets)[kind], scorers(of.targets)[kind]
    throughput = clock.EvalThroughput(timed.warm_up_targets)
    np.testing.assert_array_equal(score(timed, of, throughput), score(plain, of))
    measured = throughput.timing(of.targets, 2 * of.targets, 1)
    if of.targets <= timed.warm_up_targets:
        assert (measured["targets_per_second"], measured["projected_seconds_8gpu"]) == (0.0, None)
    else:
        assert measured["targets_per_second"] > 0
        # What a run measured, it projects for itself.
        assert clock.projected_seconds(measured, of.targets, 1) == pytest.approx(
            measured["evaluation_seconds"]
        )
    json.dumps(measured)


def test_the_projection_is_for_the_official_bytes_on_eight() -> None:
    throughput = clock.EvalThroughput(1000)
    throughput.steady.started, throughput.steady.ended = 0.0, 10.0
    measured = throughput.timing(
        targets=201_000, counted_bytes=402_000, processes=2
    )  # 20,000 a second on two, two bytes a target
    assert measured["targets_per_second"] == 20_000
    expected = measured["startup_seconds"] + (challenge.VALIDATION_BYTES / 2 - 1000) / (10_000 * 8)
    assert measured["projected_seconds_8gpu"] == pytest.approx(expected)


def write(path: Path, timing: object) -> str:
    path.write_text(json.dumps(timing))
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            [],
            0,
            "30.0 s to start, then 40,540,160 targets on 8 x 10,000 a second:"
            " 536.7 s of 600, within the budget",
        ),
        (["--processes=7"], 1, "609.1 s of 600, OVER the budget"),
        (["--processes=1", "--targets=5701000"], 0, "600.0 s of 600, within"),
    ],
)
def test_the_plan_says_before_the_start(
    arguments: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    repository: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        plan.main(
            [write(tmp_path / "timing.json", RUN), f"--params={repository / 'params.yaml'}", *arguments]
        )
    assert ended.value.code == code
    assert said in capsys.readouterr().out


def test_the_plan_counts_shards(tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards.write(tmp_path / "val_000000.bin", np.ones(501, dtype=np.uint16))
    with pytest.raises(SystemExit) as ended:
        plan.main(
            [
                write(tmp_path / "timing.json", RUN),
                f"--params={repository / 'params.yaml'}",
                f"--val={tmp_path}",
            ]
        )
    assert ended.value.code == 0
    assert "then 500 targets" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("timing", "arguments", "message"),
    [
        ({"process_seconds": 3.0}, [], "has no startup_seconds, warm_up_targets, targets_per_second, ranks"),
        ([1], [], "holds list, expected a JSON object"),
        (
            RUN | {"targets_per_second": 0.0},
            [],
            "holds no rate: the whole stream was warm-up; measure on more than 1,000 targets",
        ),
        (RUN, ["--processes=0"], "on 0 devices: expected at least one of each"),
    ],
)
def test_errors_of_the_plan_are_one_line(
    timing: object,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    repository: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        plan.main(
            [write(tmp_path / "timing.json", timing), f"--params={repository / 'params.yaml'}", *arguments]
        )
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_missing_timing_names_the_stage_that_writes_it(
    tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, message in ((tmp_path / "none.json", "none.json does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(SystemExit, match="2"):
            plan.main([str(path), f"--params={repository / 'params.yaml'}"])
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert line.endswith("; run `dvc repro ttt_eval` first, or name another")
