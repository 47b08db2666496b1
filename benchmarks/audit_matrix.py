"""Which test convicts which cheat, and how often a lawful scorer is convicted: `python -m benchmarks.audit_matrix`.

Every cheat of the zoo (tests/zoo) is tried with several keys, and every lawful scorer, the project's own among them, with many keys and
streams. Writes the counts to `--results` and the matrix to `--matrix` (docs/audit_matrix.md). Exit code 1: a cheat survived, or a lawful
scorer did not.
"""

import argparse
import dataclasses
import json
import multiprocessing
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.audit.audit_scorer import Factory
from stages.audit.params import AuditParams
from stages.audit.verdict import Verdict, convicted, reason
from stages.common.parallel import ParallelParams, world
from stages.sliding_eval.params import SlidingEvalParams
from stages.sliding_eval.scorer import SlidingScorer
from stages.ttt_eval.build import scorer_for
from tests import factories
from tests.zoo import harness, lawful
from tests.zoo.registry import CHEATS

COLUMNS = (
    "B1",
    "B1c",
    "B2",
    "B3",
    "B4",
    "B5",
    "B6",
    "B7",
    "B8",
    "B9",
    "B10",
    "B11",
    "B13",
    "B14",
    "B15",
    "B16",
    "budget",
)
SMALL = dataclasses.replace(factories.TINY, vocab_size=lawful.VOCAB)
SLIDING = SlidingEvalParams(window=16, stride=4, batch_windows=8, chunk=128)
TTT = dataclasses.replace(factories.TTT, chunk=256, epochs=1, batch_tokens=64, lr=0.01)
SERIAL = ParallelParams(
    nproc=1, threads=1, device="cpu", dtype="float32", deterministic=True, compile=False, kernels=False
)
PARAMS = dataclasses.replace(  # each call of a network costs more than a whole audit of a table
    harness.PARAMS,
    perturbations=9,
    segment_targets=32,
    recomputed_share=0.05,
    graph_documents=3,
    handed_stretches=1,
    canary_targets=64,
    sampled_targets=8,
    distributions=4,
    substitutions=6,
)


def own_scorers(seed: int) -> dict[str, Factory]:
    """The project's scorers over a random small model: sliding windows, SGD, adapters, both of these tilted, and weighed losses."""
    model = factories.random_model(seed, SMALL)
    lora = dataclasses.replace(TTT.lora, lr=0.001)
    kinds = {
        "sgd": TTT,
        "sgd, weighed": dataclasses.replace(TTT, confidence=True),
        "sgd, tilted": dataclasses.replace(TTT, tilt_rate=0.05),
        "sgd, tilted and mixed": dataclasses.replace(TTT, tilt_rate=0.05, mixer_rate=0.01),
        "adapters": dataclasses.replace(TTT, kind="lora", lora=lora),
        "adapters, tilted": dataclasses.replace(TTT, kind="lora", lora=lora, tilt_rate=0.05),
    }
    made: dict[str, Factory] = {"sliding": lambda n_targets: SlidingScorer(model, SLIDING, factories.world())}
    for name, params in kinds.items():
        made[name] = lambda n_targets, params=params: scorer_for(
            model, SLIDING, params, factories.world(), factories.table(SMALL.vocab_size), n_targets
        )  # type: ignore[misc]
    return made


def try_cheat(number: int, keys: int) -> dict[str, Any]:
    """How many keys each check convicted a cheat with."""
    cheat, counts = CHEATS[number], Counter[str]()
    for key in range(keys):
        counts.update(harness.failed(_tried(lambda folder, key=key: cheat.run(folder, bytes([key])))))  # type: ignore[misc]
    print(f"{cheat.name}: {counts[cheat.convicted_by]} of {keys} by {cheat.convicted_by}", flush=True)
    return {
        "cheat": cheat.name,
        "seen_in": cheat.seen_in,
        "named": cheat.convicted_by,
        "keys": keys,
        "convicted": dict(counts),
    }


