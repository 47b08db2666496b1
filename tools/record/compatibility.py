"""Check that runs may be averaged: they must differ in the seed and its consequences, and in nothing else.

A mean over runs of different settings, code, data or machines looks like any other mean, so every
difference is an error that names it (#2124: a third seed of another configuration; #1493: seeds of
different code).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from stages.submission.artifacts import SCORER_METRICS
from tools.record.runs import CODE, PipelineRun, flatten

SEED_KEY = "seed"
# Outputs that do not depend on the seed, and their names in messages.
SEED_INDEPENDENT_OUTPUTS = {
    "artifacts/bundle/train_gpt.py": "the bundle, train_gpt.py,",
    "artifacts/tokenize/tokenizer.model": "the tokenizer",
    "artifacts/tokenize/train": "the training shards",
    "artifacts/tokenize/val": "the validation shards",
}
# Stages whose machine and versions decide the result.
SEED_DEPENDENT_STAGES = ("train", "calibrate", "pack", *SCORER_METRICS)
SHARED_SUMMARY_FIELDS = ("scorer", "attention_backend", "coverage", "source_sha256")
HASH_LENGTHS = (32, 64)  # characters of an MD5 and a sha256
ABBREVIATED_LENGTH = 10  # characters of a hash in a message
MAX_LISTED = 6  # differences in a message


class Limit(NamedTuple):
    """A measured value and its budget."""

    value: float | None
    allowed: float
    unit: str


def require_compatible(runs: Sequence[PipelineRun]) -> None:
    """Raise ValueError, naming the runs and the reason, unless the runs may be averaged."""
    if len(runs) < 2:
        raise ValueError("a record needs runs of at least two seeds")

    name_by_seed: dict[int, str] = {}
    for run in runs:
        if run.seed in name_by_seed:
            raise ValueError(
                f"{name_by_seed[run.seed]} and {run.name} are both of seed {run.seed}:"
                " a repeated seed is no evidence"
            )
        name_by_seed[run.seed] = run.name

    found = [text for run in runs[1:] for text in differences(runs[0], run)]
    if found:
        more = f"; and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else ""
        raise ValueError(f"these runs differ in more than the seed: {'; '.join(found[:MAX_LISTED])}{more}")
    for run in runs:
        require_audited_within_budget(run)


def differences(a: PipelineRun, b: PipelineRun) -> list[str]:
    """Return the differences of two runs, one line each, causes before their consequences."""
    a_parameters = {**flatten(a.parameters), SEED_KEY: None}
    b_parameters = {**flatten(b.parameters), SEED_KEY: None}
    a_fields = {field: a.summary[field] for field in SHARED_SUMMARY_FIELDS}
    b_fields = {field: b.summary[field] for field in SHARED_SUMMARY_FIELDS}
    compared = [
        ("{}", a_parameters, b_parameters),
        ("{} (read by a stage)", a.input_hashes(), b.input_hashes()),
        ("the command of {}", commands(a), commands(b)),
        ("{}", shared_output_hashes(a), shared_output_hashes(b)),
        ("{}", environment(a), environment(b)),
        ("{}", a_fields, b_fields),
    ]

    lines = []
    for words, ours, theirs in compared:
        for key in dict.fromkeys([*ours, *theirs]):
            if ours.get(key) != theirs.get(key):
                one = _abbreviate(ours.get(key))
                other = _abbreviate(theirs.get(key))
                lines.append(f"{words.format(key)} is {one} in {a.name}, {other} in {b.name}")
    return lines


def commands(run: PipelineRun) -> dict[str, str]:
    """Return the command of each stage."""
    return {name: stage["cmd"] for name, stage in run.stages.items()}


def shared_output_hashes(run: PipelineRun) -> dict[str, str]:
    """Return the hashes of the outputs that do not depend on the seed, by their names in messages."""
    hashes = run.output_hashes()
    return {name: hashes.get(path, "absent") for path, name in SEED_INDEPENDENT_OUTPUTS.items()}


def environment(run: PipelineRun) -> dict[str, Any]:
    """Return machine, driver and versions of the stages whose results depend on them."""
    timing = run.summary["measured"]["stages"]
    found: dict[str, Any] = {}
    for stage in SEED_DEPENDENT_STAGES:
        kept = {key: timing[stage].get(key) for key in ("hardware", "versions", "driver", "ranks")}
        for key, value in flatten(kept).items():
            found[f"{key} of {stage}"] = value
    return found


def require_audited_within_budget(run: PipelineRun) -> None:
    """Raise ValueError unless the run was audited, passed its audit, and kept to its budgets."""
    summary = run.summary
    parameters = run.parameters
    verdicts = summary.get("audit") or []

    # The audit.
    if not any(verdict["subject"] == summary["scorer"] for verdict in verdicts):
        raise ValueError(
            f"{run.name} was not audited: it holds no verdict on {summary['scorer']};"
            " run `dvc repro audit submission` there"
        )
    for verdict in verdicts:
        if verdict["outcome"] == "fail":
            raise ValueError(
                f"{run.name} failed its audit: {verdict['subject']}, {verdict['name']}: {verdict['evidence']}"
            )

    # The budgets of bytes and seconds.
    measured = summary["measured"]
    training_seconds = measured.get("training_seconds")
    evaluation_seconds = measured.get("evaluation_seconds")
    max_evaluation_seconds = parameters["audit"]["evaluation_budget_seconds"]
    limits = {
        "bytes_total": Limit(summary["bytes_total"], parameters["pack"]["budget_bytes"], "bytes"),
        "training": Limit(training_seconds, parameters["train"]["seconds"], "seconds"),
        "evaluation": Limit(evaluation_seconds, max_evaluation_seconds, "seconds"),
    }

    # A number that was not measured counts as a failure: it may be over its limit.
    for name, limit in limits.items():
        if limit.value is None:
            raise ValueError(
                f"{run.name} does not say how many {limit.unit} its {name} took; run `dvc repro` there"
            )
        if limit.value > limit.allowed:
            raise ValueError(
                f"{run.name} is over budget: {name} {limit.value:,.10g} {limit.unit},"
                f" {limit.allowed:,.10g} are allowed"
            )

    # The counted code is the file that was handed in.
    if len(run.files[CODE]) != summary["bytes_code"]:
        raise ValueError(
            f"{run.name}: train_gpt.py has {len(run.files[CODE])} bytes,"
            f" bytes_code says {summary['bytes_code']}"
        )


def _abbreviate(value: Any) -> str:
    """Return a value for a message; of a hash, only the first characters."""
    text = "absent" if value is None else str(value)
    is_hash = len(text.removesuffix(".dir")) in HASH_LENGTHS and " " not in text
    return text[:ABBREVIATED_LENGTH] if is_hash else text
