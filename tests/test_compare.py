"""Two ledgers side by side: the figures against a plain count, names of runs, errors in one line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from stages.common import ledger, paired_bootstrap, shards
from stages.common.bpb import ByteTable
from stages.scoring.stream import ValidationStream, open_validation_stream
from stages.tokenize import tokenizer
from tools.compare import breakdown, revisions
from tools.compare import cli as compare

BOS = 1


def stream(lengths: list[int], seed: int = 0) -> ValidationStream:
    generator = np.random.Generator(np.random.PCG64(seed))
    tokens = np.concatenate([[BOS, *generator.integers(4, 30, length - 1)] for length in lengths]).astype(
        np.uint16
    )
    return ValidationStream(
        tokens,
        np.where(tokens[1:] == BOS, 0, 3),
        ByteTable((b"abc",) * 30, np.zeros(30, bool), np.arange(30) < 4, BOS),
    )


def ledgers(targets: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.Generator(np.random.PCG64(seed))
    a = generator.gamma(2.0, 1.0, targets).astype(np.float32)
    return a, (a + generator.normal(-0.05, 0.3, targets)).clip(0).astype(np.float32)


def slow_parts(a: np.ndarray, b: np.ndarray, of: ValidationStream, by_length: bool) -> dict[str, list[float]]:
    """Documents, bytes and bits of each class, one target at a time."""
    found: dict[str, list[Any]] = {}
    document = -1
    for i, token in enumerate(of.tokens):
        if token == BOS:
            document, start = document + 1, i
            stop = next((j for j in range(i + 1, len(of.tokens)) if of.tokens[j] == BOS), len(of.tokens))
        if i == 0:
            continue
        value = stop - start if by_length else i - start
        low = max(edge for edge in breakdown.BUCKET_EDGES if edge <= value)
        row = found.setdefault(str(low), [set(), 0, 0.0])
        row[0].add(document)
        row[1] += int(of.counted_bytes[i - 1])
        row[2] += (float(b[i - 1]) - float(a[i - 1])) / np.log(2)
    return {low: [len(row[0]), row[1], row[2]] for low, row in found.items() if row[1]}


def test_the_figures_equal_a_plain_count_and_add_up() -> None:
    of = stream([5, 70, 300, 64, 90, 2100, 40, 150, 128])
    a, b = ledgers(of.targets)
    found = breakdown.compare_ledgers(a, b, of)
    total = int(of.counted_bytes.sum())
    for by_length, parts in ((True, found.by_length), (False, found.by_position)):
        expected = slow_parts(a, b, of, by_length)
        assert [part.label.split()[0] for part in parts] == sorted(expected, key=int)
        for part in parts:
            documents, size, bits = expected[part.label.split()[0]]
            assert (part.documents, part.bytes) == (documents, size)
            assert part.difference.bpb == pytest.approx(bits / size, rel=1e-9)
            assert part.contribution == pytest.approx(bits / total, rel=1e-9)
        assert sum(part.contribution for part in parts) == pytest.approx(found.whole.bpb, rel=1e-9)
    assert found.whole == paired_bootstrap.paired_difference(
        a, b, of.counted_bytes, paired_bootstrap.document_of_target(of.tokens, BOS)
    )
    assert found.running_difference.shape == a.shape
    assert found.running_difference[-1] == pytest.approx(found.whole.bpb, rel=1e-9)
    assert found.documents == 9


def test_a_ledger_against_itself_shows_no_difference() -> None:
    of = stream([100, 80, 400])
    a, _ = ledgers(of.targets)
    found = breakdown.compare_ledgers(a, a, of)
    assert found.whole == paired_bootstrap.Difference(0.0, 0.0, 0.0)
    assert "no difference is shown" in compare.format_comparison(found, ("a", "b"), (1.0, 1.0))


def test_the_verdict_follows_the_interval() -> None:
    of = stream([100] * 40)
    a, b = ledgers(of.targets)
    assert "B is better" in compare.format_comparison(
        breakdown.compare_ledgers(a, b, of), ("a", "b"), (1.0, 1.0)
    )
    assert "A is better" in compare.format_comparison(
        breakdown.compare_ledgers(b, a, of), ("a", "b"), (1.0, 1.0)
    )


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """A folder with the stream and two ledgers where the pipeline has them."""
    texts = [f"Document {i} says that {i * i} is the square of {i}.\n" * (1 + i % 5) for i in range(30)]
    folder = tmp_path / "artifacts" / "tokenize"
    (folder / "val").mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(tokenizer.train(texts, 320, 1))
    processor = tokenizer.load(folder / "tokenizer.model", 320).processor
    tokens = np.concatenate([np.array([BOS, *processor.encode(text)], dtype=np.uint16) for text in texts])
    shards.write(folder / "val" / "val_000000.bin", tokens)
    for scorer, nll in zip(revisions.SCORERS, ledgers(len(tokens) - 1), strict=True):
        (tmp_path / "artifacts" / scorer).mkdir()
        ledger.write(tmp_path / "artifacts" / scorer / "nll.npy", nll)
    return tmp_path


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=True)


def test_the_command_takes_files_and_folders(
    scored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(scored)
    compare.main(["artifacts/sliding_eval", "artifacts/ttt_eval/nll.npy", "--json", "figures.json"])
    printed = capsys.readouterr().out
    figures = json.loads(Path("figures.json").read_text())
    of = open_validation_stream(Path("artifacts/tokenize/val"), Path("artifacts/tokenize/tokenizer.model"))
    a, b = (ledger.read(Path(f"artifacts/{scorer}/nll.npy"), of.targets) for scorer in revisions.SCORERS)
    assert (
        figures["difference"]["bpb"]
        == breakdown.compare_ledgers(a, b, of).whole.bpb
        == pytest.approx(figures["b"]["bpb"] - figures["a"]["bpb"])
    )
    assert f"{figures['difference']['bpb']:+.6f}" in printed
    first = Path(".scratch/comparison.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    compare.main(["artifacts/sliding_eval", "artifacts/ttt_eval", "--plot", "again.png"])
    assert Path("again.png").read_bytes() == first


@pytest.mark.parametrize(
    ("a", "message"),
    [
        ("nothing.npy", "nothing.npy is neither a file or folder here, nor a revision or experiment"),
        (
            "artifacts/tokenize",
            "artifacts/tokenize has no nll.npy; name a folder of sliding_eval or ttt_eval",
        ),
        ("loss.tsv", "loss.tsv is not an .npy file"),
        ("short.npy", "belongs to another stream"),
        ("HEAD:other", "'other' is not a scorer; name one of sliding_eval, ttt_eval"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    scored: Path, a: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(scored)
    ledger.write(Path("short.npy"), np.ones(3, dtype=np.float32))
    Path("loss.tsv").write_text("step\tloss\n")
    with pytest.raises(SystemExit) as ended:
        compare.main([a, "artifacts/ttt_eval"])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: compare: ")
    assert message in lines[0]
    assert not Path(".scratch").exists()


@pytest.mark.parametrize(
    ("names", "absent", "message"),
    [
        (("nosuch", "alsonot"), "tokenizer.model", "nosuch is neither a file or folder here"),
        (("a.npy", "a.npy"), "tokenizer.model", "run `dvc repro tokenize`, or name another with --tokenizer"),
        (("a.npy", "a.npy"), "val", "run `dvc repro tokenize`, or name another with --val"),
    ],
)
def test_a_missing_stream_is_one_line_after_missing_runs(
    names: tuple[str, str],
    absent: str,
    message: str,
    scored: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(scored)
    ledger.write(Path("a.npy"), np.ones(3, dtype=np.float32))
    (scored / "artifacts/tokenize" / absent).rename(scored / "elsewhere")
    with pytest.raises(SystemExit) as ended:
        compare.main(list(names))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.fixture
def repository(scored: Path) -> Path:
    """The folder as a DVC repository: ledgers in the cache, and a second run as the experiment seed-2."""
    call(scored, "git", "init", "-q", "-b", "main")
    call(scored, "git", "config", "user.email", "test@example.org")
    call(scored, "git", "config", "user.name", "test")
    dvc = (sys.executable, "-m", "dvc")
    call(scored, *dvc, "init", "-q")

    # The first run.
    stream_files = list(revisions.STREAM_PATHS)
    stages = {
        name: {"cmd": "true", "deps": stream_files, "outs": [f"artifacts/{name}/nll.npy"]}
        for name in revisions.SCORERS
    }
    (scored / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    call(scored, *dvc, "commit", "-q", "--force")
    call(scored, "git", "add", "-A")
    call(scored, "git", "commit", "-q", "-m", "one")

    # The second, as an experiment.
    nll = np.load(scored / "artifacts/sliding_eval/nll.npy")
    (scored / "artifacts/sliding_eval/nll.npy").unlink()  # a link into the cache
    ledger.write(scored / "artifacts/sliding_eval/nll.npy", nll + np.float32(0.1))
    call(scored, *dvc, "commit", "-q", "--force")
    call(scored, "git", "add", "-A")
    call(scored, "git", "commit", "-q", "-m", "two")
    commit = call(scored, "git", "rev-parse", "HEAD").stdout.strip()
    call(scored, "git", "update-ref", f"refs/exps/{commit[:2]}/{commit[2:]}/seed-2", commit)
    call(scored, "git", "reset", "-q", "--hard", "HEAD~1")
    return scored


def test_revisions_and_experiments_come_from_dvc_s_cache(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    of = open_validation_stream(Path("artifacts/tokenize/val"), Path("artifacts/tokenize/tokenizer.model"))
    first, second = revisions.read_ledger("HEAD", of.targets), revisions.read_ledger("seed-2", of.targets)
    np.testing.assert_array_equal(second, first + np.float32(0.1))
    np.testing.assert_array_equal(
        revisions.read_ledger("seed-2:ttt_eval", of.targets), ledgers(of.targets)[1]
    )

    other = call(repository, "git", "rev-parse", "HEAD").stdout.strip()
    call(repository, "git", "update-ref", f"refs/exps/11/{'1' * 38}/seed-2", other)
    with pytest.raises(ValueError, match="seed-2 names 2 experiments on different commits"):
        revisions.read_ledger("seed-2", of.targets)
    call(
        repository, "git", "update-ref", f"refs/exps/{other[:2]}/{other[2:]}/seed-2", other
    )  # as after `dvc exp run` here
    np.testing.assert_array_equal(revisions.read_ledger("seed-2", of.targets), first)

    lock = yaml.safe_load(Path("dvc.lock").read_text())
    for dependency in lock["stages"]["sliding_eval"]["deps"]:
        dependency["md5"] = "0" * 32
    Path("dvc.lock").write_text(yaml.safe_dump(lock))
    with pytest.raises(ValueError, match=r"HEAD scored another artifacts/tokenize/val .* not comparable"):
        revisions.read_ledger("HEAD", of.targets)


def test_what_the_cache_lacks_says_how_to_fetch_it(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    lock = yaml.safe_load(Path("dvc.lock").read_text())
    digest = lock["stages"]["ttt_eval"]["outs"][0]["md5"]
    (repository / ".dvc/cache/files/md5" / digest[:2] / digest[2:]).unlink()
    with pytest.raises(ValueError, match="fetches what others ran, or `dvc repro` at that commit"):
        revisions.read_ledger("HEAD:ttt_eval", 10)
