"""Anybody's scorer, audited from the command line: docs/audit.md says what it needs to offer and how to read what comes out.

The positions of an outside scorer come from fresh entropy, so that it cannot have been aimed between them; the nonce is printed, and with
--nonce the same audit is run again. Exit code 0: nothing was convicted; 1: something was; 2: the audit could not be held.
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
from stages.audit import report as render
from stages.audit.audit_scorer import Claim, Stream, audit_scorer
from stages.audit.checks import budgets, contamination, coverage, round_trip
from stages.audit.checks.metamorphic import Variants
from stages.audit.params import AuditParams
from stages.audit.sampling import Edges, key_of
from stages.audit.sandbox import clean_room
from stages.audit.scorer_recipe import Recipe
from stages.audit.verdict import Verdict, convicted, reason
from stages.common import bpb, command, shards
from stages.common.cli_errors import refuse
from stages.common.lossless_text import Speller
from stages.common.progress import Report
from tools.audit_scorer import adapters, claims, effort

CAP = 16_000_000  # bytes of code and weights together (challenge)
NONCE_BYTES = 16
SUBJECT = "scorer"
# What somebody else's code may raise: then it could not be audited, which is no conviction.
THEIR_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
)


@dataclass(frozen=True)
class Outside:
    """What the command line names: a factory, by the words that another process can call it with too."""

    spec: str
    words: tuple[str, ...]
    factory: Callable[..., Any]
    vocab_size: int
    n_targets: int  # of the whole stream, also where only a part of it is shown

    def scorer(self, **keywords: Any) -> adapters.Stepping | adapters.Replaying:
        """One at the empty prefix."""
        return adapters.adapt(lambda: self.factory(self.n_targets, *self.words, **keywords), self.vocab_size)

    def factory_of(self, n_targets: int) -> adapters.Stepping | adapters.Replaying:
        """The same, for those who would say how long their part of the stream is."""
        return self.scorer()

    def variants(self) -> Variants:
        """Those that the factory has keywords for."""
        keywords = inspect.signature(self.factory).parameters
        hashed = "buckets" in keywords
        return Variants(
            relabelled=(lambda names: self.scorer(permutation=names)) if "permutation" in keywords else None,
            hashed=(lambda buckets: self.scorer(buckets=buckets)) if hashed else None,
            forgetful=(lambda buckets: self.scorer(buckets=buckets, memory_weight=0.0))
            if hashed and "memory_weight" in keywords
            else None,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = _parser().parse_args(argv)
    try:
        verdicts = audit(arguments)
    except (ValueError, FileNotFoundError, PermissionError, IsADirectoryError) as error:
        refuse("audit_scorer", error)
    except THEIR_ERRORS as error:
        refuse(
            "audit_scorer",
            f"{arguments.scorer} raised {type(error).__name__}: {error}; it could not be audited",
        )
    for verdict in convicted(verdicts):
        print(reason(verdict))
    raise SystemExit(1 if convicted(verdicts) else 0)


def audit(arguments: argparse.Namespace) -> list[Verdict]:
    """Hold the audit that the arguments ask for, write its report, and return its verdicts."""
    nonce = _nonce(arguments.nonce)
    print(f"nonce {nonce.hex()}: the same audit again with --nonce {nonce.hex()}", flush=True)
    claim = claims.read(arguments.claim)
    tokenizer = bpb.load_tokenizer(arguments.tokenizer)
    stream = _stream(arguments.tokens, tokenizer)
    outside = _load(arguments.scorer, arguments.artifact, tokenizer.vocab_size(), len(stream.tokens) - 1)
    scorer = outside.scorer()
    params, shown = _affordable(arguments, scorer, len(stream.tokens))
    part = _cut(stream, shown, tokenizer)
    verdicts, ledger = claims.check(SUBJECT, claim, stream, tokenizer)
    verdicts += _artifact(arguments.artifact) + _room(arguments, claim)
    if arguments.train is not None:
        verdicts.append(_passages(arguments, tokenizer))
    if ledger is None:
        ledger = np.asarray(outside.scorer().score_stream(part.tokens), dtype=np.float32)
    key = hashlib.sha256(nonce + _hash(arguments)).digest()
    verdicts += _tried(
        arguments, outside, part, ledger[: shown - 1], params, key, is_part=shown < len(stream.tokens)
    )
    if scorer.predicts and not convicted(verdicts):
        count = min(effort.LEVELS[arguments.level].decoded, shown - 1)
        recipe = Recipe(outside.spec, outside.words)
        tolerance = params.loss_tolerance
        verdicts.append(
            round_trip.check_round_trip(
                SUBJECT, outside.factory_of, recipe, stream.tokens, 1, count, ledger, tolerance
            )
        )
    verdicts = catalogue.complete(
        verdicts, [SUBJECT], _reasons(shown, len(stream.tokens), convicted(verdicts))
    )
    declared = {
        "scorer": arguments.scorer,
        "level": arguments.level,
        "nonce": nonce.hex(),
        "targets in the stream": len(stream.tokens) - 1,
        "targets shown": shown - 1,
        "interface": "predict, observe, fork" if scorer.predicts else "score_stream only",
        "documents": "each by itself" if scorer.scope == "document" else "one stream",
    }
    _write(arguments.output, verdicts, declared)
    return verdicts


def _tried(
    arguments: argparse.Namespace,
    outside: Outside,
    part: Stream,
    ledger: np.ndarray,
    params: AuditParams,
    key: bytes,
    is_part: bool,
) -> list[Verdict]:
    """The verdicts of the walk. What was reported is the claim's business, and a part of the stream proves no coverage."""
    claim = Claim(ledger, None, None, (params.loss_tolerance, params.mean_tolerance))
    edges = Edges(window=arguments.window, chunk=arguments.chunk)
    report = Report(is_main=not arguments.quiet)
    found = audit_scorer(
        SUBJECT, outside.factory_of, part, claim, edges, key, params, report, outside.variants()
    )
    dropped = {"reported bits per byte", *(["coverage"] if is_part else [])}
    return [
        verdict
        for verdict in found
        if verdict.name not in dropped or (verdict.name == "coverage" and verdict.outcome == "fail")
    ]


