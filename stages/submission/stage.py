"""submission: assemble the folder to hand in from the artifacts of all stages."""

from dataclasses import asdict
from pathlib import Path

import yaml

from stages.common.stage import Run, Stage
from stages.submission import plots
from stages.submission.artifacts import STAGES, Artifacts, load_artifacts
from stages.submission.params import Params
from stages.submission.readme import PLOT_CAPTIONS, render_readme
from stages.submission.summary import build_summary

STAGE = Stage(
    name="submission",
    summary="Assemble code, figures, logs and plots into the folder to hand in.",
    params=Params,
    reads={stage: Path("artifacts") / stage for stage in STAGES}
    | {"requirements": Path("requirements.lock")},
    writes=(
        "train_gpt.py",
        "submission.json",
        "README.md",
        "train.log",
        "requirements.txt",
        "plots",
        "metrics.json",
    ),
)


def main(run: Run[Params]) -> None:
    """Read all artifacts, compute the summary, write the folder."""
    folders = {stage: run.path(stage) for stage in STAGES}
    artifacts = load_artifacts(folders, run.path("requirements"), run.params.scorer)
    summary = build_summary(run.params, artifacts)

    run.write_bytes("train_gpt.py", artifacts.code)
    run.write_json("submission.json", summary)
    run.write_text("README.md", render_readme(summary))
    run.write_text("train.log", train_log(run.params, artifacts.logs))
    run.write_bytes("requirements.txt", artifacts.requirements)
    (run.output / "plots").mkdir()
    for name, png in draw_plots(run.params, artifacts).items():
        run.write_bytes(name, png)
    run.write_json("metrics.json", {key: summary[key] for key in ("val_bpb", "val_loss", "bytes_total")})
    run.logger.log(
        f"submission: val_bpb {summary['val_bpb']:.6f} ({summary['scorer']}),"
        f" {summary['bytes_total']:,} bytes"
    )


def draw_plots(params: Params, artifacts: Artifacts) -> dict[str, bytes]:
    """Return the plots as PNG, by path within the folder."""
    sliding = artifacts.scores["sliding_eval"].chunks
    ttt = artifacts.scores["ttt_eval"].chunks
    drawn = {
        "plots/loss.png": plots.training_loss(artifacts.losses),
        "plots/bpb_by_chunk.png": plots.bpb_by_chunk(sliding, ttt),
        "plots/bytes_by_part.png": plots.bytes_by_part(
            artifacts.layers, len(artifacts.code), params.pack.budget_bytes
        ),
    }
    assert drawn.keys() == PLOT_CAPTIONS.keys()
    return drawn


def train_log(params: Params, logs: dict[str, str]) -> str:
    """Return the text of train.log: the effective parameters, then the log of each stage."""
    parts = [f"=== parameters\n{yaml.safe_dump(asdict(params), sort_keys=False)}"]
    for stage, log in logs.items():
        parts.append(f"=== {stage}\n{log}")
    return "".join(parts)