def try_lawful(name: str, runs: int) -> dict[str, Any]:
    """Runs of a lawful scorer and false convictions; another stream and another key each time."""
    of_the_zoo = {scorer.__name__: scorer for scorer in lawful.LAWFUL}
    guilty, verdicts = [], 0
    torch.set_num_threads(1)
    with world(SERIAL):
        for seed in range(runs):
            factory = of_the_zoo[name] if name in of_the_zoo else own_scorers(seed)[name]
            params, length = (harness.PARAMS, 1500) if name in of_the_zoo else (PARAMS, 600)
            found = _audited(factory, params, f"{name} {seed}".encode(), lawful.stream(length, 1000 + seed))
            verdicts += len(found)
            guilty += [reason(verdict) for verdict in convicted(found)]
    print(f"lawful {name}: {runs} runs, {verdicts} verdicts, {len(guilty)} convictions", flush=True)
    return {"scorer": name, "runs": runs, "verdicts": verdicts, "convictions": guilty}


def _audited(factory: Factory, params: AuditParams, key: bytes, tokens: np.ndarray) -> list[Verdict]:
    return _tried(lambda folder: harness.audit(factory, folder, params=params, key=key, tokens=tokens))


def _tried(run: Callable[[Path], list[Verdict]]) -> list[Verdict]:
    with tempfile.TemporaryDirectory() as folder:
        return run(Path(folder))


def matrix(cheats: list[dict[str, Any]], innocent: list[dict[str, Any]]) -> str:
    """The results as a page."""
    lines = [
        "# Which test convicts which cheat",
        "",
        "From a run of `python -m benchmarks.audit_matrix`; the cheats are in `tests/zoo/`, the tests in [audit.md](audit.md). A number is",
        f"the share of {cheats[0]['keys']} keys, in per cent, with which the test convicted; bold: the test that must, by name.",
        "B12 is not in the table: a decoder is built by `tests/test_compressor.py` for scorers of the same zoo.",
        "",
        "| cheat | seen in | " + " | ".join(COLUMNS) + " |",
        "|---|---|" + "---:|" * len(COLUMNS),
    ]
    lines += [
        f"| {row['cheat']} | {row['seen_in']} | "
        + " | ".join(_cell(row, column) for column in COLUMNS)
        + " |"
        for row in cheats
    ]
    runs, verdicts = (sum(row[key] for row in innocent) for key in ("runs", "verdicts"))
    guilty = sum(len(row["convictions"]) for row in innocent)
    lines += [
        "",
        "## Lawful scorers",
        "",
        f"{runs} runs, another stream and another key each: {guilty} of {verdicts} verdicts convict.",
        "",
    ]
    lines += ["| scorer | runs | verdicts | convictions |", "|---|---:|---:|---:|"]
    lines += [
        f"| {row['scorer']} | {row['runs']} | {row['verdicts']} | {len(row['convictions'])} |"
        for row in innocent
    ]
    return "\n".join([*lines, ""])


def _cell(row: dict[str, Any], column: str) -> str:
    shares = [count for check, count in row["convicted"].items() if check.split()[0] == column]
    if not shares:
        return ""
    text = f"{100 * max(shares) / row['keys']:.0f}"
    return f"**{text}**" if row["named"].split()[0] == column else text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, default=3, help="for each cheat")
    parser.add_argument("--runs", type=int, default=30, help="of each lawful scorer of the zoo")
    parser.add_argument("--own-runs", type=int, default=3, help="of each scorer of the project")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/audit_matrix.json"))
    parser.add_argument("--matrix", type=Path, default=Path("docs/audit_matrix.md"))
    arguments = parser.parse_args()
    zoo, own = [scorer.__name__ for scorer in lawful.LAWFUL], list(own_scorers(0))
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        tried = [pool.submit(try_cheat, number, arguments.keys) for number in range(len(CHEATS))]
        spared = [
            pool.submit(try_lawful, name, arguments.own_runs if name in own else arguments.runs)
            for name in [*own, *zoo]
        ]
        cheats, innocent = [row.result() for row in tried], [row.result() for row in spared]
    arguments.results.write_text(
        json.dumps({"cheats": cheats, "lawful": innocent}, indent=1) + "\n", encoding="utf-8"
    )
    arguments.matrix.write_text(matrix(cheats, innocent), encoding="utf-8")
    survived = [row["cheat"] for row in cheats if row["convicted"].get(row["named"], 0) < row["keys"]]
    wronged = [row["scorer"] for row in innocent if row["convictions"]]
    print(f"not always convicted by the test named: {survived}; lawful scorers convicted: {wronged}")
    raise SystemExit(1 if wronged or any(not row["convicted"] for row in cheats) else 0)


if __name__ == "__main__":
    main()
