"""Gain and speed of the byte mixture, compared with the tilt, on top of any scorer.

    python -m benchmarks.trie_mixture --params FILE --model FILE --held-out SHARDS --tokenizer FILE \\
        --results FILE [--set KEY=VALUE ...]

The FILE of --model is a model.bin. SHARDS are of training text that it was not trained on: nothing here
is chosen on validation text. The scorer of --of (sliding windows, or the one of the section ttt_eval,
without tilt and mixture) scores the first --targets of them once. Its answers (stages/scoring/queries.py)
are kept in --answers, and the tilt and the mixture are run over those. Rates are chosen on the first
quarter; the last quarter, before which most was learnt, is the one to read.

The gain depends on the network: a weak one leaves to the mixture what a strong one predicts by itself
(#1642: -0.05 bpb with a weak model, -0.0002 with the strongest).
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks._command import command_line, write_results
from benchmarks._streams import beginning
from stages.common import config, environment, paired_bootstrap
from stages.common.bpb import bits_per_byte
from stages.common.parallel import World, distributed
from stages.common.progress import Logger
from stages.pack.artifact import load_model
from stages.scoring.byte_tree import build_byte_trees, tree_index_after
from stages.scoring.byte_tree_logits import NO_HINT, DeviceByteTrees
from stages.scoring.evaluate import QueryableScorer
from stages.scoring.queries import Queries
from stages.scoring.stream import ValidationStream
from stages.sliding_eval.scorer import SlidingScorer
from stages.ttt_eval.build import build_scorer
from stages.ttt_eval.bytemix.mixer import ByteMixer
from stages.ttt_eval.bytemix.scorer import MixerScorer
from stages.ttt_eval.ngram import scorer as tilt
from stages.ttt_eval.ngram.scorer import TiltScorer
from stages.ttt_eval.ngram.table import NgramTable
from stages.ttt_eval.params import Params

TILT_RATES = (0.02, 0.05, 0.1, 0.2)
MIXER_RATES = (0.0005, 0.001, 0.002, 0.005)
PAIRS = (
    ("network", "tilt"),
    ("network", "mixture"),
    ("tilt", "tilt and mixture"),
    ("network", "tilt and mixture"),
)


class Case(NamedTuple):
    """A stream, and the inputs of tilt and mixture that depend on its tokens alone; N targets, K contexts."""

    stream: ValidationStream
    hints: np.ndarray  # (N,) int64
    states: np.ndarray  # (N, K) uint8
    trees: np.ndarray  # (N,) int64
    byte_trees: DeviceByteTrees

    @property
    def targets(self) -> np.ndarray:
        """The ids that are scored, (N,)."""
        return self.stream.tokens[1:].astype(np.int64)


def case_of(stream: ValidationStream) -> Case:
    """The byte trees of a stream, and the hints of a causal pass over it."""
    hints, states = NgramTable(stream.table.text_hashes, stream.targets).update(stream.tokens)
    trees = tree_index_after(stream.table.boundary, stream.tokens[:-1])
    byte_trees = DeviceByteTrees(build_byte_trees(stream.table), torch.device("cpu"))
    return Case(stream, hints[1:].astype(np.int64), states[1:], trees, byte_trees)


class Replay:
    """A scorer that returns the answers of an earlier run over the whole stream."""

    warm_up_targets = 0

    def __init__(self, case: Case, answers: np.ndarray) -> None:
        self.case = case
        self.answers = answers
        self.vocab_size = case.stream.table.vocab_size

    def score(self, tokens: np.ndarray, queries: Queries | None) -> np.ndarray:
        """All rows (R, N), for the whole stream at once.

        The answers were given with hints, whose ids are left out of the paths. For a query without
        hints they are put back.
        """
        assert queries is not None
        answers = self.answers.copy()
        case = self.case
        if queries.byte_trees is not None and (queries.hint_ids_N == NO_HINT).all():
            tilt.apply_to_path(
                case.byte_trees.trees,
                case.trees,
                case.targets,
                case.hints,
                answers[2].astype(np.float64),
                answers[3:],
            )
        return answers

    def _never(self, *_: Any) -> Any:
        raise AssertionError("a replayed stream is scored as a whole")

    predict = observe = fork = score_stream = _never


def answered(of: str, model: Path, params: Params, case: Case, file: Path | None) -> np.ndarray:
    """A scorer's answers for all targets, (R, N); read from the file if it exists, else written to it."""
    if file and file.exists():
        return np.load(file)
    plain = dataclasses.replace(params.ttt_eval, tilt_rate=0.0, mixer_rate=0.0)
    with distributed(params.parallel) as world:
        scorer = _scorer(of, model, dataclasses.replace(params, ttt_eval=plain), case, world)
        byte_trees = DeviceByteTrees(case.byte_trees.trees, world.device)
        answers = scorer.score(case.stream.tokens, Queries(case.hints, case.trees, byte_trees))
    if file:
        np.save(file, answers)
    return answers


