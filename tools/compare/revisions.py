"""Read ledgers by name: a file, a folder, or a run of this repository at a Git revision or DVC experiment.

Only names of revisions need DVC, and only as a command: the ledger of every run is in its cache or
remote.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from stages.common import ledger

LEDGER_FILE = "nll.npy"
NPY_MAGIC = b"\x93NUMPY"
SCORERS = ("sliding_eval", "ttt_eval")  # the first is the default
LOCK_FILE = "dvc.lock"
STREAM_PATHS = ("artifacts/tokenize/val", "artifacts/tokenize/tokenizer.model")  # define targets and bytes
EXPERIMENT_REF_PARTS = 5  # refs/exps/<2 digits>/<38 digits>/<name>


def read_ledger(name: str, targets: int) -> np.ndarray:
    """Return the ledger called `name`, (N-1,) float32.

    `name` is a path, REVISION, or REVISION:SCORER; the default scorer is sliding_eval. Raises
    ValueError if there is no such ledger, or if it is of another stream.
    """
    path = Path(name)
    if path.exists():
        return ledger.read(_ledger_file(path), targets)

    revision, scorer = _split_name(name)
    commit = resolve_commit(revision)
    require_same_stream(name, commit)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / LEDGER_FILE
        fetch_output(commit, f"artifacts/{scorer}/{LEDGER_FILE}", file)
        return ledger.read(file, targets)


def require_ledger_name(name: str) -> None:
    """Raise ValueError unless `name` is a ledger as in `read_ledger`; its content is not read."""
    path = Path(name)
    if path.exists():
        _ledger_file(path)
    else:
        resolve_commit(_split_name(name)[0])


def _ledger_file(path: Path) -> Path:
    """Return the ledger of a path, which is the file or its folder; ValueError if it is not an .npy file."""
    file = path / LEDGER_FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} has no {LEDGER_FILE}; name a folder of {' or '.join(SCORERS)}")
    with file.open("rb") as opened:
        if opened.read(len(NPY_MAGIC)) != NPY_MAGIC:
            raise ValueError(f"{file} is not an .npy file; name a ledger, such as {LEDGER_FILE}")
    return file


def _split_name(name: str) -> tuple[str, str]:
    """Split REVISION or REVISION:SCORER into revision and scorer."""
    revision, separator, scorer = name.partition(":")
    if separator and scorer not in SCORERS:
        raise ValueError(
            f"{name}: {scorer!r} is not a scorer; name one of {', '.join(SCORERS)} after the colon"
        )
    return revision, scorer or SCORERS[0]


def resolve_commit(revision: str, remedy: str = "`dvc exp pull` fetches the experiments of others") -> str:
    """Return the commit of a Git revision, or of the DVC experiment of that name.

    Of several experiments with the name, the one started from HEAD counts; without one it must be
    unique. The message about an unknown name ends with the remedy.
    """
    commit = _find_commit(revision)
    if commit:
        return commit

    # An experiment that was started from HEAD.
    head = _find_commit("HEAD")
    under_head = head and _find_commit(f"refs/exps/{head[:2]}/{head[2:]}/{revision}")
    if under_head:
        return under_head

    # Experiments that were started from other commits.
    lines = _run("git", "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps").stdout.splitlines()
    commits = set()
    for line in lines:
        commit, ref = line.split(" ", 1)
        if ref.count("/") == EXPERIMENT_REF_PARTS - 1 and ref.endswith(f"/{revision}"):
            commits.add(commit)

    # Exactly one commit must have the name.
    if not commits:
        raise ValueError(
            f"{revision} is neither a file or folder here, nor a revision or experiment of this repository;"
            f" {remedy}"
        )
    if len(commits) > 1:
        raise ValueError(
            f"{revision} names {len(commits)} experiments on different commits:"
            f" {', '.join(sorted(commits))}; name one of these"
        )
    return commits.pop()


def require_same_stream(name: str, commit: str) -> None:
    """Raise ValueError unless the commit scored the validation stream and tokenizer of this working tree."""
    lock = read_at_commit(commit, LOCK_FILE)
    if lock is None or not Path(LOCK_FILE).exists():
        raise ValueError(
            f"{name}: {LOCK_FILE} is missing {'here' if lock else 'there'},"
            " so the stream that it scored is not known"
        )
    theirs = _stream_hashes(lock)
    ours = _stream_hashes(Path(LOCK_FILE).read_text(encoding="utf-8"))
    for path in STREAM_PATHS:
        if theirs.get(path) != ours.get(path):
            raise ValueError(
                f"{name} scored another {path} ({theirs.get(path)}) than this working tree has"
                f" ({ours.get(path)}): not comparable"
            )


def read_at_commit(commit: str, path: str) -> str | None:
    """Return the text of a file that Git has at a commit, or None if it has none."""
    shown = _run("git", "show", f"{commit}:./{path}")
    return shown.stdout if shown.returncode == 0 else None


def parent_commit(commit: str) -> str:
    """Return the commit's parent, which for an experiment is the commit it was started from.

    A commit without a parent is returned itself.
    """
    return _find_commit(f"{commit}^") or commit


def fetch_output(commit: str, path: str, to: Path) -> None:
    """Copy an output of a commit from DVC's cache or remote to `to`."""
    result = _run(sys.executable, "-m", "dvc", "get", ".", path, "--rev", commit, "--out", str(to))
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = errors[0].removeprefix("ERROR: ") if errors else f"exit code {result.returncode}"
        raise ValueError(
            f"dvc has no {path} of {commit[:10]} ({reason});"
            " `dvc exp pull` or `dvc pull` fetches what others ran, or `dvc repro` at that commit makes it"
        )


def _stream_hashes(lock: str) -> dict[str, str]:
    """Return the hashes, by path, of the STREAM_PATHS that sliding_eval read, from a lock file's text."""
    content: Any = yaml.safe_load(lock)
    stages = content.get("stages", {}) if isinstance(content, dict) else {}
    dependencies = stages.get("sliding_eval", {}).get("deps", [])
    return {entry["path"]: entry.get("md5", "") for entry in dependencies if entry["path"] in STREAM_PATHS}


def _find_commit(revision: str) -> str | None:
    """Return the commit that Git knows under this name, or None."""
    result = _run("git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    return result.stdout.strip() if result.returncode == 0 else None


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ValueError(
            f"{command[0]} is not installed, and names of revisions need it; name ledger files instead"
        ) from None
