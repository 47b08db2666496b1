"""Audit an external scorer: docs/audit.md says what the scorer needs and how to read the report.

The audited positions come from fresh entropy, so that a scorer cannot be prepared for them. The
nonce is printed, and --nonce repeats the same audit. Exit code 0: no check failed; 1: some did; 2:
the audit could not be run.
"""

import argparse
import hashlib
import importlib
import inspect
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from stages.audit import catalogue
from stages.audit import report as audit_report
from stages.audit.audit_scorer import (
    AuditCase,
    AuditedStream,
    ClaimedEvaluation,
    audit_scorer,
    audited_stream,
)
from stages.audit.checks import budgets, contamination, coverage, round_trip
from stages.audit.checks.metamorphic import Variants
from stages.audit.params import AuditParams
from stages.audit.sampling import Boundaries, hash_files
from stages.audit.sandbox import clean_room
from stages.audit.scorer_recipe import Recipe
from stages.audit.verdict import Verdict, failure_message, failures
from stages.common import bpb, challenge, shards
from stages.common.cli_errors import exit_with_error
from stages.common.progress import Logger
from stages.common.stage import canonical_json
from stages.scoring.stream import ValidationStream
from tools.audit_scorer import adapters, claims, effort

NONCE_BYTES = 16
SUBJECT = "scorer"  # its name in verdicts


@dataclass(frozen=True)
class ExternalFactory:
    """Factory of the audited scorer, with the strings by which another process can call it too."""

    spec: str  # module:function
    arguments: tuple[str, ...]  # after the number of targets
    function: Callable[..., Any]
    vocab_size: int
    n_targets: int  # of the whole stream, even if only a part of it is shown

    def make(self, **keywords: Any) -> adapters.StepwiseScorer | adapters.ReplayScorer:
        """Return a scorer that has observed nothing."""
        return adapters.adapt_scorer(
            lambda: self.function(self.n_targets, *self.arguments, **keywords), self.vocab_size
        )

    def make_for(self, n_targets: int) -> adapters.StepwiseScorer | adapters.ReplayScorer:
        """Same as `make`.

        `n_targets`, the length of the part shown, is ignored, because the scorer is made for the
        whole stream.
        """
        return self.make()

    def variants(self) -> Variants:
        """Return the variants of the scorer for which the factory has keywords."""
        keywords = inspect.signature(self.function).parameters
        variants = Variants()
        if "permutation" in keywords:
            variants = variants._replace(permuted_ids=lambda ids: self.make(permutation=ids))
        if "buckets" in keywords:
            variants = variants._replace(with_buckets=lambda buckets: self.make(buckets=buckets))
        if "buckets" in keywords and "memory_weight" in keywords:
            variants = variants._replace(
                without_memory=lambda buckets: self.make(buckets=buckets, memory_weight=0.0)
            )
        return variants


def main(argv: Sequence[str] | None = None) -> None:
    """Run the audit and print the failed checks; exits with 1 if there are any."""
    arguments = _parser().parse_args(argv)
    try:
        verdicts = run_audit(arguments)
    except adapters.ScorerError as error:
        exit_with_error("audit_scorer", f"{arguments.scorer} {error}; it could not be audited")
    except (ValueError, OSError) as error:
        exit_with_error("audit_scorer", error)
    for verdict in failures(verdicts):
        print(failure_message(verdict))
    raise SystemExit(1 if failures(verdicts) else 0)


