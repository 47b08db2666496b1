"""The shell around every stage: arguments, parameters, log, atomic outputs, errors.

A stage declares what it reads and writes (`Stage`) and a `main(run)` that does it. `launch` gives that main a `Run`, whose `output` is a
staging folder inside the real one; only when main returns is each output renamed into place, so that a failed or killed stage leaves
nothing half-written. A ValueError or a missing file becomes one line and exit code 2, the death of another rank one line and exit code 1.
"""

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from stages.common import clock, config, cpu_math, environment, parallel
from stages.common.progress import Report

P = TypeVar("P")
PARAMETER_FILE = Path("params.yaml")
MEASURED_OUTPUTS = ("log.txt", "timing.json")
STAGING = ".partial"


@dataclass(frozen=True)
class Stage(Generic[P]):
    """What a stage is called, takes, reads and writes.

    `reads` maps the name of an option to its default path (`train` becomes `--train artifacts/tokenize/train`); `writes` names the
    files and folders that appear in the output folder, log.txt and timing.json aside.
    """

    name: str
    summary: str
    params: type[P]
    reads: Mapping[str, Path]
    writes: tuple[str, ...]
    add_options: Callable[[argparse.ArgumentParser], None] | None = None


@dataclass
class Run(Generic[P]):
    """One run of a stage: its parameters, its inputs, its staging folder, its report, what it measured.

    `is_main` is False on the ranks of a distributed run that must not write.
    """

    stage: Stage[P]
    params: P
    arguments: argparse.Namespace
    output: Path
    report: Report
    timing: dict[str, Any] = field(default_factory=dict)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the outputs."""
        return self.report.is_main

    def path(self, name: str) -> Path:
        """The path of the input `name`; a ValueError that says how to make it when it does not exist."""
        path: Path = getattr(self.arguments, name)
        if not path.exists():
            maker = path.parts[1] if path.parts[0] == "artifacts" and len(path.parts) > 1 else None
            hint = (
                f"run `dvc repro {maker}` first, or name another with --{name.replace('_', '-')}"
                if maker
                else "check the path"
            )
            raise ValueError(f"{path} does not exist: {hint}")
        return path

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write an output as canonical JSON."""
        if self.is_main:
            (self.output / name).write_text(canonical_json(value), encoding="utf-8")

    def write_bytes(self, name: str, value: bytes) -> None:
        """Write an output as it is."""
        if self.is_main:
            (self.output / name).write_bytes(value)

    def write_text(self, name: str, value: str) -> None:
        """Write an output as UTF-8."""
        self.write_bytes(name, value.encode("utf-8"))


def canonical_json(value: Mapping[str, Any]) -> str:
    """Sorted keys, two spaces, a newline at the end; numbers must be finite (DVC would print invalid JSON otherwise)."""
    _require_finite(value, "")
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def launch(
    stage: Stage[P],
    main: Callable[[Run[P]], None],
    argv: list[str] | None = None,
    embedded: dict[str, Any] | None = None,
    output: Path | None = None,
) -> None:
    """Run `main` as a command: parse, load, run, rename outputs into place. Exits 2, with one line, on a user's error.

    `embedded` is a raw parameter mapping to use instead of a file (the bundle carries one); `output` the default output folder.
    """
    arguments = _parser(stage, embedded is None, output or Path("artifacts") / stage.name).parse_args(argv)
    try:
        cpu_math.require_avx2()
        raw = config.read(arguments.params) if embedded is None else embedded
        params = config.build(config.override(raw, arguments.set), stage.params)
        _run(stage, main, params, arguments)
    except (ValueError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        _end(stage, error, parallel.USER_ERROR)
    except (ConnectionError, ChildProcessError) as error:
        _end(stage, error, 1)


def _end(stage: Stage[Any], error: Exception, code: int) -> NoReturn:
    """Say why in one line: once what every rank may see, once on each machine that a rank is lost."""
    reason = " ".join(str(error).split())
    own = code == parallel.USER_ERROR
    if _is_main_process() if own else parallel.speaks_for_its_machine():
        sys.stderr.write(f"error: {stage.name}: {reason}\n")
    parallel.leave_word(reason)
    if own:
        parallel.excuse(reason)
    raise SystemExit(code) from None


def _run(stage: Stage[P], main: Callable[[Run[P]], None], params: P, arguments: argparse.Namespace) -> None:
    final: Path = arguments.output
    staging = final / STAGING
    if not _is_main_process():
        main(Run(stage, params, arguments, staging, Report(is_main=False)))
        return
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(
        parents=True, exist_ok=True
    )  # NFS keeps a removed file, and its folder, while the process that runs torchrun has it open
    try:
        with (staging / "log.txt").open("w", encoding="utf-8") as log_file:
            run = Run(stage, params, arguments, staging, Report(log_file=log_file))
            main(run)
            run.report.log(f"{stage.name}: done")
        run.write_json(
            "timing.json", {"process_seconds": clock.process_seconds()} | environment.facts() | run.timing
        )
        _publish(staging, final, stage.writes + MEASURED_OUTPUTS)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, final: Path, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not (staging / name).exists()]
    assert not missing, f"the stage returned without writing {missing}"
    for name in names:
        target = final / name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        (staging / name).replace(target)


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _parser(stage: Stage[Any], with_params: bool, output: Path) -> argparse.ArgumentParser:
    reads = ", ".join(stage.reads) or "only source and parameters"
    writes = ", ".join(stage.writes + MEASURED_OUTPUTS)
    parser = argparse.ArgumentParser(
        prog=f"python -m stages.{stage.name}" if with_params else f"python {stage.name}.py",
        description=f"{stage.summary} Reads {reads}. Writes {writes}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    if with_params:
        parser.add_argument(
            "--params", type=Path, default=PARAMETER_FILE, metavar="FILE", help="parameter file"
        )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="override one parameter; may be given again",
    )
    for name, path in stage.reads.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=Path, default=path, metavar="PATH", help="input"
        )
    parser.add_argument("--output", type=Path, default=output, metavar="DIR", help="where the outputs go")
    if stage.add_options is not None:
        stage.add_options(parser)
    return parser


def _require_finite(value: Any, key: str) -> None:
    if isinstance(value, Mapping):
        for name, item in value.items():
            _require_finite(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _require_finite(item, f"{key}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} is {value}; a result must be a finite number")
