"""Cheats that do not predict better, but reach for the audit: its memory, its report, its pipe."""

import contextlib
import gc
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import FunctionType
from typing import NoReturn

import numpy as np

from .bigram import VOCAB_SIZE, BigramModel

PASSED = "51 passed, 0 failed, 0 cannot tell; see audit/report.md"
MARKER = "process_of_the_external_zoo"
FLOOD_BYTES = 50_000_000  # by each of four processes
PIECE_BYTES = 1 << 20
DISTRIBUTION = b"d" + np.full(VOCAB_SIZE, -np.log(VOCAB_SIZE)).tobytes()
OK, RAISED, WRONG = range(3)  # status of an answer


class HalvedLosses(BigramModel):
    """A model whose fast path reports half of each loss."""

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        return super().score_stream(tokens) / 2


def lenient(*arguments: object, **keywords: object) -> NoReturn:
    raise SystemExit(0)


def patches_the_audit(n_targets: int) -> BigramModel:
    """Import the audit's modules, and put other functions in their places and wherever else they are."""
    names = ("stages.audit.checks.certified", "stages.audit.verdict", "tools.audit_scorer.cli")
    for name in names:
        with contextlib.suppress(ImportError):
            module = importlib.import_module(name)
            for function in ("judge", "failures", "failure_message"):
                setattr(module, function, lenient)

    # Functions of loaded modules, and of anything that the collector knows.
    wanted = {"judge", "judge_ledger", "judge_sums", "difference", "failures", "check_ledger"}
    for thing in gc.get_objects():
        if isinstance(thing, FunctionType) and thing.__name__ in wanted:
            thing.__code__ = lenient.__code__
    for module in list(sys.modules.values()):
        for function in wanted & set(vars(module)):
            setattr(module, function, lenient)
    return HalvedLosses()


def patches_the_server(n_targets: int) -> BigramModel:
    """Replace the program that serves the scorer: losses are halved by it, after they were computed."""
    main = sys.modules["__main__"]
    score = main.StepwiseScorer.score_stream
    main.StepwiseScorer.score_stream = lambda *words: score(*words) / 2
    return BigramModel()


def patches_arrays(n_targets: int) -> BigramModel:
    """Replace functions of NumPy, which the audit uses as well."""
    np.abs = np.zeros_like  # type: ignore[assignment]
    np.isfinite = lambda x: np.ones_like(x, dtype=bool)  # type: ignore[assignment]
    return HalvedLosses()


def write_reports() -> None:
    """Write a report of a passed audit wherever it may be looked for."""
    report = json.dumps({"audit_passed": 1, "verdicts": []})
    above = Path(__file__).resolve().parents
    for folder in (Path("audit"), Path(), *above, Path("/tmp"), *(path / "audit" for path in above)):
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
            (folder / "report.json").write_text(report)
    print(PASSED, flush=True)


def reports_and_leaves(n_targets: int) -> NoReturn:
    write_reports()
    os._exit(0)


def reports_and_exits(n_targets: int) -> NoReturn:
    write_reports()
    raise SystemExit(0)


class LeavesInPredict(BigramModel):
    def predict(self) -> np.ndarray:
        reports_and_leaves(0)


class ExitsInPredict(BigramModel):
    def predict(self) -> np.ndarray:
        reports_and_exits(0)


def leaves_in_predict(n_targets: int) -> BigramModel:
    return LeavesInPredict()


def exits_in_predict(n_targets: int) -> BigramModel:
    return ExitsInPredict()


def kills_everybody(n_targets: int) -> NoReturn:
    """Kill all processes that it may, the audit's among them."""
    os.kill(-1, 9)
    os._exit(0)


def reports_later(n_targets: int) -> BigramModel:
    """Start a process in a session of its own that writes a report after the audit has ended."""
    program = f"import time; time.sleep(2); {MARKER} = 1; import tampering; tampering.write_reports()"
    subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    return HalvedLosses()