def run_audit(arguments: argparse.Namespace) -> list[Verdict]:
    """Run the audit that the arguments describe, write its report, and return its verdicts."""
    nonce = _nonce(arguments.nonce)
    print(f"nonce {nonce.hex()}: the same audit again with --nonce {nonce.hex()}", flush=True)

    # Inputs: the claim, the stream, the scorer's factory.
    claim = claims.read_claim(arguments.claim)
    tokenizer = bpb.load_tokenizer(arguments.tokenizer)
    stream = _load_stream(arguments.tokens, tokenizer)
    n_targets = len(stream.tokens) - 1
    factory = _load_factory(arguments.scorer, arguments.artifact, tokenizer.vocab_size(), n_targets)
    scorer = factory.make()

    # Fit the effort, and with it the part of the stream that the scorer is shown.
    params, shown = _fit_effort(arguments, scorer, len(stream.tokens))
    part = _shorten_stream(stream, shown, tokenizer)
    is_part = shown < len(stream.tokens)

    # Checks of the claim and of files.
    try:
        verdicts, ledger = claims.check_claim(SUBJECT, claim, stream, tokenizer)
    except (AttributeError, TypeError) as error:  # a field of another type than docs/audit.md says
        raise ValueError(f"--claim {arguments.claim}: {error}") from error
    verdicts += _check_sizes(arguments.artifact)
    verdicts += _check_clean_room(arguments, claim)
    if arguments.train is not None:
        verdicts.append(_check_contamination(arguments, tokenizer))

    # Checks of the scorer. Without a claimed ledger it makes one itself.
    if ledger is None:
        ledger = np.asarray(factory.make().score_stream(part.tokens), dtype=np.float32)
    key = hashlib.sha256(nonce + _hash_inputs(arguments)).digest()
    verdicts += _run_probes(arguments, factory, part, ledger[: shown - 1], params, key, is_part)

    # A round trip through another process, unless the scorer has failed already.
    if scorer.predicts and not failures(verdicts):
        count = min(effort.EFFORTS[arguments.level].decoded_targets, shown - 1)
        recipe = Recipe(factory.spec, factory.arguments)
        # The span is the beginning of the stream.
        verdicts.append(
            round_trip.check_round_trip(
                SUBJECT,
                factory.make_for,
                recipe,
                stream.tokens,
                start=1,
                count=count,
                ledger=ledger,
                tolerance=params.loss_tolerance,
            )
        )

    # The report names every check that could not be run.
    reasons = _reasons_not_run(shown, len(stream.tokens), failures(verdicts))
    verdicts = catalogue.with_missing(verdicts, [SUBJECT], reasons)

    # Everything that a reader needs to judge the extent of this audit, and to repeat it.
    declared = {
        "scorer": arguments.scorer,
        "level": arguments.level,
        "nonce": nonce.hex(),
        "targets in the stream": n_targets,
        "targets shown": shown - 1,
        "interface": "predict, observe, fork" if scorer.predicts else "score_stream only",
        "documents": "each by itself" if scorer.scope == "document" else "one stream",
    }
    _write_report(arguments.output, verdicts, declared)
    return verdicts


def _run_probes(
    arguments: argparse.Namespace,
    factory: ExternalFactory,
    part: AuditedStream,
    ledger: np.ndarray,
    params: AuditParams,
    key: bytes,
    is_part: bool,
) -> list[Verdict]:
    """Run the checks that probe the scorer; `ledger` has the losses of the part that is shown."""
    claim = ClaimedEvaluation(
        ledger=ledger,
        chunk_table=None,
        reported_bpb=None,
        ledger_tolerance=params.loss_tolerance,
        mean_tolerance=params.mean_tolerance,
    )

    # Draw positions, and run every check that the scorer's interface allows.
    case = AuditCase(
        name=SUBJECT,
        factory=factory.make_for,
        stream=part,
        boundaries=Boundaries(window=arguments.window, chunk=arguments.chunk),
        key=key,
        params=params,
        variants=factory.variants(),
    )
    verdicts = audit_scorer(case, claim, Logger(is_main=not arguments.quiet))

    # The reported score was checked with the claim, and a part of the stream does not prove
    # coverage.
    kept = []
    for verdict in verdicts:
        proves_nothing = is_part and verdict.check == coverage.COVERAGE and verdict.outcome != "fail"
        if verdict.check != coverage.REPORTED_BPB and not proves_nothing:
            kept.append(verdict)
    return kept


def _fit_effort(arguments: argparse.Namespace, scorer: Any, length: int) -> effort.FittedEffort:
    level = effort.EFFORTS[arguments.level]
    if scorer.predicts:
        return effort.fit_stepwise_scorer(level, arguments.targets, length, scorer.vocab_size)
    return effort.fit_replay_scorer(level, arguments.targets, length, scorer.vocab_size, arguments.window)


