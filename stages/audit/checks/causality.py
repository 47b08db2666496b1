"""C1 and C4: does a score, or the ledger, depend on what comes later (B1)?

Two tests that need each other. *Perturbation*: two forks of one scorer score the same segment, except
that for one of them the tokens after position t are others, equally many; the losses up to t must be
equal, but for rounding. This detects every dependence that reaches no further than the segment.
*Recomputation*: a scorer that is shown the stream one segment at a time must return the losses of the
ledger, which was written with the whole stream available. Losses that used tokens after the segment
cannot agree, so this detects what perturbation cannot.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stages.audit import probe_runner
from stages.audit.precision import Precision, difference, measure_shift
from stages.audit.probe_runner import Cost
from stages.audit.sampling import KeyedRng, PerturbationGroup
from stages.audit.verdict import Check, Verdict
from stages.common.scorer import Scorer

FUTURE_PERTURBATION = Check(
    "B1",
    "future perturbation",
    conditions=("C1", "C3", "C4"),
    sees="any dependence of a score on later tokens of the same segment: look-ahead, second passes, "
    "training before scoring, documents sorted by length",
    blind="validation text in the artifact, dependence on the target itself (B2, B3), "
    "tokens after the segment (recomputation)",
)
LEDGER_WITHOUT_FUTURE = Check(
    "B1",
    "ledger without the future",
    conditions=("C1", "C3", "C4", "metric"),
    sees="a ledger that another scorer wrote, a second pass, "
    "a scorer that used tokens after the segment, edited losses",
    blind="targets that were not scored again: of k false losses at random places, "
    "none is among them with probability {skipped_share:.3f}^k",
)
SUFFIXES = ("random ids", "other text", "another document", "moved boundaries")  # kinds of replaced futures
MOVED_BOUNDARIES = 2  # BOS put at random into a future whose own are taken away


class ReplacedFuture(NamedTuple):
    """Effect of replacing the tokens after one position."""

    position: int
    suffix: str  # one of SUFFIXES
    first: int | None  # first target position up to `position` whose loss changed; None if none did
    before: float  # the two losses there, in nats
    after: float


class Segment(NamedTuple):
    """Finding of one perturbation probe."""

    base: np.ndarray  # (n,) float32: losses of the segment as it is
    replaced: list[ReplacedFuture]


@dataclass(frozen=True)
class Perturbation:
    """Probe: score the segment of a group as it is, and once for each position with another future."""

    group: PerturbationGroup
    futures: tuple[tuple[str, np.ndarray], ...]  # for each position: kind, and tokens up to the segment's end
    rounding: float  # nats by which equal losses may differ

    @property
    def start(self) -> int:
        """First token position of the segment."""
        return self.group.start

    @property
    def cost(self) -> Cost:
        """Work that `run` asks for."""
        return self.cost_of(len(self.futures), self.group.stop - self.group.start)

    @staticmethod
    def cost_of(positions: int, segment: int) -> Cost:
        """Cost of scoring `segment` targets as they are, and once for each of `positions`."""
        return Cost(calls=1, targets=segment) * (1 + positions)

    def run(self, scorer: Scorer, tokens: np.ndarray) -> Segment:
        """Score the segment and its variants from forks; tokens: (N,) uint16."""
        segment = tokens[self.group.start : self.group.stop]
        base = probe_runner.checked_score(scorer.fork(), segment)
        replaced = []
        for position, (suffix, future) in zip(self.group.positions, self.futures, strict=True):
            kept = position + 1 - self.group.start  # targets up to the position
            nll = probe_runner.checked_score(scorer.fork(), np.concatenate([segment[:kept], future]))
            different = np.flatnonzero(probe_runner.differs(nll[:kept], base[:kept], self.rounding))
            if len(different):
                at = int(different[0])
                replaced.append(
                    ReplacedFuture(position, suffix, self.group.start + at, float(base[at]), float(nll[at]))
                )
            else:
                replaced.append(ReplacedFuture(position, suffix, None, 0.0, 0.0))
        return Segment(base, replaced)


def probes(
    key: bytes,
    groups: list[PerturbationGroup],
    tokens: np.ndarray,
    vocab_size: int,
    bos: int,
    rounding: float,
) -> list[Perturbation]:
    """Build one probe for each group; the kinds of futures alternate.

    The last kind is the future itself with its document boundaries moved: it detects scorers that
    sort documents by length or use where they end. tokens: (N,) uint16; rounding: nats by which equal
    losses may differ.
    """
    rng = KeyedRng(key, "future")
    perturbations: list[Perturbation] = []
    count = 0
    for group in groups:
        futures = []
        for position in group.positions:
            suffix = SUFFIXES[count % len(SUFFIXES)]
            count += 1
            future = _future(rng, suffix, tokens[position + 1 : group.stop], tokens, vocab_size, bos)

            # The very next token must differ: most look-ahead uses that one.
            if future[0] == tokens[position + 1]:
                future[0] = (int(future[0]) + rng.integer(1, vocab_size)) % vocab_size
            futures.append((suffix, future))
        perturbations.append(Perturbation(group, tuple(futures), rounding))
    return perturbations


def judge_perturbation(
    subject: str, groups: list[PerturbationGroup], segments: list[Segment], rounding: float
) -> Verdict:
    """B1, first half: no loss changed by more than `rounding` nats."""
    # One future for each perturbed position; the first that changed a loss is reported.
    futures = [future for segment in segments for future in segment.replaced]
    failed = [future for future in futures if future.first is not None]
    if failed:
        # The first loss that changed.
        first = failed[0]
        positions = sorted({future.position for future in failed})
        saw = first.after
        expected = first.before
        evidence = (
            f"with {first.suffix} after position {first.position}, the loss of target {first.first} "
            f"moved from {first.before:.6g} to {first.after:.6g} nats "
            f"({len(failed)} of {len(futures)} replaced futures changed a score)"
        )
    else:
        # Say at which kinds of boundaries futures were replaced.
        positions = sorted(future.position for future in futures)
        saw = 0.0
        expected = 0.0
        kinds = [group.kind for group in groups]
        counts = ", ".join(f"{kinds.count(kind)} at {kind}" for kind in sorted(set(kinds)))
        evidence = (
            f"{len(futures)} futures replaced in {len(groups)} segments ({counts}): "
            "no loss at or before the change moved"
        )

    return Verdict.of(
        FUTURE_PERTURBATION,
        subject,
        not failed,
        evidence,
        saw=saw,
        expected=expected,
        bound=rounding,
        positions=tuple(positions),
    )


def judge_recomputation(
    subject: str,
    ledger: np.ndarray | None,
    losses: np.ndarray,
    groups: list[PerturbationGroup],
    segments: list[Segment],
    precision: Precision,
) -> Verdict:
    """B1, second half: losses that were computed without the future are those of the ledger.

    ledger: (N-1,) float32, or None without a complete one; losses: (N-1,) float32 from the recomputed
    spans, NaN elsewhere. The losses of the perturbed segments, as they are, are added to them.
    precision: the coarser one of the scorer and its ledger.
    """
    # All targets that were scored without their future.
    recomputed = losses.copy()
    compared = ~np.isnan(losses)
    for group, segment in zip(groups, segments, strict=True):
        recomputed[group.start - 1 : group.stop - 1] = segment.base
        compared[group.start - 1 : group.stop - 1] = True
    targets = np.flatnonzero(compared)
    share = len(targets) / len(losses)
    check = LEDGER_WITHOUT_FUTURE.fill(skipped_share=1 - share)
    if ledger is None:
        evidence = "there is no complete ledger to compare with recomputed losses"
        return Verdict.cannot_tell(check, subject, evidence, bound=precision.loss_tolerance)

    # Compare one by one and in the mean: a small gain everywhere changes only the mean.
    different = difference(ledger[targets], recomputed[targets])
    largest = float(np.abs(different).max())
    shift = measure_shift(different, precision.mean_tolerance)
    worst = targets[np.abs(different).argmax()]

    return Verdict.of(
        check,
        subject,
        largest <= precision.loss_tolerance and not shift.is_systematic,
        f"{len(targets)} of {len(losses)} targets ({share:.1%}) scored again without their future: "
        f"largest difference {largest:.1e} nats (bound {precision.loss_tolerance:.0e}), "
        f"mean {shift.mean:+.1e} (bound {shift.bound:.1e})",
        # The two losses of the target with the largest difference.
        saw=float(ledger[worst]),
        expected=float(recomputed[worst]),
        bound=precision.loss_tolerance,
        positions=(int(worst) + 1,),
    )


def _future(
    rng: KeyedRng, suffix: str, future: np.ndarray, tokens: np.ndarray, vocab_size: int, bos: int
) -> np.ndarray:
    """Build a replacement of that kind for the tokens `future` (n,), from the stream `tokens` (N,)."""
    length = len(future)
    if suffix == "moved boundaries":
        no_bos = (bos + rng.integer(1, vocab_size)) % vocab_size
        moved = np.where(future == bos, no_bos, future).astype(tokens.dtype)
        moved[rng.below(length, MOVED_BOUNDARIES)] = bos
        return moved

    if suffix == "random ids" or length >= len(tokens):
        return rng.below(vocab_size, length).astype(tokens.dtype)

    # Text from anywhere, or from where a document begins.
    begin = rng.integer(0, len(tokens) - length)
    if suffix == "another document":
        starts = np.flatnonzero(tokens[: len(tokens) - length] == bos)
        if len(starts):
            begin = int(starts[rng.integer(0, len(starts))])
    return tokens[begin : begin + length].copy()