def _scorer(of: str, file: Path, params: Params, case: Case, world: World) -> QueryableScorer:
    model, logger = load_model(file, world), Logger(is_main=world.is_main)
    if of == "sliding":
        return SlidingScorer(model, params.sliding_eval, world, logger)
    return build_scorer(
        model, params.sliding_eval, params.ttt_eval, world, case.stream.table, case.stream.targets, logger
    )


def cost_of_learning(answers: np.ndarray, case: Case, rate: float) -> float:
    """Bits per byte that the tilt loses where there is nothing to gain.

    Each hint comes true with the network's own probability of it, and the tilt learns from that.
    `answers` are (R, N).
    """
    p = np.exp(np.minimum(answers[1], tilt.MAX_LOG_PROB).astype(np.float64))
    drawn = np.random.Generator(np.random.PCG64(0)).random(len(p))
    hit = (drawn < p) & (case.hints >= 0)
    nll = np.where(hit, -np.log(p), -np.log1p(-p)).astype(np.float32)
    targets = np.where(hit, case.hints, case.hints + 1)

    tilted, _ = tilt.score_and_adapt(
        tilt.new_tilt_state(), case.hints, case.states, targets, nll, answers[1], rate
    )
    return bits_per_byte(tilted, case.stream.counted_bytes) - bits_per_byte(nll, case.stream.counted_bytes)


def best(
    name: str, rates: tuple[float, ...], run: Callable[[float], QueryableScorer], case: Case
) -> tuple[np.ndarray, dict[str, Any]]:
    """Losses (N,) at the rate that is best on the first quarter, and the figures of all rates."""
    counted = case.stream.counted_bytes
    quarter = case.stream.targets // 4
    tried: dict[float, np.ndarray] = {}
    seconds = 0.0
    run(rates[0]).score(case.stream.tokens, None)  # compiles
    for rate in rates:
        scorer = run(rate)
        started = time.process_time()
        tried[rate] = scorer.score(case.stream.tokens, None)[0]
        seconds = time.process_time() - started
        print(name, rate, bits_per_byte(tried[rate], counted), f"{seconds:.1f} s", flush=True)

    rate = min(tried, key=lambda r: tried[r][:quarter].sum())
    whole = {str(r): bits_per_byte(nats, counted) for r, nats in tried.items()}
    first = {str(r): bits_per_byte(nats[:quarter], counted[:quarter]) for r, nats in tried.items()}
    return tried[rate], {
        "rate": rate,
        "bpb_by_rate": whole,
        "first_quarter_bpb_by_rate": first,
        "megabytes_per_second_of_one_core": int(counted.sum()) / 1e6 / seconds,
    }


def mixing_alone(answers: np.ndarray, case: Case) -> float:
    """MB/s of one core by the mixture alone, over the network's paths: the best of three compiled runs."""
    paths_ND = np.ascontiguousarray(answers[3:].T)
    counted = int(case.stream.counted_bytes.sum())
    seconds = []
    for _ in range(4):
        mixture = ByteMixer(case.byte_trees.trees, counted)
        started = time.process_time()
        mixture.score_and_learn(case.targets, case.trees, paths_ND, answers[0], MIXER_RATES[1])
        seconds.append(time.process_time() - started)
    return counted / 1e6 / min(seconds[1:])


