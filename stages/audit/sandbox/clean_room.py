"""B14, the clean room: the artifact scores in an empty folder, with nothing but the validation shards.

The folder holds the counted files, the shards and the tokenizer, read-only; there is no network, no
training data, no home and nothing of the caller's environment. Files that are opened are compared with
those that a run may open: the folder itself, the interpreter with its packages, and the system. The
time is measured from before the process is created to its last output, so that a timer that was started
late falls short of it, and to its end for the budget. The evidence says how far the system allowed the
sandbox; what could not be enforced or traced is "cannot tell".
"""

import hashlib
import math
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.audit.sandbox import sandbox
from stages.audit.sandbox.sandbox import Capabilities, Trace
from stages.audit.verdict import Check, Verdict, Words
from stages.common.json_object import read_json_object

COUNTED_FILES_ALONE = Check(
    "B14",
    "runs from the counted files alone",
    conditions=("clean room",),
    sees="artifacts that need another file, write over their data, or give another number than was claimed",
    blind="what the weights contain",
)
OPENED_FILES = Check(
    "B14",
    "opened files",
    conditions=("clean room",),
    sees="files outside the counted set, training shards, the repository, caches, even if only looked for",
    blind="files hidden among the interpreter's packages or the system's; without strace, "
    "files that native code opens",
)
NO_NETWORK = Check(
    "B14",
    "no network",
    conditions=("clean room",),
    sees="downloads, and services that are used while scoring",
    blind="a process on this machine, reached through a socket in a file; names that native code looks up",
)
WALL_CLOCK = Check(
    "B14",
    "wall clock",
    conditions=("clean room",),
    sees="timers started late or stopped early, seconds spent before the first line or in other processes, "
    "runs over their time",
    blind="a machine that is faster than the challenge's",
    words=Words(saw="within", expected="within"),
)
SYSTEM = (  # folders of the system that a run may read
    "/bin",
    "/dev",
    "/etc",
    "/lib",
    "/lib32",
    "/lib64",
    "/proc",
    "/sbin",
    "/sys",
    "/usr",
    "/var/cache/ldconfig",
)
# Seconds by which an artifact's clock may fall short of the audit's: start of the tracers, and what it
# writes after it has read its clock.
LATE_SECONDS = 5.0
MAX_LISTED = 3  # names in a sentence of evidence
QUOTED_OUTPUT_CHARACTERS = 200  # of a failed run's output that are quoted


@dataclass(frozen=True)
class AuditedArtifact:
    """Counted files of a submission, and the command by which they score."""

    counted: Mapping[str, Path]  # name in the clean room -> file: train_gpt.py and model.bin
    data: Mapping[str, Path]  # likewise, files and folders: data/val, data/tokenizer.model
    command: tuple[str, ...] = ("train_gpt.py", "eval")  # arguments of the interpreter
    output: str = "eval"  # folder in the clean room with metrics.json and timing.json afterwards


@dataclass(frozen=True)
class ClaimedMetric:
    """Result that the artifact's authors claim."""

    metric: str  # the key in metrics.json
    value: float
    budget_seconds: float
    tolerance: float = 0.0  # of the value


@dataclass(frozen=True)
class CleanRoomRun:
    """Record of a run in the clean room, and its results."""

    trace: Trace
    room: Path  # the folder, which no longer exists
    sizes: Mapping[str, int]  # bytes of the counted files
    changed: tuple[str, ...]  # inputs that were changed or removed
    written: float  # seconds from the process's start to its last output
    metrics: Mapping[str, Any] = field(default_factory=dict)
    timing: Mapping[str, Any] = field(default_factory=dict)


def run_in_clean_room(
    artifact: AuditedArtifact,
    masked: Sequence[Path] = (),
    capabilities: Capabilities | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float = 3600.0,
) -> CleanRoomRun:
    """Run the artifact in a sandbox with a folder of its own.

    masked: folders (training data, the repository) that are empty for it if mounts are allowed, except
    for the interpreter; capabilities: those of the system by default; environment: variables that the
    run gets.
    """
    capabilities = sandbox.detect_capabilities() if capabilities is None else capabilities
    with tempfile.TemporaryDirectory() as room_name, tempfile.TemporaryDirectory() as log_name:
        room = Path(room_name).resolve()
        log = Path(log_name).resolve()
        inputs = _copy_read_only(room, {**artifact.counted, **artifact.data})
        digests = {path: _digest(path) for path in inputs}
        sizes = {name: (room / name).stat().st_size for name in artifact.counted}

        command = [sys.executable, *artifact.command]
        trace = sandbox.run_sandboxed(
            command, room, log, capabilities, inputs, masked, environment or {}, timeout_seconds
        )

        changed = [
            str(path.relative_to(room))
            for path, digest in digests.items()
            if not path.is_file() or _digest(path) != digest
        ]
        # Of a file's times the kernel alone sets st_ctime: nobody can set it back.
        output = room / artifact.output
        written_at = max((path.stat().st_ctime for path in output.rglob("*")), default=trace.started_at)
        return CleanRoomRun(
            trace,
            room,
            sizes,
            tuple(changed),
            written_at - trace.started_at,
            metrics=_read_output(output / "metrics.json"),
            timing=_read_output(output / "timing.json"),
        )


def check_clean_room(
    subject: str, run: CleanRoomRun, claim: ClaimedMetric, late_seconds: float = LATE_SECONDS
) -> list[Verdict]:
    """B14: a run in the clean room confirms the claim.

    It gave the claimed number, opened nothing else, contacted nobody, and took the time that it states.
    """
    return [
        _check_result(subject, run, claim),
        _check_files(subject, run),
        _check_network(subject, run),
        _check_clock(subject, run, claim, late_seconds),
    ]


