"""The report: one page that a browser shows without a network, its figures those of the ledgers."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stages.common import paired_bootstrap
from stages.common.bpb import bits_per_byte
from stages.scoring.stream import open_validation_stream
from tests import miniature_run
from tools.report import cli as report
from tools.report import figures, run_data

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# What the browser finds, written where --dump-dom shows it.
PROBE = """
<script>
addEventListener("load", () => {
  const box = i => i.getBoundingClientRect();
  const images = [...document.images].map(i => [i.id, i.naturalWidth, box(i).width, box(i).height]);
  const rows = document.querySelectorAll("table tr").length;
  const found = { images, rows, loaded: performance.getEntriesByType("resource").length };
  console.error("the probe ran");
  document.title = "PROBE" + JSON.stringify(found) + "END";
});
</script>
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a run in it, which is the working folder, and another run in `other`."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "other").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for place, seed in ((folder, 42), (folder / "other", 7)):
            patch.chdir(place)
            miniature_run.make(place, seed)
            miniature_run.run(place, replace(miniature_run.PARAMS, seed=seed), "artifacts/submission")
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("page")
    report.main([".", "other", "--output", str(output)])
    return output / "index.html"


def test_the_page_is_whole_in_itself_and_the_same_again(page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    assert set(re.findall(r'(?:src|href)="([^",]*),', text)) == {"data:image/png;base64", "data:"}
    assert not re.search(r"https?://|<script|@import|url\(", re.sub(r"base64,[^\"]*", "", text))
    report.main([".", "other", "--output", str(tmp_path)])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in page.parent.iterdir()
    }
    assert text.count("<img ") == len(list(page.parent.glob("*.png"))) == 8


def test_the_figures_are_those_of_the_runs(page: Path, runs: Path) -> None:
    for folder in (runs, runs / "other"):
        summary = json.loads((folder / "artifacts/submission/submission.json").read_text())
        for key in report.SUMMARY_FIELDS:
            assert f"<td>{summary[key]}</td>" in page.read_text()


def test_intervals_hold_the_score_that_they_are_of(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bootstrap against a ledger of zeros is that of the score itself."""
    drawn: list[paired_bootstrap.Difference] = []
    difference = paired_bootstrap.paired_difference

    def kept(
        a: np.ndarray, b: np.ndarray, counted_bytes: np.ndarray, documents: np.ndarray
    ) -> paired_bootstrap.Difference:
        drawn.append(difference(a, b, counted_bytes, documents))
        return drawn[-1]

    monkeypatch.setattr(paired_bootstrap, "paired_difference", kept)
    stream = open_validation_stream(
        Path("artifacts/tokenize/val"), Path("artifacts/tokenize/tokenizer.model")
    )
    both = [run_data.read_run_data(name, stream) for name in (".", "other")]
    figures.side_by_side(both, stream)
    for found, run in zip(drawn[:2], both, strict=True):
        assert found.bpb == pytest.approx(bits_per_byte(run.claimed, stream.counted_bytes), rel=1e-12)
        assert found.low < found.bpb < found.high
    assert [difference.bpb for difference in drawn[2:]] == [
        0,
        pytest.approx(drawn[1].bpb - drawn[0].bpb, rel=1e-9),
    ]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: `apt-get install chromium`")
def test_a_browser_shows_every_picture_and_says_nothing(page: Path, tmp_path: Path) -> None:
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text() + PROBE)
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    words = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    words += [*offline, "--dump-dom", probed.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    match = re.search(r"PROBE(.*?)END", done.stdout)
    assert match, done.stderr
    found = json.loads(match[1])

    assert len(found["images"]) == 8
    for name, natural, width, height in found["images"]:
        assert natural > 500, name
        assert width > 300, name
        assert height > 100, name
    assert found["rows"] == 2 + len(report.SUMMARY_FIELDS) + 3  # heads, figures, verdicts
    assert found["loaded"] == 0  # nothing but the page itself
    (said,) = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert "the probe ran" in said


def test_a_run_that_is_none_or_of_another_stream_is_one_line(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(runs / "other/artifacts", copied / "artifacts")
    (copied / "artifacts/train/loss.tsv").unlink()
    with pytest.raises(SystemExit):
        report.main([str(copied), "--output", str(tmp_path / "out")])
    assert "has no artifacts/train/loss.tsv: run `dvc repro` there" in capsys.readouterr().err
    shard = copied / "artifacts/tokenize/val/val_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(SystemExit):
        report.main([str(copied), "--output", str(tmp_path / "out")])
    (line,) = capsys.readouterr().err.splitlines()
    assert "it scored another stream" in line
    assert not (tmp_path / "out").exists()

    # The name of a run is checked before the stream is read.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        report.main(["nosuch"])
    assert "nosuch is neither a file or folder here" in capsys.readouterr().err


def test_classes_cover_every_byte(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bars of each picture, weighed by their bytes, are the whole score."""
    stream = open_validation_stream(
        Path("artifacts/tokenize/val"), Path("artifacts/tokenize/tokenizer.model")
    )
    run = run_data.read_run_data(".", stream)
    parts: list[tuple[float, int]] = []

    def counted(nll: np.ndarray, size: np.ndarray) -> float:
        parts.append((bits_per_byte(nll, size), int(size.sum())))
        return parts[-1][0]

    monkeypatch.setattr(figures, "bits_per_byte", counted)
    figures.bpb_by_bucket([run], stream)
    total = sum(size for _, size in parts)
    assert total == 2 * stream.counted_bytes.sum()
    assert sum(bpb * size for bpb, size in parts) / total == pytest.approx(
        bits_per_byte(run.claimed, stream.counted_bytes), rel=1e-9
    )
