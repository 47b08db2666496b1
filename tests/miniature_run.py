"""A whole run in miniature: artifacts of all stages, and a DVC repository that holds such runs.

They are for the stage submission and the tools that read runs. No stage is run: `make` writes artifacts
with the project's own writers, and the stages of `pipeline` do nothing.
"""

import functools
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from stages.audit import report
from stages.audit.verdict import Check, Verdict
from stages.bundle.params import BundleParams
from stages.calibrate.params import CalibrateParams
from stages.common import ledger, shards
from stages.common.bpb import bits_per_byte, byte_table, load_tokenizer, target_bytes
from stages.common.stage import canonical_json, launch
from stages.pack.params import PackParams
from stages.pack.stats import layers_tsv, tensor_stats
from stages.sliding_eval.params import SlidingEvalParams
from stages.submission.params import Params, SubmissionParams
from stages.submission.stage import STAGE, main
from stages.tokenize import tokenizer
from stages.tokenize.params import TokenizeParams
from tests import factories
from tools.compare import revisions
from tools.record import leaderboard

ROOT = Path(__file__).resolve().parent.parent
TEXT = [
    f"the {word} of the {other} is a {word} and 1{i} more"
    for i, word in enumerate(("abc", "dog", "sun"))
    for other in ("cat", "day", "sea")
]
CODE = b"print('hello')\n" * 20
CLAIM = SubmissionParams("An Author", "author", "A name", "non-record-16mb", "What it is.")
PARAMS = Params(
    seed=42,
    scorer="ttt_eval",
    parallel=factories.PARALLEL,
    model=factories.TINY,
    tokenize=TokenizeParams("pydocs", "", "", "text", 0.1, 1000, "train", 300, 1000, 1, 1000),
    train=factories.TRAIN,
    calibrate=CalibrateParams(64, 32, 32, 1.0),
    pack=PackParams(
        "sdclip", "brotli", 8, 0.1, 0.5, 6, 8, 12.85, 12.85, 20.0, 0, 3, 0, 0.01, 128, 11, 16_000_000, 50_000
    ),
    sliding_eval=SlidingEvalParams(16, 4, 4, 32),
    ttt_eval=replace(factories.TTT, epochs=1, lr=0.01),
    bundle=BundleParams(11),
    audit=factories.AUDIT,
    submission=CLAIM,
)
TIMING = {
    "date": "2030-01-02T03:04:05Z",
    "hardware": {"cores": 2, "processor": "P", "machine": "m"},
    "versions": {"torch": "1"},
    "training_seconds": 10.0,
    "evaluation_seconds": 5.0,
}


def model_bytes(seed: int) -> bytes:
    """A file that is about as long for every seed."""
    return b"\x89model" * 50 + bytes(seed % 7)


def verdict(subject: str, outcome: Any = "pass") -> Verdict:
    """A verdict of the audit on the ledger or the files `subject`."""
    check = Check("B6", "coverage", ("C4",), sees="gaps", blind="the rest")
    return Verdict(check, subject, outcome, "seen | it", saw=1, expected=1, bound=0)


@functools.cache
def tokenizer_bytes() -> bytes:
    """A throw-away tokenizer of the pipeline's kind."""
    return tokenizer.train(TEXT, 300, 1)


