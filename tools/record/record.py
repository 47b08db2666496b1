"""Merge runs of several seeds into one submission.json: means, deviations, largest sizes, provenance.

As in a submission of one seed, measurements are in the field `measured`, and `not_reproducible`
names every field that may differ in another run of the same commits. The commit ids of experiments,
which contain the time at which they were made, are among them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.common.challenge import VALIDATION_BYTES
from stages.common.student_t import seed_statistics
from stages.submission.summary import MEASURED_FIELDS
from tools.record.runs import PipelineRun

# Fields that are the same in all runs.
COPIED_FIELDS = (
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
SIZE_FIELDS = ("bytes_total", "bytes_code", "bytes_model")
SCORE_FIELDS = ("val_bpb", "val_loss")
# Relative tolerance for counts of the challenge's validation text. They differ by tokenizer and by
# how the end of the stream is cut (151,074,309 to 151,080,891); other texts differ by more.
OFFICIAL_BYTES_TOLERANCE = 1e-4
SEED_DEPENDENT_FILES = ("model.bin",)  # among the hashes of a submission.json


def merge_runs(runs: Sequence[PipelineRun]) -> dict[str, Any]:
    """Return the record's submission.json, for runs that compatibility.py has accepted."""
    runs = sorted(runs, key=lambda run: run.seed)
    first = runs[0].summary
    record = {field: first[field] for field in COPIED_FIELDS}

    # Sizes are the worst seed's, scores the mean over seeds.
    for field in SIZE_FIELDS:
        record[field] = max(run.summary[field] for run in runs)
    for field in SCORE_FIELDS:
        statistics = seed_statistics([run.summary[field] for run in runs])
        record[field] = statistics.mean
        record[f"{field}_std"] = statistics.deviation
    scores = {}
    for name in first["scores"]:
        statistics = seed_statistics([run.summary["scores"][name]["bpb"] for run in runs])
        scores[name] = {"bpb": statistics.mean, "bpb_std": statistics.deviation}

    # Everything that depends on the seed is given by seed.
    def by_seed(values: Sequence[Any]) -> dict[str, Any]:
        return {str(run.seed): value for run, value in zip(runs, values, strict=True)}

    # Apart from the seed and the model, parameters and files of all runs are equal: the first run's.
    hashes = {name: value for name, value in first["sha256"].items() if name not in SEED_DEPENDENT_FILES}
    shared_parameters = {key: value for key, value in runs[0].parameters.items() if key != "seed"}
    commits = [{"run": run.commit, "base": run.base} for run in runs]

    # Commits and measured values differ if the same runs are repeated, and are marked as such.
    return record | {
        "date": max(run.summary["measured"]["date"] for run in runs)[:10],
        "hardware": first["hardware"],
        "seeds": [run.seed for run in runs],
        "seed_results": by_seed([run.summary["seed_results"][str(run.seed)] for run in runs]),
        "scores": scores,
        "ttt_minus_sliding_bpb": by_seed([run.summary["ttt_minus_sliding_bpb"] for run in runs]),
        "val_bpb_note": score_note(runs),
        "parameters": shared_parameters,
        "sha256": hashes,
        "model_sha256": by_seed([run.summary["sha256"]["model.bin"] for run in runs]),
        "audit": by_seed([run.summary["audit"] for run in runs]),
        "provenance": {
            "inputs_md5": runs[0].input_hashes(),
            "outputs_md5": by_seed([run.output_hashes() for run in runs]),
        },
        "commits": by_seed(commits),
        "measured": by_seed([run.summary["measured"] for run in runs]),
        "not_reproducible": [*MEASURED_FIELDS, "commits"],
    }


def score_note(runs: Sequence[PipelineRun]) -> str:
    """Explain in words how val_bpb was computed."""
    seeds = ", ".join(str(run.seed) for run in runs)
    coverage = runs[0].summary["coverage"]
    return (
        f"Mean over seeds {seeds} of {runs[0].summary['scorer']},"
        " which the parameter scorer named before the runs; val_bpb_std is the sample deviation."
        f" Each run scored all {coverage['targets']} targets of the validation stream"
        f" ({coverage['bytes']} bytes of {coverage['documents']} documents),"
        " each once, none dropped at the tail."
        " bytes_total, bytes_code and bytes_model are the worst seed's."
    )


def is_official(summary: Mapping[str, Any]) -> bool:
    """Tell, by the number of its bytes, if the challenge's validation text was scored."""
    return bool(abs(summary["coverage"]["bytes"] / VALIDATION_BYTES - 1) <= OFFICIAL_BYTES_TOLERANCE)


def bytes_per_token(summary: Mapping[str, Any]) -> float:
    """Return counted bytes per target, which converts nats per token to bits per byte."""
    return float(summary["coverage"]["bytes"] / summary["coverage"]["targets"])
