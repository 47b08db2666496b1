"""Several seeds, one record: figures against a plain count, and every difference refused by name.

The record has the same bytes when it is made again, and from a clone.
"""

import copy
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import miniature_run
from tests.miniature_run import PARAMS, call, dvc
from tools.check_record import cli as check
from tools.check_record.folder import read_folder
from tools.compare import revisions
from tools.record import baseline, leaderboard, record_readme
from tools.record import cli as merge
from tools.record.compatibility import require_compatible
from tools.record.record import merge_runs
from tools.record.runs import PipelineRun

SEEDS = (42, 314, 999)
NAMES = tuple(f"seed-{seed}" for seed in SEEDS)
FILES = {
    "README.md",
    "requirements.txt",
    "submission.json",
    "train_gpt.py",
    *(f"train_seed{seed}.log" for seed in SEEDS),
}

pytestmark = pytest.mark.xdist_group("merge")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder, with experiments of three seeds and one of another learning rate.

    They are read without DVC, except in one test.
    """
    folder = tmp_path_factory.mktemp("merge") / "repository"
    folder.mkdir()
    miniature_run.start(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed, name in zip(SEEDS, NAMES, strict=True):
            miniature_run.experiment(folder, name, replace(PARAMS, seed=seed))
        faster = replace(PARAMS, seed=1000, train=replace(PARAMS.train, matrix_lr=0.03))
        miniature_run.experiment(folder, "faster", faster)
        patch.setattr(revisions, "fetch_output", miniature_run.fetch_from_cache)
        yield folder


def written(folder: Path) -> dict[str, bytes]:
    """The one record below a folder, by file."""
    (record_folder,) = folder.iterdir()
    return {path.name: path.read_bytes() for path in record_folder.iterdir()}


def summary_of(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(written(folder)["submission.json"])
    return value


def test_a_record_is_mean_deviation_and_the_worst_seed_of_runs(repository: Path, tmp_path: Path) -> None:
    merge.main([*NAMES, "--records", str(tmp_path / "a")])
    merge.main([*reversed(NAMES), "--records", str(tmp_path / "b")])
    first = written(tmp_path / "a")
    assert first == written(tmp_path / "b")  # twice, in whatever order
    assert set(first) == FILES
    (folder,) = (tmp_path / "a").iterdir()
    assert check.findings(read_folder(folder)) == []

    # Figures.
    summary = summary_of(tmp_path / "a")
    scores = [result["val_bpb"] for result in summary["seed_results"].values()]
    assert summary["val_bpb"] == pytest.approx(statistics.mean(scores), rel=1e-15)
    assert summary["val_bpb_std"] == pytest.approx(statistics.stdev(scores), rel=1e-12)
    assert len(set(scores)) == 3
    sizes = [len(miniature_run.model_bytes(seed)) for seed in SEEDS]
    assert len(set(sizes)) > 1
    assert summary["bytes_model"] == max(sizes)
    assert summary["bytes_total"] == max(sizes) + len(first["train_gpt.py"])

    # The runs that it was made of.
    assert summary["seeds"] == list(SEEDS)
    for seed, name in zip(SEEDS, NAMES, strict=True):
        commit = call(
            repository, "git", "for-each-ref", "--format=%(objectname)", f"refs/exps/*/*/{name}"
        ).strip()
        base = call(repository, "git", "rev-parse", "HEAD").strip()
        assert summary["commits"][str(seed)] == {"run": commit, "base": base}
    assert "seed" not in summary["parameters"]
    assert summary["measured"]["999"]["training_seconds"] == 20.0
    assert re.fullmatch(r"2030-01-02_A_name", next((tmp_path / "a").iterdir()).name)

    commits = [entry["run"] for entry in summary["commits"].values()]
    merge.main([*commits, "--records", str(tmp_path / "c")])  # by commit ids
    assert written(tmp_path / "c") == first


def test_the_readme_has_its_sections_and_only_lawful_figures(repository: Path, tmp_path: Path) -> None:
    merge.main([*NAMES, "--records", str(tmp_path)])
    text = written(tmp_path)["README.md"].decode()
    headings = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert headings[:4] == ["Seeds", "What is new", "Base and credits", "How to reproduce"]
    assert headings[4:] == ["Compliance", "Experimental", "Coverage"]
    for seed in SEEDS:
        assert f"SEED={seed} python train_gpt.py && python train_gpt.py eval" in text
    for number in (1394, 1331, 1437, 549, 1412, 1204, 1493):
        assert f"[#{number}](https://github.com/openai/parameter-golf/pull/{number})" in text

    # Scores of the submitted scorer are in the table of seeds, those of the other one are experimental.
    table = text.partition("## Seeds")[2].partition("##")[0]
    experimental = text.partition("## Experimental")[2].partition("##")[0]
    summary = summary_of(tmp_path)
    assert f"{summary['val_bpb']:.8f}" in table
    other = f"{summary['scores']['sliding_eval']['bpb']:.8f}"
    assert other not in table
    assert other in experimental
    assert "C4, one left-to-right pass:" in text
    assert "seen \\| it" in text
    assert "2030" not in text  # nothing measured


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("seed-42", "seed-314", "faster"),
            "differ in more than the seed: train.matrix_lr is 0.022 in seed-42, 0.03 in faster",
        ),
        (("seed-42", "seed-314", "seed-42"), "seed-42 and seed-42 are both of seed 42"),
        (("seed-42",), "at least two seeds"),
        (
            ("seed-42", "seed-1000"),
            "seed-1000 is neither a file or folder here, nor a revision or experiment of this repository;"
            " run them with `make record`",
        ),
        (("seed-42", "HEAD"), "has no dvc.lock: it is not a run of the pipeline"),
        (("seed-42", "seed-314", "--against", "1493"), "bytes, this record on "),
    ],
)
def test_what_is_refused_is_one_line(
    repository: Path, names: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        merge.main([*names, "--records", str(tmp_path)])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: record: ")
    assert message in line
    assert not list(tmp_path.iterdir())


def test_a_clone_that_has_fetched_the_runs_merges_the_same_bytes(repository: Path, tmp_path: Path) -> None:
    names = NAMES[:2]
    merge.main([*names, "--records", str(tmp_path / "here")])
    dvc(repository, "remote", "add", "--local", "--force", "--default", "store", str(tmp_path / "store"))
    bare = tmp_path / "bare.git"
    call(tmp_path, "git", "clone", "-q", "--bare", str(repository), str(bare))
    call(repository, "git", "remote", "add", "origin", str(bare))
    try:
        dvc(repository, "exp", "push", "--quiet", "origin", *names)
        clone = tmp_path / "clone"
        call(tmp_path, "git", "clone", "-q", str(bare), str(clone))
        dvc(clone, "remote", "add", "--local", "--default", "store", str(tmp_path / "store"))
        dvc(clone, "exp", "pull", "--quiet", "origin", *names)
    finally:
        call(repository, "git", "remote", "remove", "origin")
    words = [sys.executable, "-m", "tools.record", *names, "--records", str(tmp_path / "there")]
    subprocess.run(
        words,
        cwd=clone,
        check=True,
        env={"PYTHONPATH": str(miniature_run.ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
    )
    assert written(tmp_path / "there") == written(tmp_path / "here")


def test_a_claim_against_another_record_pairs_its_ledgers(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge.main(["seed-42", "seed-314", "--records", str(tmp_path / "old")])
    (old,) = (tmp_path / "old").iterdir()
    merge.main(["seed-42", "seed-999", "--records", str(tmp_path / "new"), "--against", str(old)])
    claim = summary_of(tmp_path / "new")["claim"]
    assert [(test["unit"], test["chance"]) for test in claim["tests"]] == [
        ("token", "seeds"),
        ("byte", "seeds"),
        ("token", "documents"),
        ("byte", "documents"),
    ]
    new, before = (summary_of(tmp_path / name)["val_bpb"] for name in ("new", "old"))
    assert claim["paired"]["gain_bpb"] == pytest.approx(before - new, abs=1e-6)
    assert claim["against"]["mean"] == before
    assert "0.005 nats per byte" in capsys.readouterr().out
    assert "## Claim" in written(tmp_path / "new")["README.md"].decode()


@pytest.fixture(scope="module")
def three(repository: Path) -> list[PipelineRun]:
    assert Path.cwd() == repository
    return merge.read_runs(list(NAMES))


def _rate(run: PipelineRun) -> None:
    run.summary["parameters"]["train"]["matrix_lr"] = 0.03


def _read(path: str, *stages: str) -> Callable[[PipelineRun], None]:
    def change(run: PipelineRun) -> None:
        for stage in stages or run.stages:
            for dep in run.stages[stage]["deps"]:
                dep["md5"] = "f" * 32 if dep["path"] == path else dep["md5"]

    return change


def _out(path: str) -> Callable[[PipelineRun], None]:
    def change(run: PipelineRun) -> None:
        next(out for stage in run.stages.values() for out in stage["outs"] if out["path"] == path)["md5"] = (
            "d" * 32
        )

    return change


def _torch(run: PipelineRun) -> None:
    run.summary["measured"]["stages"]["ttt_eval"]["versions"]["torch"] = "2"


def _machine(run: PipelineRun) -> None:
    run.summary["measured"]["stages"]["train"]["hardware"]["processor"] = "Q"


def _command(run: PipelineRun) -> None:
    run.stages["pack"]["cmd"] = "false"


def _scorer(run: PipelineRun) -> None:
    run.summary["scorer"] = "sliding_eval"


def _no_audit(run: PipelineRun) -> None:
    run.summary["audit"] = []


def _failed_audit(run: PipelineRun) -> None:
    run.summary["audit"][0]["outcome"] = "fail"


def _too_large(run: PipelineRun) -> None:
    run.summary["bytes_total"] = 16_000_001


def _too_long(run: PipelineRun) -> None:
    run.summary["measured"]["training_seconds"] = 60.5


def _too_slow(run: PipelineRun) -> None:
    run.summary["measured"]["evaluation_seconds"] = 600.1


def _no_clock(run: PipelineRun) -> None:
    run.summary["measured"]["evaluation_seconds"] = None


def _other_size(run: PipelineRun) -> None:
    run.files["train_gpt.py"] += b"\n"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_rate, "train.matrix_lr is 0.022 in seed-42, 0.03 in seed-314"),
        (_read("source.py"), "source.py (read by a stage) is "),
        (_read("source.py", "train"), "seed-314: its stages ran with different states of source.py"),
        (_read("requirements.lock"), "requirements.lock (read by a stage) is "),
        (_out("artifacts/bundle/train_gpt.py"), "the bundle, train_gpt.py, is "),
        (_out("artifacts/tokenize/tokenizer.model"), "the tokenizer is "),
        (_out("artifacts/tokenize/val"), "the validation shards is "),
        (_torch, "versions.torch of ttt_eval is 1 in seed-42, 2 in seed-314"),
        (_machine, "processor of train is P in seed-42, Q in seed-314"),
        (_command, "the command of pack is true in seed-42, false in seed-314"),
        (_scorer, "scorer is ttt_eval in seed-42, sliding_eval in seed-314"),
        (_no_audit, "seed-314 was not audited: it holds no verdict on ttt_eval"),
        (_failed_audit, "seed-314 failed its audit: files, coverage: seen | it"),
        (_too_large, "seed-314 is over budget: bytes_total 16,000,001 bytes, 16,000,000 are allowed"),
        (_too_long, "seed-314 is over budget: training 60.5 seconds, 60 are allowed"),
        (_too_slow, "seed-314 is over budget: evaluation 600.1 seconds, 600 are allowed"),
        (_no_clock, "seed-314 does not say how many seconds its evaluation took"),
        (_other_size, "seed-314: train_gpt.py has"),
    ],
)
def test_every_difference_and_defect_is_named(
    three: list[PipelineRun], spoil: Callable[[PipelineRun], None], message: str
) -> None:
    runs = copy.deepcopy(three)
    require_compatible(runs)
    spoil(runs[1])
    with pytest.raises(ValueError, match=re.escape(message)):
        require_compatible(runs)


def test_against_the_leaderboard_on_the_challenge_s_own_text(three: list[PipelineRun]) -> None:
    summary = merge_runs(three)
    summary["coverage"] = {"targets": 40_540_160, "bytes": 151_078_222, "documents": 50_000}
    for seed, bpb in zip(SEEDS, (1.0771, 1.0772, 1.0773), strict=True):
        summary["seed_results"][str(seed)]["val_bpb"] = bpb
    claim = baseline.claim_against(summary, "#1493")
    shown = {test["unit"]: test["shown"] for test in claim["tests"]}
    assert shown == {"token": True, "byte": False}
    assert claim["against"] == {
        "name": "#1493",
        "source": "https://github.com/openai/parameter-golf/pull/1493",
        "status": "merged",
        "mean": 1.081,
        "deviation": 0.0002,
        "seeds": 3,
    }
    text = record_readme.render_readme(
        summary | {"claim": claim}, leaderboard.read_leaderboard(miniature_run.ROOT / leaderboard.FILE)
    )
    assert "Against #1493 (https://github.com/openai/parameter-golf/pull/1493, merged): 1.081000 bpb" in text
    assert "bytes of the same text" in text
