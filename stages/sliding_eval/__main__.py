"""sliding_eval: the artifact and the validation stream to the ledger of the sliding scorer."""

from stages.pack.file.decode_process import Decoder

DECODER = (
    Decoder() if __name__ == "__main__" else None
)  # at work while what follows is imported: torch takes seconds

import sys
from pathlib import Path

from stages.common import clock, command, environment
from stages.common.parallel import relaunch_under_torchrun, world
from stages.pack.file.load import Unpacking
from stages.scoring.evaluate import read_stream, score, scorer_of, write_results
from stages.sliding_eval.params import Params
from stages.sliding_eval.scorer import SlidingScorer
from stages.train.ops import attention_backend

STAGE = command.Stage(
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


def main(run: command.Run[Params]) -> None:
    """Load the artifact, score the stream, write the ledger and what follows from it."""
    params = run.params.sliding_eval
    files = {name: run.path(name) for name in STAGE.reads}
    relaunch_under_torchrun(run.params.parallel, "stages.sliding_eval", sys.argv[1:])
    unpacking = Unpacking(files["model"], DECODER)
    with world(run.params.parallel) as here:
        stream = read_stream(files["val"], files["tokenizer"], unpacking.params.vocab_size, params.window)
        scorer = scorer_of(
            unpacking, here, lambda model, report: SlidingScorer(model, params, here, report), run.report
        )
        pace = clock.Pace(scorer.warm_up_targets)
        nll = score(scorer, stream, pace)
        if here.is_main:
            bpb = write_results(run.output, "sliding", nll, stream, params.chunk, run.write_json)
            run.report.log(
                f"sliding_eval: {bpb:.6f} bpb over {stream.targets:,} targets, {int(stream.counted_bytes.sum()):,} bytes"
            )
        run.timing |= pace.timing(stream.targets, int(stream.counted_bytes.sum()), here.size) | {
            "hardware": environment.hardware(here.device)
        }
        run.timing["attention_backend"] = attention_backend(here)


if __name__ == "__main__":
    command.launch(STAGE, main)
