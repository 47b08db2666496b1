"""audit: prove or refute, on this run, that the scores are lawful and the number is right.

`python -m tools.audit_scorer` audits a scorer that is not this run's (docs/audit.md).

A failed audit exits with 1 and one line. Its report is no output of the stage (a pipeline must not go on from it) but is kept for a person
as failed-report.md and failed-report.json in the output folder, until the next audit starts.
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
from stages.audit.audit_scorer import Claim, Factory, Stream, audit_scorer
from stages.audit.checks import budgets, contamination, coverage, round_trip, significance
from stages.audit.params import Params
from stages.audit.sampling import key_of
from stages.audit.sandbox import clean_room
from stages.audit.verdict import Verdict, convicted, reason
from stages.common import bpb, command, shards
from stages.common.lossless_text import Speller
from stages.common.parallel import World, activation_dtype, relaunch_under_torchrun, world
from stages.pack.artifact import load_model

STAGE = command.Stage(
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
FAILED = ("failed-report.json", "failed-report.md")
REASONS = {  # why a test may be missing from the pipeline's report
    "B12": "switched off: audit.decoded_targets is 0",
    "B14": "switched off: audit.clean_room is false",
}
ROOM_TOLERANCE = 1.0e-3  # bits per byte between two runs on one kind of GPU
BUDGETED = {"sliding_eval": "sliding", "ttt_eval": "ttt"}  # scorer and the option that names its folder


def main(run: command.Run[Params]) -> None:
    """Load what is audited, judge the files, then walk each scorer; write the report, or keep it and exit 1."""
    paths = {name: run.path(name) for name in STAGE.reads}
    relaunch_under_torchrun(run.params.parallel, "stages.audit", sys.argv[1:])
    if run.is_main:
        for name in FAILED:
            (run.output.parent / name).unlink(missing_ok=True)
    tokenizer = bpb.load_tokenizer(paths["tokenizer"])
    table = bpb.byte_table(tokenizer)
    stream = read_stream(paths["val"], tokenizer, table)
    key = key_of([paths["model"], paths["code"], *shards.find(paths["val"])])
    verdicts = audit_files(run, paths, stream, tokenizer)
    # float32 and deterministic kernels, whatever the evaluation used: then a moved bit is a dependence, and not the order of some sum.
    exact = dataclasses.replace(run.params.parallel, dtype="float32", deterministic=True, compile=False)
    with world(exact) as here:
        verdicts += audit_scorers(run, paths, stream, table, key, here)
        if run.params.audit.clean_room and run.is_main:
            verdicts += visit_room(run.params, paths, here)
    verdicts = catalogue.complete(verdicts, list(BUDGETED), REASONS)
    declared: dict[str, Any] = {
        "targets": len(stream.tokens) - 1,
        "bytes": int(stream.target_bytes.sum()),
        "share that scorers with chunks were led over": run.params.audit.trained_share,
        "positions' key": key.hex(),
    }
    guilty = convicted(verdicts)
    names = FAILED if guilty else ("report.json", "report.md")
    folder = ".." if guilty else "."
    run.write_json(f"{folder}/{names[0]}", report.as_json(verdicts, declared))
    run.write_text(f"{folder}/{names[1]}", report.as_markdown(verdicts, declared))
    for verdict in verdicts:
        run.report.log(
            f"audit: {verdict.outcome}: {verdict.subject} {verdict.check} {verdict.name}: {verdict.evidence}"
        )
    if guilty:
        if run.is_main:
            sys.stderr.write(
                f"error: audit: {reason(guilty[0])}; {len(guilty)} failed, see {run.output.parent / FAILED[1]}\n"
            )
        raise SystemExit(1)
    run.write_json("metrics.json", report.summary(verdicts))


def read_stream(val: Path, tokenizer: SentencePieceProcessor, table: bpb.ByteTable) -> Stream:
    """The validation stream, its bytes by the table and by decoding."""
    for path in shards.find(val):
        shards.check_ids(path, table.vocab_size)
    tokens = shards.stream(val)
    by_decoding = coverage.count_documents(tokens, tokenizer)
    return Stream(
        tokens, table.bos, bpb.target_bytes(tokens, table), by_decoding, Speller(tokenizer).bytes_of
    )


def audit_files(
    run: command.Run[Params], paths: Mapping[str, Path], stream: Stream, tokenizer: SentencePieceProcessor
) -> list[Verdict]:
    """Bytes, clocks, denominator, data, seeds."""
    params, manifest = run.params, read_json(paths["manifest"])
    documents = np.frombuffer(paths["documents"].read_bytes(), dtype="<u8")
    training = [
        budgets.seconds_of(read_json(paths[name]), "training_seconds")
        for name in ("train_timing", "calibrate_timing")
    ]
    whole = None if None in training else sum(seconds for seconds in training if seconds is not None)
    verdicts = [
        budgets.check_sizes(
            {paths[name].name: paths[name].stat().st_size for name in ("model", "code")},
            params.pack.budget_bytes,
        ),
        budgets.check_clock("training", "files", whole, params.train.seconds),
    ]
    for subject, option in BUDGETED.items():
        seconds = budgets.seconds_of(read_json(paths[option] / "timing.json"), "process_seconds")
        verdicts.append(
            budgets.check_clock("evaluation", subject, seconds, params.audit.evaluation_budget_seconds)
        )
    recorded, counts = budgets.manifest_entries(manifest)
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards.find(paths["val"])}
    verdicts += [
        coverage.check_denominator(stream.tokens, stream.bos, stream.target_bytes, stream.document_bytes),
        coverage.check_table(tokenizer, coverage.FUZZ),
        budgets.check_shards(recorded, found),
        budgets.check_disjoint(budgets.document_hashes(stream.tokens, stream.bos), documents, *counts),
        significance.check_seeds([{}], []),
    ]
    if params.audit.shingle_rate:
        verdicts.append(
            contamination.check_passages(
                contamination.find(paths["train"], paths["val"], tokenizer, params.audit.shingle_rate)
            )
        )
    return verdicts


def audit_scorers(
    run: command.Run[Params],
    paths: Mapping[str, Path],
    stream: Stream,
    table: bpb.ByteTable,
    key: bytes,
    here: World,
) -> list[Verdict]:
    """Both scorers of the pipeline, each against its own ledger."""
    params, verdicts = run.params, []
    model = load_model(paths["model"], here)
    tolerances = (params.audit.loss_tolerance, params.audit.mean_tolerance)
    if activation_dtype(params.parallel, here.device) != here.dtype:
        tolerances = (params.audit.bfloat16_loss_tolerance, params.audit.bfloat16_mean_tolerance)
    for name, one in pipeline_scorers.scorers(
        model, params.sliding_eval, params.ttt_eval, here, table, len(stream.tokens) - 1
    ).items():
        claim = read_claim(paths[BUDGETED[name]], f"{BUDGETED[name]}_bpb", tolerances)
        verdicts += audit_scorer(
            name, one.factory, stream, claim, one.edges, key, params.audit, run.report, one.variants
        )
        if params.audit.decoded_targets:
            verdicts.append(_decoded(name, one.factory, params, paths, stream, claim))
    return verdicts


def visit_room(params: Params, paths: Mapping[str, Path], here: World) -> list[Verdict]:
    """B14: the counted files score in a room of their own, with each scorer; training data and this repository are covered."""
    artifact = {"train_gpt.py": paths["code"], "model.bin": paths["model"]}
    data = {"data/val": paths["val"], "data/tokenizer.model": paths["tokenizer"]}
    verdicts = []
    for name, option in BUDGETED.items():
        metric = f"{option}_bpb"
        claimed = float(read_json(paths[option] / "metrics.json").get(metric, math.nan))
        command_words = ("train_gpt.py", "eval", "--scorer", name)
        seen = clean_room.visit(
            clean_room.Artifact(artifact, data, command_words),
            covered=[paths["train"].absolute(), Path.cwd()],
        )
        exact = here.device.type == "cpu"
        claim = clean_room.Claim(
            metric, claimed, params.audit.evaluation_budget_seconds, 0.0 if exact else ROOM_TOLERANCE
        )
        verdicts += [
            dataclasses.replace(verdict, subject=name) for verdict in clean_room.check_clean_room(seen, claim)
        ]
    return verdicts


def _decoded(
    name: str, factory: Factory, params: Params, paths: Mapping[str, Path], stream: Stream, claim: Claim
) -> Verdict:
    """B12: the stream's first targets, by a process of its own that computes as this one does."""
    parallel = dataclasses.replace(
        params.parallel, dtype="float32", deterministic=True, compile=False, nproc=1
    )
    sections = {
        "parallel": dataclasses.asdict(parallel),
        "sliding_eval": dataclasses.asdict(params.sliding_eval),
        "ttt_eval": dataclasses.asdict(params.ttt_eval),
    }
    words = (name, str(paths["model"].absolute()), str(paths["tokenizer"].absolute()), json.dumps(sections))
    ledger = claim.ledger if claim.ledger.shape == (len(stream.tokens) - 1,) else None
    recipe = scorer_recipe.Recipe(scorer_recipe.OWN, words)
    return round_trip.check_round_trip(
        name, factory, recipe, stream.tokens, 1, params.audit.decoded_targets, ledger, claim.tolerances[0]
    )


def read_claim(folder: Path, metric: str, tolerances: tuple[float, float]) -> Claim:
    """What an evaluation left in its folder; a ledger of the wrong shape is a finding, one that is no array an error."""
    try:
        nll = np.load(folder / "nll.npy", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{folder / 'nll.npy'} is not a ledger: {error}") from error
    return Claim(
        nll,
        (folder / "chunks.tsv").read_text(encoding="utf-8"),
        read_json(folder / "metrics.json").get(metric),
        tolerances,
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; a ValueError that names the file when it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected an object")
    return value


if __name__ == "__main__":
    command.launch(STAGE, main)
