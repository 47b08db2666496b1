"""sliding_eval: score the validation stream with the packed model and overlapping windows."""

import sys
from pathlib import Path

from stages.common import clock, environment
from stages.common.parallel import distributed, relaunch_under_torchrun
from stages.common.progress import Logger
from stages.common.stage import Run, Stage
from stages.pack.file.decode_process import DecodeProcess
from stages.pack.file.load import PendingModel
from stages.scoring.evaluate import load_scorer, score, write_results
from stages.scoring.stream import open_stream_for_model
from stages.sliding_eval.params import Params
from stages.sliding_eval.scorer import SlidingScorer
from stages.train.model import Model
from stages.train.ops import attention_backend

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
    params = run.params.sliding_eval
    files = {name: run.path(name) for name in STAGE.reads}
    relaunch_under_torchrun(run.params.parallel, "stages.sliding_eval", sys.argv[1:])

    pending = PendingModel(files["model"], decoder)
    with distributed(run.params.parallel) as world:
        stream = open_stream_for_model(
            files["val"], files["tokenizer"], pending.params.vocab_size, params.window
        )

        def make(model: Model, logger: Logger) -> SlidingScorer:
            return SlidingScorer(model, params, world, logger)

        scorer = load_scorer(pending, world, make, run.logger)
        throughput = clock.EvalThroughput(scorer.warm_up_targets)
        nll = score(scorer, stream, throughput)

        counted_bytes = int(stream.counted_bytes.sum())
        if world.is_main:
            bpb = write_results(run.output, "sliding", nll, stream, params.chunk, run.write_json)
            run.logger.log(
                f"sliding_eval: {bpb:.6f} bpb over {stream.targets:,} targets, {counted_bytes:,} bytes"
            )
        run.timing |= throughput.timing(stream.targets, counted_bytes, world.size)
        run.timing["hardware"] = environment.hardware(world.device)
        run.timing["attention_backend"] = attention_backend(world)
