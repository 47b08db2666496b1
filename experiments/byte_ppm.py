"""Examination of #1858's byte mixture: its score, and the sum of its probabilities. Never part of val_bpb.

    python -m experiments.byte_ppm --ledger FILE --model model.bin --val SHARDS --tokenizer FILE \\
        --results FILE [--trained FILE]

#1858 spreads a token's loss evenly over its n bytes, p^(1/n) each, and mixes each byte with a PPM of order
5 (experiments/_ppm.py):

    lambda p^(1/n) + (1 - lambda) p_ppm

Lambda is 0.05 if the PPM's confidence is at least 0.9, else 0.9; and it is 1 if the network's loss of the
byte is below 0.277 nats. This is not a probability, for two reasons: lambda is chosen after the byte is
known, and p^(1/n) is the same for every byte. Over all tokens the "probabilities" add up to more than one,
as the counterfactual sums at places late in the stream show.

The score is given over the whole stream and over a prefix of the share that #1858 scored, to show that the
two are different numbers. `void_fractions` is the diagnostic that #1858 calls a compass.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from benchmarks._command import command_line, write_results
from experiments import _ppm
from stages.common import challenge, config, environment, ledger
from stages.common.bpb import bits_per_byte
from stages.common.parallel import distributed
from stages.common.scorer import Scorer
from stages.pack.artifact import load_model
from stages.scoring.byte_tree import tree_index_after
from stages.scoring.stream import ValidationStream, open_validation_stream
from stages.sliding_eval.params import Params
from stages.sliding_eval.scorer import SlidingScorer

# Constants of #1858.
CONFIDENT = 0.9  # confidence of the PPM from which it counts as sure
LAMBDA_CONFIDENT = 0.05  # weight of the network where the PPM is sure
LAMBDA_ELSE = 0.9  # and where it is not
GATE_NATS = 0.277  # loss of the network below which it is taken alone
PREFIX_SHARE = 8_000_000 / challenge.VALIDATION_TARGETS  # of the official targets, scored by #1858
STATUS = (
    "experimental and unlawful: not normalised (C2), the gate sees the target (C1); never part of val_bpb"
)
LEAST_ELEMENTS = 1000  # of a tensor that counts for the void fraction


def void_fractions(state: dict[str, Tensor]) -> float:
    """Share of weights that are not larger than the mean size in their tensor; 0.575 for normal weights.

    A diagnostic of #1852 and #1858.
    """
    small = 0
    count = 0
    for name, tensor in state.items():
        if "weight" in name and tensor.is_floating_point() and tensor.numel() > LEAST_ELEMENTS:
            small += int((tensor.abs() <= tensor.abs().mean()).sum())
            count += tensor.numel()
    if not count:
        raise ValueError(f"no tensor of more than {LEAST_ELEMENTS} weights")
    return small / count


def mixture(
    network_nats: np.ndarray, probability: np.ndarray, confidence: np.ndarray, gate_nats: float = GATE_NATS
) -> np.ndarray:
    """#1858's nats of each byte, (B,).

    From the network's nats, the PPM's probability and the PPM's confidence, each (B,).
    """
    weight = np.where(confidence >= CONFIDENT, LAMBDA_CONFIDENT, LAMBDA_ELSE)
    weight = np.where(network_nats < gate_nats, 1.0, weight)
    return -np.log(weight * np.exp(-network_nats) + (1 - weight) * probability)


class StreamBytes:
    """A stream of N targets as B bytes, and the bytes that each id would emit."""

    def __init__(self, stream: ValidationStream) -> None:
        self.texts = [stream.table.appended_bytes(is_after_boundary) for is_after_boundary in (False, True)]
        self.modes = tree_index_after(stream.table.boundary, stream.tokens[:-1])  # (N,), index of texts
        emitted = [self.texts[mode][token] for mode, token in zip(self.modes, stream.tokens[1:], strict=True)]
        self.sizes = np.array([len(text) for text in emitted])  # (N,)
        assert np.array_equal(self.sizes, stream.counted_bytes)
        self.starts = np.concatenate(([0], np.cumsum(self.sizes)))  # (N + 1,)
        self.text = np.frombuffer(b"".join(emitted), np.uint8)  # (B,)

    def spread(self, nll: np.ndarray) -> np.ndarray:
        """Losses (N,) spread evenly over each token's bytes, (B,); tokens without bytes are left out."""
        sizes = self.sizes[: len(nll)]
        return np.repeat(nll.astype(np.float64) / np.maximum(1, sizes), sizes)


def score(of: StreamBytes, nll: np.ndarray, targets: int) -> dict[str, float]:
    """Scores of the mixture, the network and the PPM alone, over the first `targets` of `nll` (N,).

    The PPM begins empty.
    """
    size = int(of.starts[targets])
    probability = np.empty(size)
    confidence = np.empty(size)
    started = time.process_time()
    _ppm.predict(of.text[:size], _ppm.Tables(), 0, size, probability, confidence)
    seconds = time.process_time() - started

    # Tokens without bytes keep the network's loss.
    network = of.spread(nll[:targets])
    without = float(nll[:targets][of.sizes[:targets] == 0].sum(dtype=np.float64))

    def bpb(nats: np.ndarray) -> float:
        return (float(nats.sum()) + without) / math.log(2) / size

    return {
        "targets": targets,
        "bytes": size,
        "network_bpb": bits_per_byte(nll[:targets], of.sizes[:targets]),
        "spread_over_bytes_bpb": bpb(network),
        "ppm_bpb": -float(np.log2(probability).sum()) / size,
        "unlawful_mixture_bpb": bpb(mixture(network, probability, confidence)),
        "unlawful_mixture_without_gate_bpb": bpb(mixture(network, probability, confidence, gate_nats=-1.0)),
        "gate_skips_share_of_bytes": float((network < GATE_NATS).mean()),
        "confident_share_of_bytes": float((confidence >= CONFIDENT).mean()),
        "ppm_megabytes_per_second_of_one_core": size / 1e6 / seconds,
    }


