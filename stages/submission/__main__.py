"""submission: the folder to hand in, made from the artifacts of all stages."""

from dataclasses import asdict
from pathlib import Path

import yaml

from stages.common import command
from stages.submission import plots
from stages.submission.artifacts import STAGES, Artifacts, load
from stages.submission.params import Params
from stages.submission.readme import PLOTS, render
from stages.submission.summary import submission

STAGE = command.Stage(
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


def main(run: command.Run[Params]) -> None:
    """Read everything, compute the summary, write the folder."""
    made = load(
        {stage: run.path(stage) for stage in STAGES}, run.path("requirements"), run.params.submission.scorer
    )
    summary = submission(run.params, made)
    run.write_bytes("train_gpt.py", made.code)
    run.write_json("submission.json", summary)
    run.write_text("README.md", render(summary))
    run.write_text("train.log", train_log(run.params, made.logs))
    run.write_bytes("requirements.txt", made.requirements)
    (run.output / "plots").mkdir()
    for name, picture in pictures(run.params, made).items():
        run.write_bytes(name, picture)
    run.write_json("metrics.json", {key: summary[key] for key in ("val_bpb", "val_loss", "bytes_total")})
    run.report.log(
        f"submission: val_bpb {summary['val_bpb']:.6f} ({summary['scorer']}), {summary['bytes_total']:,} bytes"
    )


def pictures(params: Params, made: Artifacts) -> dict[str, bytes]:
    """The plots by path."""
    drawn = {
        "plots/loss.png": plots.loss(made.losses),
        "plots/bpb_by_chunk.png": plots.chunks(
            made.scores["sliding_eval"].chunks, made.scores["ttt_eval"].chunks
        ),
        "plots/bytes_by_part.png": plots.parts(made.layers, len(made.code), params.pack.budget_bytes),
    }
    assert drawn.keys() == PLOTS.keys()
    return drawn


def train_log(params: Params, logs: dict[str, str]) -> str:
    """The effective parameters, then each stage's log."""
    parts = [f"=== parameters\n{yaml.safe_dump(asdict(params), sort_keys=False)}"]
    return "".join(parts + [f"=== {stage}\n{log}" for stage, log in logs.items()])


if __name__ == "__main__":
    command.launch(STAGE, main)
