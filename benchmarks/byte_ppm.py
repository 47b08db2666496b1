"""#1858's byte mixture, examined: what it reports, and why that is no probability. Experimental and unlawful; never part of val_bpb.

    python -m benchmarks.byte_ppm --ledger FILE --model model.bin --val SHARDS --tokenizer FILE --results FILE [--trained FILE]

#1858 spreads a token's loss evenly over its n bytes, p^(1/n) each, and mixes each byte with a PPM of order 5: lambda p^(1/n) + (1 - lambda)
p_ppm, where lambda is 0.05 if the PPM's confidence is at least 0.9, else 0.9, and 1 where the network's loss of the byte that came is
below 0.277 nats. So lambda is chosen after the byte is known, and p^(1/n) is the same for every byte: over all tokens the "probabilities"
add up to more than one, which the counterfactual sum shows at places late in the stream. Beside the score over the whole stream stands
that of a prefix of the share that #1858 scored: two unlike numbers. `void_fractions` is #1858's "compass".
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import _ppm
from stages.common import config, environment, ledger
from stages.common.bpb import bits_per_byte
from stages.common.parallel import world
from stages.common.scorer import Scorer
from stages.pack.artifact import load_model
from stages.scoring.byte_tree import numbers_behind
from stages.scoring.evaluate import Stream, open_stream
from stages.sliding_eval.params import Params
from stages.sliding_eval.scorer import SlidingScorer

CONFIDENT, LAMBDA_CONFIDENT, LAMBDA_ELSE, GATE_NATS = 0.9, 0.05, 0.9, 0.277  # as in #1858
PREFIX_SHARE = 8_000_000 / 40_540_160  # of the targets: what #1858 scored of the official set
LEAST_ELEMENTS = 1000


def void_fractions(state: dict[str, Tensor]) -> float:
    """#1852's and #1858's diagnostic: the share of weights no larger than the mean size of their tensor; 0.575 for normal ones."""
    chosen = [
        tensor
        for name, tensor in state.items()
        if "weight" in name and tensor.is_floating_point() and tensor.numel() > LEAST_ELEMENTS
    ]
    if not chosen:
        raise ValueError(f"no tensor of more than {LEAST_ELEMENTS} weights")
    small = sum(int((tensor.abs() <= tensor.abs().mean()).sum()) for tensor in chosen)
    return small / sum(tensor.numel() for tensor in chosen)


def mixture(
    network_nats: np.ndarray, probability: np.ndarray, confidence: np.ndarray, gate_nats: float = GATE_NATS
) -> np.ndarray:
    """#1858's nats of each byte, from the network's nats of it, the PPM's probability of it and its confidence; all (B,)."""
    weight = np.where(confidence >= CONFIDENT, LAMBDA_CONFIDENT, LAMBDA_ELSE)
    weight = np.where(network_nats < gate_nats, 1.0, weight)
    return -np.log(weight * np.exp(-network_nats) + (1 - weight) * probability)


class Bytes:
    """A stream as bytes: which target each belongs to, and the text that each id would add in each place."""

    def __init__(self, stream: Stream) -> None:
        self.texts = [stream.table.emissions(is_after_boundary) for is_after_boundary in (False, True)]
        self.modes = numbers_behind(stream.table.boundary, stream.tokens[:-1])
        emitted = [self.texts[mode][token] for mode, token in zip(self.modes, stream.tokens[1:], strict=True)]
        self.sizes = np.array([len(text) for text in emitted])
        assert np.array_equal(self.sizes, stream.counted_bytes)
        self.starts = np.concatenate(([0], np.cumsum(self.sizes)))
        self.text = np.frombuffer(b"".join(emitted), np.uint8)

    def spread(self, nll: np.ndarray) -> np.ndarray:
        """A token's nats, evenly over its bytes, (B,); those of tokens without bytes have no place and are left out."""
        sizes = self.sizes[: len(nll)]
        return np.repeat(nll.astype(np.float64) / np.maximum(1, sizes), sizes)


