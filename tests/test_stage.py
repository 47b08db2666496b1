"""The shell around a stage: errors are one line and exit code 2, and outputs appear whole or not at all."""

import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from stages.common.config import require_positive
from stages.common.stage import Run, Stage, canonical_json, launch

ROOT = Path(__file__).resolve().parent.parent
STAGES = sorted(path.parent.name for path in (ROOT / "stages").glob("*/__main__.py"))


@dataclass(frozen=True)
class PackParams:
    width: int

    def __post_init__(self) -> None:
        require_positive(self, "width")


@dataclass(frozen=True)
class Params:
    seed: int
    pack: PackParams


STAGE = Stage(
    name="pack",
    summary="A toy.",
    params=Params,
    reads={"model": Path("artifacts/train/model.bin"), "val_shards": Path("artifacts/tokenize/val")},
    writes=("x.bin", "folder", "metrics.json"),
)
Main = Callable[[Run[Params]], None]


def write_all(run: Run[Params]) -> None:
    run.write_bytes("x.bin", bytes(run.params.pack.width))
    (run.output / "folder").mkdir()
    (run.output / "folder" / f"{run.params.seed}.txt").write_text("x")
    run.write_json("metrics.json", {"width": run.params.pack.width})
    run.timing["seconds"] = 1.5


@pytest.fixture(autouse=True)
def _tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    Path("params.yaml").write_text("seed: 1\npack:\n  width: 8\n", encoding="utf-8")


