"""Run a scorer over the validation stream and write the results that all later numbers come from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from stages.common import ledger
from stages.common.bpb import ByteTable, bits_per_byte
from stages.common.clock import EvalThroughput
from stages.common.environment import hardware
from stages.common.parallel import World, distributed
from stages.common.progress import Logger
from stages.common.scorer import Scorer, TimedScorer
from stages.common.stage import Run
from stages.pack.file.decode_process import DecodeProcess
from stages.pack.file.load import PendingModel
from stages.scoring.stream import ValidationStream, open_stream_for_model
from stages.train.model import Model, build_model
from stages.train.ops import attention_backend


class ScorerInputs(NamedTuple):
    """Everything but parameters that a scorer is built from."""

    model: Model
    world: World
    table: ByteTable  # of the stream's ids
    n_targets: int  # length of the stream, a public constant
    logger: Logger = Logger(is_main=False)


class Evaluation(NamedTuple):
    """Result of an evaluation."""

    nll: np.ndarray  # the ledger, (targets,) float32 nats
    bpb: float
    stream: ValidationStream

    @property
    def counted_bytes(self) -> int:
        """Bytes of text of all targets."""
        return int(self.stream.counted_bytes.sum())


def run_evaluation(
    run: Run[Any], name: str, build: Callable[[ScorerInputs], TimedScorer], decoder: DecodeProcess | None
) -> Evaluation:
    """Score the validation stream with the packed model; writes nll.npy, chunks.tsv and metrics.json.

    `name` is sliding_eval or ttt_eval. The run reads `model`, `val` and `tokenizer`, and has the
    parameter sections parallel, sliding_eval and `name`. `build` makes the scorer. `decoder` is a
    process that waits for a model file; by default it is started here.
    """
    params = run.params
    pending = PendingModel(run.path("model"), decoder)
    with distributed(params.parallel) as world:
        stream = open_stream_for_model(
            run.path("val"), run.path("tokenizer"), pending.params.vocab_size, params.sliding_eval.window
        )
        model = build_model(pending.params, world)
        inputs = ScorerInputs(model, world, stream.table, stream.targets)

        # While the weights are decoded, compile the fused kernels. A scorer over the empty model,
        # which is thrown away, needs them all.
        if world.kernels:
            from stages.train.kernels.precompile import precompile_kernels

            with precompile_kernels(world.device.index):
                warm_up_kernels(build(inputs))

        # Load the weights and score.
        model.load_state_dict(pending.wait())
        scorer = build(inputs._replace(logger=run.logger))
        throughput = EvalThroughput(scorer.warm_up_targets)
        nll = score(scorer, stream, throughput)

        # Results and measurements.
        evaluation = Evaluation(nll, bits_per_byte(nll, stream.counted_bytes), stream)
        if world.is_main:
            write_results(run, name.removesuffix("_eval"), evaluation, getattr(params, name).chunk)
        run.timing |= throughput.timing(stream.targets, evaluation.counted_bytes, world.size)
        run.timing["hardware"] = hardware(world.device)
        run.timing["attention_backend"] = attention_backend(world)
    return evaluation


def warm_up_kernels(scorer: TimedScorer) -> None:
    """Score the warm-up targets of a made-up stream, 0, 1, 2, ... mod V, with a throw-away scorer."""
    scorer.score_stream(np.arange(scorer.warm_up_targets + 1) % scorer.vocab_size)


def score(scorer: Scorer, stream: ValidationStream, throughput: EvalThroughput | None = None) -> np.ndarray:
    """Score the whole stream; returns the ledger, (N-1,) float32 nats.

    `throughput` measures the targets after the warm-up. A ValueError unless every target got
    exactly one finite loss.
    """
    first = stream.targets if throughput is None else min(throughput.warm_up_targets, stream.targets)
    nll = scorer.score_stream(stream.tokens[: first + 1])

    if throughput is not None and first < stream.targets:
        throughput.steady.start()
        nll = np.concatenate([nll, scorer.score_stream(stream.tokens[first + 1 :])])
        throughput.steady.mark()

    if nll.shape != (stream.targets,):
        raise ValueError(
            f"the scorer returned {nll.shape} losses for {stream.targets} targets:"
            " every target is scored exactly once"
        )
    ledger.check(nll)
    return nll


def write_results(run: Run[Any], prefix: str, evaluation: Evaluation, chunk: int) -> None:
    """Write nll.npy, chunks.tsv and metrics.json, whose keys begin with `prefix`.

    `chunk` is the number of targets in a row of chunks.tsv.
    """
    nll = evaluation.nll
    stream = evaluation.stream
    ledger.write(run.output / "nll.npy", nll)
    ledger.write_chunks(run.output / "chunks.tsv", nll, stream.counted_bytes, chunk)
    metrics = {
        f"{prefix}_bpb": evaluation.bpb,
        f"{prefix}_nats_per_token": float(nll.mean(dtype=np.float64)),
        f"{prefix}_targets": stream.targets,
        f"{prefix}_bytes": evaluation.counted_bytes,
    }
    run.write_json("metrics.json", metrics)
