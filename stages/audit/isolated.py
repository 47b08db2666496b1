"""Audit of a scorer that runs in processes of its own only, each in a sandbox.

What a process has been handed decides what its answers prove, so there is one for each purpose:

    process     handed                                          its answers prove
    ----------  ----------------------------------------------  ------------------------------------
    ledger      the whole stream in one call, without a claim   nothing: they are the claim
    certified   each certified target after its prediction      C1 to C4 for those targets (B17)
    encoding,   each token after it has predicted it, or after  that another process repeats the
    decoding    the audit has decoded it                        predictions (B12)
    prefix      score_stream alone: a prefix of the stream      that its losses need nothing later (B1)
    probes      later tokens too, and other ones, in forks      what it fails; a pass adds little

No process is given anything of another. Processes that must not know later tokens run before those that
are shown them, since the machine's file locks and caches are a channel that no sandbox closes. The
audit's own process imports nothing of the scorer.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from threading import Lock
from typing import TypeVar

import numpy as np

from stages.audit.audit_scorer import (
    PROTOCOL,
    AuditCase,
    AuditedStream,
    ClaimedEvaluation,
    audit_scorer,
    certify_scorer,
    sum_losses,
)
from stages.audit.checks import round_trip
from stages.audit.checks.certified import CertifiedLosses
from stages.audit.checks.metamorphic import NO_VARIANTS, Variants
from stages.audit.params import AuditParams
from stages.audit.precision import coarser, of_scorer
from stages.audit.probe_runner import Cost, ProtocolError
from stages.audit.remote.process import Description, ScorerError, ScorerProcess, ScorerSource
from stages.audit.sampling import Boundaries
from stages.audit.sandbox.room import detect_isolation
from stages.audit.verdict import Check, Verdict
from stages.common.progress import Logger
from stages.common.scorer import Scorer

T = TypeVar("T")
SANDBOX = Check(
    "B18",
    "scorer in a sandbox",
    conditions=("C1", "C2", "C3", "C4"),
    sees="nothing by itself: without a sandbox a scorer could reach the audit, the stream and its own other "
    "processes, and no other check would mean anything",
    blind="what the counted files hold; the time that an access takes",
)
PERMUTATION, BUCKETS, MEMORY_WEIGHT = "permutation", "buckets", "memory_weight"  # keywords of a factory


@dataclass
class ScorerProcesses:
    """The processes of one audit: starts them, ends them all after an error, and adds up their work."""

    vocab_size: int  # ids of the tokenizer
    answer_seconds: float  # longest wait for one answer of a process
    cost: Cost = field(default_factory=Cost)  # work that was asked of those that have ended
    _running: list[ScorerProcess] = field(default_factory=list)
    _descriptions: dict[tuple[object, ...], Description] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)
    _is_stopped: bool = False  # after an error in one of several tasks

    @contextlib.contextmanager
    def start(self, source: ScorerSource) -> Iterator[ScorerProcess]:
        """Start a process for the scorers of a factory; it ends with the context.

        Raises ProtocolError if the scorers describe themselves in another way than in an earlier process:
        one that had predict() only where it is not certified could choose what is held against it.
        """
        self._require_running()
        process = ScorerProcess(source, self.vocab_size, self.answer_seconds)
        with self._lock:
            self._running.append(process)
        try:
            self._require_running()
            factory = (source.factory, source.arguments, source.precision)
            with self._lock:
                first = self._descriptions.setdefault(factory, process.description)
            if process.description != first:
                raise ProtocolError(f"the scorer is {process.description}, in another process it was {first}")
            yield process
        finally:
            process.close()
            with self._lock:
                self._running.remove(process)
                self.cost += process.cost

    def _require_running(self) -> None:
        if self._is_stopped:
            raise ScorerError("was ended")

    def run_side_by_side(self, tasks: Sequence[Callable[[], T]], workers: int) -> list[T]:
        """Run tasks that start processes, `workers` at once; returns their results in order.

        After the first error all processes are ended, so that the other tasks end too.
        """
        with ThreadPoolExecutor(workers) as pool:
            tasks_by_future = [pool.submit(task) for task in tasks]
            try:
                finished, _ = wait(tasks_by_future, return_when=FIRST_EXCEPTION)
                for future in finished:
                    future.result()
            except BaseException:
                for future in tasks_by_future:
                    future.cancel()
                with self._lock:
                    self._is_stopped = True
                    for process in self._running:
                        process.kill()
                raise
            return [future.result() for future in tasks_by_future]


@dataclass(frozen=True)
class IsolatedScorer:
    """A scorer, its claimed evaluation, and all that its audit needs."""

    name: str
    certified_source: ScorerSource  # in the arithmetic that wrote the ledger
    probed_source: ScorerSource  # in the most exact arithmetic that there is
    stream: AuditedStream
    boundaries: Boundaries
    key: bytes
    params: AuditParams
    claim: ClaimedEvaluation

    def case(self, process: ScorerProcess | None = None) -> AuditCase:
        """Build the case of a scorer in a process; without one, only to judge what another has answered."""

        def make(n_targets: int) -> Scorer:
            assert process is not None
            return process.new_scorer()

        variants = NO_VARIANTS if process is None else variants_of(process)
        return AuditCase(self.name, make, self.stream, self.boundaries, self.key, self.params, variants)


def check_sandbox(subject: str) -> Verdict:
    """B18: the scorer's processes ran in complete sandboxes; cannot tell where the system allows none."""
    isolation = detect_isolation()
    evidence = f"each process of the scorer: {isolation}"
    if isolation.complete:
        return Verdict.passed(SANDBOX, subject, evidence)
    return Verdict.cannot_tell(SANDBOX, subject, evidence)


def variants_of(process: ScorerProcess) -> Variants:
    """The variants of a scorer for which its factory has keywords."""
    keywords = process.description.variants
    variants = Variants()
    if PERMUTATION in keywords:
        variants = variants._replace(permuted_ids=lambda ids: process.new_scorer(permutation=ids))
    if BUCKETS in keywords:
        variants = variants._replace(with_buckets=lambda buckets: process.new_scorer(buckets=buckets))
    if BUCKETS in keywords and MEMORY_WEIGHT in keywords:
        variants = variants._replace(
            without_memory=lambda buckets: process.new_scorer(buckets=buckets, memory_weight=0.0)
        )
    return variants


def certify_isolated(
    scorer: IsolatedScorer, processes: ScorerProcesses, is_claimed: bool, logger: Logger
) -> CertifiedLosses | Verdict:
    """B17, in a process that gets each token after it has predicted it, and nothing else.

    is_claimed: the ledger is known before; otherwise a process makes it afterwards.
    """
    try:
        with processes.start(scorer.certified_source) as process:
            case = scorer.case(process)
            return certify_scorer(case, case.factory, scorer.claim.ledger if is_claimed else None, logger)
    except ProtocolError as error:
        return Verdict.failed(PROTOCOL, scorer.name, str(error), bound=0)


def decode_isolated(scorer: IsolatedScorer, processes: ScorerProcesses, count: int) -> list[Verdict]:
    """B12: one process encodes the first `count` targets of the stream, another one decodes them."""
    source = scorer.probed_source
    tokens = scorer.stream.tokens
    start = 1

    def decode(payload: bytes, size: int) -> np.ndarray:
        with processes.start(source) as process:
            return round_trip.decode_span(process.new_scorer(), tokens[:start], payload, size)

    # An incomplete ledger fails B6; the file is then compared with the scorer's own losses.
    is_complete = scorer.claim.ledger.shape == (len(tokens) - 1,)
    ledger = scorer.claim.ledger if is_complete else None

    # The decoder does not run at the same time.
    try:
        with processes.start(source) as process:
            encoder = process.new_scorer()
            own = of_scorer(encoder)
            encoded = round_trip.encode_span(encoder, tokens, start, count, ledger)

        verdict = round_trip.judge(
            scorer.name,
            encoded,
            lambda: decode(encoded.payload, len(encoded.span)),
            coarser(own, scorer.claim.precision).loss_tolerance,
        )
    except ProtocolError as error:
        verdict = Verdict.failed(PROTOCOL, scorer.name, str(error), bound=0)
    return [verdict]


def sum_isolated(scorer: IsolatedScorer, processes: ScorerProcesses) -> list[Verdict]:
    """B3 and B4 of a scorer without predict(), in a process that is shown nothing after a target."""
    try:
        with processes.start(scorer.certified_source) as process:
            return sum_losses(scorer.case(process), scorer.claim)
    except ProtocolError as error:
        return [Verdict.failed(PROTOCOL, scorer.name, str(error), bound=0)]


def probe_isolated(scorer: IsolatedScorer, processes: ScorerProcesses, logger: Logger) -> list[Verdict]:
    """All checks that show a scorer later or other tokens."""
    try:
        with processes.start(scorer.probed_source) as process:
            return audit_scorer(scorer.case(process), scorer.claim, logger)
    except ProtocolError as error:
        return [Verdict.failed(PROTOCOL, scorer.name, str(error), bound=0)]
