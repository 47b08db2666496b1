"""DVC's own commands on two runs: what README's "Two runs side by side" promises of them."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import miniature_run
from tests.miniature_run import call

ROOT = Path(__file__).resolve().parent.parent
TITLES = (
    *("Training loss", "Bytes by tensor", "Sliding windows", "Test-time training"),
    *("Bits per byte by chunk", "Squared error of quantisation"),
)


def dvc(folder: Path, *words: str, **environment: str) -> str:
    """A command of DVC with a state of its own."""
    settings = {**os.environ, "DVC_SITE_CACHE_DIR": str(folder.parent / "site"), **environment}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "dvc", *words]
    result = subprocess.run(
        command, cwd=folder, env={**settings, "PATH": path}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, f"{words}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result.stdout


def repository(folder: Path, pipeline: dict[str, Any]) -> Path:
    """An empty repository of Git and DVC with a pipeline."""
    folder.mkdir()
    call(folder, "git", "init", "-q", "-b", "main")
    call(folder, "git", "config", "user.email", "test@example.org")
    call(folder, "git", "config", "user.name", "test")
    dvc(folder, "init", "-q")
    (folder / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    return folder


def commit(folder: Path, message: str) -> None:
    call(folder, "git", "add", "-A")
    call(folder, "git", "commit", "-q", "-m", message)


# Two runs


def in_git(entries: list[Any]) -> list[Any]:
    """The metrics and plots that are in Git."""
    return [entry for entry in entries if isinstance(entry, dict)]


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Commits a and b of a repository with this project's metrics and plots, without its stages' work."""
    ours = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    for stage in ours["stages"].values():
        stage.update(
            cmd="true", metrics=in_git(stage.get("metrics", [])), plots=in_git(stage.get("plots", []))
        )
        for key in ("deps", "params", "outs"):
            stage.pop(key, None)
    folder = repository(tmp_path_factory.mktemp("runs") / "repository", ours)
    (folder / "artifacts/submission/plots").mkdir(parents=True)
    shutil.copy(ROOT / "docs/report/side_by_side.png", folder / "artifacts/submission/plots")
    for name, seed in (("a", 42), ("b", 7)):
        miniature_run.make(folder, seed)
        miniature_run.write_json(
            folder / "artifacts/submission/metrics.json",
            {"val_bpb": 1.234567 + seed * 1e-7, "bytes_total": 500},
        )
        commit(folder, name)
        call(folder, "git", "tag", name)
    return folder


def test_metrics_show_what_differs_at_the_digits_asked_for(two_runs: Path) -> None:
    table = dvc(two_runs, "metrics", "diff", "--precision", "8", "a", "b")
    assert {"sliding_bpb", "ttt_bpb", "val_bpb"} <= set(table.split())
    assert "bytes_code" not in table
    (row,) = [line.split() for line in table.splitlines() if "val_bpb" in line]
    assert row[2:] == ["1.2345712", "1.2345677", "-3.5e-06"]


def test_plots_overlay_both_runs(two_runs: Path) -> None:
    shown = json.loads(dvc(two_runs, "plots", "diff", "--json", "a", "b"))
    assert not shown.get("errors")
    plots = [plot for group in shown["data"].values() for plot in group if plot["type"] == "vega"]
    assert {tuple(sorted(plot["revisions"])) for plot in plots} == {("a", "b")}
    text = json.dumps(plots)
    assert [title for title in TITLES if title not in text] == []


# A remote

FIRST: dict[str, Any] = {"cmd": "python work.py 1", "deps": ["work.py"], "params": ["seed"]}
FIRST["outs"] = ["one", {"note.json": {"cache": False}}]
SECOND = {"cmd": "python work.py 2", "deps": ["work.py", "one"], "outs": ["two.bin"]}
POOL = {"stages": {"first": FIRST, "second": SECOND}}
WORK = """
import os, pathlib, sys
with open(os.environ["RUNS"], "a") as runs:
    runs.write(sys.argv[1])
if sys.argv[1] == "1":
    pathlib.Path("one").mkdir()
    for i in range(3):
        pathlib.Path(f"one/{i}.bin").write_bytes(bytes([i]) * 1000)
    pathlib.Path("note.json").write_text("{}")
else:
    pathlib.Path("two.bin").write_bytes(pathlib.Path("one/2.bin").read_bytes() * 2)
"""


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an S3 server with an empty bucket `store`."""
    pytest.importorskip("moto", reason="moto is in requirements-dev.lock")
    boto3 = pytest.importorskip("boto3")
    for key, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{key}", value)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and server.poll() is None:
                with socket.socket() as door:
                    if door.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
            client.create_bucket(Bucket="store")
            client.close()
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # boto3's own connections
def test_a_clone_pulls_from_s3_what_was_pushed_and_runs_nothing_again(s3: str, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    first = repository(tmp_path / "first", POOL)
    (first / "work.py").write_text(WORK)
    (first / "params.yaml").write_text("seed: 1\n")
    dvc(first, "remote", "add", "--default", "store", "s3://store/caddie")
    dvc(first, "remote", "modify", "store", "endpointurl", s3)
    dvc(first, "repro", "-q", RUNS=str(runs))
    commit(first, "run")
    dvc(first, "push", "-q")
    call(tmp_path, "git", "clone", "-q", str(first), "second")
    second = tmp_path / "second"
    shutil.rmtree(first / ".dvc/cache")
    dvc(second, "pull", "-q")
    assert (second / "two.bin").read_bytes() == b"\2" * 2000
    assert sorted(path.name for path in (second / "one").iterdir()) == ["0.bin", "1.bin", "2.bin"]
    assert "up to date" in dvc(second, "status")
    assert "up to date" in dvc(second, "repro", RUNS=str(runs))
    assert runs.read_text() == "12"
    assert call(second, "git", "status", "--porcelain") == ""
