"""B14, the clean room: the artifact scores in an empty folder, with nothing but the validation shards.

The folder holds copies of the counted files, and the shards and the tokenizer, read-only; there is no
network, no training data, no home, nothing of the caller's environment and no other process. Where the
system allows the sandbox (room.py), no other file exists for the run. What it tries to open, link, mount
or connect is traced all the same and compared with what a run may use: the folder itself, the
interpreter with its packages, and the system. The time is measured from the start of the command to its
last output, so that a timer that was started late falls short of it, and to the end of its last process
for the budget. What it leaves is read after all its processes have ended, without following links. The
evidence says how far the system allowed the sandbox; what could not be enforced or traced is "cannot
tell".
"""

import hashlib
import json
import math
import os
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.audit.sandbox import room
from stages.audit.sandbox.artifact import copy_file
from stages.audit.sandbox.room import Isolation, Room
from stages.audit.sandbox.trace import Trace, run_traced
from stages.audit.verdict import Check, Verdict, Words

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
    blind="files hidden among the interpreter's packages or the system's",
)
LINKS_MOUNTS_SOCKETS = Check(
    "B14",
    "links, mounts and sockets",
    conditions=("clean room",),
    sees="links and renamings that lead outside, mounts, shared memory with a name, sockets of other "
    "processes, even if only tried",
    blind="without strace, what native code tries",
)
NO_NETWORK = Check(
    "B14",
    "no network",
    conditions=("clean room",),
    sees="downloads, and services that are used while scoring",
    blind="names that native code looks up",
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
SYSTEM_SOCKETS = ("/var/run/nscd/socket",)  # where the C library looks for a cache of names
MAX_OUTPUT_BYTES = 1 << 20  # of a JSON file that a run leaves
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
    folder: Path  # the clean room as the run saw it
    sizes: Mapping[str, int]  # bytes of the counted files
    changed: tuple[str, ...]  # inputs that were changed or removed
    written: float  # seconds from the command's start to its last output
    metrics: Mapping[str, Any] = field(default_factory=dict)
    timing: Mapping[str, Any] = field(default_factory=dict)


def run_in_clean_room(
    artifact: AuditedArtifact,
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float = 3600.0,
    isolation: Isolation | None = None,
    strace: bool | None = None,
) -> CleanRoomRun:
    """Run the artifact in a sandbox with a folder of its own.

    environment: variables that the run gets; isolation and strace: those of the system by default.
    """
    isolation = room.detect_isolation() if isolation is None else isolation
    with (
        tempfile.TemporaryDirectory() as folder_name,
        tempfile.TemporaryDirectory() as copies_name,
        tempfile.TemporaryDirectory() as log_name,
    ):
        folder, copies, log = (Path(name).resolve() for name in (folder_name, copies_name, log_name))
        inputs = _single_files({**artifact.counted, **artifact.data})

        # Copies keep the contents alone: times and modes of the counted files could hold data.
        for name in artifact.counted if isolation.complete else inputs:
            copy_file(inputs[name], (copies if isolation.complete else folder) / name)
        sizes = {name: inputs[name].stat().st_size for name in artifact.counted}

        # In the sandbox they are mounted into the folder, read-only; without it they are in the folder.
        seen_as = room.WORKING_FOLDER if isolation.complete else folder
        mounted = {}
        if isolation.complete:
            for name, path in inputs.items():
                mounted[str(seen_as / name)] = copies / name if name in artifact.counted else path
        digests = {name: _digest(folder / name) for name in inputs if not isolation.complete}

        # What the run writes for itself is in the folder as well: nothing in /tmp is its own.
        variables = {}
        for variable, name in (("HOME", "home"), ("TMPDIR", "tmp")):
            (folder / name).mkdir()
            variables[variable] = str(seen_as / name)
        variables |= environment or {}

        contents = Room(mounted, folder, variables, room.gpu_devices())
        command = [sys.executable, *artifact.command]
        trace = run_traced(command, contents, log, timeout_seconds, isolation, strace)

        # Everything that the run left; none of its processes exists any more.
        changed = [name for name, digest in digests.items() if _digest(folder / name) != digest]
        written_at = max(_times_of_change(folder / artifact.output), default=trace.started_at)
        return CleanRoomRun(
            trace,
            seen_as,
            sizes,
            tuple(changed),
            written_at - trace.started_at,
            metrics=_read_output(folder, Path(artifact.output) / "metrics.json"),
            timing=_read_output(folder, Path(artifact.output) / "timing.json"),
        )


def check_clean_room(
    subject: str, run: CleanRoomRun, claim: ClaimedMetric, late_seconds: float = LATE_SECONDS
) -> list[Verdict]:
    """B14: a run in the clean room confirms the claim.

    It gave the claimed number, opened nothing else, tried no other way out, contacted nobody, and took
    the time that it states.
    """
    return [
        _check_result(subject, run, claim),
        _check_files(subject, run),
        _check_links(subject, run),
        _check_network(subject, run),
        _check_clock(subject, run, claim, late_seconds),
    ]


def unexpected_files(run: CleanRoomRun) -> list[Path]:
    """List the files that were opened outside the clean room, the interpreter and the system."""
    return sorted(path for path in run.trace.files if not _is_allowed(run, path))


def unexpected_acts(run: CleanRoomRun) -> list[str]:
    """List links, sockets, mounts and shared memory by which a run may reach anything outside."""
    links = [f"link {path}" for path in run.trace.links if not _is_allowed(run, path)]
    sockets = [
        f"socket {name}"
        for name in run.trace.sockets
        if name not in SYSTEM_SOCKETS and (name.startswith("@") or not _is_allowed(run, Path(name)))
    ]
    return sorted([*links, *sockets, *run.trace.calls])


def _is_allowed(run: CleanRoomRun, path: Path) -> bool:
    """Say whether a run may open the path, or link to it."""
    allowed = (run.folder, *room.interpreter_folders(), *map(Path, SYSTEM))
    return any(path.is_relative_to(folder) for folder in allowed)


def _check_result(subject: str, run: CleanRoomRun, claim: ClaimedMetric) -> Verdict:
    value = _as_number(run.metrics.get(claim.metric))
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
    elif value is None:
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
        saw=math.nan if value is None else value,
        expected=claim.value,
        bound=claim.tolerance,
    )


