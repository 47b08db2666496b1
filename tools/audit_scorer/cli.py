"""Audit an external scorer: docs/audit.md says what the scorer needs and how to read the report.

The audited positions come from fresh entropy, so that a scorer cannot be prepared for them. The
nonce is printed, and --nonce repeats the same audit. Exit code 0: no check failed; 1: some did; 2:
the audit could not be run, because of the options, or because a process of the scorer failed.
"""

import argparse
import secrets
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from stages.audit import precision
from stages.audit import report as audit_report
from stages.audit.audit_scorer import AuditedStream, audited_stream
from stages.audit.checks import budgets, contamination
from stages.audit.remote.process import ScorerError
from stages.audit.sampling import hash_files
from stages.audit.sandbox import clean_room
from stages.audit.sandbox.artifact import artifact_files, counted_bytes
from stages.audit.verdict import Verdict, failure_message, failures
from stages.common import bpb, challenge, shards
from stages.common.cli_errors import exit_with_error
from stages.common.progress import Logger
from stages.common.stage import canonical_json
from stages.scoring.stream import ValidationStream
from tools.audit_scorer import audit, claims, effort, source

NONCE_BYTES = 16
INTERRUPTED = 130  # exit code after Ctrl-C, as of a shell
CODE_HINT = "its process sees the scorer's own module or package alone: name other files with --code"
REPORTS = ("report.json", "report.md")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the audit and print the failed checks; exits with 1 if there are any."""
    arguments = _parser().parse_args(argv)
    try:
        # Whatever happens, no report of an earlier audit is taken for this one's.
        for name in REPORTS:
            (arguments.output / name).unlink(missing_ok=True)
        verdicts = run_audit(arguments)
    except ScorerError as error:
        hint = f"; {CODE_HINT}" if "ModuleNotFoundError" in str(error) else ""
        exit_with_error("audit_scorer", f"{arguments.scorer} {error}; it could not be audited{hint}")
    except KeyboardInterrupt:
        sys.stderr.write("error: audit_scorer: interrupted\n")
        raise SystemExit(INTERRUPTED) from None
    except (ValueError, OSError) as error:
        exit_with_error("audit_scorer", error)
    for verdict in failures(verdicts):
        print(failure_message(verdict))
    raise SystemExit(1 if failures(verdicts) else 0)


def run_audit(arguments: argparse.Namespace) -> list[Verdict]:
    """Run the audit that the arguments describe, write its report, and return its verdicts."""
    nonce = _nonce(arguments.nonce)
    print(f"nonce {nonce.hex()}: the same audit again with --nonce {nonce.hex()}", flush=True)

    # Inputs: the claim, the stream, the counted files.
    claim = claims.read_claim(arguments.claim)
    tokenizer = bpb.load_tokenizer(arguments.tokenizer)
    stream = _load_stream(arguments.tokens, tokenizer)

    # What is claimed and counted.
    n_targets = len(stream.tokens) - 1
    ledger = claims.complete_ledger(claim, n_targets)
    if arguments.artifact is not None and not arguments.artifact.is_dir():
        raise ValueError(f"--artifact {arguments.artifact}: expected a folder, the counted files in it")

    # The scorer, in its processes. They have ended before anything of the report is written.
    settings = audit.Settings(
        level=arguments.level,
        max_targets=arguments.targets,
        window=arguments.window,
        chunk=arguments.chunk,
        key=audit.draw_key(nonce, _hash_inputs(arguments), ledger),
        answer_seconds=arguments.answer_seconds,
        logger=Logger(is_main=not arguments.quiet),
    )

    # Copies of the counted files, since times and modes could hold data.
    with tempfile.TemporaryDirectory() as copies:
        scorer_source = source.find_source(
            arguments.scorer,
            arguments.artifact,
            arguments.code,
            n_targets,
            arguments.precision,
            Path(copies),
        )
        found = audit.audit_external(scorer_source, stream, tokenizer, ledger, settings)

    # Checks of the claim and of files.
    texts = None if arguments.text is None else claims.read_texts(arguments.text)
    try:
        checked = claims.check_claim(audit.SUBJECT, claim, stream, tokenizer, texts, found.own)
    except (AttributeError, TypeError) as error:  # a field of another type than docs/audit.md says
        raise ValueError(f"--claim {arguments.claim}: {error}") from error
    verdicts = checked.verdicts + _check_sizes(arguments)
    verdicts.append(budgets.check_tokenizer_file(arguments.tokenizer))
    verdicts += _check_clean_room(arguments, claim)
    if arguments.train is not None:
        verdicts.append(_check_contamination(arguments, tokenizer))

    # The report names every check that could not be run, and what is needed to repeat the audit.
    shown = int(found.declared["targets shown"]) + 1
    verdicts = audit.complete_catalogue(verdicts + found.verdicts, shown, len(stream.tokens))
    declared = {"scorer": arguments.scorer, "level": arguments.level, "nonce": nonce.hex()}
    _write_report(arguments.output, verdicts, declared | found.declared)
    return verdicts


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


def _check_sizes(arguments: argparse.Namespace) -> list[Verdict]:
    """Check the size of the counted files and of the scorer's code, if the counted files are given."""
    if arguments.artifact is None:
        return []
    counted = counted_bytes(arguments.artifact)
    sizes = {f"{source.ARTIFACT_FOLDER}/{name}": size for name, size in counted.items()}
    sizes |= source.code_bytes(arguments.scorer, arguments.code)
    return [budgets.check_sizes(sizes, challenge.MAX_ARTIFACT_BYTES)]


def _check_clean_room(arguments: argparse.Namespace, claim: dict[str, Any]) -> list[Verdict]:
    """B14: run the counted files in a clean room with stream and tokenizer alone, if --run says how."""
    if arguments.run is None:
        return []
    if arguments.artifact is None or not isinstance(claim.get("bpb"), (int, float)):
        raise ValueError(
            "--run needs the counted files (--artifact) and the number that they claim (`bpb` in --claim)"
        )
    counted = artifact_files(arguments.artifact)
    data = {f"data/val/{path.name}": path for path in _files(arguments.tokens)}
    data["data/tokenizer.model"] = arguments.tokenizer
    artifact = clean_room.AuditedArtifact(counted, data, tuple(arguments.run.split()))
    run = clean_room.run_in_clean_room(artifact)

    budget = challenge.MAX_EVALUATION_SECONDS
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
    return list(artifact_files(path).values())


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
    if untold := audit_report.untold_conditions(verdicts):
        print(f"{', '.join(untold)} cannot be told: the report says why", flush=True)
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

    add(
        "--code",
        action="append",
        default=[],
        type=Path,
        metavar="PATH",
        help="another file or folder that the scorer's module imports or reads beside it; may be repeated",
    )

    # Its arithmetic.
    add(
        "--precision",
        choices=tuple(precision.PRECISIONS),
        help="of the scorer's arithmetic (default: its attribute `precision`, or float32)",
    )

    # Everything else that can be checked, if it is given: sizes, claims, contamination.
    add("--artifact", type=Path, metavar="DIR", help="folder of the counted files")
    add("--claim", type=Path, metavar="FILE", help="JSON file of claimed results (docs/audit.md)")
    add(
        "--train",
        type=Path,
        metavar="DIR",
        help="training shards, which must not contain passages of the stream",
    )

    add("--text", type=Path, metavar="FILE", help="original documents: .jsonl with `text`, or .txt")

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

    add(
        "--answer-seconds",
        type=float,
        default=3600.0,
        metavar="SECONDS",
        help="longest wait for one answer of the scorer's process (default: %(default)g)",
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