def differences(losses: dict[str, np.ndarray], of: np.ndarray, case: Case) -> dict[str, Any]:
    """The bpb of each kind of losses, (N,), over the targets `of`, and paired differences over documents."""
    counted = case.stream.counted_bytes[of]
    documents = paired_bootstrap.document_of_target(case.stream.tokens, case.stream.table.bos)
    numbers = np.unique(documents[of], return_inverse=True)[1]
    found: dict[str, Any] = {name: bits_per_byte(nats[of], counted) for name, nats in losses.items()}
    for a, b in PAIRS:
        pair = paired_bootstrap.paired_difference(losses[a][of], losses[b][of], counted, numbers)
        found[f"{b} minus {a}"] = pair._asdict()
    return found


def figures(losses: dict[str, np.ndarray], case: Case) -> dict[str, Any]:
    """Differences over all targets, over the last quarter, and over quarters of the documents.

    The documents are sorted by the network's loss a byte; each quarter has a quarter of the bytes. Of
    few documents there are fewer quarters.
    """
    targets = np.arange(case.stream.targets)
    documents = paired_bootstrap.document_of_target(case.stream.tokens, case.stream.table.bos)
    size = np.bincount(documents, case.stream.counted_bytes)
    by_loss = np.argsort(np.bincount(documents, losses["network"]) / np.maximum(1, size))
    quarter = np.empty(len(size), np.int64)
    quarter[by_loss] = np.minimum(3, 4 * np.cumsum(size[by_loss]) / size.sum())

    by_quarter = []
    for number in np.unique(quarter[size > 0]):
        by_quarter.append(differences(losses, targets[quarter[documents] == number], case))
    return {
        "all": differences(losses, targets, case),
        "last quarter": differences(losses, targets[3 * len(targets) // 4 :], case),
        "documents by the network's bpb, best quarter first": by_quarter,
    }


def main() -> None:
    """Score once, run tilt and mixture at all rates, and write the JSON file."""
    parser = command_line(__doc__)
    for option in ("params", "model", "held-out", "tokenizer", "results"):
        parser.add_argument(f"--{option}", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--of", choices=("sliding", "ttt_eval"), default="sliding", help="the scorer below tilt and mixture"
    )
    parser.add_argument("--targets", type=int, default=1_000_000)
    parser.add_argument("--answers", type=Path, metavar="FILE.npy", help="read if it exists, else written")
    arguments = parser.parse_args()

    params = config.load(arguments.params, Params, arguments.set)
    case = case_of(beginning(arguments.held_out, arguments.tokenizer, arguments.targets))
    answers = answered(arguments.of, arguments.model, params, case, arguments.answers)
    table = case.stream.table
    targets = case.stream.targets

    def tilted(rate: float) -> TiltScorer:
        return TiltScorer(Replay(case, answers), rate, table.text_hashes, targets)

    def mixed(scorer: QueryableScorer, rate: float) -> MixerScorer:
        return MixerScorer(scorer, rate, table, targets, torch.device("cpu"))

    # Tilt and mixture alone, then the mixture on top of the tilt at its configured rate.
    ways: dict[str, tuple[tuple[float, ...], Callable[[float], QueryableScorer]]] = {
        "tilt": (TILT_RATES, tilted),
        "mixture": (MIXER_RATES, lambda rate: mixed(Replay(case, answers), rate)),
        "tilt and mixture": (MIXER_RATES, lambda rate: mixed(tilted(params.ttt_eval.tilt_rate), rate)),
    }
    losses = {"network": answers[0]}
    results: dict[str, Any] = {}
    for name, (rates, run) in ways.items():
        losses[name], results[name] = best(name, rates, run, case)
    costs = {str(rate): cost_of_learning(answers, case, rate) for rate in TILT_RATES}
    results["tilt"]["cost_of_learning_bpb_by_rate"] = costs
    results["mixture"]["megabytes_per_second_mixing_alone"] = mixing_alone(answers, case)

    found = figures(losses, case)
    results |= {"targets": targets, "bytes": int(case.stream.counted_bytes.sum()), "of": arguments.of}
    results |= {"changes": arguments.set}
    write_results(arguments.results, results | found | environment.run_environment())
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