def unexpected_files(run: CleanRoomRun) -> list[Path]:
    """List the files that were opened outside the clean room, the interpreter and the system."""
    allowed = [run.room, *sandbox.interpreter_folders(), *map(Path, SYSTEM)]
    return sorted(
        path for path in run.trace.files if not any(path.is_relative_to(folder) for folder in allowed)
    )


def _check_result(subject: str, run: CleanRoomRun, claim: ClaimedMetric) -> Verdict:
    value = run.metrics.get(claim.metric)
    parts = " + ".join(f"{size} ({name})" for name, size in run.sizes.items())

    # The run itself first, then its result.
    holds = False
    if run.trace.returncode is None:
        evidence = "the run had not ended at its timeout"
    elif run.trace.returncode:
        # The reason is usually at the end of its output.
        printed = " ".join(run.trace.output.split())[-QUOTED_OUTPUT_CHARACTERS:]
        evidence = (
            f"with {parts} bytes and the data alone, "
            f"the run ended with exit code {run.trace.returncode}: {printed}"
        )
    elif run.changed:
        evidence = f"the run changed its inputs: {', '.join(run.changed[:MAX_LISTED])}"
    elif not isinstance(value, (int, float)):
        evidence = f"the run left no metrics.json with {claim.metric}"
    else:
        holds = abs(value - claim.value) <= claim.tolerance
        evidence = f"with {parts} bytes and the data alone, {claim.metric} is {value!r}"

    return Verdict.of(
        COUNTED_FILES_ALONE,
        subject,
        holds,
        evidence,
        # The number that the run gave, and the claimed one.
        saw=float(value) if isinstance(value, (int, float)) else math.nan,
        expected=claim.value,
        bound=claim.tolerance,
    )


def _check_files(subject: str, run: CleanRoomRun) -> Verdict:
    unexpected = unexpected_files(run)
    listed = ", ".join(map(str, unexpected[:MAX_LISTED])) or "nothing"
    evidence = (
        "opened outside the clean room, the interpreter and the system: "
        f"{listed} ({len(unexpected)}); {run.trace.capabilities}"
    )
    if not unexpected and not run.trace.capabilities.traced:
        return Verdict.cannot_tell(OPENED_FILES, subject, evidence, saw=0, expected=0, bound=0)
    return Verdict.of(
        OPENED_FILES, subject, not unexpected, evidence, saw=len(unexpected), expected=0, bound=0
    )


def _check_network(subject: str, run: CleanRoomRun) -> Verdict:
    contacted = sorted(run.trace.addresses)
    capabilities = run.trace.capabilities
    listed = ", ".join(contacted[:MAX_LISTED]) or "none"
    evidence = f"hosts looked up or contacted: {listed}; {capabilities}"
    if not contacted and not (capabilities.network or capabilities.traced):
        return Verdict.cannot_tell(NO_NETWORK, subject, evidence, saw=0, expected=0, bound=0)
    return Verdict.of(NO_NETWORK, subject, not contacted, evidence, saw=len(contacted), expected=0, bound=0)


def _check_clock(subject: str, run: CleanRoomRun, claim: ClaimedMetric, late_seconds: float) -> Verdict:
    """Compare the run's own clock with the outside one.

    Measured seconds are in the evidence of a failure only: a verdict that passes has the same bytes on
    a faster machine.
    """
    stated = run.timing.get("evaluation_seconds", run.timing.get("process_seconds"))
    is_stated = isinstance(stated, (int, float)) and not isinstance(stated, bool)
    stated_seconds = float(stated) if is_stated else None

    if run.trace.seconds > claim.budget_seconds:
        evidence = (
            f"from the process's start to its end {run.trace.seconds:.1f} seconds, "
            f"{claim.budget_seconds:g} are allowed"
        )
        return Verdict.failed(
            WALL_CLOCK, subject, evidence, saw=run.trace.seconds, expected=stated_seconds, bound=late_seconds
        )

    if stated_seconds is None:
        evidence = (
            "it left no timing.json with its evaluation_seconds; by the audit's clock it kept to its budget"
        )
        return Verdict.cannot_tell(WALL_CLOCK, subject, evidence, bound=late_seconds)

    # The run's own clock must not show less than passed until its last output.
    if stated_seconds < run.written - late_seconds:
        evidence = (
            f"it states {stated_seconds:.1f} seconds, and wrote its last output after {run.written:.1f}: "
            "its timer was started late, or stopped early"
        )
        return Verdict.failed(
            WALL_CLOCK, subject, evidence, saw=run.written, expected=stated_seconds, bound=late_seconds
        )

    evidence = (
        f"from the process's start to its end within {claim.budget_seconds:g} seconds, "
        "and its own clock agrees"
    )
    return Verdict.passed(WALL_CLOCK, subject, evidence, bound=late_seconds)


def _copy_read_only(room: Path, wanted: Mapping[str, Path]) -> list[Path]:
    """Copy files and folders into the clean room under the wanted names, read-only; returns the copies."""
    copied = []
    for name, source in wanted.items():
        if source.is_dir():
            files = [path for path in sorted(source.rglob("*")) if path.is_file()]
            targets = [room / name / path.relative_to(source) for path in files]
        else:
            files = [source]
            targets = [room / name]
        for path, target in zip(files, targets, strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            target.chmod(0o444)
            copied.append(target)
    return copied


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_output(path: Path) -> dict[str, Any]:
    """Read a JSON object that the run wrote; empty if it wrote none."""
    try:
        return read_json_object(path)
    except (OSError, ValueError):
        return {}
