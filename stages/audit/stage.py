"""audit: prove or refute, on this run, that the scores are lawful and the reported number is right.

Positions, and ids that are put in a target's place, are sampled; a pass holds for these. A
distribution whose sum is below one passes, because it only loses bits.
`python -m tools.audit_scorer` audits any other scorer (docs/audit.md).

A failed audit exits with 1, prints one line and leaves no report.json, so that stage submission,
which reads it, cannot run. Its report is kept in the output folder as failed-report.md and
failed-report.json until the next audit starts.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor

from stages.audit import catalogue, precision, report
from stages.audit.audit_scorer import (
    AuditedStream,
    ClaimedEvaluation,
    audited_stream,
    judge_certified,
)
from stages.audit.checks import budgets, contamination, coverage, significance
from stages.audit.isolated import (
    IsolatedScorer,
    ScorerProcesses,
    certify_isolated,
    check_sandbox,
    decode_isolated,
    probe_isolated,
)
from stages.audit.params import Params
from stages.audit.pipeline_scorers import boundaries_of, decode_model, scorer_source
from stages.audit.precision import Precision
from stages.audit.remote.process import ScorerError
from stages.audit.sampling import hash_files
from stages.audit.sandbox import clean_room
from stages.audit.verdict import Verdict, failure_message, failures
from stages.common import bpb, shards
from stages.common.json_object import read_json_object
from stages.common.parallel import ParallelParams
from stages.common.progress import Logger
from stages.common.stage import Run, Stage, canonical_json
from stages.scoring.stream import open_validation_stream

STAGE = Stage(
    name="audit",
    summary="Audit both scorers, their ledgers, the counted files, the data and the clocks.",
    params=Params,
    reads={
        "model": Path("artifacts/pack/model.bin"),
        "code": Path("artifacts/bundle/train_gpt.py"),
        "train": Path("artifacts/tokenize/train"),
        "val": Path("artifacts/tokenize/val"),
        "tokenizer": Path("artifacts/tokenize/tokenizer.model"),
        "documents": Path("artifacts/tokenize/documents.u64"),
        "manifest": Path("artifacts/tokenize/manifest.json"),
        "sliding": Path("artifacts/sliding_eval"),
        "ttt": Path("artifacts/ttt_eval"),
        "train_timing": Path("artifacts/train/timing.json"),
        "calibrate_timing": Path("artifacts/calibrate/timing.json"),
    },
    writes=("report.json", "report.md", "metrics.json"),
)
FAILED_REPORTS = ("failed-report.json", "failed-report.md")
NOT_RUN_REASONS = {  # check number -> the setting that switched it off
    "B12": "switched off: audit.decoded_targets is 0",
    "B14": "switched off: audit.clean_room is false",
}
CLEAN_ROOM_TOLERANCE = 1.0e-3  # bits per byte between two runs on one kind of GPU; on a CPU they are equal
SIDE_BY_SIDE = 2  # processes that run at once, each with its share of the threads
ANSWER_SECONDS = 3600.0  # longest wait for one answer of a process
EVALUATIONS = {"sliding_eval": "sliding", "ttt_eval": "ttt"}  # scorer -> option that names its folder


def main(run: Run[Params]) -> None:
    """Load everything, check the files, audit each scorer, and write the report.

    Exits with 1 if a check failed.
    """
    paths = {name: run.path(name) for name in STAGE.reads}
    run.remove_failure_reports(*FAILED_REPORTS)

    # Inputs. All positions follow from a hash of the artifact, the code and the
    # validation shards; certified ones from the ledger as well.
    tokenizer = bpb.load_tokenizer(paths["tokenizer"])
    validation = open_validation_stream(paths["val"], paths["tokenizer"])
    stream = audited_stream(validation, tokenizer)
    key = hash_files([paths["model"], paths["code"], *shards.find(paths["val"])])

    # Checks: of the files in this process, while the scorers' processes work.
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as background:
        of_files = background.submit(audit_files, run.params, dict(paths), stream, tokenizer)
        paths["weights"] = Path(folder, "weights.safetensors")
        decode_model(paths["model"], paths["weights"])
        of_scorers = audit_scorers(run, paths, stream, tokenizer.vocab_size(), key)
        verdicts = of_files.result() + of_scorers

    # The counted files in a clean room, and what did not run.
    if run.params.audit.clean_room:
        verdicts += audit_in_clean_room(run.params, paths)
    verdicts = catalogue.with_missing(verdicts, list(EVALUATIONS), NOT_RUN_REASONS)
    for verdict in verdicts:
        run.logger.log(
            f"audit: {verdict.outcome}: {verdict.subject} {verdict.check.label}: {verdict.evidence}"
        )

    # Report, with the size of the stream and the key that the positions can be derived from.
    declared: dict[str, Any] = {
        "targets": len(stream.tokens) - 1,
        "bytes": int(stream.target_bytes.sum()),
        "share of the stream shown to scorers that train in chunks": run.params.audit.chunked_scorer_share,
        "key of all positions": key.hex(),
    }
    as_json = report.as_json(verdicts, declared)
    as_markdown = report.as_markdown(verdicts, declared)

    # After a failure the stage has no outputs; the report is kept under other names.
    if failed := failures(verdicts):
        json_name, markdown_name = FAILED_REPORTS
        run.write_failure_report(json_name, canonical_json(as_json))
        kept = run.write_failure_report(markdown_name, as_markdown)
        if run.is_main:
            sys.stderr.write(
                f"error: audit: {failure_message(failed[0])}; {len(failed)} failed, see {kept}\n"
            )
        raise SystemExit(1)

    run.write_json("report.json", as_json)
    run.write_text("report.md", as_markdown)
    run.write_json("metrics.json", report.count_outcomes(verdicts))


def audit_files(
    params: Params, paths: Mapping[str, Path], stream: AuditedStream, tokenizer: SentencePieceProcessor
) -> list[Verdict]:
    """Run the checks that need no scorer: sizes, clocks, bytes of the text, data, seeds."""
    # Training time: calibration counts too. Unknown if either time was not recorded.
    training_seconds: float | None = 0.0
    for name in ("train_timing", "calibrate_timing"):
        seconds = budgets.measured_seconds(read_json_object(paths[name]), "training_seconds")
        if seconds is None or training_seconds is None:
            training_seconds = None
        else:
            training_seconds += seconds

    # Budgets: bytes on disk, training and evaluation seconds.
    sizes = {paths[name].name: paths[name].stat().st_size for name in ("model", "code")}
    verdicts = [
        budgets.check_sizes(sizes, params.pack.budget_bytes),
        budgets.check_clock("training", "files", training_seconds, params.train.seconds),
    ]
    for scorer, option in EVALUATIONS.items():
        seconds = budgets.measured_seconds(read_json_object(paths[option] / "timing.json"), "process_seconds")
        verdicts.append(
            budgets.check_clock("evaluation", scorer, seconds, params.audit.evaluation_budget_seconds)
        )

    # Text and data: counted bytes, validation shards, documents of val in train.
    documents = np.frombuffer(paths["documents"].read_bytes(), dtype="<u8")
    recorded, document_counts = budgets.manifest_entries(read_json_object(paths["manifest"]))
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards.find(paths["val"])}
    val_hashes = budgets.document_hashes(stream.tokens, stream.bos)

    verdicts += [
        coverage.check_denominator(stream.tokens, stream.bos, stream.target_bytes, stream.document_bytes),
        coverage.check_table(tokenizer, coverage.AWKWARD_TEXTS),
        coverage.check_normaliser(stream.tokens, tokenizer),
        budgets.check_tokenizer_file(paths["tokenizer"]),
        budgets.check_shards(recorded, found),
        budgets.check_disjoint(val_hashes, documents, *document_counts),
        significance.check_seeds([{}], []),  # one run has one seed: "cannot tell"
    ]

    # Passages that train and val share: this reads all of train, so it can be switched off.
    if params.audit.shingle_rate:
        overlap = contamination.find_overlap(
            paths["train"], paths["val"], tokenizer, params.audit.shingle_rate
        )
        verdicts.append(contamination.check_passages(overlap))
    return verdicts


def audit_scorers(
    run: Run[Params], paths: Mapping[str, Path], stream: AuditedStream, vocab_size: int, key: bytes
) -> list[Verdict]:
    """Audit both scorers of the pipeline, each with its own ledger."""
    # The certified score is computed in the evaluation's arithmetic, and so agrees with the ledger also
    # in the mean. The probes run in float32 with deterministic kernels, whatever the evaluation used: a
    # changed bit is then a dependence, and not the order of a sum.
    parallel = run.params.parallel
    evaluated = dataclasses.replace(parallel, threads=max(1, parallel.threads // SIDE_BY_SIDE))
    exact = dataclasses.replace(evaluated, dtype="float32", deterministic=True, compile=False)

    # Each scorer with its claim.
    scorers = []
    written_in = ledger_precision(parallel)
    for name, option in EVALUATIONS.items():
        as_evaluated, as_probed = (
            scorer_source(name, run.params, arithmetic, declared, paths, len(stream.tokens) - 1)
            for arithmetic, declared in ((evaluated, written_in), (exact, precision.FLOAT32))
        )
        claim = read_claim(paths[option], f"{option}_bpb", written_in)
        boundaries = boundaries_of(name, run.params)
        scorers.append(
            IsolatedScorer(name, as_evaluated, as_probed, stream, boundaries, key, run.params.audit, claim)
        )

    # Both side by side, each in processes one after another.
    processes = ScorerProcesses(vocab_size, ANSWER_SECONDS)
    decoded_targets = run.params.audit.decoded_targets
    tasks = [
        functools.partial(audit_in_sandbox, scorer, processes, decoded_targets, run.logger)
        for scorer in scorers
    ]
    return list(itertools.chain(*processes.run_side_by_side(tasks, SIDE_BY_SIDE)))


def audit_in_sandbox(
    scorer: IsolatedScorer, processes: ScorerProcesses, decoded_targets: int, logger: Logger
) -> list[Verdict]:
    """Audit one scorer: first in the processes that must not know anything of the stream."""
    try:
        losses = certify_isolated(scorer, processes, is_claimed=True, logger=logger)
        decoded = decode_isolated(scorer, processes, decoded_targets) if decoded_targets else []
        probed = probe_isolated(scorer, processes, logger)
    except ScorerError as error:
        raise ScorerError(f"{scorer.name} {error}") from None
    certified = judge_certified(scorer.case(), losses, scorer.claim.precision, scorer.claim)
    return [*probed, check_sandbox(scorer.name), *certified, *decoded]


def audit_in_clean_room(params: Params, paths: Mapping[str, Path]) -> list[Verdict]:
    """B14: run the counted files in a sandbox, once with each scorer."""
    counted = {"train_gpt.py": paths["code"], "model.bin": paths["model"]}
    data = {"data/val": paths["val"], "data/tokenizer.model": paths["tokenizer"]}
    tolerance = CLEAN_ROOM_TOLERANCE if uses_gpu(params.parallel) else 0.0
    verdicts = []
    for scorer, option in EVALUATIONS.items():
        metric = f"{option}_bpb"
        value = float(read_json_object(paths[option] / "metrics.json").get(metric, math.nan))
        claim = clean_room.ClaimedMetric(metric, value, params.audit.evaluation_budget_seconds, tolerance)

        artifact = clean_room.AuditedArtifact(counted, data, ("train_gpt.py", "eval", "--scorer", scorer))
        room_run = clean_room.run_in_clean_room(artifact)
        verdicts += clean_room.check_clean_room(scorer, room_run, claim)
    return verdicts


def ledger_precision(parallel: ParallelParams) -> Precision:
    """The precision of the arithmetic by which the evaluations wrote their ledgers."""
    is_bfloat16 = parallel.dtype == "bfloat16" or (parallel.dtype == "auto" and uses_gpu(parallel))
    return precision.BFLOAT16 if is_bfloat16 else precision.FLOAT32


def uses_gpu(parallel: ParallelParams) -> bool:
    """True if the evaluations ran on a GPU."""
    return parallel.device == "cuda" or (parallel.device == "auto" and torch.cuda.is_available())


def read_claim(folder: Path, metric: str, written_in: Precision) -> ClaimedEvaluation:
    """Read the results that an evaluation wrote to its folder.

    A ledger of the wrong shape is left to the checks; a file that is not an array is a ValueError.
    """
    try:
        nll = np.load(folder / "nll.npy", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{folder / 'nll.npy'} is not a ledger: {error}") from error
    chunk_table = (folder / "chunks.tsv").read_text(encoding="utf-8")
    reported_bpb = read_json_object(folder / "metrics.json").get(metric)
    return ClaimedEvaluation(nll, chunk_table, reported_bpb, written_in)
