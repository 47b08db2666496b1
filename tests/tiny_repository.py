"""A Git and DVC repository with this source, tiny parameters and a small text: its pipeline takes seconds."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

from tools.preset import overlay

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    *("stages", "tools", "data", "dvc.yaml", "params.yaml", "requirements.lock", "pyproject.toml"),
    *(".dvcignore", ".gitignore"),
)
TINY = {
    "parallel": {"threads": 1},
    "tokenize": {
        "source": "files",
        "train_glob": "*.jsonl",
        "val_fraction": 0.2,
        "vocab_size": 400,
        "threads": 1,
    },
    "model": {"vocab_size": 400, "context": 32, "width": 32, "heads": 2, "kv_heads": 1, "hidden": 64},
    "train": {"steps": 30, "batch_tokens": 256, "micro_batch_tokens": 128, "ema_decay": 0.9},
    "calibrate": {"tokens": 512, "importance_tokens": 256, "micro_batch_tokens": 256},
    "sliding_eval": {"window": 32, "stride": 8, "batch_windows": 16, "chunk": 256},
    # Without the byte mixture, which every process of the audit would have to compile.
    "ttt_eval": {"chunk": 256, "epochs": 1, "batch_tokens": 256, "mixer_rate": 0.0},
    "audit": {"segment_targets": 32, "certified_targets": 16},
}
WORDS = "tensor gradient matrix returns shape loss the of a to in and is for with norm".split()  # noqa: SIM905


def call(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder` with this interpreter first on PATH; its failure fails the test."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {
        **os.environ,
        "PATH": path,
        "DVC_SITE_CACHE_DIR": str(folder.parent / "site"),
        "PYTHONPATH": str(folder.parent / "python"),
        "NUMBA_CACHE_DIR": str(folder.parent / "compiled"),
        "PYTHONDONTWRITEBYTECODE": "1",
        **environment,
    }
    result = subprocess.run(words, cwd=folder, env=settings, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, f"{words}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result


def make_repository(folder: Path) -> Path:
    """Make and commit the repository; its pipeline has not run yet."""
    folder.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    (folder / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", folder / ".dvc/config")

    # Its own parameters and text.
    params = overlay((folder / "params.yaml").read_text(), yaml.safe_dump(TINY, default_flow_style=None))
    (folder / "params.yaml").write_text(params)
    generator = np.random.Generator(np.random.PCG64(0))
    documents = [" ".join(generator.choice(WORDS, 60)) + f". Note {number}." for number in range(120)]
    lines = [json.dumps({"text": text}) for text in documents]
    (folder / "data/text/documents.jsonl").write_text("\n".join(lines) + "\n")

    call(folder, "git", "init", "-q")
    commit(folder, "start")
    return folder


def commit(folder: Path, message: str) -> None:
    """Commit everything in the repository."""
    call(folder, "git", "add", "-A")
    call(folder, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", message)
