"""Ledgers by name: a file, a folder that holds one, or what a revision or an experiment of this repository has scored.

Only names of revisions need DVC, and only as a command: its cache, or its remote, has the ledger of every run.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from stages.common import ledger

FILE = "nll.npy"
SCORERS = ("sliding_eval", "ttt_eval")
LOCK = "dvc.lock"
STREAM = (
    "artifacts/tokenize/val",
    "artifacts/tokenize/tokenizer.model",
)  # what a ledger's targets and bytes come from
EXPERIMENT_PARTS = 5  # of refs/exps/<2 digits>/<38 digits>/<name>


def read(name: str, targets: int) -> np.ndarray:
    """The ledger called `name`, (N-1,) float32; a ValueError when there is none, or when it belongs to another stream.

    `name` is a path, or REVISION or REVISION:SCORER, where SCORER is sliding_eval (without one) or ttt_eval.
    """
    path = Path(name)
    if path.exists():
        return ledger.read(path / FILE if path.is_dir() else path, targets)
    revision, separator, scorer = name.partition(":")
    if separator and scorer not in SCORERS:
        raise ValueError(
            f"{name}: {scorer!r} is no scorer; name one of {', '.join(SCORERS)} behind the colon"
        )
    commit = resolve(revision)
    require_same_stream(name, commit)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / FILE
        fetch(commit, f"artifacts/{scorer or SCORERS[0]}/{FILE}", file)
        return ledger.read(file, targets)


def resolve(revision: str) -> str:
    """The commit of a Git revision or of the DVC experiment of that name: the one started from HEAD, or the only one."""
    found = _commit(revision)
    if found:
        return found
    head = _commit("HEAD")
    under_head = head and _commit(f"refs/exps/{head[:2]}/{head[2:]}/{revision}")
    if under_head:
        return under_head
    listed = _run("git", "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps").stdout.splitlines()
    pairs = [line.split(" ", 1) for line in listed]
    commits = {
        commit
        for commit, ref in pairs
        if ref.count("/") == EXPERIMENT_PARTS - 1 and ref.endswith(f"/{revision}")
    }
    if not commits:
        raise ValueError(
            f"{revision} is neither a file or folder here, nor a revision or experiment of this repository;"
            " `dvc exp pull` fetches the experiments of others"
        )
    if len(commits) > 1:
        raise ValueError(
            f"{revision} names {len(commits)} experiments on different commits: {', '.join(sorted(commits))}; name one of these"
        )
    return commits.pop()


def require_same_stream(name: str, commit: str) -> None:
    """Raise ValueError unless the commit scored the validation stream and tokenizer that this working tree has."""
    shown = show(commit, LOCK)
    if shown is None or not Path(LOCK).exists():
        raise ValueError(
            f"{name}: {LOCK} is missing {'here' if shown else 'there'}, so the stream it scored is not known"
        )
    there, here = _stream(shown), _stream(Path(LOCK).read_text(encoding="utf-8"))
    for path in STREAM:
        if there.get(path) != here.get(path):
            raise ValueError(
                f"{name} scored another {path} ({there.get(path)}) than this working tree has ({here.get(path)}): not comparable"
            )


def show(commit: str, path: str) -> str | None:
    """The text of a file that a commit holds in Git; None where it holds none."""
    shown = _run("git", "show", f"{commit}:./{path}")
    return shown.stdout if shown.returncode == 0 else None


def parent(commit: str) -> str:
    """The commit before: for an experiment the one that it was started from; a commit without one is its own."""
    return _commit(f"{commit}^") or commit


def fetch(commit: str, path: str, to: Path) -> None:
    """Copy an output of a commit out of DVC's cache, or its remote."""
    got = _run(sys.executable, "-m", "dvc", "get", ".", path, "--rev", commit, "--out", str(to))
    if got.returncode != 0:
        said = [
            line.removeprefix("ERROR: ") for line in got.stderr.splitlines() if line.startswith("ERROR: ")
        ]
        reason = said[0] if said else f"exit code {got.returncode}"
        raise ValueError(
            f"dvc has no {path} of {commit[:10]} ({reason}); `dvc exp pull` or `dvc pull` fetches what others ran"
        )


def _stream(lock: str) -> dict[str, str]:
    """The hashes of what sliding_eval read of the stream, by path, from the text of a lock file."""
    content: Any = yaml.safe_load(lock)
    stages = content.get("stages", {}) if isinstance(content, dict) else {}
    entries = stages.get("sliding_eval", {}).get("deps", [])
    return {entry["path"]: entry.get("md5", "") for entry in entries if entry["path"] in STREAM}


def _commit(revision: str) -> str | None:
    """The commit that Git knows under this name."""
    found = _run("git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    return found.stdout.strip() if found.returncode == 0 else None


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ValueError(
            f"{command[0]} is not installed, and names of revisions need it; name ledger files instead"
        ) from None
