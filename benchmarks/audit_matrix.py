"""The audit against known cheats and lawful scorers: `python -m benchmarks.audit_matrix`.

Every cheat of tests/zoo is tried with several keys; every lawful scorer, the project's own among them,
with many keys and streams. Writes the counts to --results and a matrix of cheats and tests to --matrix
(docs/audit_matrix.md). Exits 1 if no test found a cheat, or if a lawful scorer failed a test.
"""

import dataclasses
import functools
import json
import multiprocessing
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks._command import command_line
from stages.audit.audit_scorer import ScorerFactory
from stages.audit.verdict import failure_message, failures
from stages.common.parallel import ParallelParams, distributed
from stages.common.scorer import Scorer
from stages.sliding_eval.params import SlidingEvalParams
from stages.sliding_eval.scorer import SlidingScorer
from stages.ttt_eval.build import build_scorer
from stages.ttt_eval.params import TttEvalParams
from tests import factories
from tests.zoo import harness, lawful
from tests.zoo.registry import CHEATS

# Tests that need only a scorer or its files; B12 needs a decoder.
COLUMNS = ("B1", "B1c", *(f"B{number}" for number in (*range(2, 12), *range(13, 18))), "budget")
SMALL = dataclasses.replace(factories.TINY, vocab_size=lawful.VOCAB)
SLIDING = SlidingEvalParams(window=16, stride=4, batch_windows=8, chunk=128)
TTT = dataclasses.replace(factories.TTT, chunk=256, epochs=1, batch_tokens=64, lr=0.01)
SERIAL = ParallelParams(
    nproc=1, threads=1, device="cpu", dtype="float32", deterministic=True, compile=False, kernels=False
)
# For a network, of which each call costs more than a whole audit of a scorer that is a table.
PARAMS = dataclasses.replace(
    harness.PARAMS,
    perturbations=9,
    segment_targets=32,
    recomputed_share=0.05,
    order_documents=3,
    call_splits=1,
    canary_targets=64,
    sampled_targets=8,
    distributions=4,
    substitutions=6,
    certified_targets=60,
)


def own_scorers(seed: int) -> dict[str, ScorerFactory]:
    """The project's scorers over a random small model, by name."""
    model = factories.random_model(seed, SMALL)
    lora = dataclasses.replace(TTT.lora, lr=0.001)
    kinds = {
        "sgd": TTT,
        "sgd, weighed": dataclasses.replace(TTT, weight_by_surprise=True),
        "sgd, tilted": dataclasses.replace(TTT, tilt_rate=0.05),
        "sgd, tilted and mixed": dataclasses.replace(TTT, tilt_rate=0.05, mixer_rate=0.01),
        "adapters": dataclasses.replace(TTT, kind="lora", lora=lora),
        "adapters, tilted": dataclasses.replace(TTT, kind="lora", lora=lora, tilt_rate=0.05),
    }

    def sliding(n_targets: int) -> Scorer:
        return SlidingScorer(model, SLIDING, factories.make_world())

    def adapting(params: TttEvalParams, n_targets: int) -> Scorer:
        return build_scorer("ttt_eval", SLIDING, params, factories.scorer_inputs(model, n_targets))

    made: dict[str, ScorerFactory] = {"sliding": sliding}
    for name, params in kinds.items():
        made[name] = functools.partial(adapting, params)
    return made


def try_cheat(number: int, keys: int) -> dict[str, Any]:
    """Counts by check of the keys with which it found a cheat."""
    cheat = CHEATS[number]
    counts = Counter[str]()
    for key in range(keys):
        with tempfile.TemporaryDirectory() as folder:
            counts.update(harness.failed_checks(cheat.run(Path(folder), bytes([key]))))
    print(f"{cheat.name}: {counts[cheat.detected_by]} of {keys} by {cheat.detected_by}", flush=True)
    return {
        "cheat": cheat.name,
        "seen_in": cheat.seen_in,
        "detected_by": cheat.detected_by,
        "keys": keys,
        "failed": dict(sorted(counts.items())),
    }


