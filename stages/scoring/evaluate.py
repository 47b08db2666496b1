"""From a scorer to results: run it over the official stream, once, and write what every later number is computed from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from stages.common import ledger, shards
from stages.common.bpb import ByteTable, bits_per_byte, byte_table, load_tokenizer, target_bytes
from stages.common.clock import Pace
from stages.common.parallel import World
from stages.common.progress import Report
from stages.common.scorer import Scorer
from stages.pack.file.load import Unpacking
from stages.scoring.queries import Asked
from stages.train.model import Model, model_for


class Stream(NamedTuple):
    """The validation stream: its N tokens, the bytes of its N-1 targets, and the table that counted them."""

    tokens: np.ndarray  # (N,) uint16
    counted_bytes: np.ndarray  # (N-1,) int64
    table: ByteTable

    @property
    def targets(self) -> int:
        """The number of targets, N-1."""
        return len(self.tokens) - 1


class TimedScorer(Scorer, Protocol):
    """A scorer that knows how much of a stream it scores until its speed is steady."""

    @property
    def warm_up_targets(self) -> int:
        """Targets that are scored first and timed apart; a stream that is cut behind them is scored with the same batches."""
        ...


class AskedScorer(TimedScorer, Protocol):
    """A scorer that can say, in the same pass, more of its distributions than what the targets got."""

    def score(self, tokens: np.ndarray, asked: Asked | None) -> np.ndarray:
        """`score_stream` as the first of (R, N) rows; the others answer what is asked (queries.py)."""
        ...

    def fork(self) -> "AskedScorer":
        """An independent copy."""
        ...


S = TypeVar("S", bound=TimedScorer)


def open_stream(val_folder: Path, tokenizer_file: Path) -> Stream:
    """The stream of a folder of shards and the bytes of its targets; a ValueError when they do not fit the tokenizer."""
    table = byte_table(load_tokenizer(tokenizer_file))
    for path in shards.find(val_folder):
        shards.check_ids(path, table.vocab_size)
    tokens = shards.stream(val_folder)
    shards.document_starts(tokens, table.bos)
    return Stream(tokens, target_bytes(tokens, table), table)


def read_stream(val_folder: Path, tokenizer_file: Path, vocab_size: int, window: int) -> Stream:
    """The stream as a model of this vocabulary scores it with windows of this length; a ValueError when it cannot."""
    stream = open_stream(val_folder, tokenizer_file)
    if stream.table.vocab_size != vocab_size:
        raise ValueError(
            f"{tokenizer_file} has {stream.table.vocab_size} ids, but the model was trained on {vocab_size}"
        )
    if stream.targets < window:
        raise ValueError(
            f"{val_folder}: {stream.targets} targets are fewer than one window of {window}; give more validation text"
        )
    return stream


def scorer_of(unpacking: Unpacking, here: World, make: Callable[[Model, Report], S], report: Report) -> S:
    """What `make` makes of the model in a file; kernels are compiled while another process decodes the weights."""
    model = model_for(unpacking.params, here)
    if here.kernels:
        from stages.train.kernels.precompile import compiled_side_by_side

        with compiled_side_by_side(here.device.index):
            rehearse(make(model, Report(is_main=False)))
    model.load_state_dict(unpacking.state())
    return make(model, report)


def rehearse(scorer: TimedScorer) -> None:
    """Let a scorer, to be thrown away, score as much of a made-up stream as its warm-up is: the ids in turn."""
    scorer.score_stream(np.arange(scorer.warm_up_targets + 1) % scorer.vocab_size)


def score(scorer: Scorer, stream: Stream, pace: Pace | None = None) -> np.ndarray:
    """The ledger of the whole stream, (N-1,) float32; coverage is checked, not assumed. `pace` is told when the warm-up ends."""
    warm_up = min(pace.warm_up_targets, stream.targets) if pace else stream.targets
    nll = scorer.score_stream(stream.tokens[: warm_up + 1])
    if pace and warm_up < stream.targets:
        pace.steady.start()
        nll = np.concatenate([nll, scorer.score_stream(stream.tokens[warm_up + 1 :])])
        pace.steady.mark()
    if nll.shape != (stream.targets,):
        raise ValueError(
            f"the scorer returned {nll.shape} losses for {stream.targets} targets: every target is scored exactly once"
        )
    ledger.check(nll)
    return nll


def write_results(
    output: Path,
    prefix: str,
    nll: np.ndarray,
    stream: Stream,
    chunk: int,
    write_json: Callable[[str, Any], None],
) -> float:
    """Write nll.npy, chunks.tsv and metrics.json with `<prefix>_bpb`; returns the bpb."""
    ledger.write(output / "nll.npy", nll)
    ledger.write_chunks(output / "chunks.tsv", nll, stream.counted_bytes, chunk)
    bpb = bits_per_byte(nll, stream.counted_bytes)
    write_json(
        "metrics.json",
        {
            f"{prefix}_bpb": bpb,
            f"{prefix}_nats_per_token": float(nll.mean(dtype=np.float64)),
            f"{prefix}_targets": stream.targets,
            f"{prefix}_bytes": int(stream.counted_bytes.sum()),
        },
    )
    return bpb
