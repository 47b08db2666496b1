"""Read a record folder: submission.json, logs, README and code, in the variants that people use.

Nothing in the folder is run. A compressed train_gpt.py is unpacked as data: the longest string in
its syntax tree is decoded and decompressed.
"""

import ast
import base64
import binascii
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import brotli

from stages.common.json_object import read_json_object
from tools.check_record.logs import Log, parse_integer, parse_log

SUMMARY = "submission.json"
README = "README.md"
CODE = "train_gpt.py"
OUR_SUBMISSION = ("artifacts", "submission")  # last parts of the path of the stage's output
MAX_SOURCE_BYTES = 10_000_000  # unpacked source beyond this is cut: protection from a decompression bomb
# Names that records use for the results of a seed, by the name used here.
FIELD_ALIASES = {
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
# Words in a track's name that exempt a folder from the rules of the record track.
OTHER_TRACKS = ("non-record", "non_record", "nonrecord", "unlimited")


@dataclass(frozen=True)
class RecordFolder:
    """Content of a record folder."""

    path: Path
    summary: dict[str, Any]  # submission.json, {} if there is none
    summary_error: str | None  # the reason why submission.json could not be read
    logs: tuple[Log, ...]
    readme: str
    code: bytes | None  # train_gpt.py
    source: str  # the Python that it runs, unpacked
    files: dict[str, int]  # size in bytes of every file in the folder, by relative path

    @property
    def track(self) -> str:
        """Text that names the track, from submission.json and the folder's path, in lower case."""
        return f"{self.summary.get('track', '')} {self.path.resolve().as_posix()}".lower()

    @property
    def is_record(self) -> bool:
        """True if the rules of the record track apply, which they also do if no track is named."""
        return not any(word in self.track for word in OTHER_TRACKS)

    @property
    def seed_results(self) -> dict[int, dict[str, Any]]:
        """Results by seed, with the names of FIELD_ALIASES; other fields keep their own names."""
        raw: Any = {}
        for field in ("seed_results", "per_seed", "results"):
            raw = raw or self.summary.get(field)

        # Either a mapping by seed, or a list of mappings with a field `seed`.
        rows: Iterable[tuple[Any, Any]] = ()
        if isinstance(raw, Mapping):
            rows = raw.items()
        elif isinstance(raw, list):
            rows = [(row.get("seed"), row) for row in raw if isinstance(row, Mapping)]

        results = {}
        for seed, row in rows:
            if str(seed).isdigit() and isinstance(row, Mapping):
                results[int(seed)] = with_canonical_names(row)
        return results

    @property
    def claimed_seeds(self) -> list[int]:
        """Seeds that submission.json names."""
        listed = self.summary.get("seeds")
        if not listed:
            listed = [self.summary["seed"]] if "seed" in self.summary else []
        seeds = [seed for seed in listed if isinstance(seed, int)] if isinstance(listed, list) else []
        return list(dict.fromkeys([*seeds, *self.seed_results]))

    def log_of(self, seed: int) -> Log | None:
        """Return the log of a seed; a single log without a seed is that of a single claimed seed."""
        for log in self.logs:
            if log.seed == seed:
                return log
        is_single = len(self.logs) == 1 and self.claimed_seeds == [seed] and self.logs[0].seed is None
        return self.logs[0] if is_single else None


def read_folder(path: Path) -> RecordFolder:
    """Read a folder; ValueError only if it does not exist or has nothing to check."""
    # Git has the small files of our own submission, and DVC has the code.
    if path.resolve().parts[-2:] == OUR_SUBMISSION and not (path / CODE).is_file():
        raise ValueError(f"{path} has no {CODE}; run `dvc repro submission` or `dvc pull`")
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder")

    # Everything in the folder, by relative path.
    files = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            files[file.relative_to(path).as_posix()] = file.stat().st_size
    if not {SUMMARY, README, CODE} & files.keys():
        raise ValueError(
            f"{path} has neither {SUMMARY} nor {README} nor {CODE}: name the folder of one record"
        )

    # A missing file leaves its part empty or None; the checks report it.
    summary, summary_error = _read_summary(path / SUMMARY)
    code = (path / CODE).read_bytes() if CODE in files else None
    readme = (path / README).read_text(encoding="utf-8", errors="replace") if README in files else ""

    # Code may be compressed, so checks of its text search `source`, which is unwrapped.
    return RecordFolder(
        path=path,
        summary=summary,
        summary_error=summary_error,
        logs=tuple(_read_logs(path, files)),
        readme=readme,
        code=code,
        source=unwrap_source(code) if code else "",
        files=files,
    )


def with_canonical_names(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of results with the names of FIELD_ALIASES added; digits in a string become an integer."""
    result: dict[str, Any] = dict(row)
    for name, aliases in FIELD_ALIASES.items():
        value = next((row[alias] for alias in aliases if alias in row), None)
        if isinstance(value, str) and value.replace(",", "").isdigit():
            value = parse_integer(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            result[name] = value
    return result


def unwrap_source(code: bytes) -> str:
    """Return the source that a train_gpt.py runs: the file itself, or the content of its longest string."""
    text = code.decode("latin-1" if b"latin-1" in code[:200] else "utf-8", errors="replace")
    try:
        constants = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    except (SyntaxError, ValueError, RecursionError):
        return text

    # A wrapper consists mostly of one string.
    longest = max((value for value in constants if isinstance(value, (str, bytes))), key=len, default="")
    if len(longest) < len(text) / 2:
        return text
    packed = longest.encode("latin-1", errors="replace") if isinstance(longest, str) else longest
    for decoded in _decodings(packed):
        for source in _decompressions(decoded):
            return source.decode("utf-8", errors="replace")
    return text


def _decodings(packed: bytes) -> Iterator[bytes]:
    """Yield the data itself, and the result of each text decoder that accepts it."""
    yield packed
    for decode in (base64.b85decode, base64.a85decode, base64.b64decode):
        try:
            yield decode(packed)
        except (ValueError, binascii.Error):
            continue


def _decompressions(data: bytes) -> Iterator[bytes]:
    """Yield the result of each decompressor that accepts the data, at most MAX_SOURCE_BYTES."""
    attempts: tuple[Callable[[], bytes], ...] = (
        lambda: lzma.LZMADecompressor().decompress(data, MAX_SOURCE_BYTES),
        lambda: zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(data, MAX_SOURCE_BYTES),
        lambda: brotli.Decompressor().process(data, output_buffer_limit=MAX_SOURCE_BYTES),
    )
    for attempt in attempts:
        try:
            content = attempt()
        except (lzma.LZMAError, zlib.error, brotli.error):
            continue
        if content:
            yield content


def _read_summary(path: Path) -> tuple[dict[str, Any], str | None]:
    """Return submission.json and None, or {} and the reason why it cannot be read."""
    if not path.is_file():
        return {}, "does not exist"
    try:
        return read_json_object(path, errors="replace"), None
    except ValueError as error:
        return {}, str(error).removeprefix(f"{path} ")


def _read_logs(path: Path, files: Mapping[str, int]) -> Iterator[Log]:
    for name in files:
        if name.endswith((".log", ".txt")) and "requirements" not in name:
            log = parse_log(name, (path / name).read_text(encoding="utf-8", errors="replace"))
            if log is not None:
                yield log
