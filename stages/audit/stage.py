"""audit: prove or refute, on this run, that the scores are lawful and the reported number is right.

Positions, and ids that are put in a target's place, are sampled; a pass holds for these. A
distribution whose sum is below one passes, because it only loses bits.
`python -m tools.audit_scorer` audits any other scorer (docs/audit.md).

A failed audit exits with 1, prints one line and leaves no report.json, so that stage submission,
which reads it, cannot run. Its report is kept in the output folder as failed-report.md and
failed-report.json until the next audit starts.
"""

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor

from stages.audit import catalogue, pipeline_scorers, report, scorer_recipe
from stages.audit.audit_scorer import (
    AuditCase,
    AuditedStream,
    ClaimedEvaluation,
    ScorerFactory,
    audit_scorer,
    audited_stream,
)
from stages.audit.checks import budgets, contamination, coverage, round_trip, significance
from stages.audit.params import Params
from stages.audit.sampling import hash_files
from stages.audit.sandbox import clean_room
from stages.audit.verdict import Verdict, failure_message, failures
from stages.common import bpb, shards
from stages.common.json_object import read_json_object
from stages.common.parallel import World, activation_dtype, distributed
from stages.common.stage import Run, Stage, canonical_json
from stages.common.torchrun import relaunch_under_torchrun
from stages.pack.artifact import load_model
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
EVALUATIONS = {"sliding_eval": "sliding", "ttt_eval": "ttt"}  # scorer -> option that names its folder


def main(run: Run[Params]) -> None:
    """Load everything, check the files, audit each scorer, and write the report.

    Exits with 1 if a check failed.
    """
    paths = {name: run.path(name) for name in STAGE.reads}
    relaunch_under_torchrun(run.params.parallel, "stages.audit", sys.argv[1:])
    run.remove_failure_reports(*FAILED_REPORTS)

    # Inputs. All positions follow from a hash of the artifact, the code and the validation shards.
    tokenizer = bpb.load_tokenizer(paths["tokenizer"])
    validation = open_validation_stream(paths["val"], paths["tokenizer"])
    stream = audited_stream(validation, tokenizer)
    key = hash_files([paths["model"], paths["code"], *shards.find(paths["val"])])

    # Checks. Scorers run in float32 with deterministic kernels, whatever the evaluation used: a changed
    # bit is then a dependence, and not the order of a sum.
    verdicts = audit_files(run.params, paths, stream, tokenizer)
    exact = dataclasses.replace(run.params.parallel, dtype="float32", deterministic=True, compile=False)
    with distributed(exact) as world:
        verdicts += audit_scorers(run, paths, stream, validation.table, key, world)
        if run.params.audit.clean_room and run.is_main:
            verdicts += audit_in_clean_room(run.params, paths, world)
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
    run: Run[Params],
    paths: Mapping[str, Path],
    stream: AuditedStream,
    table: bpb.ByteTable,
    key: bytes,
    world: World,
) -> list[Verdict]:
    """Audit both scorers of the pipeline, each with its own ledger."""
    params = run.params
    model = load_model(paths["model"], world)
    scorers = pipeline_scorers.build_scorers(
        model, params.sliding_eval, params.ttt_eval, world, table, len(stream.tokens) - 1
    )

    # A ledger written with bfloat16 activations differs more from the audit's float32 losses.
    ledger_tolerance = params.audit.loss_tolerance
    mean_tolerance = params.audit.mean_tolerance
    if activation_dtype(params.parallel, world.device) != world.dtype:
        ledger_tolerance = params.audit.bfloat16_loss_tolerance
        mean_tolerance = params.audit.bfloat16_mean_tolerance

    verdicts: list[Verdict] = []
    for name, (factory, boundaries, variants) in scorers.items():
        option = EVALUATIONS[name]
        claim = read_claim(paths[option], f"{option}_bpb", ledger_tolerance, mean_tolerance)
        case = AuditCase(name, factory, stream, boundaries, key, params.audit, variants)
        verdicts += audit_scorer(case, claim, run.logger)
        if params.audit.decoded_targets:
            verdicts.append(audit_decoder(name, factory, params, paths, stream, claim))
    return verdicts


def audit_decoder(
    name: str,
    factory: ScorerFactory,
    params: Params,
    paths: Mapping[str, Path],
    stream: AuditedStream,
    claim: ClaimedEvaluation,
) -> Verdict:
    """B12: encode the first targets of the stream; another process with the same arithmetic decodes them."""
    parallel = dataclasses.replace(
        params.parallel, dtype="float32", deterministic=True, compile=False, nproc=1
    )
    sections = {
        "parallel": dataclasses.asdict(parallel),
        "sliding_eval": dataclasses.asdict(params.sliding_eval),
        "ttt_eval": dataclasses.asdict(params.ttt_eval),
    }
    words = (name, str(paths["model"].absolute()), str(paths["tokenizer"].absolute()), json.dumps(sections))
    recipe = scorer_recipe.Recipe(scorer_recipe.PIPELINE_FACTORY, words)

    # An incomplete ledger fails B6; the file is then compared with the scorer's own losses.
    is_complete = claim.ledger.shape == (len(stream.tokens) - 1,)
    return round_trip.check_round_trip(
        name,
        factory,
        recipe,
        stream.tokens,
        1,
        params.audit.decoded_targets,
        claim.ledger if is_complete else None,
        claim.ledger_tolerance,
    )


def audit_in_clean_room(params: Params, paths: Mapping[str, Path], world: World) -> list[Verdict]:
    """B14: run the counted files in a sandbox, once with each scorer.

    Training data and this repository are masked.
    """
    counted = {"train_gpt.py": paths["code"], "model.bin": paths["model"]}
    data = {"data/val": paths["val"], "data/tokenizer.model": paths["tokenizer"]}
    tolerance = 0.0 if world.device.type == "cpu" else CLEAN_ROOM_TOLERANCE
    verdicts = []
    for scorer, option in EVALUATIONS.items():
        metric = f"{option}_bpb"
        value = float(read_json_object(paths[option] / "metrics.json").get(metric, math.nan))
        claim = clean_room.ClaimedMetric(metric, value, params.audit.evaluation_budget_seconds, tolerance)

        artifact = clean_room.AuditedArtifact(counted, data, ("train_gpt.py", "eval", "--scorer", scorer))
        room_run = clean_room.run_in_clean_room(artifact, masked=[paths["train"].absolute(), Path.cwd()])
        verdicts += clean_room.check_clean_room(scorer, room_run, claim)
    return verdicts


def read_claim(
    folder: Path, metric: str, ledger_tolerance: float, mean_tolerance: float
) -> ClaimedEvaluation:
    """Read the results that an evaluation wrote to its folder.

    A ledger of the wrong shape is left to the checks; a file that is not an array is a ValueError.
    """
    try:
        nll = np.load(folder / "nll.npy", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{folder / 'nll.npy'} is not a ledger: {error}") from error
    chunk_table = (folder / "chunks.tsv").read_text(encoding="utf-8")
    reported_bpb = read_json_object(folder / "metrics.json").get(metric)
    return ClaimedEvaluation(nll, chunk_table, reported_bpb, ledger_tolerance, mean_tolerance)
