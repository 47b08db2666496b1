"""A record folder as it lies there: submission.json, logs, README, code and everything else, whatever their forms.

Nothing in it is run. A compressed train_gpt.py is unwrapped as data: the longest string of its syntax tree, decoded and decompressed.
"""

import ast
import base64
import binascii
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import brotli

from tools.check_record.logs import Log, parse, whole

SUMMARY, README, CODE = "submission.json", "README.md", "train_gpt.py"
LARGEST_SOURCE = 10_000_000  # bytes: what a wrapper may unpack to
# Names under which a seed's results say one thing.
NAMES = {
    "val_bpb": ("val_bpb", "bpb", "ttt_bpb", "post_ttt_bpb"),
    "bytes_total": (
        "bytes_total",
        "artifact_bytes",
        "total_bytes",
        "submission_bytes",
        "artifact_size",
        "total_submission_bytes",
    ),
    "bytes_model": ("bytes_model", "model_bytes"),
    "bytes_code": ("bytes_code", "code_bytes", "wrapped_code_bytes"),
    "steps": ("steps", "step_stop", "train_steps", "stop_step", "num_steps"),
    "train_seconds": (
        "train_seconds",
        "train_time_s",
        "train_wallclock_seconds",
        "wallclock_seconds",
        "training_seconds",
        "train_time",
    ),
    "eval_seconds": ("eval_seconds", "eval_time_s", "ttt_eval_seconds", "evaluation_seconds", "eval_time"),
}


@dataclass(frozen=True)
class Folder:
    """What was found."""

    path: Path
    summary: dict[str, Any]  # {} where there is none
    broken: str | None  # why submission.json could not be read
    logs: tuple[Log, ...]
    readme: str
    code: bytes | None  # of train_gpt.py
    source: str  # the Python that it runs, unwrapped
    files: dict[str, int]  # every file below the folder and its size

    @property
    def track(self) -> str:
        """The track that the folder claims, from submission.json or its path."""
        return f"{self.summary.get('track', '')} {self.path.resolve().as_posix()}".lower()

    @property
    def is_record(self) -> bool:
        """Whether the budgets and the validation set of the record track bind; who names no track is judged by it."""
        return not any(word in self.track for word in ("non-record", "non_record", "nonrecord", "unlimited"))

    @property
    def seed_results(self) -> dict[int, dict[str, Any]]:
        """Per-seed results by seed, in our names (NAMES); what else they hold is kept under its own."""
        raw = (
            self.summary.get("seed_results")
            or self.summary.get("per_seed")
            or self.summary.get("results")
            or {}
        )
        rows: Iterable[tuple[Any, Any]] = raw.items() if isinstance(raw, Mapping) else ()
        if isinstance(raw, list):
            rows = [(row.get("seed"), row) for row in raw if isinstance(row, Mapping)]
        return {
            int(seed): renamed(row) for seed, row in rows if str(seed).isdigit() and isinstance(row, Mapping)
        }

    @property
    def claimed_seeds(self) -> list[int]:
        """Seeds that submission.json names."""
        listed = self.summary.get("seeds") or ([self.summary["seed"]] if "seed" in self.summary else [])
        found = [seed for seed in listed if isinstance(seed, int)] if isinstance(listed, list) else []
        return list(dict.fromkeys([*found, *self.seed_results]))

    def log_of(self, seed: int) -> Log | None:
        """The log of a seed; the only log of the folder is that of its only seed."""
        named = next((log for log in self.logs if log.seed == seed), None)
        alone = len(self.logs) == 1 and self.claimed_seeds == [seed] and self.logs[0].seed is None
        return named or (self.logs[0] if alone else None)


def read(path: Path) -> Folder:
    """Read a folder; a ValueError only when there is none, or nothing in it to check."""
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder")
    files = {
        file.relative_to(path).as_posix(): file.stat().st_size
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
    if not {SUMMARY, README, CODE} & files.keys():
        raise ValueError(
            f"{path} has neither {SUMMARY} nor {README} nor {CODE}: name the folder of one record"
        )
    summary, broken = _summary(path / SUMMARY)
    code = (path / CODE).read_bytes() if CODE in files else None
    return Folder(
        path=path,
        summary=summary,
        broken=broken,
        logs=tuple(_logs(path, files)),
        readme=(path / README).read_text(encoding="utf-8", errors="replace") if README in files else "",
        code=code,
        source=unwrapped(code) if code else "",
        files=files,
    )


def renamed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of results with our names beside its own; numbers in strings become numbers."""
    result: dict[str, Any] = dict(row)
    for name, others in NAMES.items():
        value = next((row[other] for other in others if other in row), None)
        if isinstance(value, str) and value.replace(",", "").isdigit():
            value = whole(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            result[name] = value
    return result


def unwrapped(code: bytes) -> str:
    """The source that a train_gpt.py runs: itself, or what its longest string holds."""
    text = code.decode("latin-1" if b"latin-1" in code[:200] else "utf-8", errors="replace")
    try:
        constants = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    except (SyntaxError, ValueError, RecursionError):
        return text
    longest = max((value for value in constants if isinstance(value, (str, bytes))), key=len, default="")
    if len(longest) < len(text) / 2:
        return text
    packed = longest.encode("latin-1", errors="replace") if isinstance(longest, str) else longest
    found = [inner for data in _decoded(packed) for inner in _decompressed(data)]
    return found[0].decode("utf-8", errors="replace") if found else text


def _decoded(packed: bytes) -> Iterator[bytes]:
    yield packed
    for decode in (base64.b85decode, base64.a85decode, base64.b64decode):
        try:
            yield decode(packed)
        except (ValueError, binascii.Error):
            continue


def _decompressed(data: bytes) -> Iterator[bytes]:
    """The data through each decompressor that takes it, bounded in size."""
    unpack: tuple[Callable[[], bytes], ...] = (
        lambda: lzma.LZMADecompressor().decompress(data, LARGEST_SOURCE),
        lambda: zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(data, LARGEST_SOURCE),
        lambda: brotli.Decompressor().process(data, output_buffer_limit=LARGEST_SOURCE),
    )
    for attempt in unpack:
        try:
            content = attempt()
        except (lzma.LZMAError, zlib.error, brotli.error):
            continue
        if content:
            yield content


def _summary(path: Path) -> tuple[dict[str, Any], str | None]:
    if not path.is_file():
        return {}, "does not exist"
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        return {}, f"is not JSON: {error}"
    return (
        (value, None)
        if isinstance(value, dict)
        else ({}, f"holds {type(value).__name__}, expected a mapping")
    )


def _logs(path: Path, files: Mapping[str, int]) -> Iterator[Log]:
    for name in files:
        if name.endswith((".log", ".txt")) and "requirements" not in name:
            log = parse(name, (path / name).read_text(encoding="utf-8", errors="replace"))
            if log is not None:
                yield log