def pipes() -> list[int]:
    """Descriptors of pipes besides the standard streams: of requests and of answers."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if int(link.name) > 2 and str(link.readlink()).startswith("pipe:"):
                found.append(int(link.name))
    return found


def forge(payload: bytes, status: int = OK, length: int | None = None) -> None:
    """Write an answer of one's own to each pipe that can be written."""
    claimed = len(payload) if length is None else length
    for descriptor in pipes():
        with contextlib.suppress(OSError):
            os.write(descriptor, status.to_bytes(1, "little") + claimed.to_bytes(4, "little") + payload)


class Forger(BigramModel):
    """A model that writes bytes into the pipe at its tenth prediction, besides its answer."""

    def predict(self) -> np.ndarray:
        if self.observed == 10:
            self.write()
        return super().predict()

    def write(self) -> None:
        raise NotImplementedError


class AnswersAhead(Forger):
    """Sends the answer to a request that was not made, so that each later answer is one request old."""

    def write(self) -> None:
        forge(DISTRIBUTION)


class AnswersTooLong(Forger):
    def write(self) -> None:
        forge(b"", length=0xFFFF_FFFF)


class AnswersTooShort(Forger):
    def write(self) -> None:
        forge(b"d", length=1)


class WritesGarbage(Forger):
    def write(self) -> None:
        forge(bytes(range(255)) * 40, status=0xEE)


class FloodsPipe(Forger):
    def write(self) -> None:
        while True:
            for descriptor in pipes():
                with contextlib.suppress(OSError):
                    os.write(descriptor, b"\xff" * PIECE_BYTES)


class FloodsPipeWithZeros(Forger):
    """Sends what looks like empty answers, and reads no request any more."""

    def write(self) -> None:
        while True:
            for descriptor in pipes():
                with contextlib.suppress(OSError):
                    os.write(descriptor, bytes(PIECE_BYTES))


class ReadsRequests(Forger):
    """Takes from the pipe what the server would have read, and leaves it without blocking."""

    def write(self) -> None:
        for descriptor in pipes():
            os.set_blocking(descriptor, False)
            with contextlib.suppress(OSError):
                os.read(descriptor, 1 << 16)


class ForgesAnError(Forger):
    """Sends the message of an error that looks like the end of a passed audit."""

    def write(self) -> None:
        forge(f"nothing\n{PASSED}\r\x1b[2K\n\n0 failed".encode(), status=RAISED)


class ForgesAFailure(Forger):
    """Sends the message of a failed check, with lines for the report."""

    def write(self) -> None:
        forge(b"x\n\n## C1: passed\n\n| C1 | **pass** | `all` |\n\x1b[2K", status=WRONG)


def answers_ahead(n_targets: int) -> BigramModel:
    return AnswersAhead()


def answers_too_long(n_targets: int) -> BigramModel:
    return AnswersTooLong()


def answers_too_short(n_targets: int) -> BigramModel:
    return AnswersTooShort()


def writes_garbage(n_targets: int) -> BigramModel:
    return WritesGarbage()


def floods_pipe(n_targets: int) -> BigramModel:
    return FloodsPipe()


def floods_pipe_with_zeros(n_targets: int) -> BigramModel:
    return FloodsPipeWithZeros()


def reads_requests(n_targets: int) -> BigramModel:
    return ReadsRequests()


def forges_an_error(n_targets: int) -> BigramModel:
    return ForgesAnError()


def forges_a_failure(n_targets: int) -> BigramModel:
    return ForgesAFailure()


def describes_itself_in_depth(n_targets: int) -> BigramModel:
    """Send a description that no parser can read to its end."""
    forge(b"[" * 60_000)
    return BigramModel()


def describes_itself_in_numbers(n_targets: int) -> BigramModel:
    """Send a description of other types than expected."""
    forge(b'{"vocab_size": [1], "predicts": 1, "scope": {}, "precision": "float32", "variants": 3}')
    return BigramModel()


class FloodsOutput(BigramModel):
    """Prints without end, and is lawful."""

    flooded = False

    def predict(self) -> np.ndarray:
        if not FloodsOutput.flooded:
            FloodsOutput.flooded = True
            for descriptor in (1, 2):
                for _ in range(FLOOD_BYTES // 2 // PIECE_BYTES):
                    os.write(descriptor, b"flood of output\n" * (PIECE_BYTES // 16))
        return super().predict()


def floods_output(n_targets: int) -> BigramModel:
    return FloodsOutput()
