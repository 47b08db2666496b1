"""Does a byte model mixed in over the trie of tokens gain more than the tilt? The test that decides whether to build it.

    python -m benchmarks.trie_mixture --model FILE --held-out SHARDS --tokenizer FILE --results FILE [--preset smoke] [--set KEY=VALUE ...]

FILE of --model is train's model.safetensors, SHARDS are of training text that the model was not trained on: nothing here is chosen on
validation text. The network scores the first --targets of them with sliding windows; its losses, its probabilities of the hints and of
every decision on the paths of the tokens are kept in --dump, and the tilt (stages/ttt_eval/tilt.py) and the mixer (_mixer.py) are run over
those. Rates are chosen on the first quarter; the last quarter, with the most behind it, is what is to be read.

The gain depends on the network: a weak one leaves to the mixer what a strong one knows by itself (#1642: -0.05 bpb with a weak model and
-0.0002 with the strongest).
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from safetensors.torch import load_file

from benchmarks import _mixer, _trie
from benchmarks._preset import train_params
from stages import bootstrap, clock
from stages.bpb import bits_per_byte, load_tokenizer
from stages.parallel import world
from stages.sliding_eval.evaluate import Stream, open_stream
from stages.sliding_eval.windows import plan
from stages.train.model import Model, model_for
from stages.train.params import Params as TrainInput
from stages.ttt_eval import tilt
from stages.ttt_eval.hints import LENGTHS, STATES, Hints

BATCH = 8
RATES = {"tilt": (0.01, 0.02, 0.05, 0.1, 0.2), "mixer": (0.002, 0.005, 0.02, 0.05)}
Tries = tuple[_trie.Trie, _trie.Trie]


class Dump(NamedTuple):
    """What the network said of N targets."""

    nll: np.ndarray  # (N,) float64 nats
    hint_logp: np.ndarray  # (N,) float32
    within: np.ndarray  # (N,) float64: log P(token) / T
    logits: np.ndarray  # float32: of all decisions, one path behind the other


class Case(NamedTuple):
    """The stream and what stands of it without a network."""

    stream: Stream
    tries: Tries
    modes: np.ndarray  # (N,) int64: which of them each target is in
    hints: np.ndarray  # (N,) int32
    states: np.ndarray  # (N, K) uint8

    @property
    def targets(self) -> np.ndarray:
        """The ids that are scored, (N,)."""
        return self.stream.tokens[1:]


def case_of(stream: Stream, tokenizer_file: Path) -> Case:
    """Both trees, and the hints of a causal pass."""
    tokenizer = load_tokenizer(tokenizer_file)
    tries = [_trie.build(_trie.emissions(tokenizer, stream.table, mode)) for mode in (_trie.AFTER_TEXT, _trie.AFTER_CONTROL)]
    hints, states = Hints(stream.targets).observe(stream.tokens)
    modes = np.where(stream.table.boundary[stream.tokens[:-1]], _trie.AFTER_CONTROL, _trie.AFTER_TEXT)
    return Case(stream, (tries[0], tries[1]), modes, hints[1:], states[1:])


@njit(nogil=True)
def decide(logp: np.ndarray, tries: Any, targets: np.ndarray, modes: np.ndarray, logits: np.ndarray, within: np.ndarray) -> int:
    """The path logits of targets from their distributions, (n, V); how many there are."""
    sums, at = np.zeros(logp.shape[1] + 1, np.int64), 0
    for i in range(len(targets)):
        trie = tries[modes[i]]
        for place in range(logp.shape[1]):
            sums[place + 1] = sums[place] + max(1, np.int64(np.rint(np.exp(np.float64(logp[i, trie.order_V[place]])) * _trie.UNIT)))
        at += _trie.path_logits(sums, trie, targets[i], logits[at:])
        within[i] = _trie.within(sums, trie, targets[i])
    return at


@torch.no_grad()
def score(model: Model, case: Case, stride: int) -> Dump:
    """Every target with sliding windows of the model's context; their number must fill the last one."""
    ids = torch.from_numpy(case.stream.tokens.astype(np.int64)).to(model.embedding.weight.device)
    parts, buffer = [], np.empty(BATCH * model.params.context * _mixer.DECISIONS)
    windows = plan(0, case.stream.targets, model.params.context, stride)
    batches = [windows[:1], *(windows[i : i + BATCH] for i in range(1, len(windows), BATCH))]
    started = time.monotonic()
    for number, batch in enumerate(batches):
        logits = model.logits(torch.stack([ids[w.start : w.end] for w in batch]), True, batch[0].first - batch[0].start).flatten(0, 1)
        logp = torch.log_softmax(logits, -1).cpu().numpy()
        places = np.concatenate([np.arange(w.first, w.end) for w in batch])
        rows, targets, within = np.arange(len(places)), case.targets[places].astype(np.int64), np.empty(len(places))
        count = decide(logp, case.tries, targets, case.modes[places], buffer, within)
        parts.append((-logp[rows, targets].astype(np.float64), logp[rows, case.hints[places]], within, buffer[:count].astype(np.float32)))
        if number % 20 == 0:
            print(f"{places[-1] + 1:,} of {case.stream.targets:,} targets, {time.monotonic() - started:.0f} s", flush=True)
    return Dump(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def tilted(nll: np.ndarray, hint_logp: np.ndarray, targets: np.ndarray, case: Case, rate: float) -> np.ndarray:
    """The tilt's losses, (N,)."""
    weights, updates = np.zeros((len(LENGTHS) * tilt.BUCKETS, tilt.INPUTS)), np.zeros(len(LENGTHS) * tilt.BUCKETS, np.int64)
    shares, counts = np.full((len(LENGTHS), STATES), 0.5), np.zeros((len(LENGTHS), STATES), np.int64)
    return tilt.follow(case.hints, case.states, targets, nll, hint_logp, weights, shares, counts, updates, rate)


def cost_of_learning(of: Dump, case: Case, rate: float) -> float:
    """bpb that the tilt loses where nothing can be gained: whether a hint comes true is drawn from the network's own probability of it."""
    p = np.exp(np.minimum(of.hint_logp, tilt.SURE).astype(np.float64))
    came = (np.random.Generator(np.random.PCG64(0)).random(len(p)) < p) & (case.hints >= 0)
    nll = np.where(came, -np.log(p), -np.log1p(-p)).astype(np.float32)
    tilted_nll = tilted(nll, of.hint_logp, np.where(came, case.hints, case.hints + 1), case, rate)
    return bits_per_byte(tilted_nll, case.stream.counted_bytes) - bits_per_byte(nll, case.stream.counted_bytes)


def mixed(of: Dump, case: Case, rate: float) -> np.ndarray:
    """The mixer's losses, (N,); at rate 0 the network's own, telescoped."""
    nats = np.empty(case.stream.targets)
    state = _mixer.State(int(case.stream.counted_bytes.sum()))
    _mixer.follow(state.arrays, case.tries, case.targets, case.modes, of.logits, of.within, rate, nats)
    return nats


def best(name: str, run: Callable[[float], np.ndarray], case: Case) -> tuple[np.ndarray, dict[str, Any]]:
    """The losses at the rate that is best on the first quarter, and what was seen."""
    quarter, seconds = case.stream.targets // 4, 0.0
    tried: dict[float, np.ndarray] = {}
    for rate in RATES[name]:
        run(rate) if not tried else None  # compiles
        started = time.process_time()
        nats = run(rate)
        seconds = time.process_time() - started
        tried[rate] = nats
        print(name, rate, bits_per_byte(nats, case.stream.counted_bytes), f"{seconds:.1f} s", flush=True)
    rate = min(tried, key=lambda r: tried[r][:quarter].sum())
    megabytes = int(case.stream.counted_bytes.sum()) / 1e6
    first = {str(r): bits_per_byte(nats[:quarter], case.stream.counted_bytes[:quarter]) for r, nats in tried.items()}
    return tried[rate], {"rate": rate, "first_quarter_bpb_by_rate": first, "megabytes_per_second_of_one_core": megabytes / seconds}


def differences(losses: dict[str, np.ndarray], of: np.ndarray, case: Case) -> dict[str, Any]:
    """bpb of each and their paired differences, over the targets `of`."""
    counted = case.stream.counted_bytes[of]
    numbers = np.unique(bootstrap.document_of_target(case.stream.tokens, case.stream.table.bos)[of], return_inverse=True)[1]
    found: dict[str, Any] = {name: bits_per_byte(nats[of], counted) for name, nats in losses.items()}
    for a, b in (("network", "tilt"), ("network", "mixer"), ("tilt", "mixer")):
        found[f"{b} minus {a}"] = bootstrap.paired_difference(losses[a][of], losses[b][of], counted, numbers)._asdict()
    return found


def figures(losses: dict[str, np.ndarray], case: Case) -> dict[str, Any]:
    """Over everything, over the last quarter, and over quarters of the bytes by how well the network knows their documents."""
    targets, counted = np.arange(case.stream.targets), case.stream.counted_bytes
    found: dict[str, Any] = {
        "all": differences(losses, targets, case),
        "last quarter": differences(losses, targets[3 * len(targets) // 4 :], case),
    }
    documents = bootstrap.document_of_target(case.stream.tokens, case.stream.table.bos)
    size = np.bincount(documents, counted)
    by_loss = np.argsort(np.bincount(documents, losses["network"]) / np.maximum(1, size))
    quarter = np.empty(len(size), np.int64)
    quarter[by_loss] = np.minimum(3, 4 * np.cumsum(size[by_loss]) / size.sum())
    found["documents by the network's bpb, best quarter first"] = [
        differences(losses, targets[quarter[documents] == number], case) for number in range(4)
    ]
    return found


def network(arguments: argparse.Namespace, params: TrainInput, case: Case) -> Dump:
    """What the model says of the case's targets, from the dump where there is one."""
    if arguments.dump and arguments.dump.exists():
        return Dump(**np.load(arguments.dump))
    with world(params.parallel) as here:
        model = model_for(params.model, here)
        model.load_state_dict(load_file(arguments.model))
        of = score(model, case, arguments.stride)
    if arguments.dump:
        np.savez(arguments.dump, **of._asdict())
    return of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="smoke")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True, help="shards of training text that the model was not trained on")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--targets", type=int, default=1_000_000)
    parser.add_argument("--stride", type=int, default=128)
    parser.add_argument("--dump", type=Path, metavar="FILE.npz", help="read when it is there, else written")
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()
    params = train_params(arguments.preset, arguments.set)
    whole, window = open_stream(arguments.held_out, arguments.tokenizer), params.model.context
    targets = window + (min(arguments.targets, whole.targets) - window) // arguments.stride * arguments.stride
    case = case_of(Stream(whole.tokens[: targets + 1], whole.counted_bytes[:targets], whole.table), arguments.tokenizer)
    of = network(arguments, params, case)
    losses, seen = {"network": of.nll}, {}
    losses["tilt"], seen["tilt"] = best("tilt", lambda rate: tilted(of.nll, of.hint_logp, case.targets, case, rate), case)
    seen["tilt"]["cost_of_learning_bpb_by_rate"] = {str(rate): cost_of_learning(of, case, rate) for rate in RATES["tilt"]}
    losses["mixer"], seen["mixer"] = best("mixer", lambda rate: mixed(of, case, rate), case)
    about = {
        "targets": targets,
        "bytes": int(case.stream.counted_bytes.sum()),
        "preset": arguments.preset,
        "changes": arguments.set,
        "decisions_per_target": len(of.logits) / targets,
        "telescoped_minus_nll_largest_nats": float(np.abs(mixed(of, case, 0.0) - of.nll).max()),
    }
    found = figures(losses, case)
    arguments.results.write_text(json.dumps(about | seen | found | clock.facts(), indent=2, sort_keys=True) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
