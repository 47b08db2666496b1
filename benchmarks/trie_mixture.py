"""Does a byte model mixed in over the tree of tokens gain more than the tilt? What it gains, on top of which scorer, at what rate a second.

    python -m benchmarks.trie_mixture --params FILE --model FILE --held-out SHARDS --tokenizer FILE --results FILE [--set KEY=VALUE ...]

FILE of --model is model.bin, SHARDS are of training text that the model was not trained on: nothing here is chosen on validation text. The
scorer of --of (sliding windows, or what ttt_eval's section says, without tilt and mixture) scores the first --targets of them once; its
answers (stages/scoring/queries.py) are kept in --answers, and the tilt and the mixture are run over those. Rates are chosen on the first
quarter; the last quarter, with the most behind it, is what is to be read.

The gain depends on the network: a weak one leaves to the mixture what a strong one knows by itself (#1642: -0.05 bpb with a weak model and
-0.0002 with the strongest).
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks._streams import beginning
from stages.common import config, environment, paired_bootstrap
from stages.common.bpb import bits_per_byte
from stages.common.parallel import World, world
from stages.common.progress import Report
from stages.pack.artifact import load_model
from stages.scoring.byte_tree import numbers_behind, of_table
from stages.scoring.byte_tree_logits import NO_HINT, Forest
from stages.scoring.evaluate import AskedScorer, Stream
from stages.scoring.queries import Asked
from stages.sliding_eval.scorer import SlidingScorer
from stages.ttt_eval.build import scorer_for
from stages.ttt_eval.bytemix.mixer import Mixture
from stages.ttt_eval.bytemix.scorer import MixerScorer
from stages.ttt_eval.ngram import scorer as tilt
from stages.ttt_eval.ngram.scorer import TiltScorer
from stages.ttt_eval.ngram.table import LENGTHS, STATES, Hints
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
    """The stream, and what stands of it without a network."""

    stream: Stream
    hints: np.ndarray  # (N,) int64
    states: np.ndarray  # (N, K) uint8
    trees: np.ndarray  # (N,) int64
    forest: Forest

    @property
    def targets(self) -> np.ndarray:
        """The ids that are scored, (N,)."""
        return self.stream.tokens[1:].astype(np.int64)


def case_of(stream: Stream) -> Case:
    """Both trees, and the hints of a causal pass."""
    hints, states = Hints(stream.table.codes, stream.targets).observe(stream.tokens)
    trees = numbers_behind(stream.table.boundary, stream.tokens[:-1])
    return Case(
        stream,
        hints[1:].astype(np.int64),
        states[1:],
        trees,
        Forest(of_table(stream.table), torch.device("cpu")),
    )


class Replay:
    """A network that has scored the stream before: its answers, over again."""

    warm_up_targets = 0

    def __init__(self, case: Case, answers: np.ndarray) -> None:
        self.case, self.answers, self.vocab_size = case, answers, case.stream.table.vocab_size

    def score(self, tokens: np.ndarray, asked: Asked | None) -> np.ndarray:
        """All rows, for the whole stream at once; who asks without hints gets paths in which they are put back."""
        assert asked is not None
        answers, case = self.answers.copy(), self.case
        if asked.forest is not None and (asked.about_2N[0] == NO_HINT).all():
            tilt.bend(
                case.forest.trees,
                case.trees,
                case.targets,
                case.hints,
                answers[2].astype(np.float64),
                answers[3:],
            )
        return answers

    def _never(self, *_: Any) -> Any:
        raise AssertionError("a stream that is over again is not predicted")

    predict = observe = fork = score_stream = _never


def answered(of: str, model: Path, params: Params, case: Case, file: Path | None) -> np.ndarray:
    """A scorer's answers about all targets, (R, N); from the file where it is there."""
    if file and file.exists():
        return np.load(file)
    plain = dataclasses.replace(params.ttt_eval, tilt_rate=0.0, mixer_rate=0.0)
    with world(params.parallel) as here:
        scorer = _scorer(of, model, dataclasses.replace(params, ttt_eval=plain), case, here)
        forest = Forest(case.forest.trees, here.device)
        answers = scorer.score(case.stream.tokens, Asked(np.stack((case.hints, case.trees)), forest))
    if file:
        np.save(file, answers)
    return answers