def make(root: Path, seed: int = 42) -> None:
    """Write artifacts of all stages before submission; the seed decides the ledgers and the model."""
    folder = root / "artifacts"
    for stage in (*STAGE.reads.keys() - {"requirements"}, "tokenize/val"):
        (folder / stage).mkdir(parents=True, exist_ok=True)
        (folder / stage / "log.txt").write_text(f"what {stage} said\n")

    # A tokenizer and a validation stream.
    (folder / "tokenize/tokenizer.model").write_bytes(tokenizer_bytes())
    processor = load_tokenizer(folder / "tokenize/tokenizer.model")
    tokens = np.concatenate([[processor.bos_id(), *processor.encode(text)] for text in TEXT]).astype(
        np.uint16
    )
    shards.write(folder / "tokenize/val/val_000000.bin", tokens)
    counted = target_bytes(tokens, byte_table(processor))

    # Ledgers of both evaluations.
    generator = np.random.Generator(np.random.PCG64(seed))
    for stage, prefix, base in (("sliding_eval", "sliding", 2.0), ("ttt_eval", "ttt", 1.9)):
        nll = (base + generator.random(len(counted))).astype(np.float32)
        ledger.write(folder / stage / "nll.npy", nll)
        ledger.write_chunks(folder / stage / "chunks.tsv", nll, counted, 32)
        bpb = bits_per_byte(nll, counted)
        write_json(folder / stage / "metrics.json", {f"{prefix}_bpb": bpb})
        line = f"{bpb:.6f} bpb over {len(nll):,} targets, {counted.sum():,} bytes"
        (folder / stage / "log.txt").write_text(f"    1.0s {stage}: {line}\n")

    # The files that are counted, and what train and pack say of them.
    _write_layers(folder / "pack/layers.tsv")
    (folder / "pack/model.bin").write_bytes(model_bytes(seed))
    (folder / "bundle/train_gpt.py").write_bytes(CODE)
    steps = [f"{step}\t{8 / step:.6f}\t1.0\t{int(step > 4)}" for step in range(1, 13)]
    (folder / "train/loss.tsv").write_text("\n".join(["step\tloss\tlr_multiplier\tlooped", *steps]) + "\n")
    (folder / "train/log.txt").write_text("    1.0s train: 12 steps in 10.0 s, 2,355 tokens/s\n")

    # Metrics, the audit's report, times.
    write_json(folder / "tokenize/manifest.json", {"source": "pydocs"})
    write_json(folder / "pack/metrics.json", {"bytes_model": len(model_bytes(seed))})
    write_json(folder / "bundle/metrics.json", {"bytes_code": len(CODE)})
    write_json(folder / "train/metrics.json", {"train_steps": 12})
    for stage in ("calibrate", "audit"):
        write_json(folder / stage / "metrics.json", {})
    write_report(folder, [verdict("files"), verdict("sliding_eval", "cannot tell"), verdict("ttt_eval")])
    for stage in STAGE.reads.keys() - {"requirements"}:
        write_json(folder / stage / "timing.json", TIMING)
    (root / "requirements.lock").write_text("torch==2.13.0\n")


def _write_layers(path: Path) -> None:
    rows = [
        tensor_stats.TensorStats("embedding.weight", "embedding", (4, 4), "rows:8", 200, 16),
        tensor_stats.TensorStats("container", "container", (), "", 150, 0),
    ]
    path.write_text(layers_tsv.to_tsv(rows))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file as the stages do."""
    path.write_text(canonical_json(value), encoding="utf-8")


def write_report(folder: Path, verdicts: list[Verdict]) -> None:
    """Write the audit's report to the artifacts in `folder`."""
    write_json(folder / "audit/report.json", report.as_json(verdicts, {}))


def run(tree: Path, params: Params = PARAMS, output: str = "out") -> Path:
    """Run the stage submission in `tree`, which is the working folder; returns its output folder."""
    as_yaml = yaml.safe_dump(json.loads(json.dumps(asdict(params))))
    (tree / "params.yaml").write_text(as_yaml, encoding="utf-8")
    launch(STAGE, main, ["--output", output])
    return tree / output


# Outputs of the pipeline whose stages do nothing.
OUTS = {
    "tokenize": ["val", "tokenizer.model"],
    "train": ["loss.tsv"],
    "calibrate": ["log.txt"],
    "pack": ["model.bin"],
    "sliding_eval": ["nll.npy"],
    "ttt_eval": ["nll.npy"],
    "bundle": ["train_gpt.py"],
    "audit": ["report.json"],
}


