"""Build submission.json: the fields that the challenge asks for, and the evidence for them.

Everything is computed. Measurements (times, dates, hardware, versions) are in the field `measured`.
The challenge also wants `date` and `hardware` at the top level, so they are copied from there;
`not_reproducible` names the fields that may differ in another run of the same commit. Every other
byte is the same in each run.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from stages.submission.artifacts import Artifacts
from stages.submission.params import Params

MEASURED_FIELDS = ("date", "hardware", "attention_backend", "measured")


def build_summary(params: Params, artifacts: Artifacts) -> dict[str, Any]:
    """Return the mapping that is written as submission.json.

    Raises ValueError if the artifact is over the byte budget.
    """
    claim = params.submission
    score = artifacts.scores[params.scorer]
    if artifacts.bytes_total > params.pack.budget_bytes:
        raise ValueError(
            f"artifact over the byte budget: {artifacts.bytes_total} bytes,"
            f" {params.pack.budget_bytes} allowed (pack.budget_bytes)"
        )

    result = {
        "val_bpb": score.bpb,
        "val_loss": score.nats_per_token,
        "bytes_total": artifacts.bytes_total,
        "bytes_code": len(artifacts.code),
        "bytes_model": len(artifacts.model),
    }
    scores = {}
    for name, other in artifacts.scores.items():
        scores[name] = {"bpb": other.bpb, "nats_per_token": other.nats_per_token}
    measured = measurements(artifacts, params.scorer)
    attention_backend = artifacts.timing[params.scorer].get("attention_backend", "not stated")

    return {
        # The fields that the challenge asks for.
        "author": claim.author,
        "github_id": claim.github_id,
        "name": claim.name,
        "blurb": claim.blurb,
        "track": claim.track,
        "date": measured["date"][:10],
        "hardware": describe_hardware(measured["hardware"]),
        **result,
        "seeds": [params.seed],
        "seed_results": {str(params.seed): result | other_results(artifacts)},
        # The evidence: other scores, coverage, parameters, hashes, audit, measurements.
        "scorer": params.scorer,
        "scores": scores,
        "ttt_minus_sliding_bpb": artifacts.ttt_gain._asdict(),
        "coverage": asdict(artifacts.coverage),
        "reference": asdict(artifacts.reference),
        "val_bpb_note": score_note(params.scorer, artifacts),
        "parameters": asdict(params),
        "source_sha256": artifacts.hashes["train_gpt.py"],
        "sha256": artifacts.hashes,
        "data": artifacts.manifest,
        "audit": artifacts.verdicts,
        "attention_backend": attention_backend,
        "measured": measured,
        "not_reproducible": list(MEASURED_FIELDS),
    }


def other_results(artifacts: Artifacts) -> dict[str, Any]:
    """Return what is stated of a seed as well as its result: every scorer's bpb, and the training steps."""
    bpb_by_scorer = {f"{name}_bpb": score.bpb for name, score in artifacts.scores.items()}
    return bpb_by_scorer | {"steps": artifacts.metrics["train"]["train_steps"]}


def score_note(scorer: str, artifacts: Artifacts) -> str:
    """Explain in words how val_bpb was computed."""
    coverage = artifacts.coverage
    others = []
    for name, score in artifacts.scores.items():
        if name != scorer:
            others.append(f"{name} {score.bpb:.6f}")
    return (
        f"{scorer}, which the parameter scorer named before the run,"
        f" over all {coverage.targets} targets of the validation stream:"
        f" {coverage.bytes} bytes of {coverage.documents} documents,"
        " each target scored once, none dropped at the tail."
        " val_bpb = sum of the ledger's nats (float64) / ln 2 / bytes; val_loss = mean nats per target."
        f" Beside it, not claimed: {', '.join(others)}."
    )


def measurements(artifacts: Artifacts, scorer: str) -> dict[str, Any]:
    """Return the field `measured`.

    Training seconds are train's plus calibrate's, which are two processes in the pipeline.
    """
    seconds = {stage: artifacts.timing[stage].get("training_seconds") for stage in ("train", "calibrate")}
    if not all(isinstance(value, (int, float)) for value in seconds.values()):
        raise ValueError(
            f"timing.json of train and calibrate must both hold training_seconds, saw {seconds};"
            " run `dvc repro calibrate`"
        )
    train = artifacts.timing["train"]
    return {
        "date": train["date"],
        "hardware": train["hardware"],
        "driver": train.get("driver"),
        "versions": train["versions"],
        "training_seconds": sum(seconds.values()),
        "evaluation_seconds": artifacts.timing[scorer].get("evaluation_seconds"),
        "stages": artifacts.timing,
    }


def describe_hardware(hardware: Mapping[str, Any]) -> str:
    """Return the hardware as a phrase.

    >>> describe_hardware({"accelerator": "NVIDIA H200", "accelerators": 8, "processor": "x", "cores": 2})
    '8 x NVIDIA H200'
    """
    if hardware.get("accelerator"):
        return f"{hardware.get('accelerators', 1)} x {hardware['accelerator']}"
    return f"{hardware.get('cores')} cores of {hardware.get('processor') or hardware.get('machine')}"
