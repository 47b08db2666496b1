"""Rounding errors of a network, and their size after the tilt and the byte mixture.

    python -m experiments.rounding --params FILE --model FILE --val FOLDER --tokenizer FILE \\
        --results FILE [--targets N] [--answers FOLDER]

The network computes as usual (on a GPU in bfloat16) and in float32. Test-time training as in the section
ttt_eval goes on in both, so that their weights differ, too. The audit compares the two ledgers
(`BFLOAT16` of stages/audit/precision.py): the tilt and the mixture must not make the network's
rounding errors larger.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._command import command_line, write_results
from benchmarks._streams import beginning
from benchmarks.trie_mixture import Case, case_of, mixed, network_scores, tilted
from stages.common import config, environment
from stages.scoring.queries import TargetScores
from stages.ttt_eval.params import Params

PERCENTILES = (50, 90, 99, 99.9, 99.99, 100)


def ledgers(case: Case, scores: TargetScores[np.ndarray], params: Params) -> dict[str, np.ndarray]:
    """Losses (N,) of the network, and of tilt and mixture on top of it."""
    with_tilt = tilted(case, scores, params.ttt_eval.tilt_rate)
    return {
        "network": scores.nll_N,
        "tilt": with_tilt.nll_N,
        "tilt and mixture": mixed(case, with_tilt, params.ttt_eval.mixer_rate),
    }


def apart(one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Figures of the difference between two ledgers, both nats (N,)."""
    difference = one.astype(np.float64) - other
    sizes = {str(share): float(np.percentile(np.abs(difference), share)) for share in PERCENTILES}
    return {
        "percentiles_of_size": sizes,
        "mean": float(difference.mean()),
        "above_half": int((np.abs(difference) > 0.5).sum()),
    }


def main() -> None:
    """Score in both ways, and write the JSON file."""
    parser = command_line(__doc__)
    for option in ("params", "model", "val", "tokenizer", "results"):
        parser.add_argument(f"--{option}", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--targets", type=int, default=300_000)
    parser.add_argument("--scores", type=Path, metavar="FOLDER", help="read if they exist, else written")
    arguments = parser.parse_args()

    params = config.load(arguments.params, Params, arguments.set)
    case = case_of(beginning(arguments.val, arguments.tokenizer, arguments.targets))
    exact = dataclasses.replace(params.parallel, dtype="float32", deterministic=True, compile=False)
    sides = {}
    for name, parallel in (("exact", exact), ("usual", params.parallel)):
        file = arguments.scores / f"{name}.npz" if arguments.scores else None
        changed = dataclasses.replace(params, parallel=parallel)
        scores = network_scores("ttt_eval", arguments.model, changed, case, file)
        sides[name] = ledgers(case, scores, params)

    found = {name: apart(sides["usual"][name], nll) for name, nll in sides["exact"].items()}
    about = {"targets": case.stream.targets, "changes": arguments.set}
    write_results(arguments.results, about | found | environment.run_environment())
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