def pipeline() -> dict[str, Any]:
    """The content of dvc.yaml."""
    stages: dict[str, Any] = {}
    for stage, outs in OUTS.items():
        deps = ["requirements.lock"]
        if stage not in ("tokenize", "bundle"):
            deps = ["source.py", *revisions.STREAM_PATHS]
        stages[stage] = {"cmd": "true", "deps": deps, "outs": [f"artifacts/{stage}/{name}" for name in outs]}
    stages["train"]["params"] = ["seed"]

    names = ("train_gpt.py", "README.md", "train.log", "requirements.txt")
    outs = [f"artifacts/submission/{name}" for name in names]
    in_git = {"artifacts/submission/submission.json": {"cache": False}}
    stages["submission"] = {"cmd": "true", "deps": ["artifacts/audit/report.json"], "outs": [*outs, in_git]}
    return {"stages": stages}


def call(folder: Path, *words: str) -> str:
    """Run a command in `folder`; returns its output. Its failure fails the test."""
    result = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, f"{words}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result.stdout


def dvc(folder: Path, *words: str) -> str:
    return call(folder, sys.executable, "-m", "dvc", *words)


def start(folder: Path) -> None:
    """Make a Git and DVC repository with the pipeline, which has not run."""
    call(folder, "git", "init", "-q", "-b", "main")
    call(folder, "git", "config", "user.email", "test@example.org")
    call(folder, "git", "config", "user.name", "test")
    dvc(folder, "init", "-q")
    (folder / "dvc.yaml").write_text(yaml.safe_dump(pipeline(), sort_keys=False))
    (folder / "source.py").write_text("print('train')\n")
    (folder / "data").mkdir()
    shutil.copy(ROOT / leaderboard.FILE, folder / leaderboard.FILE)
    call(folder, "git", "add", "-A")
    call(folder, "git", "commit", "-q", "-m", "start")


def experiment(folder: Path, name: str, params: Params) -> str:
    """Make artifacts in `folder`, which is the working folder, and a DVC experiment of them.

    Returns the experiment's commit.
    """
    # Artifacts are links into the cache, so they are removed before others are written.
    base = call(folder, "git", "rev-parse", "HEAD").strip()
    for path in (folder / "artifacts").rglob("*"):
        if path.is_file():
            path.unlink()
    make(folder, params.seed)
    run(folder, params, "artifacts/submission")
    # A commit that no branch holds, under the name that DVC gives experiments.
    dvc(folder, "commit", "-q", "--force")
    call(folder, "git", "add", "-A")
    call(folder, "git", "commit", "-q", "-m", name)
    commit = call(folder, "git", "rev-parse", "HEAD").strip()
    call(folder, "git", "update-ref", f"refs/exps/{base[:2]}/{base[2:]}/{name}", commit)
    call(folder, "git", "reset", "-q", "--hard", base)
    return commit


def fetch_from_cache(commit: str, path: str, to: Path) -> None:
    """Copy an output of a commit to `to` from the working folder's cache, as `dvc get` does from a remote."""
    stages = yaml.safe_load(call(Path(), "git", "show", f"{commit}:dvc.lock"))["stages"]
    outs = {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"]}
    if path in outs:
        _copy_from_cache(outs[path], to)
        return
    to.mkdir()
    for inside in (Path(out) for out in outs if Path(out).parent == Path(path)):
        in_git = subprocess.run(["git", "show", f"{commit}:{inside}"], capture_output=True, check=False)
        if in_git.returncode == 0:
            (to / inside.name).write_bytes(in_git.stdout)
        else:
            _copy_from_cache(outs[str(inside)], to / inside.name)


def _copy_from_cache(md5: str, to: Path) -> None:
    cached = Path(".dvc/cache/files/md5") / md5[:2] / md5[2:]
    if not md5.endswith(".dir"):
        shutil.copy(cached, to)
        return
    to.mkdir()
    for entry in json.loads(cached.read_text()):
        _copy_from_cache(entry["md5"], to / entry["relpath"])