def fails(main: Main, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of a run that exits with code 2."""
    with pytest.raises(SystemExit) as stop:
        launch(STAGE, main, list(argv))
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: pack: ")
    assert line.count("\n") == 1
    return line


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_run_publishes_its_outputs_and_nothing_else() -> None:
    launch(STAGE, write_all, [])
    output = Path("artifacts/pack")
    assert listing(output) == ["folder", "folder/1.txt", "log.txt", "metrics.json", "timing.json", "x.bin"]
    assert (output / "metrics.json").read_text() == '{\n  "width": 8\n}\n'
    timing = json.loads((output / "timing.json").read_text())
    assert timing["seconds"] == 1.5
    assert timing["process_seconds"] > 0
    assert {"date", "hardware", "versions"} <= set(timing)
    assert (output / "log.txt").read_text().endswith("pack: done\n")


def test_a_second_run_replaces_the_first() -> None:
    launch(STAGE, write_all, [])
    launch(STAGE, write_all, ["--set", "seed=2", "--set", "pack.width=3"])
    output = Path("artifacts/pack")
    assert listing(output) == ["folder", "folder/2.txt", "log.txt", "metrics.json", "timing.json", "x.bin"]
    assert (output / "x.bin").read_bytes() == bytes(3)


def test_outputs_are_new_files_so_that_links_into_the_cache_stay_whole() -> None:
    launch(STAGE, write_all, [])
    cached = Path("cached.bin")
    cached.hardlink_to(Path("artifacts/pack/x.bin"))
    launch(STAGE, write_all, ["--set", "pack.width=3"])
    assert cached.read_bytes() == bytes(8)


def half(error: BaseException) -> Main:
    def main(run: Run[Params]) -> None:
        run.write_bytes("x.bin", b"half")
        raise error

    return main


def test_a_user_error_leaves_the_last_outputs_and_nothing_half_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    launch(STAGE, write_all, [])
    capsys.readouterr()
    assert fails(half(ValueError("two\n  lines")), capsys) == "error: pack: two lines\n"
    assert Path("artifacts/pack/x.bin").read_bytes() == bytes(8)
    assert not Path("artifacts/pack/.partial").exists()


def test_a_missing_file_is_a_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert "gone.txt" in fails(lambda run: print(Path("gone.txt").read_text()), capsys)


def test_a_fault_of_ours_keeps_its_traceback_and_leaves_nothing() -> None:
    with pytest.raises(ZeroDivisionError):
        launch(STAGE, half(ZeroDivisionError()), [])
    assert listing(Path("artifacts/pack")) == []


def test_a_stage_that_forgets_an_output_is_a_fault_of_ours() -> None:
    with pytest.raises(AssertionError, match=r"without writing \['x.bin', 'folder', 'metrics.json'\]"):
        launch(STAGE, lambda run: None, [])
    assert listing(Path("artifacts/pack")) == []


def test_what_a_killed_run_left_is_cleared() -> None:
    stale = Path("artifacts/pack/.partial/folder")
    stale.mkdir(parents=True)
    (stale / "old.txt").write_text("stale")
    launch(STAGE, write_all, [])
    assert listing(Path("artifacts/pack/folder")) == ["1.txt"]
    assert not stale.exists()


def test_an_absent_input_says_which_stage_makes_it(capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(lambda run: print(run.path("val_shards")), capsys)
    assert line == (
        "error: pack: artifacts/tokenize/val does not exist:"
        " run `dvc repro tokenize` first, or name another with --val-shards\n"
    )
    assert "check the path" in fails(lambda run: print(run.path("model")), capsys, "--model", "elsewhere.bin")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--set", "pack.depth=1"], "pack.depth: unknown key"),
        (["--set", "pack.width=0"], "pack.width: 0 is not above zero"),
        (["--set", "pack.width=wide"], "pack.width: saw 'wide' (str), expected int"),
        (["--params", "absent.yaml"], "absent.yaml does not exist"),
        (
            ["--params", str(ROOT / "presets/sprint.yaml")],
            "is a preset, which has only some of the keys;"
            " `python -m tools.preset sprint --output FILE` makes a parameter file of it",
        ),
    ],
)
def test_bad_parameters_are_one_line_and_no_folder(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in fails(write_all, capsys, *argv)
    assert not Path("artifacts").exists()


def test_a_result_that_is_not_finite_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(lambda run: run.write_json("metrics.json", {"a": [1.0, {"b": float("nan")}]}), capsys)
    assert line == "error: pack: a[1].b is nan; a result must be a finite number\n"


def test_other_ranks_write_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")

    def main(run: Run[Params]) -> None:
        run.logger.log("a line")
        run.write_bytes("x.bin", b"1")
        raise ValueError("seen on every rank, said once")

    with pytest.raises(SystemExit) as stop:
        launch(STAGE, main, [])
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "")
    assert not Path("artifacts").exists()


def test_embedded_parameters_and_output_folder() -> None:
    launch(STAGE, write_all, [], embedded={"seed": 3, "pack": {"width": 2}}, output=Path("here"))
    assert (Path("here") / "x.bin").read_bytes() == bytes(2)


def test_canonical_json_is_sorted_and_ends_with_a_newline() -> None:
    assert canonical_json({"b": 1, "a": "\u00e9"}) == '{\n  "a": "\u00e9",\n  "b": 1\n}\n'


KILLED = """
import os, sys, time
from pathlib import Path
from stages.common.stage import Run, Stage, canonical_json, launch
sys.path.insert(0, sys.argv[1])
import test_stage as t
def main(run):
    run.write_bytes("x.bin", b"half")
    print("ready", flush=True)
    time.sleep(60)
launch(t.STAGE, main, [])
"""


def test_a_killed_run_touches_no_output(tmp_path: Path) -> None:
    launch(STAGE, write_all, [])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", KILLED, str(ROOT / "tests")]
    with subprocess.Popen(
        arguments, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert Path("artifacts/pack/x.bin").read_bytes() == bytes(8)
    launch(STAGE, write_all, [])
    assert not Path("artifacts/pack/.partial").exists()


def test_an_interpreter_without_torch_ends_with_one_line() -> None:
    """`-S` leaves site-packages out, as an interpreter outside the project's environment does."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [sys.executable, "-S", "-m", "stages.train"]
    result = subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "lacks torch, numpy, yaml; activate the project's environment (`make environment`" in result.stderr


@pytest.fixture
def run_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[object, str, str]]:
    """Run `python -m stages.NAME ...` in the repository: exit code, standard output, standard error."""

    def run(name: str, *argv: str) -> tuple[object, str, str]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [name, *argv])
        monkeypatch.delitem(sys.modules, f"stages.{name}.__main__", raising=False)
        with pytest.raises(SystemExit) as stop:
            runpy.run_module(f"stages.{name}", run_name="__main__", alter_sys=True)
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", STAGES)
def test_help_says_what_a_stage_reads_and_writes(
    name: str, run_stage: Callable[..., tuple[object, str, str]]
) -> None:
    code, output, _ = run_stage(name, "--help")
    words = output.split()
    assert code == 0
    assert words[:4] == ["usage:", "python", "-m", f"stages.{name}"]
    assert {"Reads", "Writes", "--params", "--set", "--output"} <= set(words)
    assert "log.txt, timing.json" in " ".join(words)


@pytest.mark.parametrize("name", STAGES)
def test_a_bad_parameter_stops_every_stage_with_one_line(
    name: str, tmp_path: Path, run_stage: Callable[..., tuple[object, str, str]]
) -> None:
    code, output, error = run_stage(name, "--set", "nonsense.key=1", "--output", str(tmp_path / "out"))
    assert (code, output) == (2, "")
    assert (
        error
        == f"error: {name}: nonsense.key: unknown key; --set only changes keys that the parameter file has\n"
    )
    assert not (tmp_path / "out").exists()
