"""May these runs be averaged? Only when they differ in the seed, in what follows from it, and in nothing else.

A mean over runs of different settings, code, data or machines looks like any other, so each difference is refused by name (#2124: a third
seed of another configuration; #1493: seeds of different code).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.submission.artifacts import SCORERS
from tools.record.runs import Run, flat

SEED = "seed"
# Stages before the seed: their outputs are the same in every run, and named by what they are when they are not.
SHARED = {
    "artifacts/bundle/train_gpt.py": "the bundle, train_gpt.py,",
    "artifacts/tokenize/tokenizer.model": "the tokenizer",
    "artifacts/tokenize/train": "the training shards",
    "artifacts/tokenize/val": "the validation shards",
}
AFTER_SEED = ("train", "calibrate", "pack", *SCORERS)  # stages whose machine and versions decide the result
FACTS = ("scorer", "attention_backend", "coverage", "source_sha256")
SHOWN = 6  # differences in a message


def require_agreement(runs: Sequence[Run]) -> None:
    """Raise ValueError, naming the runs and what is wrong, unless the runs may be averaged."""
    if len(runs) < 2:
        raise ValueError("a record needs runs of at least two seeds")
    by_seed: dict[int, str] = {}
    for run in runs:
        if run.seed in by_seed:
            raise ValueError(
                f"{by_seed[run.seed]} and {run.name} are both of seed {run.seed}: a repeated seed is no evidence"
            )
        by_seed[run.seed] = run.name
    found = [text for run in runs[1:] for text in differences(runs[0], run)]
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ValueError(f"these runs differ in more than the seed: {'; '.join(found[:SHOWN])}{more}")
    for run in runs:
        require_sound(run)


def differences(a: Run, b: Run) -> list[str]:
    """What two runs do not share, one line each, the causes before what follows from them."""
    parts = [
        _unequal({**flat(a.parameters), SEED: None}, {**flat(b.parameters), SEED: None}, "{}"),
        _unequal(a.inputs(), b.inputs(), "{} (read by a stage)"),
        _unequal(commands(a), commands(b), "the command of {}"),
        _unequal(shared(a), shared(b), "{}"),
        _unequal(environment(a), environment(b), "{}"),
        _unequal({key: a.summary[key] for key in FACTS}, {key: b.summary[key] for key in FACTS}, "{}"),
    ]
    return [f"{text[0]} is {text[1]} in {a.name}, {text[2]} in {b.name}" for part in parts for text in part]


def commands(run: Run) -> dict[str, str]:
    """What each stage was started with."""
    return {name: stage["cmd"] for name, stage in run.stages.items()}


def shared(run: Run) -> dict[str, str]:
    """The hashes of what does not depend on the seed."""
    made = run.produced()
    return {words: made.get(path, "absent") for path, words in SHARED.items()}


def environment(run: Run) -> dict[str, Any]:
    """Machine, driver and versions of the stages whose results depend on them."""
    timing = run.summary["measured"]["stages"]
    found: dict[str, Any] = {}
    for stage in AFTER_SEED:
        kept = {key: timing[stage].get(key) for key in ("hardware", "versions", "driver", "ranks")}
        found |= {f"{key} of {stage}": value for key, value in flat(kept).items()}
    return found


def require_sound(run: Run) -> None:
    """Raise ValueError unless the run was audited, passed, and kept to its budgets."""
    summary, parameters = run.summary, run.parameters
    verdicts = summary.get("audit") or []
    claimed = [verdict for verdict in verdicts if verdict["subject"] == summary["scorer"]]
    if not claimed:
        raise ValueError(
            f"{run.name} was not audited: it holds no verdict on {summary['scorer']}; run `dvc repro audit submission` there"
        )
    for verdict in verdicts:
        if verdict["outcome"] == "fail":
            raise ValueError(
                f"{run.name} failed its audit: {verdict['subject']}, {verdict['name']}: {verdict['evidence']}"
            )
    measured = summary["measured"]
    limits = {
        "bytes_total": (summary["bytes_total"], parameters["pack"]["budget_bytes"], "bytes"),
        "training": (measured.get("training_seconds"), parameters["train"]["seconds"], "seconds"),
        "evaluation": (
            measured.get("evaluation_seconds"),
            parameters["audit"]["evaluation_budget_seconds"],
            "seconds",
        ),
    }
    for what, (saw, allowed, unit) in limits.items():
        if saw is None:
            raise ValueError(
                f"{run.name} does not say how many {unit} its {what} took; run `dvc repro` there"
            )
        if saw > allowed:
            raise ValueError(
                f"{run.name} is over budget: {what} {saw:,.10g} {unit}, {allowed:,.10g} are allowed"
            )
    if len(run.files["train_gpt.py"]) != summary["bytes_code"]:
        raise ValueError(
            f"{run.name}: train_gpt.py has {len(run.files['train_gpt.py'])} bytes, bytes_code says {summary['bytes_code']}"
        )


def _unequal(a: Mapping[str, Any], b: Mapping[str, Any], words: str) -> list[tuple[str, str, str]]:
    """Each key whose values differ, in the words of its kind, and both values."""
    keys = [*a, *(key for key in b if key not in a)]
    return [
        (words.format(key), _short(a.get(key)), _short(b.get(key)))
        for key in keys
        if a.get(key) != b.get(key)
    ]


def _short(value: Any) -> str:
    """A value in a message: hashes need no more than their beginning."""
    text = "absent" if value is None else str(value)
    return text[:10] if len(text.removesuffix(".dir")) in (32, 64) and " " not in text else text
