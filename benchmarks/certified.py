"""Certified score of the whole stream, both scorers: `python -m benchmarks.certified`.

Takes the artifacts of the pipeline. Each scorer runs in a sandboxed process and is handed each token after
it has predicted it, as in the audit (B17), but every target is certified. Writes the scores, the
differences from the ledgers and the times to --results.
"""

import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._command import command_line
from stages.audit.audit_scorer import AuditedStream, audited_stream
from stages.audit.checks import certified
from stages.audit.isolated import IsolatedScorer, ScorerProcesses, certify_isolated
from stages.audit.params import Params
from stages.audit.pipeline_scorers import boundaries_of, decode_model, scorer_source
from stages.audit.stage import EVALUATIONS, SIDE_BY_SIDE, STAGE, ledger_precision, read_claim
from stages.audit.verdict import Verdict
from stages.common import bpb, config
from stages.common.progress import Logger
from stages.scoring.stream import open_validation_stream

ANSWER_SECONDS = 600.0


def main() -> None:
    """Certify both scorers side by side, one thread each."""
    parser = command_line(__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/certified.json"))
    arguments = parser.parse_args()

    # The pipeline's parameters, with every target certified, and its stream.
    params = config.load(Path("params.yaml"), Params, [])
    everything = dataclasses.replace(params.audit, certified_targets=0, chunked_scorer_share=1.0)
    threads = max(1, params.parallel.threads // SIDE_BY_SIDE)
    params = dataclasses.replace(
        params, audit=everything, parallel=dataclasses.replace(params.parallel, threads=threads)
    )
    tokenizer = bpb.load_tokenizer(STAGE.reads["tokenizer"])
    stream = audited_stream(open_validation_stream(STAGE.reads["val"], STAGE.reads["tokenizer"]), tokenizer)

    # Both scorers.
    processes = ScorerProcesses(tokenizer.vocab_size(), ANSWER_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        paths = {**STAGE.reads, "weights": Path(folder, "weights.safetensors")}
        decode_model(paths["model"], paths["weights"])
        tasks = [functools.partial(certify, name, params, paths, stream, processes) for name in EVALUATIONS]
        rows = processes.run_side_by_side(tasks, SIDE_BY_SIDE)

    for row in rows:
        print(row)
    arguments.results.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def certify(
    name: str,
    params: Params,
    paths: Mapping[str, Path],
    stream: AuditedStream,
    processes: ScorerProcesses,
) -> dict[str, Any]:
    """Certify every target of the stream by the scorer `name`; returns a row of the results."""
    precision = ledger_precision(params.parallel)
    source = scorer_source(name, params, params.parallel, precision, paths, len(stream.tokens) - 1)
    claim = read_claim(paths[EVALUATIONS[name]], f"{EVALUATIONS[name]}_bpb", precision)
    boundaries = boundaries_of(name, params)
    scorer = IsolatedScorer(name, source, source, stream, boundaries, b"all", params.audit, claim)

    started = time.monotonic()
    losses = certify_isolated(scorer, processes, is_claimed=True, logger=Logger())
    seconds = time.monotonic() - started
    if isinstance(losses, Verdict):
        raise SystemExit(f"{name}: {losses.evidence}")

    difference = claim.ledger.astype(np.float64) - losses.losses
    return {
        "scorer": name,
        "targets": len(losses.losses),
        "seconds": seconds,
        "certified_bpb": certified.certified_bits_per_byte(losses, stream.target_bytes),
        "reported_bpb": claim.reported_bpb,
        "largest_difference_nats": float(np.abs(difference).max()),
        "mean_difference_nats": float(difference.mean()),
        "largest_log_sum": float(losses.log_sums.max()),
    }


if __name__ == "__main__":
    main()