def try_lawful(name: str, runs: int) -> dict[str, Any]:
    """Audits of a lawful scorer and false alarms, with another stream and another key each time."""
    of_the_zoo = {scorer.__name__: scorer for scorer in lawful.LAWFUL}
    alarms: list[str] = []
    verdicts = 0
    torch.set_num_threads(1)
    with distributed(SERIAL):
        for seed in range(runs):
            factory: ScorerFactory = of_the_zoo[name] if name in of_the_zoo else own_scorers(seed)[name]
            params, length = (harness.PARAMS, 1500) if name in of_the_zoo else (PARAMS, 600)
            tokens = lawful.random_stream(length, 1000 + seed)
            key = f"{name} {seed}".encode()
            with tempfile.TemporaryDirectory() as folder:
                found = harness.audit(factory, Path(folder), params=params, key=key, tokens=tokens)
            verdicts += len(found)
            alarms += [failure_message(verdict) for verdict in failures(found)]

    print(f"lawful {name}: {runs} runs, {verdicts} verdicts, {len(alarms)} false alarms", flush=True)
    return {"scorer": name, "runs": runs, "verdicts": verdicts, "false_alarms": alarms}


def matrix(cheats: list[dict[str, Any]], lawful_rows: list[dict[str, Any]]) -> str:
    """The results as a page."""
    keys = cheats[0]["keys"]

    lines = [
        "# Which check detects which cheat",
        "",
        "From a run of `python -m benchmarks.audit_matrix`; the cheats are in `tests/zoo/`, the checks in",
        f"[audit.md](audit.md). A number is the share of {keys} keys, in per cent, with which the check",
        "failed; bold: the check that must detect the cheat. B12 is not in the table:",
        "`tests/test_compressor.py` builds a decoder for scorers of the same zoo.",
        "",
        "| cheat | seen in | " + " | ".join(COLUMNS) + " |",
        "|---|---|" + "---:|" * len(COLUMNS),
    ]

    for row in cheats:
        cells = " | ".join(_cell(row, column) for column in COLUMNS)
        lines.append(f"| {row['cheat']} | {row['seen_in']} | {cells} |")

    # Lawful scorers: the sums, then a row for each.
    runs = sum(row["runs"] for row in lawful_rows)
    verdicts = sum(row["verdicts"] for row in lawful_rows)
    alarms = sum(len(row["false_alarms"]) for row in lawful_rows)

    lines += [
        "",
        "## Lawful scorers",
        "",
        f"{runs} runs, each with another stream and key: {alarms} of {verdicts} verdicts are failures.",
        "",
        "| scorer | runs | verdicts | failures |",
        "|---|---:|---:|---:|",
    ]
    for row in lawful_rows:
        lines.append(f"| {row['scorer']} | {row['runs']} | {row['verdicts']} | {len(row['false_alarms'])} |")
    return "\n".join([*lines, ""])


def _cell(row: dict[str, Any], column: str) -> str:
    """The per cent of keys with which the column's test found the cheat; empty if it never did."""
    shares = [count for check, count in row["failed"].items() if check.split()[0] == column]
    if not shares:
        return ""
    text = f"{100 * max(shares) / row['keys']:.0f}"
    return f"**{text}**" if row["detected_by"].split()[0] == column else text


def main() -> None:
    """Audit everything, and write the counts and the matrix."""
    parser = command_line(__doc__)
    parser.add_argument("--keys", type=int, default=3, help="for each cheat")
    parser.add_argument("--runs", type=int, default=33, help="of each lawful scorer of the zoo")
    parser.add_argument("--own-runs", type=int, default=2, help="of each scorer of the project")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/audit_matrix.json"))
    parser.add_argument("--matrix", type=Path, default=Path("docs/audit_matrix.md"))
    arguments = parser.parse_args()

    runs = dict.fromkeys(own_scorers(0), arguments.own_runs)
    runs |= {scorer.__name__: arguments.runs for scorer in lawful.LAWFUL}
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        tried = [pool.submit(try_cheat, number, arguments.keys) for number in range(len(CHEATS))]
        spared = [pool.submit(try_lawful, name, count) for name, count in runs.items()]
        cheats = [row.result() for row in tried]
        lawful_rows = [row.result() for row in spared]

    results = json.dumps({"cheats": cheats, "lawful": lawful_rows}, indent=1) + "\n"
    arguments.results.write_text(results, encoding="utf-8")
    arguments.matrix.write_text(matrix(cheats, lawful_rows), encoding="utf-8")

    missed = [row["cheat"] for row in cheats if row["failed"].get(row["detected_by"], 0) < row["keys"]]
    alarmed = [row["scorer"] for row in lawful_rows if row["false_alarms"]]
    print(f"not always found by the test named: {missed}; lawful scorers that failed a test: {alarmed}")
    raise SystemExit(1 if alarmed or any(not row["failed"] for row in cheats) else 0)


if __name__ == "__main__":
    main()