def _scorer(of: str, file: Path, params: Params, case: Case, here: World) -> AskedScorer:
    model, report = load_model(file, here), Report(is_main=here.is_main)
    if of == "sliding":
        return SlidingScorer(model, params.sliding_eval, here, report)
    return scorer_for(
        model, params.sliding_eval, params.ttt_eval, here, case.stream.table, case.stream.targets, report
    )


def cost_of_learning(answers: np.ndarray, case: Case, rate: float) -> float:
    """bpb that the tilt loses where nothing can be gained: whether a hint comes true is drawn from the network's own probability of it."""
    p = np.exp(np.minimum(answers[1], tilt.SURE).astype(np.float64))
    came = (np.random.Generator(np.random.PCG64(0)).random(len(p)) < p) & (case.hints >= 0)
    nll = np.where(came, -np.log(p), -np.log1p(-p)).astype(np.float32)
    weights, updates = np.zeros((len(LENGTHS) * tilt.KNOTS, tilt.INPUTS)), np.zeros(len(LENGTHS) * tilt.KNOTS)
    shares, counts = np.full((len(LENGTHS), STATES), 0.5), np.zeros((len(LENGTHS), STATES), np.int64)
    targets = np.where(came, case.hints, case.hints + 1)
    tilted, _ = tilt.follow(
        case.hints, case.states, targets, nll, answers[1], weights, shares, counts, updates, rate
    )
    return bits_per_byte(tilted, case.stream.counted_bytes) - bits_per_byte(nll, case.stream.counted_bytes)


def best(
    name: str, rates: tuple[float, ...], run: Callable[[float], AskedScorer], case: Case
) -> tuple[np.ndarray, dict[str, Any]]:
    """The losses at the rate that is best on the first quarter, and what was seen."""
    quarter, seconds, counted = case.stream.targets // 4, 0.0, case.stream.counted_bytes
    tried: dict[float, np.ndarray] = {}
    run(rates[0]).score(case.stream.tokens, None)  # compiles
    for rate in rates:
        scorer = run(rate)
        started = time.process_time()
        tried[rate] = scorer.score(case.stream.tokens, None)[0]
        seconds = time.process_time() - started
        print(name, rate, bits_per_byte(tried[rate], counted), f"{seconds:.1f} s", flush=True)
    rate = min(tried, key=lambda r: tried[r][:quarter].sum())
    return tried[rate], {
        "rate": rate,
        "bpb_by_rate": {str(r): bits_per_byte(nats, counted) for r, nats in tried.items()},
        "first_quarter_bpb_by_rate": {
            str(r): bits_per_byte(nats[:quarter], counted[:quarter]) for r, nats in tried.items()
        },
        "megabytes_per_second_of_one_core": int(counted.sum()) / 1e6 / seconds,
    }


def mixing_alone(answers: np.ndarray, case: Case) -> float:
    """MB/s of one core over the network's paths, nothing but the mixture: the best of three runs, compiled before."""
    paths_ND, seconds, counted = np.ascontiguousarray(answers[3:].T), [], int(case.stream.counted_bytes.sum())
    for _ in range(4):
        mixture = Mixture(case.forest.trees, counted)
        started = time.process_time()
        mixture.follow(case.targets, case.trees, paths_ND, answers[0], MIXER_RATES[1])
        seconds.append(time.process_time() - started)
    return counted / 1e6 / min(seconds[1:])