def charged(
    log_probs: np.ndarray,
    texts: list[bytes],
    tables: _ppm.Tables,
    before: np.ndarray,
    gate_nats: float = GATE_NATS,
) -> np.ndarray:
    """Nats that the mixture would charge for each id in one place, (V,).

    `log_probs` are the network's, (V,); `texts` the bytes of each id; `before` the text so far, (B,). The
    tables are not changed. #1858 counts each byte before it looks the next one up; that moves little.
    """
    context = before[-_ppm.ORDERS :]
    looked_up: dict[bytes, tuple[float, float]] = {}
    nats = np.empty(len(log_probs))
    for token, text in enumerate(texts):
        if not text:
            nats[token] = -log_probs[token]
            continue

        rows = []
        for size in range(1, len(text) + 1):
            prefix = text[:size]
            if prefix not in looked_up:
                tail = np.concatenate([context, np.frombuffer(prefix, np.uint8)])
                looked_up[prefix] = _ppm.look(tables.arrays, tail, len(tail) - 1)
            rows.append(looked_up[prefix])
        probability, confidence = np.array(rows).T
        network = np.full(len(text), -log_probs[token] / len(text))
        nats[token] = mixture(network, probability, confidence, gate_nats).sum()
    return nats


def counterfactual_sums(
    of: StreamBytes, stream: ValidationStream, scorer: Scorer, places: list[int]
) -> dict[str, Any]:
    """The sum over all ids of exp(-nats charged), at targets `places`: 1 for a probability distribution."""
    tables = _ppm.Tables()
    probability = np.empty(len(of.text))
    confidence = np.empty(len(of.text))
    counted_bytes = 0
    observed = 0
    network, gated, plain = [], [], []
    for place in sorted(places):
        # The network and the PPM learn what comes before the place.
        for token in stream.tokens[observed : place + 1].tolist():
            scorer.observe(token)
        observed = place + 1
        start = int(of.starts[place])
        _ppm.predict(of.text, tables, counted_bytes, start, probability, confidence)
        counted_bytes = start

        # Then every id is charged there.
        log_probs = scorer.predict()
        texts = of.texts[of.modes[place]]
        before = of.text[:start]
        network.append(float(np.exp(log_probs).sum()))
        gated.append(float(np.exp(-charged(log_probs, texts, tables, before)).sum()))
        plain.append(float(np.exp(-charged(log_probs, texts, tables, before, gate_nats=-1.0)).sum()))

    return {
        "places": len(gated),
        "network_largest_deviation_from_one": max(abs(value - 1) for value in network),
        "mixture": _summary(gated),
        "mixture_without_gate": _summary(plain),
    }


def _summary(sums: list[float]) -> dict[str, float]:
    return {
        "mean": float(np.mean(sums)),
        "largest": max(sums),
        "mean_log2": float(np.log2(sums).mean()),
    }


def main() -> None:
    """Score the stream, sum at random places, and write the JSON file."""
    parser = command_line(__doc__)
    parser.add_argument("--ledger", type=Path, required=True, help="the network's, of sliding_eval")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--trained", type=Path, help="the weights that train wrote, for their void fraction")
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--places", type=int, default=60, help="sums, in the last half of the stream")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()

    # The reported scores, of the whole stream and of #1858's share.
    params = config.load(Path("params.yaml"), Params, arguments.set)
    stream = open_validation_stream(arguments.val, arguments.tokenizer)
    nll = ledger.read(arguments.ledger, stream.targets)
    of = StreamBytes(stream)
    _ppm.predict(of.text[:1000], _ppm.Tables(6), 0, 1000, np.empty(1000), np.empty(1000))  # compiles
    result: dict[str, Any] = {
        "status": STATUS,
        "changes": arguments.set,
        "whole": score(of, nll, stream.targets),
        "prefix": score(of, nll, round(PREFIX_SHARE * stream.targets)),
        "prefix_share": PREFIX_SHARE,
    }

    # The sums of its probabilities.
    last_half = np.arange(stream.targets // 2, stream.targets)
    places = np.random.Generator(np.random.PCG64(0)).choice(last_half, arguments.places, replace=False)
    with distributed(params.parallel) as world:
        model = load_model(arguments.model, world)
        scorer = SlidingScorer(model, params.sliding_eval, world)
        result["counterfactual_sum"] = counterfactual_sums(of, stream, scorer, places.tolist())
        result["void_fraction_packed"] = void_fractions(dict(model.state_dict()))
    if arguments.trained:
        result["void_fraction_trained"] = void_fractions(load_file(arguments.trained))
    write_results(arguments.results, result | environment.run_environment())
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
