"""The folder to hand in: every figure is computed from files, and measured figures are in `measured` alone.

Mixed or unaudited runs are refused.
"""

import io
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import yaml
from PIL import Image

from stages.common import ledger
from stages.submission import plots
from stages.submission.stage import STAGE
from tests import miniature_run
from tests.miniature_run import CODE, PARAMS, TEXT, TIMING, run, verdict, write_json, write_report


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Artifacts of all stages below the working folder."""
    monkeypatch.chdir(tmp_path)
    miniature_run.make(tmp_path)
    return tmp_path


def summary_of(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
    return value


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_every_field_is_there_and_every_size_is_that_of_a_file(tree: Path) -> None:
    folder = run(tree)
    summary = summary_of(folder)
    challenge = "author github_id name date track val_bpb val_loss bytes_total bytes_code bytes_model"
    challenge += " seeds seed_results hardware blurb"
    ours = "parameters source_sha256 sha256 data coverage val_bpb_note audit attention_backend measured"
    assert {*challenge.split(), *ours.split()} <= summary.keys()
    on_disk = [
        (tree / "artifacts" / name).stat().st_size for name in ("bundle/train_gpt.py", "pack/model.bin")
    ]
    assert [summary["bytes_code"], summary["bytes_model"]] == on_disk
    assert summary["bytes_total"] == sum(on_disk) == summary["seed_results"]["42"]["bytes_total"]
    assert (folder / "train_gpt.py").read_bytes() == CODE
    assert summary["measured"]["training_seconds"] == 20.0
    assert json.loads((folder / "metrics.json").read_text()) == {
        key: summary[key] for key in ("val_bpb", "val_loss", "bytes_total")
    }
    assert summary["parameters"] == json.loads(json.dumps(asdict(PARAMS)))


@pytest.mark.parametrize(("scorer", "metric"), [("sliding_eval", "sliding_bpb"), ("ttt_eval", "ttt_bpb")])
def test_val_bpb_is_that_of_the_named_scorer_and_no_minimum(tree: Path, scorer: Any, metric: str) -> None:
    summary = summary_of(run(tree, replace(PARAMS, scorer=scorer)))
    assert (
        summary["val_bpb"] == json.loads((tree / "artifacts" / scorer / "metrics.json").read_text())[metric]
    )
    assert summary["val_bpb_note"].startswith(scorer)
    assert summary["scores"]["ttt_eval"]["bpb"] < summary["scores"]["sliding_eval"]["bpb"]
    assert summary["coverage"]["documents"] == len(TEXT)
    assert summary["coverage"]["bytes"] == sum(len(text.encode()) for text in TEXT)


def test_only_what_is_declared_changes_with_time_and_machine(tree: Path) -> None:
    first = run(tree, output="first")
    for stage in ("train", "calibrate", "ttt_eval"):
        write_json(
            tree / "artifacts" / stage / "timing.json",
            TIMING | {"date": "2031-01-01T00:00:00Z", "training_seconds": 11.5},
        )
    second = run(tree, output="second")
    before, after = summary_of(first), summary_of(second)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"measured", "date"}
    assert changed <= set(before["not_reproducible"])
    kept, again = files_of(first), files_of(second)
    assert {name for name in kept if kept[name] != again[name]} <= {
        "submission.json",
        "log.txt",
        "timing.json",
    }


def test_readme_log_and_requirements(tree: Path) -> None:
    folder = run(tree)
    readme, log = (
        (folder / "README.md").read_text(encoding="utf-8"),
        (folder / "train.log").read_text(encoding="utf-8"),
    )
    assert f"{summary_of(folder)['val_bpb']:.8f}" in readme
    assert "SEED=42 python train_gpt.py" in readme
    assert "seen \\| it" in readme
    assert "2030" not in readme
    for name in files_of(folder / "plots"):
        assert f"](plots/{name})" in readme
    head, *stages = log.split("=== ")[1:]
    assert yaml.safe_load(head.removeprefix("parameters\n")) == json.loads(json.dumps(asdict(PARAMS)))
    assert [part.split("\n")[0] for part in stages] == [
        name for name in STAGE.reads if name != "requirements"
    ]
    assert "what calibrate said" in log
    assert (folder / "requirements.txt").read_bytes() == (tree / "requirements.lock").read_bytes()


def _failed(folder: Path) -> None:
    write_report(folder, [verdict("ttt_eval"), verdict("files", "fail")])


def _unaudited(folder: Path) -> None:
    write_report(folder, [verdict("sliding_eval")])


def _empty_audit(folder: Path) -> None:
    write_report(folder, [])


def _no_audit(folder: Path) -> None:
    (folder / "audit/report.json").unlink()


def _other_code(folder: Path) -> None:
    (folder / "bundle/train_gpt.py").write_bytes(CODE + b"\n")


def _other_score(folder: Path) -> None:
    write_json(folder / "ttt_eval/metrics.json", {"ttt_bpb": 1.0})


def _short_ledger(folder: Path) -> None:
    ledger.write(folder / "ttt_eval/nll.npy", np.load(folder / "ttt_eval/nll.npy")[:-1])


def _no_clock(folder: Path) -> None:
    write_json(
        folder / "calibrate/timing.json",
        {key: value for key, value in TIMING.items() if key != "training_seconds"},
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_failed, "the audit failed, so there is nothing to hand in: files, coverage"),
        (_unaudited, "no verdict on ttt_eval"),
        (_empty_audit, "holds no verdicts"),
        (_no_audit, "report.json does not exist: run `dvc repro audit` first"),
        (_other_code, "bundle/metrics.json says bytes_code"),
        (_other_score, "ttt_eval/metrics.json says ttt_bpb 1.0"),
        (_short_ledger, "it belongs to another stream"),
        (_no_clock, "must both hold training_seconds"),
    ],
)
def test_what_does_not_fit_together_is_one_clear_error(
    tree: Path, spoil: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(tree / "artifacts")
    with pytest.raises(SystemExit) as stopped:
        run(tree)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list((tree / "out").iterdir())


def test_over_the_byte_budget_is_an_error(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tree, replace(PARAMS, pack=replace(PARAMS.pack, budget_bytes=100, code_reserve_bytes=1)))
    assert "artifact over the byte budget" in capsys.readouterr().err


def test_plots_are_pictures_of_the_same_bytes_whatever_the_users_settings(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = files_of(run(tree, output="first") / "plots")
    monkeypatch.setitem(mpl.rcParams, "font.size", 20.0)
    monkeypatch.setitem(mpl.rcParams, "axes.facecolor", "red")
    assert files_of(run(tree, output="second") / "plots") == first
    assert set(first) == {"bpb_by_chunk.png", "bytes_by_part.png", "loss.png"}
    for picture in first.values():
        with Image.open(io.BytesIO(picture)) as image:
            assert min(image.size) > 150
            assert "Software" not in image.info


def test_bytes_by_part_add_up() -> None:
    names = [
        "embedding.weight",
        "blocks.0.attention.query.weight",
        "blocks.1.mlp.down.weight",
        "blocks.0.mix",
        "skip_gate",
        "container",
    ]
    sizes = plots.sizes_by_part([{"name": name, "bytes": str(10 + i)} for i, name in enumerate(names)], 7)
    assert sizes == {
        "embedding (tied head)": 10,
        "attention: query": 11,
        "MLP: down": 12,
        plots.OTHER_PART: 13 + 14,
        "container": 15,
        plots.CODE_PART: 7,
    }


def test_smoothing_is_an_average_without_the_pull_of_its_start() -> None:
    values = np.array([5.0, 4.0, 3.0])
    keep = np.exp(-1 / 2)
    expected = [5.0, (4 + 5 * keep) / (1 + keep), (3 + 4 * keep + 5 * keep**2) / (1 + keep + keep**2)]
    np.testing.assert_allclose(plots.exponential_average(values, 2), expected)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_of_one_step_can_be_drawn(steps: int) -> None:
    rows = [{"step": str(i + 1), "loss": "3.0", "looped": str(i)} for i in range(steps)]
    assert plots.training_loss(rows).startswith(b"\x89PNG")


def test_a_missing_column_is_named() -> None:
    with pytest.raises(ValueError, match="no column loss"):
        plots.number_column([{"step": "1"}], "loss")
