"""sliding_eval: score the validation stream with the packed model and overlapping windows."""

import sys
from pathlib import Path

from stages.common.stage import Run, Stage
from stages.common.torchrun import relaunch_under_torchrun
from stages.pack.file.decode_process import DecodeProcess
from stages.scoring.evaluate import ScorerInputs, run_evaluation
from stages.sliding_eval.params import Params
from stages.sliding_eval.scorer import SlidingScorer

STAGE = Stage(
    name="sliding_eval",
    summary="Score every target of the validation stream with overlapping windows.",
    params=Params,
    reads={
        "model": Path("artifacts/pack/model.bin"),
        "val": Path("artifacts/tokenize/val"),
        "tokenizer": Path("artifacts/tokenize/tokenizer.model"),
    },
    writes=("nll.npy", "chunks.tsv", "metrics.json"),
)


def main(run: Run[Params], decoder: DecodeProcess | None = None) -> None:
    """Load the model, score the stream, and write the ledger and the metrics."""
    run.require_inputs()
    relaunch_under_torchrun(run.params.parallel, "stages.sliding_eval", sys.argv[1:])

    def build_scorer(inputs: ScorerInputs) -> SlidingScorer:
        return SlidingScorer(inputs.model, run.params.sliding_eval, inputs.world, inputs.logger)

    evaluation = run_evaluation(run, "sliding_eval", build_scorer, decoder)
    run.logger.log(
        f"sliding_eval: {evaluation.bpb:.6f} bpb over {evaluation.stream.targets:,} targets,"
        f" {evaluation.counted_bytes:,} bytes"
    )
