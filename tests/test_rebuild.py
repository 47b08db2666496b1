"""A record made again: equal bytes in a toy pipeline; where and why they are not, named."""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.miniature_run import call, dvc
from tools.rebuild import cli as rebuild
from tools.rebuild import first_difference
from tools.record.runs import PipelineRun

MAKE = """
import json, os, random, sys, yaml
from pathlib import Path
parameters = yaml.safe_load(Path("params.yaml").read_text())
weights, handed_in = Path("artifacts/train/model.safetensors"), Path("artifacts/submission")
if sys.argv[1] == "train":
    generator = random.Random(parameters["seed"])
    content = bytearray(generator.randbytes(parameters["train"]["steps"]))
    if "NOISE" in os.environ:
        content[70] ^= 1
    weights.write_bytes(content)
else:
    (handed_in / "train_gpt.py").write_text("print()\\n")
    (handed_in / "requirements.txt").write_text("torch\\n")
    bpb = 1 + sum(weights.read_bytes()) / 1e7
    (handed_in / "submission.json").write_text(json.dumps({"val_bpb": bpb}))
"""
PIPELINE = {
    "train": {
        "cmd": "python make.py train",
        "deps": ["make.py"],
        "params": ["seed", "train"],
        "outs": ["artifacts/train/model.safetensors"],
    },
    "submission": {
        "cmd": "python make.py submission",
        "deps": ["make.py", "artifacts/train/model.safetensors"],
        "outs": [
            "artifacts/submission/train_gpt.py",
            "artifacts/submission/requirements.txt",
            {"artifacts/submission/submission.json": {"cache": False}},
        ],
    },
}
PARAMETERS = {"seed": 42, "train": {"steps": 200}}

pytestmark = pytest.mark.xdist_group("merge")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A repository, the working folder, whose toy pipeline has run, and a record of that run in `record`."""
    folder = tmp_path_factory.mktemp("rebuild")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        call(folder, "git", "init", "-q", "-b", "main")
        for key, value in (("email", "test@example.org"), ("name", "test")):
            call(folder, "git", "config", f"user.{key}", value)
        dvc(folder, "init", "-q")
        (folder / "make.py").write_text(MAKE)
        (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": PIPELINE}))
        (folder / "params.yaml").write_text(yaml.safe_dump(PARAMETERS))
        for name in ("train", "submission"):
            (folder / "artifacts" / name).mkdir(parents=True)
        dvc(folder, "repro", "-q")
        call(folder, "git", "add", "-A")
        call(folder, "git", "commit", "-q", "-m", "the run")
        write_record(folder)
        yield folder


def write_record(folder: Path) -> None:
    """The part of a record that a rebuild reads."""
    commit = call(folder, "git", "rev-parse", "HEAD").strip()
    stages = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    run = PipelineRun("42", commit, commit, {"seeds": [42], "parameters": PARAMETERS}, stages, {})
    bpb = json.loads((folder / "artifacts/submission/submission.json").read_text())["val_bpb"]
    summary = {
        "commits": {"42": {"run": commit, "base": commit}},
        "parameters": {"train": PARAMETERS["train"]},
        "seeds": [42],
        "provenance": {"inputs_md5": run.input_hashes(), "outputs_md5": {"42": run.output_hashes()}},
        "seed_results": {"42": {"val_bpb": bpb}},
        "sha256": {},
    }
    (folder / "record").mkdir()
    (folder / "record/submission.json").write_text(json.dumps(summary))
    for name in ("train_gpt.py", "requirements.txt"):
        (folder / "record" / name).write_bytes((folder / "artifacts/submission" / name).read_bytes())


def changed(folder: Path, tmp_path: Path, *keys: str, value: Any) -> Path:
    """A copy of the record with one value of its submission.json changed, or without it."""
    summary = json.loads((folder / "record/submission.json").read_text())
    inner = summary
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (tmp_path / "copy").mkdir()
    for file in (folder / "record").iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "copy/submission.json").write_text(json.dumps(summary))
    return tmp_path / "copy"


def exit_code(*words: str) -> Any:
    with pytest.raises(SystemExit) as ended:
        rebuild.main(list(words))
    return ended.value.code


def test_a_record_is_made_again_to_the_last_byte(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = call(made, "git", "status", "--porcelain")
    assert exit_code("record") == 0
    assert "seed 42: equal: 3 outputs of 2 stages; val_bpb 1.0" in capsys.readouterr().out
    assert call(made, "git", "status", "--porcelain") == before


def test_the_first_difference_is_named_with_its_place(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NOISE", "1")
    assert exit_code("record", "--seed", "42") == 1
    printed = capsys.readouterr().out
    assert "first difference in stage train: artifacts/train/model.safetensors, byte 70 of 200; " in printed
    assert re.search(r"; val_bpb [0-9.]+, rebuilt [0-9.]+$", printed, re.MULTILINE)


def test_other_source_is_named_and_not_run(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = changed(made, tmp_path, "provenance", "inputs_md5", "make.py", value="0" * 32)
    assert exit_code(str(record)) == 1
    assert re.search(
        "not run: at [0-9a-f]{10} the content of make.py is not that of the recorded run",
        capsys.readouterr().out,
    )


def test_an_experiment_that_was_not_fetched_is_rebuilt_from_its_base(made: Path) -> None:
    commit = call(made, "git", "rev-parse", "HEAD").strip()
    assert rebuild.available_commit({"run": "1" * 40, "base": commit}) == commit
    with pytest.raises(ValueError, match="neither 1111111111 nor 2222222222 is in this repository"):
        rebuild.available_commit({"run": "1" * 40, "base": "2" * 40})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere",), "nowhere/submission.json does not exist"),
        (
            ("artifacts/submission",),
            "has no commits, parameters, seeds, provenance, seed_results, sha256: only records",
        ),
        (("record", "--seed", "7"), "record has no seed 7; it has 42"),
    ],
)
def test_what_cannot_be_rebuilt_is_one_line(
    made: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: rebuild: ")
    assert message in line


def test_places(tmp_path: Path) -> None:
    def pair(a: bytes, b: bytes) -> str | None:
        (tmp_path / "a").write_bytes(a)
        (tmp_path / "b").write_bytes(b)
        return first_difference.first_difference(tmp_path / "a", tmp_path / "b")

    assert pair(b"same", b"same") is None
    assert pair(b"\0abc", b"\0abd") == "byte 3 of 4"
    assert pair(b"\0abc", b"\0ab") == "byte 3 of 4, rebuilt 3"
    assert pair(b"x\xff1", b"x\xff2") == "byte 2 of 3"
    assert pair(b"one\ntwo\nthree", b"one\ntwo\n") == 'byte 8 (line 3: "three", rebuilt "") of 13, rebuilt 8'
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "x").write_bytes(b"\0x")
    assert first_difference.first_difference(one, two) is None
    assert first_difference.first_difference(one, tmp_path / "a") == "one is a folder, the other a file"
    (two / "y").write_bytes(b"y")
    assert first_difference.first_difference(one, two) == "y is in one of them only"
    (two / "x").write_bytes(b"\0y")
    assert first_difference.first_difference(one, two) == "x: byte 1 of 2"
