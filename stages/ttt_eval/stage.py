"""ttt_eval: score the validation stream with the packed model and test-time training."""

import sys
from pathlib import Path

from stages.common import clock, environment, ledger, paired_bootstrap
from stages.common.parallel import distributed, relaunch_under_torchrun
from stages.common.progress import Logger
from stages.common.stage import Run, Stage
from stages.pack.file.decode_process import DecodeProcess
from stages.pack.file.load import PendingModel
from stages.scoring.evaluate import TimedScorer, load_scorer, score, write_results
from stages.scoring.stream import open_stream_for_model
from stages.train.model import Model
from stages.train.ops import attention_backend
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
    files = {name: run.path(name) for name in STAGE.reads}
    relaunch_under_torchrun(params.parallel, "stages.ttt_eval", sys.argv[1:])

    pending = PendingModel(files["model"], decoder)
    with distributed(params.parallel) as world:
        stream = open_stream_for_model(
            files["val"], files["tokenizer"], pending.params.vocab_size, params.sliding_eval.window
        )

        def make(model: Model, logger: Logger) -> TimedScorer:
            return build_scorer(
                model, params.sliding_eval, params.ttt_eval, world, stream.table, stream.targets, logger
            )

        scorer = load_scorer(pending, world, make, run.logger)
        throughput = clock.EvalThroughput(scorer.warm_up_targets)
        nll = score(scorer, stream, throughput)

        run.timing |= throughput.timing(stream.targets, int(stream.counted_bytes.sum()), world.size)
        run.timing["hardware"] = environment.hardware(world.device)
        run.timing["attention_backend"] = attention_backend(world)
        if world.is_main:
            bpb = write_results(run.output, "ttt", nll, stream, params.ttt_eval.chunk, run.write_json)
            documents = paired_bootstrap.document_of_target(stream.tokens, stream.table.bos)
            sliding_nll = ledger.read(files["sliding"], stream.targets)
            gain = paired_bootstrap.paired_difference(sliding_nll, nll, stream.counted_bytes, documents)
            run.logger.log(
                f"ttt_eval: {bpb:.6f} bpb over {stream.targets:,} targets; against sliding {gain.bpb:+.6f}"
                f" (95 % interval {gain.low:+.6f} to {gain.high:+.6f}, paired over documents)"
            )
