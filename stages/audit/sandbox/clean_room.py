"""B14, the clean room: the artifact scores in an empty folder, with only itself and the validation shards, and an outside clock running.

The room holds the counted files, the shards and the tokenizer, read-only; no network, no training data, no home, none of the caller's
environment. What is opened is held against what a run may open: the room itself, the interpreter with its packages, and the system. The
time is taken from before the process is made to its last output, so that a timer that was started late falls short of it, and to its end
for the budget. How far the system let us go stands in the evidence; what could not be enforced or watched is "cannot tell".
"""

import hashlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.audit.sandbox import sandbox
from stages.audit.sandbox.sandbox import Means, Seen
from stages.audit.verdict import Outcome, Verdict, outcome

SYSTEM = (
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
LATE_SECONDS = 5.0  # that an artifact's clock may fall short of ours: what it writes after it has asked, and the start of the watchers
LISTED = 3  # files that a sentence names
NAME = "clean room"


@dataclass(frozen=True)
class Artifact:
    """What is handed in, and how it is made to score."""

    counted: Mapping[str, Path]  # name in the room to file: train_gpt.py and model.bin
    data: Mapping[str, Path]  # likewise, files and folders: data/val, data/tokenizer.model
    command: tuple[str, ...] = ("train_gpt.py", "eval")  # for the interpreter
    output: str = "eval"  # where metrics.json and timing.json are then


@dataclass(frozen=True)
class Claim:
    """What the artifact's authors say of its run."""

    metric: str  # the key in metrics.json
    value: float
    budget_seconds: float
    tolerance: float = 0.0  # of the value


@dataclass(frozen=True)
class Visit:
    """What a run in the room did and left."""

    seen: Seen
    room: Path  # which is gone
    sizes: Mapping[str, int]  # bytes of the counted files
    changed: tuple[str, ...]  # inputs that are not what they were
    written: float  # seconds from the process's start to its last output
    metrics: Mapping[str, Any] = field(default_factory=dict)
    timing: Mapping[str, Any] = field(default_factory=dict)


def visit(
    artifact: Artifact,
    covered: Sequence[Path] = (),
    means: Means | None = None,
    environment: Mapping[str, str] | None = None,
    patience_seconds: float = 3600.0,
) -> Visit:
    """Run the artifact in a room of its own; folders in `covered` (training data, the repository) are empty for it where mounts allow.

    The interpreter stays where it is, also within them. `environment` is handed on to the run.
    """
    means = sandbox.available() if means is None else means
    with tempfile.TemporaryDirectory() as room_name, tempfile.TemporaryDirectory() as log_name:
        room, log = Path(room_name).resolve(), Path(log_name).resolve()
        inputs = _furnish(room, {**artifact.counted, **artifact.data})
        before = {path: _digest(path) for path in inputs}
        sizes = {name: (room / name).stat().st_size for name in artifact.counted}
        command = [sys.executable, *artifact.command]
        seen = sandbox.run(command, room, log, means, inputs, covered, environment or {}, patience_seconds)
        changed = [
            str(path.relative_to(room))
            for path, was in before.items()
            if not path.is_file() or _digest(path) != was
        ]
        output = room / artifact.output
        # Of a file's times the kernel sets st_ctime alone: nobody can set it back.
        written = max((path.stat().st_ctime for path in output.rglob("*")), default=seen.began) - seen.began
        return Visit(
            seen,
            room,
            sizes,
            tuple(changed),
            written,
            _json(output / "metrics.json"),
            _json(output / "timing.json"),
        )


def check_clean_room(seen: Visit, claim: Claim, late_seconds: float = LATE_SECONDS) -> list[Verdict]:
    """B14: the run came out as claimed, touched nothing else, spoke to nobody, and took the time that it says."""
    return [
        _check_result(seen, claim),
        _check_files(seen),
        _check_network(seen),
        _check_clock(seen, claim, late_seconds),
    ]


def outsiders(seen: Visit) -> list[Path]:
    """What was opened and is neither the room's, nor the interpreter's, nor the system's."""
    allowed = [seen.room, *sandbox.interpreter(), *map(Path, SYSTEM)]
    return sorted(path for path in seen.seen.files if not any(_within(path, place) for place in allowed))


def _check_result(seen: Visit, claim: Claim) -> Verdict:
    value, code = seen.metrics.get(claim.metric), seen.seen.returncode
    parts = " + ".join(f"{size} ({name})" for name, size in seen.sizes.items())
    result: Outcome = "fail"
    if code is None:
        evidence = "the run had not ended when patience did"
    elif code:
        said = " ".join(seen.seen.output.split())[-200:]
        evidence = f"with {parts} bytes and the data alone, the run ended with exit code {code}: {said}"
    elif seen.changed:
        evidence = f"the run changed its inputs: {', '.join(seen.changed[:LISTED])}"
    elif not isinstance(value, (int, float)):
        evidence = f"the run left no metrics.json with {claim.metric}"
    else:
        result = outcome(abs(value - claim.value) <= claim.tolerance)
        evidence = f"with {parts} bytes and the data alone, {claim.metric} is {value!r}"
    number = float(value) if isinstance(value, (int, float)) else math.nan
    sees = "artifacts that need another file, write over their data, or give another number than was claimed"
    return _verdict(
        "runs from the counted files alone",
        result,
        evidence,
        number,
        claim.value,
        claim.tolerance,
        sees,
        "what the weights know",
    )


def _check_files(seen: Visit) -> Verdict:
    outside = outsiders(seen)
    result: Outcome = "fail" if outside else "pass" if seen.seen.means.traced else "cannot tell"
    listed = ", ".join(map(str, outside[:LISTED]))
    evidence = f"opened outside the room, the interpreter and the system: {listed or 'nothing'} ({len(outside)}); {seen.seen.means}"
    return _verdict(
        "opened files",
        result,
        evidence,
        len(outside),
        0,
        0,
        sees="files outside the counted set, training shards, the repository, caches, even if only looked for",
        blind="files hidden among the interpreter's packages or the system's; without strace, what native code opens",
    )


def _check_network(seen: Visit) -> Verdict:
    means, spoken = seen.seen.means, sorted(seen.seen.addresses)
    result: Outcome = "fail" if spoken else "pass" if means.network or means.traced else "cannot tell"
    evidence = f"hosts looked up or spoken to: {', '.join(spoken[:LISTED]) or 'none'}; {means}"
    return _verdict(
        "no network",
        result,
        evidence,
        len(spoken),
        0,
        0,
        sees="downloads, and services asked while scoring",
        blind="a process on this machine, reached through a socket in a file; names that native code looks up",
    )


def _check_clock(seen: Visit, claim: Claim, late_seconds: float) -> Verdict:
    """Measured seconds are told when they convict; a verdict that passes has the same bytes on a faster machine."""
    said, took = seen.timing.get("evaluation_seconds", seen.timing.get("process_seconds")), seen.seen.seconds
    known = isinstance(said, (int, float)) and not isinstance(said, bool)
    result: Outcome = "pass"
    evidence = f"from the process's start to its end within {claim.budget_seconds:g} seconds, and its own clock agrees"
    if took > claim.budget_seconds:
        result, evidence = (
            "fail",
            f"from the process's start to its end {took:.1f} seconds, {claim.budget_seconds:g} are allowed",
        )
    elif known and float(said) < seen.written - late_seconds:
        took, result = seen.written, "fail"
        evidence = f"it says {said:.1f} seconds, and wrote its last output after {took:.1f}: its timer was started late, or stopped early"
    elif not known:
        result, evidence = (
            "cannot tell",
            "it left no timing.json with its evaluation_seconds; by our clock it kept to its budget",
        )
    numbers = (f"{took:.1f} s", f"{said} s") if result == "fail" else ("within", "within")
    sees = "timers started late or stopped early, seconds spent before the first line or in other processes, runs over their time"
    return _verdict(
        "wall clock",
        result,
        evidence,
        *numbers,
        late_seconds,
        sees,
        "a machine that is faster than the challenge's",
    )


def _verdict(
    name: str,
    result: Outcome,
    evidence: str,
    saw: float | str,
    expected: float | str,
    bound: float,
    sees: str,
    blind: str,
) -> Verdict:
    return Verdict(
        "B14", name, NAME, ("clean room",), result, evidence, saw, expected, bound, (), sees, blind
    )


def _furnish(room: Path, wanted: Mapping[str, Path]) -> list[Path]:
    """Copy files and folders to where they are wanted, read-only; the files."""
    files = []
    for name, source in wanted.items():
        inside = (
            [path for path in sorted(source.rglob("*")) if path.is_file()] if source.is_dir() else [source]
        )
        for path in inside:
            target = room / name / path.relative_to(source) if source.is_dir() else room / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            target.chmod(0o444)
            files.append(target)
    return files


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _within(path: Path, place: Path) -> bool:
    return path.is_relative_to(place)


def _json(path: Path) -> dict[str, Any]:
    """A JSON object that the run wrote; nothing where it wrote none."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}