def _affordable(arguments: argparse.Namespace, scorer: Any, length: int) -> tuple[AuditParams, int]:
    level, targets = effort.LEVELS[arguments.level], arguments.targets
    if scorer.predicts:
        return effort.affordable(level, targets, length, scorer.vocab_size)
    return effort.affordable_calls(level, targets, length, scorer.vocab_size, arguments.window)


def _stream(path: Path, tokenizer: sentencepiece.SentencePieceProcessor) -> Stream:
    table = bpb.byte_table(tokenizer)
    tokens = read_tokens(path, table.vocab_size)
    by_decoding = coverage.count_documents(tokens, tokenizer)
    return Stream(
        tokens, table.bos, bpb.target_bytes(tokens, table), by_decoding, Speller(tokenizer).bytes_of
    )


def _passages(arguments: argparse.Namespace, tokenizer: sentencepiece.SentencePieceProcessor) -> Verdict:
    val = contamination.texts(_files(arguments.tokens), tokenizer)
    return contamination.check_passages(
        contamination.overlap(contamination.texts(shards.find(arguments.train), tokenizer), val)
    )


def _hash(arguments: argparse.Namespace) -> bytes:
    """Of all that is audited: with the nonce it is the key of every draw."""
    return key_of(
        [
            *_files(arguments.tokens),
            arguments.tokenizer,
            *(_files(arguments.artifact) if arguments.artifact else []),
        ]
    )


def read_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """A stream from a shard, a folder of shards or an .npy file, (N,) uint16; every id is one of the tokenizer's."""
    if not path.exists():
        raise ValueError(
            f"{path} does not exist: a token shard, a folder of them, or an .npy file is expected there"
        )
    if path.suffix == ".npy":
        tokens = np.load(path, allow_pickle=False).reshape(-1)
    else:
        tokens = shards.stream(path) if path.is_dir() else np.array(shards.view(path))
    if len(tokens) < 16 or int(tokens.max()) >= vocab_size or int(tokens.min()) < 0:
        raise ValueError(
            f"{path} holds {len(tokens)} tokens, expected at least 16, all ids below {vocab_size}"
        )
    return tokens.astype(np.uint16)


def _cut(whole: Stream, shown: int, tokenizer: sentencepiece.SentencePieceProcessor) -> Stream:
    """The stream's first tokens: what the scorer may be asked for."""
    if shown == len(whole.tokens):
        return whole
    tokens = whole.tokens[:shown]
    return Stream(
        tokens,
        whole.bos,
        whole.target_bytes[: shown - 1],
        coverage.count_documents(tokens, tokenizer),
        whole.spelling,
    )


def _reasons(shown: int, length: int, guilty: Sequence[Verdict]) -> dict[str, str]:
    """Why a test may be missing from the verdicts."""
    reasons = {}
    if shown < length:
        reasons["B6"] = (
            f"no whole ledger was claimed (--claim); the audit itself was allowed {shown - 1} of {length - 1} targets"
        )
    if guilty:
        reasons["B12"] = "the scorer is convicted already"
    return reasons


def _artifact(folder: Path | None) -> list[Verdict]:
    if folder is None:
        return []
    return [
        budgets.check_sizes(
            {str(path.relative_to(folder)): path.stat().st_size for path in _files(folder)}, CAP
        )
    ]