def score(of: Bytes, nll: np.ndarray, targets: int) -> dict[str, float]:
    """What the mixture reports over the first so many targets, from an empty PPM, beside the network and the PPM alone."""
    size = int(of.starts[targets])
    probability, confidence = np.empty(size), np.empty(size)
    started = time.process_time()
    _ppm.predict(of.text[:size], _ppm.Tables(), 0, size, probability, confidence)
    seconds = time.process_time() - started
    network = of.spread(nll[:targets])
    without = float(
        nll[:targets][of.sizes[:targets] == 0].sum(dtype=np.float64)
    )  # their loss stays the network's

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
    law: np.ndarray, texts: list[bytes], tables: _ppm.Tables, before: np.ndarray, gate_nats: float = GATE_NATS
) -> np.ndarray:
    """What the mixture would charge each id in one place, nats (V,): `law` are the network's log-probabilities, `before` the text so far.

    The tables stay as they are while a candidate's bytes are looked up; #1858 counts between them, which moves little.
    """
    context = before[-_ppm.ORDERS :]
    known: dict[bytes, tuple[float, float]] = {}
    nats = np.empty(len(law))
    for token, text in enumerate(texts):
        rows = []
        for size in range(1, len(text) + 1):
            if text[:size] not in known:
                tail = np.concatenate([context, np.frombuffer(text[:size], np.uint8)])
                known[text[:size]] = _ppm.look(tables.arrays, tail, len(tail) - 1)
            rows.append(known[text[:size]])
        column = np.array(rows).reshape(-1, 2).T
        network = np.full(len(text), -law[token] / max(1, len(text)))
        nats[token] = mixture(network, column[0], column[1], gate_nats).sum() if len(text) else -law[token]
    return nats


def counterfactual_sums(of: Bytes, stream: Stream, scorer: Scorer, places: list[int]) -> dict[str, Any]:
    """The sum over all ids of exp(-nats charged), at places of the stream: 1 for a law."""
    tables, probability, confidence = _ppm.Tables(), np.empty(len(of.text)), np.empty(len(of.text))
    at, seen, network, gated, plain = 0, 0, [], [], []
    for place in sorted(places):
        for token in stream.tokens[seen : place + 1].tolist():
            scorer.observe(token)
        start, seen = int(of.starts[place]), place + 1
        _ppm.predict(of.text, tables, at, start, probability, confidence)
        law, texts, at = scorer.predict(), of.texts[of.modes[place]], start
        network.append(float(np.exp(law).sum()))
        gated.append(float(np.exp(-charged(law, texts, tables, of.text[:start])).sum()))
        plain.append(float(np.exp(-charged(law, texts, tables, of.text[:start], gate_nats=-1.0)).sum()))
    return {
        "places": len(gated),
        "network_largest_deviation_from_one": max(abs(value - 1) for value in network),
        "mixture": {
            "mean": float(np.mean(gated)),
            "largest": max(gated),
            "mean_log2": float(np.log2(gated).mean()),
        },
        "mixture_without_gate": {
            "mean": float(np.mean(plain)),
            "largest": max(plain),
            "mean_log2": float(np.log2(plain).mean()),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ledger", type=Path, required=True, help="the network's, of sliding_eval")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument(
        "--trained", type=Path, help="train's model.safetensors, for the void fraction before packing"
    )
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument(
        "--places", type=int, default=60, help="of counterfactual sums, in the last half of the stream"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()
    params = config.load(Path("params.yaml"), Params, arguments.set)
    stream = open_stream(arguments.val, arguments.tokenizer)
    nll = ledger.read(arguments.ledger, stream.targets)
    of = Bytes(stream)
    result: dict[str, Any] = {
        "status": "experimental and unlawful: not normalised (C2), the gate sees the target (C1); never part of val_bpb"
    }
    prefix = round(PREFIX_SHARE * stream.targets)
    _ppm.predict(of.text[:1000], _ppm.Tables(6), 0, 1000, np.empty(1000), np.empty(1000))  # compiles
    result["changes"] = arguments.set
    result |= {
        "whole": score(of, nll, stream.targets),
        "prefix": score(of, nll, prefix),
        "prefix_share": PREFIX_SHARE,
    }
    with world(params.parallel) as here:
        model = load_model(arguments.model, here)
        drawn = np.random.Generator(np.random.PCG64(0)).choice(
            np.arange(stream.targets // 2, stream.targets), arguments.places, replace=False
        )
        result["counterfactual_sum"] = counterfactual_sums(
            of, stream, SlidingScorer(model, params.sliding_eval, here), drawn.tolist()
        )
        result["void_fraction_packed"] = void_fractions(dict(model.state_dict()))
    if arguments.trained:
        result["void_fraction_trained"] = void_fractions(load_file(arguments.trained))
    arguments.results.write_text(json.dumps(result | environment.facts(), indent=2, sort_keys=True) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
