"""Presets over the parameter file: what is committed validates, and laying one leaves nothing of another."""

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stages.common import config
from tools import preset

ROOT = Path(__file__).resolve().parent.parent
NAMES = preset.preset_names(ROOT / "presets")

TOY = """\
# A head comment.
seed: 42  # the only scalar

model:
  # D
  width: 64       # a multiple of heads
  betas: [0.9, 0.95]  # lists stay in brackets
train:
  lr: 1.0e-4
  name: "a # b"  # quoted
"""


def text(name: str) -> str:
    return (ROOT / "presets" / f"{name}.yaml").read_text(encoding="utf-8")


def params_text() -> str:
    return (ROOT / "params.yaml").read_text(encoding="utf-8")


def test_the_presets_of_the_design_exist() -> None:
    assert set(NAMES) >= {"smoke", "sprint", "record"}


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_validates_for_every_stage(name: str) -> None:
    preset.validate(yaml.safe_load(preset.overlay(params_text(), text(name))))


def test_all_presets_set_the_same_keys() -> None:
    keys = {name: set(preset.scalar_spans(text(name), name)) for name in NAMES}
    first = keys[NAMES[0]]
    assert {name: sorted(first ^ found) for name, found in keys.items() if found != first} == {}


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(NAMES, 2)))
def test_one_preset_after_another_is_the_other(first: str, second: str) -> None:
    direct = preset.overlay(params_text(), text(second))
    assert preset.overlay(preset.overlay(params_text(), text(first)), text(second)) == direct


def test_params_yaml_as_committed_is_smoke() -> None:
    assert preset.overlay(params_text(), text("smoke")) == params_text()


def test_params_yaml_holds_each_section_and_nothing_else() -> None:
    assert set(config.read_parameters(ROOT / "params.yaml")) == set(config.SECTIONS)


def test_every_key_of_params_yaml_has_a_comment() -> None:
    lines = params_text().splitlines()
    bare = []
    for dotted, value in preset.scalar_spans(params_text(), "params.yaml").items():
        row = params_text().count("\n", 0, value.start)
        after = lines[row][lines[row].index(value.text) + len(value.text) :]
        if "#" not in after and not lines[row - 1].lstrip().startswith("#"):
            bare.append(dotted)
    assert bare == []


def test_only_the_text_of_the_values_changes() -> None:
    merged = preset.overlay(TOY, "seed: 7\nmodel: {width: 128, betas: [0.8]}\ntrain:\n  name: 'c'\n")
    expected = (
        TOY.replace("42", "7").replace("64", "128").replace("[0.9, 0.95]", "[0.8]").replace('"a # b"', "'c'")
    )
    assert merged == expected


def test_a_key_that_the_file_lacks_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^model\.depth: the preset sets a key that params\.yaml does not have"
    ):
        preset.overlay(TOY, "model:\n  depth: 3\n")


@pytest.mark.parametrize("old_is_in", ["params.yaml", "the preset"])
def test_a_renamed_key_is_refused_with_its_new_name(old_is_in: str) -> None:
    old = "ttt_eval:\n  confidence: true\n"
    new = "ttt_eval:\n  weight_by_surprise: true\n"
    message = (
        rf"^ttt_eval\.confidence: {old_is_in} sets a key that is called ttt_eval\.weight_by_surprise now$"
    )
    with pytest.raises(ValueError, match=message):
        preset.overlay(*((old, new) if old_is_in == "params.yaml" else (new, old)))


def test_a_value_over_several_lines_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^model\.betas: .* list in brackets"):
        preset.overlay(TOY, "model:\n  betas:\n    - 0.8\n    - 0.9\n")


def test_a_key_set_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^model\.width: set twice"):
        preset.overlay(TOY, "model:\n  width: 8\n  width: 16\n")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    return tmp_path


def test_laying_writes_in_place_and_says_what_changed(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tree)
    preset.main(["record"])
    assert (tree / "params.yaml").read_text(encoding="utf-8") == preset.overlay(params_text(), text("record"))
    assert "params.yaml: " in capsys.readouterr().out.splitlines()[-1]
    preset.main(["record"])
    assert capsys.readouterr().out == "params.yaml: already record\n"
    assert sorted(path.name for path in tree.iterdir()) == ["params.yaml", "presets"]


def test_output_leaves_the_parameter_file_alone(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    preset.main(["sprint", "--output", "other.yaml"])
    assert (tree / "params.yaml").read_text(encoding="utf-8") == params_text()
    assert (tree / "other.yaml").read_text(encoding="utf-8") == preset.overlay(params_text(), text("sprint"))


def test_an_invalid_result_is_not_written(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tree)
    (tree / "presets" / "broken.yaml").write_text("model:\n  heads: 0\n", encoding="utf-8")
    for argv in (["broken"], ["--check"], ["absent"]):
        with pytest.raises(SystemExit) as stop:
            preset.main(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith("error: preset: ")
        assert error.count("\n") == 1
        assert "model.heads" in error or "the presets are broken, " in error
        assert (tree / "params.yaml").read_text(encoding="utf-8") == params_text()


def test_check_passes_on_what_is_committed() -> None:
    command = [sys.executable, "-m", "tools.preset", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 1 + len(NAMES)
