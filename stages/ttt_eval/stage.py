"""ttt_eval: score the validation stream with the packed model and test-time training."""

import sys
from functools import partial
from pathlib import Path

from stages.common import ledger, paired_bootstrap
from stages.common.stage import Run, Stage
from stages.common.torchrun import relaunch_under_torchrun
from stages.pack.file.decode_process import DecodeProcess
from stages.scoring.evaluate import run_evaluation
from stages.ttt_eval.build import build_scorer
from stages.ttt_eval.params import Params

STAGE = Stage(
    name="ttt_eval",
    summary="Score every target, train on each chunk after it is scored, compare with the sliding ledger.",
    params=Params,
    reads={
        "model": Path("artifacts/pack/model.bin"),
        "val": Path("artifacts/tokenize/val"),
        "tokenizer": Path("artifacts/tokenize/tokenizer.model"),
        "sliding": Path("artifacts/sliding_eval/nll.npy"),
    },
    writes=("nll.npy", "chunks.tsv", "metrics.json"),
)


def main(run: Run[Params], decoder: DecodeProcess | None = None) -> None:
    """Load the model, score the stream and train on it, write the ledger, compare it with sliding_eval's."""
    params = run.params
    run.require_inputs()
    relaunch_under_torchrun(params.parallel, "stages.ttt_eval", sys.argv[1:])

    build = partial(build_scorer, "ttt_eval", params.sliding_eval, params.ttt_eval)
    evaluation = run_evaluation(run, "ttt_eval", build, decoder)
    if not run.is_main:
        return

    stream = evaluation.stream
    sliding_nll = ledger.read(run.path("sliding"), stream.targets)
    documents = paired_bootstrap.document_of_target(stream.tokens, stream.table.bos)
    gain = paired_bootstrap.paired_difference(sliding_nll, evaluation.nll, stream.counted_bytes, documents)
    run.logger.log(
        f"ttt_eval: {evaluation.bpb:.6f} bpb over {stream.targets:,} targets; against sliding {gain.bpb:+.6f}"
        f" (95 % interval {gain.low:+.6f} to {gain.high:+.6f}, paired over documents)"
    )
