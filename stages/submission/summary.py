"""submission.json: the challenge's fields, and what a reader needs in order to believe them. Everything is computed, nothing typed.

What was measured (times, dates, hardware, versions) stands below `measured`. The challenge also wants `date` and `hardware` at the top:
they are taken from there, and `not_reproducible` names the fields that another run of the same commit may give differently. Every
other byte is the same in each run.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from stages.submission.artifacts import Artifacts
from stages.submission.params import Params

MEASURED_FIELDS = ("date", "hardware", "attention_backend", "measured")


def submission(params: Params, made: Artifacts) -> dict[str, Any]:
    """The mapping that is written as submission.json."""
    claim = params.submission
    score = made.scores[claim.scorer]
    result = {
        "val_bpb": score.bpb,
        "val_loss": score.nats_per_token,
        "bytes_total": made.bytes_total,
        "bytes_code": len(made.code),
        "bytes_model": len(made.model),
    }
    if made.bytes_total > params.pack.budget_bytes:
        raise ValueError(
            f"artifact over the byte budget: {made.bytes_total} bytes, {params.pack.budget_bytes} allowed (pack.budget_bytes)"
        )
    measured = measurements(made, claim.scorer)
    return {
        "author": claim.author,
        "github_id": claim.github_id,
        "name": claim.name,
        "blurb": claim.blurb,
        "track": claim.track,
        "date": measured["date"][:10],
        "hardware": hardware(measured["hardware"]),
        **result,
        "seeds": [params.seed],
        "seed_results": {str(params.seed): result | beside(made)},
        "scorer": claim.scorer,
        "scores": {
            name: {"bpb": score.bpb, "nats_per_token": score.nats_per_token}
            for name, score in made.scores.items()
        },
        "ttt_minus_sliding_bpb": made.gain._asdict(),
        "coverage": asdict(made.coverage),
        "reference": asdict(made.reference),
        "val_bpb_note": note(claim.scorer, made),
        "parameters": asdict(params),
        "source_sha256": made.hashes["train_gpt.py"],
        "sha256": made.hashes,
        "data": made.manifest,
        "audit": made.verdicts,
        "attention_backend": made.timing[claim.scorer].get("attention_backend", "not stated"),
        "measured": measured,
        "not_reproducible": list(MEASURED_FIELDS),
    }


def beside(made: Artifacts) -> dict[str, Any]:
    """What is told of a seed beside its result: every scorer's bpb, the steps of training."""
    return {f"{name}_bpb": score.bpb for name, score in made.scores.items()} | {
        "steps": made.metrics["train"]["train_steps"]
    }


def note(scorer: str, made: Artifacts) -> str:
    """How val_bpb came about, in words."""
    covered = made.coverage
    others = ", ".join(f"{name} {score.bpb:.6f}" for name, score in made.scores.items() if name != scorer)
    return (
        f"{scorer}, which submission.scorer named before the run, over all {covered.targets} targets of the validation stream:"
        f" {covered.bytes} bytes of {covered.documents} documents, each target scored once, none dropped at the tail."
        " val_bpb = sum of the ledger's nats (float64) / ln 2 / bytes; val_loss = mean nats per target."
        f" Beside it, not claimed: {others}."
    )


def measurements(made: Artifacts, scorer: str) -> dict[str, Any]:
    """The field `measured`; training seconds are train's interval plus calibrate's, which are two processes here."""
    parts = {stage: made.timing[stage].get("training_seconds") for stage in ("train", "calibrate")}
    if not all(isinstance(seconds, (int, float)) for seconds in parts.values()):
        raise ValueError(
            f"timing.json of train and calibrate must both hold training_seconds, saw {parts}; run `dvc repro calibrate`"
        )
    return {
        "date": made.timing["train"]["date"],
        "hardware": made.timing["train"]["hardware"],
        "driver": made.timing["train"].get("driver"),
        "versions": made.timing["train"]["versions"],
        "training_seconds": sum(parts.values()),
        "evaluation_seconds": made.timing[scorer].get("evaluation_seconds"),
        "stages": made.timing,
    }


def hardware(seen: Mapping[str, Any]) -> str:
    """The hardware in a phrase.

    >>> hardware({"accelerator": "NVIDIA H200", "accelerators": 8, "processor": "x", "cores": 2})
    '8 x NVIDIA H200'
    """
    if seen.get("accelerator"):
        return f"{seen.get('accelerators', 1)} x {seen['accelerator']}"
    return f"{seen.get('cores')} cores of {seen.get('processor') or seen.get('machine')}"
