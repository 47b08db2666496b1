"""Run a scorer over the validation stream and write the results that all later numbers come from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from stages.common import ledger
from stages.common.bpb import bits_per_byte
from stages.common.clock import EvalThroughput
from stages.common.parallel import World
from stages.common.progress import Logger
from stages.common.scorer import Scorer
from stages.pack.file.load import PendingModel
from stages.scoring.queries import Queries
from stages.scoring.stream import ValidationStream
from stages.train.model import Model, build_model


class TimedScorer(Scorer, Protocol):
    """A scorer that states how many targets it takes until its speed is steady."""

    @property
    def warm_up_targets(self) -> int:
        """Number of targets that are scored first and timed separately.

        Scoring a stream in two calls, cut after these targets, forms the same batches as scoring it
        in one.
        """
        ...


class QueryableScorer(TimedScorer, Protocol):
    """A scorer that computes extra outputs in the same pass, for a scorer built on top of it."""

    def score(self, tokens: np.ndarray, queries: Queries | None) -> np.ndarray:
        """Score and observe tokens; returns (R, N) float32, the losses in row 0.

        The other rows are described in queries.py.
        """
        ...

    def fork(self) -> "QueryableScorer":
        """An independent copy."""
        ...


S = TypeVar("S", bound=TimedScorer)


def load_scorer(pending: PendingModel, world: World, make: Callable[[Model, Logger], S], logger: Logger) -> S:
    """Build a scorer with `make` from a model whose weights another process is decoding.

    While they are decoded, the fused kernels are compiled: a scorer over the empty model, which is
    thrown away, needs them all.
    """
    model = build_model(pending.params, world)
    if world.kernels:
        from stages.train.kernels.precompile import precompile_kernels

        with precompile_kernels(world.device.index):
            warm_up_kernels(make(model, Logger(is_main=False)))
    model.load_state_dict(pending.wait())
    return make(model, logger)


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


def write_results(
    output: Path,
    prefix: str,
    nll: np.ndarray,
    stream: ValidationStream,
    chunk: int,
    write_json: Callable[[str, Any], None],
) -> float:
    """Write nll.npy, chunks.tsv and metrics.json, whose keys begin with `prefix`; returns bits per byte.

    `nll` is a ledger (N-1,) of the stream, `chunk` the number of targets in a row of chunks.tsv.
    """
    ledger.write(output / "nll.npy", nll)
    ledger.write_chunks(output / "chunks.tsv", nll, stream.counted_bytes, chunk)
    bpb = bits_per_byte(nll, stream.counted_bytes)
    metrics = {
        f"{prefix}_bpb": bpb,
        f"{prefix}_nats_per_token": float(nll.mean(dtype=np.float64)),
        f"{prefix}_targets": stream.targets,
        f"{prefix}_bytes": int(stream.counted_bytes.sum()),
    }
    write_json("metrics.json", metrics)
    return bpb