def _room(arguments: argparse.Namespace, claim: dict[str, Any]) -> list[Verdict]:
    """B14, where it is said how the counted files score: they get the stream and the tokenizer, and nothing else."""
    if arguments.run is None:
        return []
    if arguments.artifact is None or "bpb" not in claim:
        raise ValueError(
            "--run needs the counted files (--artifact) and the number that they claim (`bpb` in --claim)"
        )
    counted = {str(path.relative_to(arguments.artifact)): path for path in _files(arguments.artifact)}
    data = {f"data/val/{path.name}": path for path in _files(arguments.tokens)} | {
        "data/tokenizer.model": arguments.tokenizer
    }
    seen = clean_room.visit(
        clean_room.Artifact(counted, data, tuple(arguments.run.split())), covered=[Path.cwd()]
    )
    budget = float(claim.get("budget_seconds", claims.BUDGET_SECONDS))
    return clean_room.check_clean_room(seen, clean_room.Claim(arguments.metric, float(claim["bpb"]), budget))


def _load(spec: str, artifact: Path | None, vocab_size: int, n_targets: int) -> Outside:
    module_name, separator, name = spec.partition(":")
    if not separator:
        raise ValueError(f"--scorer {spec}: expected module:factory")
    try:
        factory = getattr(importlib.import_module(module_name), name, None)
    except ImportError as error:
        raise ValueError(f"--scorer {spec}: {module_name} cannot be imported from here: {error}") from error
    if not callable(factory):
        raise ValueError(f"--scorer {spec}: {module_name} has no function {name}")
    if artifact is not None and not artifact.is_dir():
        raise ValueError(f"--artifact {artifact}: expected a folder, the counted files in it")
    return Outside(
        spec, () if artifact is None else (str(artifact.absolute()),), factory, vocab_size, n_targets
    )


def _files(path: Path) -> list[Path]:
    return sorted(found for found in path.rglob("*") if found.is_file()) if path.is_dir() else [path]


def _nonce(text: str | None) -> bytes:
    try:
        return secrets.token_bytes(NONCE_BYTES) if text is None else bytes.fromhex(text)
    except ValueError as error:
        raise ValueError(f"--nonce {text}: expected hexadecimal digits, as an audit printed them") from error


def _write(folder: Path, verdicts: list[Verdict], declared: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(
        command.canonical_json(render.as_json(verdicts, declared)), encoding="utf-8"
    )
    (folder / "report.md").write_text(render.as_markdown(verdicts, declared), encoding="utf-8")
    counts = render.summary(verdicts)
    told = f"{counts['audit_pass']} passed, {counts['audit_fail']} failed, {counts['audit_cannot_tell']} cannot tell"
    print(f"{told}; see {folder / 'report.md'}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.audit_scorer",
        description="Audit a scorer of your own; docs/audit.md says what it has to offer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--scorer",
        required=True,
        metavar="MODULE:FACTORY",
        help="called with the number of targets, and --artifact's folder",
    )
    parser.add_argument(
        "--tokens",
        required=True,
        type=Path,
        metavar="FILE",
        help="validation stream: a shard, a folder of shards or .npy",
    )
    parser.add_argument("--tokenizer", required=True, type=Path, metavar="FILE", help="SentencePiece model")
    parser.add_argument("--artifact", type=Path, metavar="DIR", help="the counted files")
    parser.add_argument("--claim", type=Path, metavar="FILE", help="JSON: what is claimed (docs/audit.md)")
    parser.add_argument(
        "--train",
        type=Path,
        metavar="DIR",
        help="training shards, in which no passage of the stream may stand",
    )
    parser.add_argument(
        "--run",
        metavar="WORDS",
        help='how the counted files score in a clean room, as in "train_gpt.py eval"',
    )
    parser.add_argument(
        "--metric", default="val_bpb", metavar="KEY", help="their number in eval/metrics.json"
    )
    parser.add_argument("--level", choices=tuple(effort.LEVELS), default="quick", help="how hard to look")
    parser.add_argument(
        "--targets",
        type=int,
        metavar="N",
        help="targets that the scorer is asked for at most; default: the level's",
    )
    parser.add_argument(
        "--window", type=int, default=256, metavar="N", help="targets that one window of the scorer adds"
    )
    parser.add_argument(
        "--chunk", type=int, metavar="N", help="targets between two updates of a scorer that trains"
    )
    parser.add_argument("--nonce", metavar="HEX", help="repeat the audit that printed it")
    parser.add_argument(
        "--output", type=Path, default=Path("audit"), metavar="DIR", help="where report.md and report.json go"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser
