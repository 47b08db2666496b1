"""The scorer's process: how it fails, what the audit makes of that, and what is left of it afterwards."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from stages.audit.isolated import ScorerProcesses
from stages.audit.probe_runner import Cost, ProtocolError
from stages.audit.remote import process as remote
from stages.audit.remote.process import RemoteScorer, ScorerError, ScorerProcess, ScorerSource
from stages.audit.sandbox.room import detect_isolation
from tests import external_audit
from tests.zoo.external.bigram import BigramModel, ScoresAlone
from tests.zoo.external.failing import FAILS_AT, SCORERS
from tests.zoo.external.registry import FAILING, ExternalScorer
from tests.zoo.external.tampering import MARKER

pytestmark = pytest.mark.skipif(not detect_isolation().complete, reason=str(detect_isolation()))
VOCAB_SIZE = external_audit.VOCAB_SIZE
TOKENS = np.random.default_rng(0).integers(0, VOCAB_SIZE, 200).astype(np.uint16)


@pytest.fixture(autouse=True)
def package_of_scorers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is found as a user's is: in a folder of the path."""
    monkeypatch.syspath_prepend(str(external_audit.PACKAGE.parent))


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return external_audit.write_stream(tmp_path_factory.mktemp("scorer_process"))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """After each test no process of a sandbox is left."""
    yield
    assert children() == []
    assert MARKER not in commands()


def children() -> list[str]:
    """Commands of the processes that this one started and that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
    return found


def commands() -> str:
    """Command lines of all processes."""
    lines = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            lines.append((folder / "cmdline").read_bytes().decode(errors="replace"))
    return "\n".join(lines)


def source(factory: str) -> ScorerSource:
    visible = {f"/scorer/{external_audit.PACKAGE_NAME}": external_audit.PACKAGE}
    return ScorerSource(f"{external_audit.PACKAGE_NAME}.{factory}", (len(TOKENS) - 1,), visible, ("/scorer",))


def start(factory: str, answer_seconds: float = 60.0) -> ScorerProcess:
    return ScorerProcess(source(factory), VOCAB_SIZE, answer_seconds)


def observe(scorer: RemoteScorer | BigramModel, tokens: np.ndarray) -> None:
    for token in tokens.tolist():
        scorer.observe(token)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("Crashes", "was killed by signal 11 before it had answered"),
        ("LeavesWithZero", "ended with exit code 0 before it had answered"),
        ("LeavesWithThree", "ended with exit code 3 before it had answered: the last words"),
        ("ExitsWithZero", "raised SystemExit: 0"),
        ("StopsIterating", "raised StopIteration"),
        ("Interrupts", "raised KeyboardInterrupt"),
        ("Raises", "raised ValueError: shapes differ"),
        ("RunsOutOfMemory", "MemoryError"),
        ("RecursesWithoutEnd", "raised RecursionError"),
        ("IsKilled", "was killed (signal 9; perhaps out of memory)"),
        ("IsAborted", "was killed by signal 6"),
        ("ClosesItsPipe", "before it had answered"),
        ("RaisesInObserve", "raised IndexError: no row for it"),
        ("LeavesProcesses", "raised ValueError: it left processes"),
    ],
)
def test_a_failure_of_the_process_is_an_error_and_nothing_is_sent_afterwards(kind: str, message: str) -> None:
    factory = kind[0].lower() + kind[1:]
    with start(f"failing:{factory}") as process:
        scorer = process.new_scorer()
        observe(scorer, TOKENS[: FAILS_AT + ("Observe" in kind)])
        with pytest.raises(ScorerError) as first:
            scorer.predict()
        assert message in str(first.value)
        with pytest.raises(ScorerError) as second:
            scorer.predict()
        assert str(second.value) == str(first.value)


@pytest.mark.parametrize("kind", ["HangsInPredict", "HangsInObserve", "StopsItself"])
def test_an_answer_that_does_not_come_is_an_error(kind: str) -> None:
    factory = kind[0].lower() + kind[1:]
    begin = time.monotonic()
    with start(f"failing:{factory}", answer_seconds=1.0) as process:
        scorer = process.new_scorer()
        observe(scorer, TOKENS[: FAILS_AT + (kind == "HangsInObserve")])
        with pytest.raises(ScorerError, match="did not answer within 1 seconds"):
            scorer.predict()
    assert time.monotonic() - begin < 20


def test_a_process_that_reads_nothing_is_an_error() -> None:
    """Requests fill the pipe; the audit does not wait for it longer than for an answer."""
    with start("failing:hangsInObserve", answer_seconds=1.0) as process:
        scorer = process.new_scorer()
        with pytest.raises(ScorerError, match="did not answer within 1 seconds"):
            observe(scorer, np.zeros(20 * remote.MAX_BUFFERED_TOKENS + remote.PIPE_BYTES, dtype=np.uint16))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("ReturnsText", "predict returned"),
        ("ReturnsNothing", "predict returned object"),
        ("ReturnsIntegers", "predict returned int64"),
        ("ReturnsTooFew", "predict returned 2552 bytes, expected 320 numbers"),
    ],
)
def test_a_result_of_another_kind_breaks_the_protocol(kind: str, message: str) -> None:
    factory = kind[0].lower() + kind[1:]
    with start(f"failing:{factory}") as process:
        scorer = process.new_scorer()
        observe(scorer, TOKENS[:FAILS_AT])
        with pytest.raises(ProtocolError, match=message):
            scorer.predict()


@pytest.mark.parametrize("kind", ["LosesOne", "ScoresNothing", "AloneLosesOne", "AloneReturnsMatrix"])
def test_losses_of_another_shape_break_the_protocol(kind: str) -> None:
    factory = kind[0].lower() + kind[1:]
    with start(f"failing:{factory}") as process, pytest.raises(ProtocolError, match="score_stream"):
        process.new_scorer().score_stream(TOKENS)


def test_every_failing_scorer_is_tried() -> None:
    tried = Path(__file__).read_text() + "".join(scorer.factory for scorer in FAILING)
    names = {kind[0].lower() + kind[1:] for kind in SCORERS}
    assert [name for name in names if name not in tried and name[0].upper() + name[1:] not in tried] == []


@pytest.mark.parametrize("scorer", FAILING, ids=lambda scorer: scorer.name)
def test_a_failure_ends_the_audit_with_its_exit_code_and_no_old_report(
    scorer: ExternalScorer, stream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 and one line if it could not be audited, without a report; 1 and a report if it was convicted."""
    ended = external_audit.audit(scorer, stream, tmp_path / "audit")
    errors = capsys.readouterr().err.splitlines()
    if scorer.exit_code == 1:
        assert (ended.code, errors) == (1, [])
        assert scorer.failed in ended.failed
        return

    assert (ended.code, len(errors), ended.report) == (2, 1, {}), (errors, ended.failed)
    assert errors[0].startswith("error: audit_scorer: ")
    assert scorer.message in errors[0]
    assert list((tmp_path / "audit").iterdir()) == []


def test_answers_are_those_of_the_scorer_itself() -> None:
    """Also after more tokens than are sent together, and in forks."""
    tokens = np.random.default_rng(1).integers(0, VOCAB_SIZE, remote.MAX_BUFFERED_TOKENS + 100)
    local = BigramModel()
    with start("odd:float64") as process:
        scorer = process.new_scorer()
        observe(scorer, tokens)
        observe(local, tokens)
        assert np.array_equal(scorer.predict(), local.predict())

        # A fork, and then the scorer again.
        fork = scorer.fork()
        fork.observe(5)
        assert not np.array_equal(fork.predict(), local.predict())
        assert np.array_equal(scorer.predict(), local.predict())
        assert np.array_equal(scorer.score_stream(TOKENS), local.score_stream(TOKENS))
        assert np.array_equal(process.new_scorer().score_stream(TOKENS), BigramModel().score_stream(TOKENS))


def test_tensors_arrive_as_arrays() -> None:
    with start("tensors:make") as process:
        scorer = process.new_scorer()
        losses = scorer.fork().score_stream(TOKENS)
        observe(scorer, TOKENS[:50])
        predicted = scorer.predict()
    assert process.description.precision == "float32"
    assert predicted.dtype == np.float64
    assert losses.dtype == np.float32
    assert abs(np.exp(predicted).sum() - 1) < 1e-5
    assert losses[49] == np.float32(-predicted[TOKENS[50]])


def test_a_token_observed_by_one_scorer_is_seen_before_another_is_asked() -> None:
    """Tokens are sent together; a state that scorers share must show all the same."""
    with start("selective:shared_counts") as process:
        one, other = process.new_scorer(), process.new_scorer()
        before = other.predict()
        observe(one, np.full(100, 7))
        after = other.predict()
    assert after[7] > before[7] + 3


def test_work_is_counted() -> None:
    with start("odd:float64") as process:
        scorer = process.new_scorer()
        observe(scorer, TOKENS[:10])
        scorer.predict()
        scorer.fork().score_stream(TOKENS[10:30])
        assert process.cost == Cost(calls=1, targets=30, predictions=1)

    # A scorer with score_stream alone scores its prefix again.
    with start("odd:alone") as process:
        scorer = process.new_scorer()
        observe(scorer, TOKENS[:10])
        losses = scorer.score_stream(TOKENS[10:30])
        assert process.cost == Cost(calls=1, targets=30)
    assert np.array_equal(losses, ScoresAlone().score_stream(TOKENS[:30])[9:])


def test_the_process_ends_with_its_context_also_after_an_error() -> None:
    with start("odd:float64") as process:
        scorer = process.new_scorer()
        assert len(children()) == 1
    assert children() == []
    with pytest.raises(ScorerError, match="was ended"):
        scorer.predict()

    def fail() -> None:
        with start("odd:float64"):
            assert len(children()) == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert children() == []


def test_after_one_error_all_processes_side_by_side_end() -> None:
    """Whatever the others are doing: here the first one hangs."""
    processes = ScorerProcesses(VOCAB_SIZE, answer_seconds=8.0)

    def score(factory: str) -> float:
        with processes.start(source(factory)) as process:
            scorer = process.new_scorer()
            observe(scorer, TOKENS[:FAILS_AT])
            return float(scorer.predict()[0])

    tasks = [lambda: score("failing:hangsInPredict"), lambda: score("failing:raises")]
    begin = time.monotonic()
    with pytest.raises(ScorerError, match="shapes differ"):
        processes.run_side_by_side(tasks, workers=2)
    assert time.monotonic() - begin < 6
    assert children() == []


def test_the_package_is_not_this_projects() -> None:
    for path in external_audit.PACKAGE.glob("*.py"):
        for line in path.read_text().splitlines():
            assert not line.startswith(("import stages", "from stages", "from tests", "from tools"))