def differences(losses: dict[str, np.ndarray], of: np.ndarray, case: Case) -> dict[str, Any]:
    """bpb of each and their paired differences, over the targets `of`."""
    counted = case.stream.counted_bytes[of]
    numbers = np.unique(
        paired_bootstrap.document_of_target(case.stream.tokens, case.stream.table.bos)[of],
        return_inverse=True,
    )[1]
    found: dict[str, Any] = {name: bits_per_byte(nats[of], counted) for name, nats in losses.items()}
    for a, b in PAIRS:
        found[f"{b} minus {a}"] = paired_bootstrap.paired_difference(
            losses[a][of], losses[b][of], counted, numbers
        )._asdict()
    return found


def figures(losses: dict[str, np.ndarray], case: Case) -> dict[str, Any]:
    """Over everything, over the last quarter, and over quarters of the bytes by how well the network knows their documents."""
    targets, counted = np.arange(case.stream.targets), case.stream.counted_bytes
    found: dict[str, Any] = {
        "all": differences(losses, targets, case),
        "last quarter": differences(losses, targets[3 * len(targets) // 4 :], case),
    }
    documents = paired_bootstrap.document_of_target(case.stream.tokens, case.stream.table.bos)
    size = np.bincount(documents, counted)
    by_loss = np.argsort(np.bincount(documents, losses["network"]) / np.maximum(1, size))
    quarter = np.empty(len(size), np.int64)
    quarter[by_loss] = np.minimum(3, 4 * np.cumsum(size[by_loss]) / size.sum())
    found["documents by the network's bpb, best quarter first"] = [  # of few documents, fewer than four
        differences(losses, targets[quarter[documents] == number], case)
        for number in np.unique(quarter[size > 0])
    ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option in ("params", "model", "held-out", "tokenizer", "results"):
        parser.add_argument(f"--{option}", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--of",
        choices=("sliding", "ttt_eval"),
        default="sliding",
        help="what the tilt and the mixture lie on",
    )
    parser.add_argument("--targets", type=int, default=1_000_000)
    parser.add_argument(
        "--answers", type=Path, metavar="FILE.npy", help="read when it is there, else written"
    )
    arguments = parser.parse_args()
    params = config.load(arguments.params, Params, arguments.set)
    case = case_of(beginning(arguments.held_out, arguments.tokenizer, arguments.targets))
    answers = answered(arguments.of, arguments.model, params, case, arguments.answers)
    targets, codes = case.stream.targets, case.stream.table.codes

    def mixed(scorer: AskedScorer, rate: float) -> MixerScorer:
        return MixerScorer(scorer, rate, case.stream.table, targets, torch.device("cpu"))

    losses, seen = {"network": answers[0]}, {}
    losses["tilt"], seen["tilt"] = best(
        "tilt", TILT_RATES, lambda rate: TiltScorer(Replay(case, answers), rate, codes, targets), case
    )
    seen["tilt"]["cost_of_learning_bpb_by_rate"] = {
        str(rate): cost_of_learning(answers, case, rate) for rate in TILT_RATES
    }
    losses["mixture"], seen["mixture"] = best(
        "mixture", MIXER_RATES, lambda rate: mixed(Replay(case, answers), rate), case
    )
    losses["tilt and mixture"], seen["tilt and mixture"] = best(
        "tilt and mixture",
        MIXER_RATES,
        lambda rate: mixed(
            TiltScorer(Replay(case, answers), params.ttt_eval.tilt_rate, codes, targets), rate
        ),
        case,
    )
    seen["mixture"]["megabytes_per_second_mixing_alone"] = mixing_alone(answers, case)
    about = {
        "targets": targets,
        "bytes": int(case.stream.counted_bytes.sum()),
        "of": arguments.of,
        "changes": arguments.set,
    }
    found = figures(losses, case)
    arguments.results.write_text(
        json.dumps(about | seen | found | environment.facts(), indent=2, sort_keys=True) + "\n"
    )
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