def _load_stream(path: Path, tokenizer: sentencepiece.SentencePieceProcessor) -> AuditedStream:
    table = bpb.byte_table(tokenizer)
    tokens = read_tokens(path, table.vocab_size)
    stream = ValidationStream(tokens, bpb.target_bytes(tokens, table), table)
    return audited_stream(stream, tokenizer)


def read_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """Return the stream in a shard, a folder of shards or an .npy file, (N,) uint16, checked."""
    if not path.exists():
        raise ValueError(
            f"{path} does not exist: a token shard, a folder of them, or an .npy file is expected there"
        )
    if path.suffix == ".npy":
        tokens = np.load(path, allow_pickle=False).reshape(-1)
    else:
        tokens = shards.stream(path) if path.is_dir() else np.array(shards.view(path))
    if len(tokens) < effort.MIN_TOKENS or tokens.max() >= vocab_size or tokens.min() < 0:
        raise ValueError(
            f"{path} holds {len(tokens)} tokens,"
            f" expected at least {effort.MIN_TOKENS}, all ids below {vocab_size}"
        )
    return tokens.astype(np.uint16)


def _shorten_stream(
    stream: AuditedStream, shown: int, tokenizer: sentencepiece.SentencePieceProcessor
) -> AuditedStream:
    """Return the first `shown` tokens of the stream, the part that the scorer is shown."""
    if shown == len(stream.tokens):
        return stream
    tokens = stream.tokens[:shown]
    return AuditedStream(
        tokens,
        stream.bos,
        stream.target_bytes[: shown - 1],
        coverage.count_decoded_bytes(tokens, tokenizer),
        stream.token_bytes,
    )


def _load_factory(spec: str, artifact: Path | None, vocab_size: int, n_targets: int) -> ExternalFactory:
    module_name, separator, name = spec.partition(":")
    if not separator:
        raise ValueError(f"--scorer {spec}: expected module:factory")
    try:
        function = getattr(importlib.import_module(module_name), name, None)
    except ImportError as error:
        raise ValueError(f"--scorer {spec}: {module_name} cannot be imported from here: {error}") from error
    except adapters.SCORER_ERRORS as error:
        raise adapters.ScorerError(f"raised {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"--scorer {spec}: {module_name} has no function {name}")
    if artifact is not None and not artifact.is_dir():
        raise ValueError(f"--artifact {artifact}: expected a folder, the counted files in it")
    arguments = () if artifact is None else (str(artifact.absolute()),)
    return ExternalFactory(spec, arguments, function, vocab_size, n_targets)


def _check_sizes(folder: Path | None) -> list[Verdict]:
    """Check the size of the counted files, if they are given."""
    if folder is None:
        return []
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in _files(folder)}
    return [budgets.check_sizes(sizes, challenge.MAX_ARTIFACT_BYTES)]


def _check_clean_room(arguments: argparse.Namespace, claim: dict[str, Any]) -> list[Verdict]:
    """B14: run the counted files in a clean room with stream and tokenizer alone, if --run says how."""
    if arguments.run is None:
        return []
    if arguments.artifact is None or not isinstance(claim.get("bpb"), (int, float)):
        raise ValueError(
            "--run needs the counted files (--artifact) and the number that they claim (`bpb` in --claim)"
        )
    counted = {str(path.relative_to(arguments.artifact)): path for path in _files(arguments.artifact)}
    data = {f"data/val/{path.name}": path for path in _files(arguments.tokens)}
    data["data/tokenizer.model"] = arguments.tokenizer
    artifact = clean_room.AuditedArtifact(counted, data, tuple(arguments.run.split()))
    run = clean_room.run_in_clean_room(artifact, masked=[Path.cwd()])

    budget = float(claim.get("budget_seconds", challenge.MAX_EVALUATION_SECONDS))
    metric = clean_room.ClaimedMetric(arguments.metric, float(claim["bpb"]), budget)
    return clean_room.check_clean_room("clean room", run, metric)


def _check_contamination(
    arguments: argparse.Namespace, tokenizer: sentencepiece.SentencePieceProcessor
) -> Verdict:
    """B15: search the training shards for passages of the stream."""
    val = contamination.document_texts(_files(arguments.tokens), tokenizer)
    train = contamination.document_texts(shards.find(arguments.train), tokenizer)
    return contamination.check_passages(contamination.measure_overlap(train, val))


