"""How far losses move when a network computes as it usually does instead of exactly, and what the tilt and the byte mixture make of that.

    python -m benchmarks.rounding --params FILE --model FILE --val FOLDER --tokenizer FILE --results FILE [--targets N] [--answers FOLDER]

On a GPU that is bfloat16 against float32. Test-time training as ttt_eval's section says goes on in both, so that their weights differ,
too. The audit holds the ledger of one against the other (audit.bfloat16_loss_tolerance): what stands on top of the network must not make
its rounding errors larger.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._streams import beginning
from benchmarks.trie_mixture import Case, Replay, answered, case_of
from stages.common import config, environment
from stages.ttt_eval.bytemix.scorer import MixerScorer
from stages.ttt_eval.ngram.scorer import TiltScorer
from stages.ttt_eval.params import Params

PERCENTILES = (50, 90, 99, 99.9, 99.99, 100)


def ledgers(case: Case, answers: np.ndarray, params: Params) -> dict[str, np.ndarray]:
    """The losses of the network, and of what stands on top of it."""
    table, targets, tokens, ttt = case.stream.table, case.stream.targets, case.stream.tokens, params.ttt_eval

    def tilted() -> TiltScorer:
        return TiltScorer(Replay(case, answers), ttt.tilt_rate, table.codes, targets)

    mixed = MixerScorer(tilted(), ttt.mixer_rate, table, targets, torch.device("cpu"))
    return {
        "network": answers[0],
        "tilt": tilted().score_stream(tokens),
        "tilt and mixture": mixed.score_stream(tokens),
    }


def apart(one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """nats of a target, both (N,)."""
    difference = one.astype(np.float64) - other
    sizes = {str(share): float(np.percentile(np.abs(difference), share)) for share in PERCENTILES}
    return {
        "percentiles_of_size": sizes,
        "mean": float(difference.mean()),
        "above_half": int((np.abs(difference) > 0.5).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option in ("params", "model", "val", "tokenizer", "results"):
        parser.add_argument(f"--{option}", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--targets", type=int, default=300_000)
    parser.add_argument(
        "--answers", type=Path, metavar="FOLDER", help="read when they are there, else written"
    )
    arguments = parser.parse_args()
    params = config.load(arguments.params, Params, arguments.set)
    case = case_of(beginning(arguments.val, arguments.tokenizer, arguments.targets))
    exact = dataclasses.replace(params.parallel, dtype="float32", deterministic=True, compile=False)
    sides = {}
    for name, parallel in (("exact", exact), ("usual", params.parallel)):
        file = arguments.answers / f"{name}.npy" if arguments.answers else None
        answers = answered(
            "ttt_eval", arguments.model, dataclasses.replace(params, parallel=parallel), case, file
        )
        sides[name] = ledgers(case, answers, params)
    found = {name: apart(sides["usual"][name], nll) for name, nll in sides["exact"].items()}
    about = {"targets": case.stream.targets, "changes": arguments.set}
    arguments.results.write_text(
        json.dumps(about | found | environment.facts(), indent=2, sort_keys=True) + "\n"
    )
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
