"""ttt_eval: the artifact and the validation stream to the ledger of the test-time-training scorer."""

from stages.pack.file.decode_process import Decoder

DECODER = (
    Decoder() if __name__ == "__main__" else None
)  # at work while what follows is imported: torch takes seconds

import sys
from pathlib import Path

from stages.common import clock, command, environment, ledger, paired_bootstrap
from stages.common.parallel import relaunch_under_torchrun, world
from stages.common.progress import Report
from stages.pack.file.load import Unpacking
from stages.scoring.evaluate import TimedScorer, read_stream, score, scorer_of, write_results
from stages.train.model import Model
from stages.train.ops import attention_backend
from stages.ttt_eval.build import scorer_for
from stages.ttt_eval.params import Params

STAGE = command.Stage(
    name="ttt_eval",
    summary="Score every target, training on each chunk after it is scored, and compare with the sliding ledger.",
    params=Params,
    reads={
        "model": Path("artifacts/pack/model.bin"),
        "val": Path("artifacts/tokenize/val"),
        "tokenizer": Path("artifacts/tokenize/tokenizer.model"),
        "sliding": Path("artifacts/sliding_eval/nll.npy"),
    },
    writes=("nll.npy", "chunks.tsv", "metrics.json"),
)


def main(run: command.Run[Params]) -> None:
    """Load the artifact, score and train through the stream, write the ledger, and compare it with the sliding one."""
    params = run.params
    files = {name: run.path(name) for name in STAGE.reads}
    relaunch_under_torchrun(params.parallel, "stages.ttt_eval", sys.argv[1:])
    unpacking = Unpacking(files["model"], DECODER)
    with world(params.parallel) as here:
        stream = read_stream(
            files["val"], files["tokenizer"], unpacking.params.vocab_size, params.sliding_eval.window
        )

        def make(model: Model, report: Report) -> TimedScorer:
            return scorer_for(
                model, params.sliding_eval, params.ttt_eval, here, stream.table, stream.targets, report
            )

        scorer = scorer_of(unpacking, here, make, run.report)
        pace = clock.Pace(scorer.warm_up_targets)
        nll = score(scorer, stream, pace)
        run.timing |= pace.timing(stream.targets, int(stream.counted_bytes.sum()), here.size) | {
            "hardware": environment.hardware(here.device)
        }
        run.timing["attention_backend"] = attention_backend(here)
        if here.is_main:
            bpb = write_results(run.output, "ttt", nll, stream, params.ttt_eval.chunk, run.write_json)
            documents = paired_bootstrap.document_of_target(stream.tokens, stream.table.bos)
            gain = paired_bootstrap.paired_difference(
                ledger.read(files["sliding"], stream.targets), nll, stream.counted_bytes, documents
            )
            run.report.log(
                f"ttt_eval: {bpb:.6f} bpb over {stream.targets:,} targets; against sliding {gain.bpb:+.6f}"
                f" (95 % interval {gain.low:+.6f} to {gain.high:+.6f}, paired over documents)"
            )


if __name__ == "__main__":
    command.launch(STAGE, main)
