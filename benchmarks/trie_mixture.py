"""Gain and speed of the byte mixture, compared with the tilt, on top of any scorer.

    python -m benchmarks.trie_mixture --params FILE --model FILE --held-out SHARDS --tokenizer FILE \\
        --results FILE [--set KEY=VALUE ...]

The FILE of --model is a model.bin. SHARDS are of training text that it was not trained on: nothing here
is chosen on validation text. The scorer of --of (sliding windows, or the one of the section ttt_eval,
without tilt and mixture) scores the first --targets of them once. Its scores (stages/scoring/queries.py)
are kept in --scores, and the tilt and the mixture are run over those. Rates are chosen on the first
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
from stages.common.parallel import distributed
from stages.common.progress import Logger
from stages.pack.artifact import load_model
from stages.scoring.byte_tree import build_byte_trees, tree_index_after
from stages.scoring.byte_tree_logits import DeviceByteTrees
from stages.scoring.evaluate import ScorerInputs
from stages.scoring.queries import Queries, TargetScores
from stages.scoring.stream import ValidationStream
from stages.ttt_eval.build import BYTES_PER_TARGET, build_scorer
from stages.ttt_eval.bytemix.mixer import ByteMixer
from stages.ttt_eval.ngram.tilt import MAX_LOG_PROB, Hints, NgramTilt
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
    """A stream, and the inputs of tilt and mixture that depend on its tokens alone; N targets."""

    stream: ValidationStream
    hints: Hints
    trees_N: np.ndarray  # int64
    byte_trees: DeviceByteTrees

    @property
    def targets_N(self) -> np.ndarray:
        """The ids that are scored, int64."""
        return self.stream.tokens[1:].astype(np.int64)


def case_of(stream: ValidationStream) -> Case:
    """The byte trees of a stream, and the hints of a causal pass over it."""
    hints = NgramTilt(stream.table.text_hashes, stream.targets, 0.0).observe(stream.tokens)
    trees_N = tree_index_after(stream.table.boundary, stream.tokens[:-1])
    byte_trees = DeviceByteTrees(build_byte_trees(stream.table), torch.device("cpu"))
    return Case(stream, hints.last(stream.targets), trees_N, byte_trees)


def network_scores(
    of: str, model_file: Path, params: Params, case: Case, file: Path | None
) -> TargetScores[np.ndarray]:
    """A network's scores of all targets; read from the file if it exists, else written to it."""
    if file and file.exists():
        with np.load(file) as arrays:
            return TargetScores(**arrays)
    without = dataclasses.replace(params.ttt_eval, tilt_rate=0.0, mixer_rate=0.0)
    stream = case.stream
    with distributed(params.parallel) as world:
        model = load_model(model_file, world)
        inputs = ScorerInputs(model, world, stream.table, stream.targets, Logger(is_main=world.is_main))
        scorer: Any = build_scorer(of, params.sliding_eval, without, inputs)
        byte_trees = DeviceByteTrees(case.byte_trees.trees, world.device)
        scores: TargetScores[np.ndarray] = scorer.score(
            stream.tokens, Queries(case.hints.ids_N, case.trees_N, byte_trees)
        )
    if file:
        np.savez(file, **scores._asdict())
    return scores


def tilted(case: Case, scores: TargetScores[np.ndarray], rate: float) -> TargetScores[np.ndarray]:
    """A network's scores under the tilt.

    At the rate 0 these are the network's own losses; the paths, which leave out the hints, get them back.
    """
    tilt = NgramTilt(case.stream.table.text_hashes, case.stream.targets, rate)
    own_scores = scores.map(np.copy)
    tilt.score_and_learn_(own_scores, case.hints, case.targets_N, case.trees_N, case.byte_trees.trees)
    return own_scores


def mixed(case: Case, scores: TargetScores[np.ndarray], rate: float) -> np.ndarray:
    """Losses (N,) of the mixture over scores whose paths have the hints."""
    assert scores.path_logits_DN is not None
    mixer = ByteMixer(case.byte_trees.trees, case.stream.targets * BYTES_PER_TARGET, rate)
    logits_ND = np.ascontiguousarray(scores.path_logits_DN.T)
    return mixer.score_and_learn(case.targets_N, case.trees_N, logits_ND, scores.nll_N)


