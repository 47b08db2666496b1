"""Audit of a scorer that runs in processes of its own only, each in a sandbox.

What a process has been handed decides what its answers prove, so there is one for each purpose:

    process     handed                                          its answers prove
    ----------  ----------------------------------------------  ------------------------------------
    ledger      the whole stream in one call, without a claim   nothing: they are the claim
    certified   each token after it has predicted it            C1 to C4 for those targets (B17)
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import TypeVar

from stages.audit.audit_scorer import (
    AuditCase,
    AuditedStream,
    ClaimedEvaluation,
    audit_scorer,
    certify_scorer,
    sum_losses,
)
from stages.audit.checks.metamorphic import Variants
from stages.audit.checks.round_trip import check_round_trip
from stages.audit.params import AuditParams
from stages.audit.precision import of_scorer
from stages.audit.probe_runner import Cost
from stages.audit.remote.process import ScorerProcess, ScorerSource
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
    _lock: Lock = field(default_factory=Lock)

    @contextlib.contextmanager
    def start(self, source: ScorerSource) -> Iterator[ScorerProcess]:
        """Start a process for the scorers of a factory; it ends with the context."""
        process = ScorerProcess(source, self.vocab_size, self.answer_seconds)
        with self._lock:
            self._running.append(process)
        try:
            yield process
        finally:
            process.close()
            with self._lock:
                self._running.remove(process)
                self.cost += process.cost

    def run_side_by_side(self, tasks: Sequence[Callable[[], T]], workers: int) -> list[T]:
        """Run tasks that start processes, `workers` at once; returns their results in order.

        After the first error all processes are ended, so that the other tasks end too.
        """
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(task) for task in tasks]
            try:
                return [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()
                with self._lock:
                    for process in self._running:
                        process.close()
                raise


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

    def case(self, process: ScorerProcess) -> AuditCase:
        """Build the case of a scorer in a process."""

        def make(n_targets: int) -> Scorer:
            return process.new_scorer()

        return AuditCase(
            self.name,
            make,
            self.stream,
            self.boundaries,
            self.key,
            self.params,
            variants_of(process),
        )


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


def certify_isolated(scorer: IsolatedScorer, processes: ScorerProcesses, logger: Logger) -> list[Verdict]:
    """B17, in a process that gets each token after it has predicted it, and nothing else."""
    with processes.start(scorer.certified_source) as process:
        case = scorer.case(process)
        return certify_scorer(case, case.factory, scorer.claim, logger)


def decode_isolated(scorer: IsolatedScorer, processes: ScorerProcesses, count: int) -> list[Verdict]:
    """B12: one process encodes the first `count` targets of the stream, another one decodes them."""
    source = scorer.probed_source
    with processes.start(source) as encoding, processes.start(source) as decoding:
        # An incomplete ledger fails B6; the file is then compared with the scorer's own losses.
        ledger = scorer.claim.ledger
        is_complete = ledger.shape == (len(scorer.stream.tokens) - 1,)
        encoder = encoding.new_scorer()
        tolerance = max(of_scorer(encoder).loss_tolerance, scorer.claim.precision.loss_tolerance)
        verdict = check_round_trip(
            scorer.name,
            encoder,
            decoding.new_scorer(),
            scorer.stream.tokens,
            start=1,
            count=count,
            ledger=ledger if is_complete else None,
            tolerance=tolerance,
        )
    return [verdict]


def sum_isolated(scorer: IsolatedScorer, processes: ScorerProcesses) -> list[Verdict]:
    """B3 and B4 of a scorer without predict(), in a process that is shown nothing after a target."""
    with processes.start(scorer.certified_source) as process:
        return sum_losses(scorer.case(process), scorer.claim)


def probe_isolated(scorer: IsolatedScorer, processes: ScorerProcesses, logger: Logger) -> list[Verdict]:
    """All checks that show a scorer later or other tokens."""
    with processes.start(scorer.probed_source) as process:
        return audit_scorer(scorer.case(process), scorer.claim, logger)