def _hash_inputs(arguments: argparse.Namespace) -> bytes:
    """Hash all audited files; with the nonce it is the key of every draw."""
    files = [*_files(arguments.tokens), arguments.tokenizer]
    if arguments.artifact:
        files += _files(arguments.artifact)
    return hash_files(files)


def _files(path: Path) -> list[Path]:
    """Return a file, or all files in a folder, sorted."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file())


def _reasons_not_run(shown: int, length: int, failed: Sequence[Verdict]) -> dict[str, str]:
    """Return the reasons why a check may be missing from the verdicts, by check."""
    reasons = {}
    if shown < length:
        reasons["B6"] = (
            "no complete ledger was claimed (--claim);"
            f" the audit itself was allowed {shown - 1} of {length - 1} targets"
        )
    if failed:
        reasons["B12"] = "the scorer has failed another check"
    return reasons


def _nonce(text: str | None) -> bytes:
    try:
        return secrets.token_bytes(NONCE_BYTES) if text is None else bytes.fromhex(text)
    except ValueError as error:
        raise ValueError(f"--nonce {text}: expected hexadecimal digits, as an audit printed them") from error


def _write_report(folder: Path, verdicts: list[Verdict], declared: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    as_json = canonical_json(audit_report.as_json(verdicts, declared))
    (folder / "report.json").write_text(as_json, encoding="utf-8")
    (folder / "report.md").write_text(audit_report.as_markdown(verdicts, declared), encoding="utf-8")
    counts = audit_report.count_outcomes(verdicts)
    print(
        f"{counts['audit_pass']} passed, {counts['audit_fail']} failed,"
        f" {counts['audit_cannot_tell']} cannot tell; see {folder / 'report.md'}",
        flush=True,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.audit_scorer",
        description="Audit an external scorer; docs/audit.md says what it needs and how to read the report.",
    )
    add = parser.add_argument

    # The scorer.
    add(
        "--scorer",
        required=True,
        metavar="MODULE:FACTORY",
        help="function that returns a new scorer; its arguments are the number of targets and,"
        " with --artifact, that folder",
    )

    # The validation stream, and the tokenizer by which its bytes are counted.
    add(
        "--tokens",
        required=True,
        type=Path,
        metavar="FILE",
        help="validation stream: a token shard, a folder of shards, or an .npy file of ids",
    )
    add("--tokenizer", required=True, type=Path, metavar="FILE", help="SentencePiece model of the stream")

    # Everything else that can be checked, if it is given: sizes, claims, contamination.
    add("--artifact", type=Path, metavar="DIR", help="folder of the counted files")
    add("--claim", type=Path, metavar="FILE", help="JSON file of claimed results (docs/audit.md)")
    add(
        "--train",
        type=Path,
        metavar="DIR",
        help="training shards, which must not contain passages of the stream",
    )

    # A clean room runs the counted files and compares their score with the claimed one.
    add(
        "--run",
        metavar="WORDS",
        help='command by which the counted files score in a clean room, such as "train_gpt.py eval"',
    )
    add(
        "--metric",
        default="val_bpb",
        metavar="KEY",
        help="key of the score in their eval/metrics.json (default: %(default)s)",
    )

    # Effort: the number of positions that are probed and targets that are scored.
    add(
        "--level",
        choices=tuple(effort.EFFORTS),
        default="quick",
        help="effort: how many positions, and how much of the stream is scored again (default: %(default)s)",
    )
    add(
        "--targets",
        type=int,
        metavar="N",
        help="limit of the targets that the scorer scores or observes (default: that of the level)",
    )

    # Structure of the scorer: targets next to these boundaries are probed too.
    add(
        "--window",
        type=int,
        default=256,
        metavar="N",
        help="targets that one window of the scorer adds (default: %(default)s)",
    )
    add("--chunk", type=int, metavar="N", help="targets between two updates of a scorer that trains")

    # Repetition and output.
    add("--nonce", metavar="HEX", help="nonce printed by an earlier audit, to repeat it")
    add(
        "--output",
        type=Path,
        default=Path("audit"),
        metavar="DIR",
        help="folder for report.md and report.json (default: %(default)s)",
    )
    add("--quiet", action="store_true", help="do not print progress")
    return parser