def cost_of_learning(scores: TargetScores[np.ndarray], case: Case, rate: float) -> float:
    """Bits per byte that the tilt loses where there is nothing to gain.

    Each hint comes true with the network's own probability of it, and the tilt learns from that.
    """
    assert scores.hint_logp_N is not None
    p = np.exp(np.minimum(scores.hint_logp_N, MAX_LOG_PROB).astype(np.float64))
    drawn = np.random.Generator(np.random.PCG64(0)).random(len(p))
    hit = (drawn < p) & (case.hints.ids_N >= 0)
    nll = np.where(hit, -np.log(p), -np.log1p(-p)).astype(np.float32)
    targets = np.where(hit, case.hints.ids_N, case.hints.ids_N + 1)

    tilt = NgramTilt(case.stream.table.text_hashes, case.stream.targets, rate)
    made_up = TargetScores(nll.copy(), scores.hint_logp_N)
    tilt.score_and_learn_(made_up, case.hints, targets, case.trees_N, None)
    counted = case.stream.counted_bytes
    return bits_per_byte(made_up.nll_N, counted) - bits_per_byte(nll, counted)


def best(
    name: str, rates: tuple[float, ...], run: Callable[[float], np.ndarray], case: Case
) -> tuple[np.ndarray, dict[str, Any]]:
    """Losses (N,) at the rate that is best on the first quarter, and the figures of all rates."""
    counted = case.stream.counted_bytes
    quarter = case.stream.targets // 4
    tried: dict[float, np.ndarray] = {}
    seconds = 0.0
    run(rates[0])  # compiles
    for rate in rates:
        started = time.process_time()
        tried[rate] = run(rate)
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


def mixing_alone(scores: TargetScores[np.ndarray], case: Case) -> float:
    """MB/s of one core by the mixture alone, over the network's paths: the best of three compiled runs."""
    assert scores.path_logits_DN is not None
    paths_ND = np.ascontiguousarray(scores.path_logits_DN.T)
    counted = int(case.stream.counted_bytes.sum())
    seconds = []
    for _ in range(4):
        mixer = ByteMixer(case.byte_trees.trees, counted, MIXER_RATES[1])
        started = time.process_time()
        mixer.score_and_learn(case.targets_N, case.trees_N, paths_ND, scores.nll_N)
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
    # Command line.
    parser = command_line(__doc__)
    for option in ("params", "model", "held-out", "tokenizer", "results"):
        parser.add_argument(f"--{option}", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    scorers = ("sliding_eval", "ttt_eval")
    parser.add_argument("--of", choices=scorers, default=scorers[0], help="below tilt and mixture")
    parser.add_argument("--targets", type=int, default=1_000_000)
    parser.add_argument("--scores", type=Path, metavar="FILE.npz", help="read if it exists, else written")
    arguments = parser.parse_args()

    # The network's scores, once.
    params = config.load(arguments.params, Params, arguments.set)
    case = case_of(beginning(arguments.held_out, arguments.tokenizer, arguments.targets))
    scores = network_scores(arguments.of, arguments.model, params, case, arguments.scores)
    with_hints = tilted(case, scores, 0.0)
    with_tilt = tilted(case, scores, params.ttt_eval.tilt_rate)

    # Tilt and mixture alone, then the mixture on top of the tilt at its configured rate.
    ways: dict[str, tuple[tuple[float, ...], Callable[[float], np.ndarray]]] = {
        "tilt": (TILT_RATES, lambda rate: tilted(case, scores, rate).nll_N),
        "mixture": (MIXER_RATES, lambda rate: mixed(case, with_hints, rate)),
        "tilt and mixture": (MIXER_RATES, lambda rate: mixed(case, with_tilt, rate)),
    }
    losses = {"network": scores.nll_N}
    results: dict[str, Any] = {}
    for name, (rates, run) in ways.items():
        losses[name], results[name] = best(name, rates, run, case)
    costs = {str(rate): cost_of_learning(scores, case, rate) for rate in TILT_RATES}
    results["tilt"]["cost_of_learning_bpb_by_rate"] = costs
    results["mixture"]["megabytes_per_second_mixing_alone"] = mixing_alone(scores, case)

    found = figures(losses, case)
    results |= {
        "targets": case.stream.targets,
        "bytes": int(case.stream.counted_bytes.sum()),
        "of": arguments.of,
    }
    results |= {"changes": arguments.set}
    write_results(arguments.results, results | found | environment.run_environment())
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
