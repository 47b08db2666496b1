"""The shell around every stage: arguments, parameters, log, atomic outputs, errors.

A stage declares what it reads and writes (`Stage`), and a `main(run)` that does the work. `launch`
parses the command line, reads the parameters, and calls `main` with a `Run`, whose `output` is a
staging folder inside the real output folder. Each output is renamed into place when all are
complete, so none is half-written; a process killed during the renames can leave old and new ones
together.

A ValueError or a missing file is a user error: one line and exit code 2. The loss of another rank
is one line and exit code 1. Any other exception is a defect and keeps its traceback.
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

from stages.common import clock, config, cpu_math, environment
from stages.common.cli_errors import USER_ERROR
from stages.common.failure_detector import is_local_rank_zero, write_torchelastic_error
from stages.common.progress import Logger
from stages.common.rendezvous import announce_failure

P = TypeVar("P")
PARAMETER_FILE = Path("params.yaml")
MEASURED_OUTPUTS = ("log.txt", "timing.json")  # written for every stage; they differ from run to run
STAGING = ".partial"  # folder inside the output folder


@dataclass(frozen=True)
class Stage(Generic[P]):
    """Declaration of a stage: its name, parameters, inputs and outputs.

    `reads` maps the name of an option to its default path (`train` becomes `--train
    artifacts/tokenize/train`); `writes` names the files and folders in the output folder, apart
    from MEASURED_OUTPUTS.
    """

    name: str
    summary: str
    params: type[P]
    reads: Mapping[str, Path]
    writes: tuple[str, ...]
    add_options: Callable[[argparse.ArgumentParser], None] | None = None


@dataclass
class Run(Generic[P]):
    """One run of a stage: parameters, inputs, staging folder, log, and measurements for timing.json."""

    stage: Stage[P]
    params: P
    arguments: argparse.Namespace
    output: Path
    logger: Logger
    timing: dict[str, Any] = field(default_factory=dict)

    @property
    def is_main(self) -> bool:
        """True on the process that writes the outputs: rank 0."""
        return self.logger.is_main

    def path(self, name: str) -> Path:
        """The path of the input `name`; a ValueError that says how to make it when it does not exist."""
        path: Path = getattr(self.arguments, name)
        if path.exists():
            return path
        advice = "check the path"
        if path.parts[0] == "artifacts" and len(path.parts) > 1:
            option = name.replace("_", "-")
            advice = f"run `dvc repro {path.parts[1]}` first, or name another with --{option}"
        raise ValueError(f"{path} does not exist: {advice}")

    def require_inputs(self) -> None:
        """Raise ValueError unless all inputs exist."""
        for name in self.stage.reads:
            self.path(name)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write an output as canonical JSON."""
        if self.is_main:
            (self.output / name).write_text(canonical_json(value), encoding="utf-8")

    def write_bytes(self, name: str, value: bytes) -> None:
        """Write an output from its bytes; only rank 0 writes."""
        if self.is_main:
            (self.output / name).write_bytes(value)

    def write_text(self, name: str, value: str) -> None:
        """Write an output as UTF-8."""
        self.write_bytes(name, value.encode("utf-8"))

    def write_failure_report(self, name: str, value: str) -> Path:
        """Write a report of a run that is about to fail into the output folder itself; returns its path.

        It is not an output of the stage, and stays until a later run calls `remove_failure_reports`.
        """
        path = self.output.parent / name
        if self.is_main:
            path.write_text(value, encoding="utf-8")
        return path

    def remove_failure_reports(self, *names: str) -> None:
        """Remove the reports that an earlier run wrote with `write_failure_report`."""
        if self.is_main:
            for name in names:
                (self.output.parent / name).unlink(missing_ok=True)


def canonical_json(value: Mapping[str, Any]) -> str:
    """JSON with sorted keys, an indent of two spaces, and a newline at the end.

    A ValueError when a number is not finite: Python would write NaN, which is not JSON.
    """
    _require_finite(value, "")
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def launch(
    stage: Stage[P],
    main: Callable[[Run[P]], None],
    argv: list[str] | None = None,
    embedded: dict[str, Any] | None = None,
    output: Path | None = None,
) -> None:
    """Run `main` as a command.

    `embedded` are raw parameters to use instead of a file (the bundle carries its own); `output` is
    the default output folder. Exits with code 2 on a user error, with code 1 when another rank or
    process was lost.
    """
    default_output = output or Path("artifacts") / stage.name
    arguments = _parser(stage, embedded is None, default_output).parse_args(argv)
    try:
        cpu_math.require_avx2()
        raw = config.read_parameters(arguments.params) if embedded is None else embedded
        params = config.build(config.override(raw, arguments.set), stage.params)
        _run(stage, main, params, arguments)
    except (ValueError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        _exit(stage, error, USER_ERROR)
    except (ConnectionError, ChildProcessError) as error:
        _exit(stage, error, 1)


def _exit(stage: Stage[Any], error: Exception, code: int) -> NoReturn:
    """Print the error as one line, report it to torchrun and to the other ranks, and exit.

    A user error usually occurs on every rank, and rank 0 prints it. If rank 0 does not have it, the
    process that ran torchrun does. The loss of a rank is printed once on each machine, by local
    rank 0.
    """
    reason = " ".join(str(error).split())
    is_user_error = code == USER_ERROR
    should_print = _is_main_process() if is_user_error else is_local_rank_zero()
    if should_print:
        sys.stderr.write(f"error: {stage.name}: {reason}\n")

    write_torchelastic_error(reason)
    if is_user_error:
        # Ranks that wait in the rendezvous learn why this one will not come.
        announce_failure(reason)
    raise SystemExit(code) from None


def _run(stage: Stage[P], main: Callable[[Run[P]], None], params: P, arguments: argparse.Namespace) -> None:
    """Call `main` with a staging folder; on rank 0, write the log and timing.json and publish the outputs.

    The staging folder is removed at the end, after an error too. Other ranks get no log, and write
    no outputs.
    """
    final: Path = arguments.output
    staging = final / STAGING
    if not _is_main_process():
        main(Run(stage, params, arguments, staging, Logger(is_main=False)))
        return

    # The process that runs torchrun keeps its log.txt open in this folder. On NFS an open file
    # cannot be removed, so the folder may remain; mkdir accepts that.
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True, exist_ok=True)
    try:
        with (staging / "log.txt").open("w", encoding="utf-8") as log_file:
            run = Run(stage, params, arguments, staging, Logger(log_file=log_file))
            main(run)
            run.logger.log(f"{stage.name}: done")
        timing = {"process_seconds": clock.process_seconds()} | environment.run_environment() | run.timing
        run.write_json("timing.json", timing)
        _publish(staging, final, stage.writes + MEASURED_OUTPUTS)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, final: Path, names: tuple[str, ...]) -> None:
    """Rename each output from the staging folder into the output folder, when all are there.

    A process killed between two renames leaves old and new outputs together.
    """
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
        help="override one parameter; can be given several times",
    )

    for name, path in stage.reads.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=Path, default=path, metavar="PATH", help="input")
    parser.add_argument("--output", type=Path, default=output, metavar="DIR", help="folder of the outputs")
    if stage.add_options is not None:
        stage.add_options(parser)
    return parser


def _require_finite(value: Any, key: str) -> None:
    """Raise ValueError, with the dotted key, for a float in `value` that is not finite."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            _require_finite(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _require_finite(item, f"{key}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} is {value}; a result must be a finite number")