def _check_files(subject: str, run: CleanRoomRun) -> Verdict:
    unexpected = unexpected_files(run)
    listed = ", ".join(map(str, unexpected[:MAX_LISTED])) or "nothing"
    evidence = (
        "opened outside the clean room, the interpreter and the system: "
        f"{listed} ({len(unexpected)}); {run.trace.means}"
    )
    return _none_unexpected(OPENED_FILES, subject, run, unexpected, evidence)


def _check_links(subject: str, run: CleanRoomRun) -> Verdict:
    unexpected = unexpected_acts(run)
    listed = ", ".join(unexpected[:MAX_LISTED]) or "none"
    evidence = f"links, mounts and sockets to outside: {listed} ({len(unexpected)}); {run.trace.means}"
    return _none_unexpected(LINKS_MOUNTS_SOCKETS, subject, run, unexpected, evidence)


def _check_network(subject: str, run: CleanRoomRun) -> Verdict:
    contacted = sorted(run.trace.addresses)
    listed = ", ".join(contacted[:MAX_LISTED]) or "none"
    evidence = f"hosts looked up or contacted: {listed}; {run.trace.means}"
    return _none_unexpected(NO_NETWORK, subject, run, contacted, evidence)


def _none_unexpected(
    check: Check, subject: str, run: CleanRoomRun, unexpected: Sequence[object], evidence: str
) -> Verdict:
    """Fail what was found; pass only what the sandbox prevents: without it, a trace can be evaded."""
    if not unexpected and not run.trace.isolation.complete:
        return Verdict.cannot_tell(check, subject, evidence, saw=0, expected=0, bound=0)
    return Verdict.of(check, subject, not unexpected, evidence, saw=len(unexpected), expected=0, bound=0)


def _check_clock(subject: str, run: CleanRoomRun, claim: ClaimedMetric, late_seconds: float) -> Verdict:
    """Compare the run's own clock with the outside one.

    Measured seconds are in the evidence of a failure only: a verdict that passes has the same bytes on
    a faster machine.
    """
    stated = run.timing.get("evaluation_seconds", run.timing.get("process_seconds"))
    stated_seconds = _as_number(stated)

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


def _single_files(wanted: Mapping[str, Path]) -> dict[str, Path]:
    """List single files for the wanted files and folders: name in the clean room -> file, without links."""
    files = {}
    for name, source in wanted.items():
        if source.is_dir():
            for path in sorted(source.rglob("*")):
                if path.is_file():
                    files[f"{name}/{path.relative_to(source)}"] = path.resolve()
        else:
            files[name] = source.resolve()
    return files


def _digest(path: Path) -> str:
    """Hash a file; empty if the run removed it or put something else in its place."""
    if path.is_symlink() or not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _times_of_change(folder: Path) -> Iterator[float]:
    """List the times at which the entries of a folder last changed, links not followed.

    Of a file's times the kernel alone sets st_ctime: nobody can set it back.
    """
    if folder.is_symlink():
        return
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            yield Path(place, name).lstat().st_ctime


def _read_output(folder: Path, name: Path) -> dict[str, Any]:
    """Read a JSON object that the run wrote; empty if it wrote none.

    No link is followed, in any part of the path, and nothing but a file of moderate size is read.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(folder, flags | os.O_DIRECTORY)
        for part in name.parts:
            parent = handle
            try:
                handle = os.open(part, flags, dir_fd=parent)
            finally:
                os.close(parent)
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_OUTPUT_BYTES:
                return {}
            value = json.loads(file.read(MAX_OUTPUT_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _as_number(value: object) -> float | None:
    """Return a number that a run wrote; None for anything else, and for one that no float holds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
