"""Several runs of one configuration as one submission.json: means, sample deviations, the worst seed's bytes, and where it all came from.

As in a submission of one seed, what was measured stands below `measured`, and `not_reproducible` names every field that another
run of the same commits may give differently; the ids of experiments, which hold the time at which they were made, are among them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.common.clock import OFFICIAL_BYTES
from stages.submission.summary import MEASURED_FIELDS
from tools.record.runs import Run
from tools.record.significance import sample

TAKEN = (
    "author",
    "github_id",
    "name",
    "blurb",
    "track",
    "scorer",
    "coverage",
    "reference",
    "source_sha256",
    "data",
    "attention_backend",
)
# Counts of the same text differ by tokenizer and by how a stream's tail is cut (151,074,309 to 151,080,891); other text differs by more.
TOLERANCE = 1e-4
PER_SEED = ("model.bin",)  # of the hashes in a submission.json, those that depend on the seed


def record(runs: Sequence[Run]) -> dict[str, Any]:
    """The mapping that is written as the record's submission.json, for runs that agree (compatibility.py), in the order of their seeds."""
    runs = sorted(runs, key=lambda run: run.seed)
    first = runs[0].summary
    sizes = {
        key: max(run.summary[key] for run in runs) for key in ("bytes_total", "bytes_code", "bytes_model")
    }
    means = {key: sample([run.summary[key] for run in runs]) for key in ("val_bpb", "val_loss")}
    scores = {name: sample([run.summary["scores"][name]["bpb"] for run in runs]) for name in first["scores"]}
    return {
        **{key: first[key] for key in TAKEN},
        **sizes,
        **{key: found.mean for key, found in means.items()},
        **{f"{key}_std": found.deviation for key, found in means.items()},
        "date": max(run.summary["measured"]["date"] for run in runs)[:10],
        "hardware": first["hardware"],
        "seeds": [run.seed for run in runs],
        "seed_results": {str(run.seed): run.summary["seed_results"][str(run.seed)] for run in runs},
        "scores": {name: {"bpb": found.mean, "bpb_std": found.deviation} for name, found in scores.items()},
        "ttt_minus_sliding_bpb": {str(run.seed): run.summary["ttt_minus_sliding_bpb"] for run in runs},
        "val_bpb_note": note(runs),
        "parameters": {key: value for key, value in runs[0].parameters.items() if key != "seed"},
        "sha256": {name: value for name, value in first["sha256"].items() if name not in PER_SEED},
        "model_sha256": {str(run.seed): run.summary["sha256"]["model.bin"] for run in runs},
        "audit": {str(run.seed): run.summary["audit"] for run in runs},
        "provenance": {
            "inputs_md5": runs[0].inputs(),
            "outputs_md5": {str(run.seed): run.produced() for run in runs},
        },
        "commits": {str(run.seed): {"run": run.commit, "base": run.base} for run in runs},
        "measured": {str(run.seed): run.summary["measured"] for run in runs},
        "not_reproducible": [*MEASURED_FIELDS, "commits"],
    }


def note(runs: Sequence[Run]) -> str:
    """How val_bpb came about."""
    seeds = ", ".join(str(run.seed) for run in runs)
    covered = runs[0].summary["coverage"]
    return (
        f"Mean over seeds {seeds} of {runs[0].summary['scorer']}, which submission.scorer named before the runs; val_bpb_std is the sample"
        f" deviation. Each run scored all {covered['targets']} targets of the validation stream ({covered['bytes']} bytes of"
        f" {covered['documents']} documents), each once, none dropped at the tail. bytes_total, bytes_code and"
        " bytes_model are the worst seed's."
    )


def is_official(summary: Mapping[str, Any]) -> bool:
    """Whether the challenge's validation text was scored, going by its bytes."""
    return bool(abs(summary["coverage"]["bytes"] / OFFICIAL_BYTES - 1) <= TOLERANCE)


def bytes_per_token(summary: Mapping[str, Any]) -> float:
    """Counted bytes of a scored target, by which nats per token become bits per byte."""
    return float(summary["coverage"]["bytes"] / summary["coverage"]["targets"])
