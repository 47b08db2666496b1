"""C1 to C4: a score that the audit computes itself, target by target, and the ledger against it (B17).

A fresh scorer is fed the stream. Before it is handed the token of a certified target, it must return the
whole distribution; the audit checks its sum, normalises it and takes the loss of the token. Whatever the
scorer is, these losses are a lawful score: they depend on earlier tokens only (C1, C3), are those of a
distribution (C2), and come from one pass from left to right (C4). A ledger is compared with them.

A long stream is certified at n of its N targets, one drawn at random in each of n equal parts, after the
ledger is fixed: the key of the draw contains the ledger's hash.

*Power.* The gain at target t is g_t = c_t - l_t: certified loss less loss in the ledger, in nats. How
much can the ledger gain in total, if no certified target shows it? A gain is bounded by comparing the
ledger with a lawful scorer: the same one, with a share e of the uniform distribution over V ids mixed in.
That one loses ln(V / e) at most at a target, and costs -ln(1 - e) at most against the certified losses. So

    mean gain <= s - ln(1 - e) + K / N ln(V / e),

where K is the number of targets whose ledger differs from the certified loss by more than the tolerance
of one loss, and s is the mean of the gains below it.

*K.* If n of N targets are drawn in equal parts of m = N / n, and k_i of the K are in part i, all are missed
with the probability prod(1 - k_i / m). That is largest if the K are spread evenly: with K = k n + r,

    P(missed) <= (1 - k / m)^(n - r) (1 - (k + 1) / m)^r,    roughly exp(-K n / N).

`largest_missed` is the largest K for which this exceeds 0.01: no K at all if the whole stream is certified.
The best e is f / (1 + f) with f = K / N. At N = 40.5 million, n = 80,000: K = 2,332, and a gain of 0.0011
nats.

*s.* Gains up to the tolerance of one loss cannot be told from round-off one by one, but their mean can.
They are bounded, and drawn independently; so by the empirical Bernstein bound (Maurer and Pontil 2009)
with standard deviation d and range R, except with probability 0.01,

    s <= mean of the drawn + d sqrt(2 ln(200) / n) + 7 R ln(200) / (3 (n - 1)).

In bfloat16, where losses differ by 0.03, this term is the larger one.

So the check passes with probability 0.01 at most if the ledger gains more than `MAX_GAIN`, however the
gain is spread: K and s cannot both be small then. If n is too small it cannot tell.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from stages.audit import precision as precisions
from stages.audit import probe_runner
from stages.audit.checks.normalisation import log_sum_exp
from stages.audit.precision import Precision
from stages.audit.probe_runner import Cost
from stages.audit.verdict import Check, Verdict, Words
from stages.common.scorer import Scorer

CERTIFIED_LEDGER = Check(
    "B17",
    "ledger equals certified score",
    conditions=("C1", "C2", "C3", "C4", "metric"),
    sees="a ledger that is not what the scorer commits to before it has each token: gates, look-ahead, "
    "second passes, edited losses, another scorer's; a systematic shift of {shift:.1e} nats",
    blind="targets that were not certified; what the scorer holds before the stream begins (B14, B15)",
)
CERTIFIED_SUMS = Check(
    "B17",
    "certified sums",
    conditions=("C2",),
    sees="probabilities over the whole vocabulary that sum to more than one",
    blind="targets that were not certified",
)
CERTIFIED_POWER = Check(
    "B17",
    "certified power",
    conditions=("C1", "C2", "C3", "C4"),
    sees="a total gain of the ledger above the bound, however it is spread, with probability 0.99",
    blind="a smaller gain; what the scorer holds before the stream begins (B14, B15)",
    words=Words(expected="<= bound"),
)
NO_DISTRIBUTION = Check(
    "B17",
    "certified score",
    conditions=("C1", "C2", "C3", "C4"),
    sees="nothing here",
    blind="everything: without predict() there is no distribution to certify",
)
MAX_GAIN = 0.0005  # bits per byte: a tenth of what a new record must gain
MISSED = 0.01  # largest probability with which a larger total gain passes
NATS_PER_BIT = math.log(2)


class CertifiedLosses(NamedTuple):
    """Losses of n targets of a stream, computed by the audit."""

    positions: np.ndarray  # (n,) int64, ascending: token positions of the targets, from 1
    losses: np.ndarray  # (n,) float64, nats, after normalisation; infinite for an impossible token
    log_sums: np.ndarray  # (n,) float64: log of the sum of the probabilities; NaN or +inf if one is
    targets: int  # N-1: targets of the whole stream
    vocab_size: int

    @property
    def is_whole(self) -> bool:
        """True if every target of the stream is certified."""
        return len(self.positions) == self.targets


class GainBound(NamedTuple):
    """Bound of the total gain that may have been missed, in nats per target of the whole stream."""

    drawn: np.ndarray  # (n,) float64: gains at the certified targets
    targets: int
    vocab_size: int
    largest_small: float  # gain at one target that is not convicted

    def at(self, count: int) -> float:
        """Compute the bound for `count` certified targets with gains like the drawn ones."""
        small = float(self.drawn.mean())
        if count >= self.targets:
            return small

        # The mean of small gains, from a sample; it cannot exceed the largest of them.
        deviation = float(self.drawn.std())
        logarithm = math.log(2 / MISSED)
        small += deviation * math.sqrt(2 * logarithm / count)
        small += 7 * 2 * self.largest_small * logarithm / (3 * max(1, count - 1))
        small = min(small, self.largest_small)

        # Large gains, none of which is among the certified targets.
        share = largest_missed(self.targets, count) / self.targets
        mixed = share / (1 + share)  # weight e of the uniform distribution
        if not mixed:
            return small
        return small - math.log1p(-mixed) + share * math.log(self.vocab_size / mixed)

    def needed(self, limit: float) -> int | None:
        """Compute how many certified targets bring the bound down to `limit` nats; None if all do not."""
        if self.at(self.targets) > limit:
            return None
        low, high = 0, self.targets
        while high - low > 1:
            middle = (low + high) // 2
            if self.at(middle) <= limit:
                high = middle
            else:
                low = middle
        return high


def certify(
    scorer: Scorer,
    tokens: np.ndarray,
    positions: np.ndarray,
    advance: Callable[[int], None] = lambda tokens: None,
) -> CertifiedLosses:
    """Feed a stream to a fresh scorer, and compute the losses of the targets at `positions`.

    tokens: (N,) uint16. positions: (n,) int64, ascending, from 1; the pass ends at the last of them.
    advance: called with the number of tokens passed since its last call.

    Raises probe_runner.ProtocolError if predict() does not return (V,) float64.
    """
    losses = np.empty(len(positions))
    log_sums = np.empty(len(positions))
    stream = tokens.tolist()
    passed = 0  # tokens that the scorer has observed
    for i, position in enumerate(positions.tolist()):
        for token in stream[passed:position]:
            scorer.observe(token)
        advance(position - passed)
        passed = position

        # The scorer does not have stream[position] yet.
        predicted = probe_runner.checked_predict(scorer)
        log_sums[i] = log_sum_exp(predicted)
        losses[i] = log_sums[i] - predicted[stream[position]] if np.isfinite(log_sums[i]) else math.inf
    return CertifiedLosses(positions, losses, log_sums, len(tokens) - 1, scorer.vocab_size)


def cost_of(targets: int, certified: int) -> Cost:
    """Cost of certifying `certified` targets of a stream; the pass observes up to `targets` tokens."""
    return Cost(targets=targets, predictions=certified)


def certified_bits_per_byte(certified: CertifiedLosses, target_bytes: np.ndarray) -> float:
    """Compute the certified score of a whole stream, in bits per byte; target_bytes: (N-1,) int64."""
    assert certified.is_whole, "only a stream that is certified whole has a certified score"
    return float(certified.losses.sum()) / NATS_PER_BIT / float(target_bytes.sum())


def judge(
    subject: str,
    certified: CertifiedLosses,
    ledger: np.ndarray | None,
    scorer_precision: Precision,
    ledger_precision: Precision,
    stream_bytes: int,
) -> list[Verdict]:
    """Judge certified losses and the ledger, (N-1,) float32, or None without a complete one.

    ledger_precision: of the evaluation that wrote the ledger; stream_bytes: of the whole stream's text.
    """
    sums = judge_sums(subject, certified, scorer_precision)
    if ledger is None:
        evidence = f"{_coverage(certified)}; there is no complete ledger to compare with them"
        return [
            sums,
            Verdict.cannot_tell(CERTIFIED_LEDGER.fill(shift=math.inf), subject, evidence),
            Verdict.cannot_tell(CERTIFIED_POWER, subject, evidence, bound=MAX_GAIN),
        ]
    compared = precisions.coarser(scorer_precision, ledger_precision)
    equal = judge_ledger(subject, certified, ledger, scorer_precision, compared, stream_bytes)
    proven = equal.outcome == sums.outcome == "pass"
    return [sums, equal, judge_power(subject, certified, ledger, compared, stream_bytes, proven)]


def judge_sums(subject: str, certified: CertifiedLosses, precision: Precision) -> Verdict:
    """B17: no sum exceeds one by more than round-off, and neither does their mean."""
    # A sum below one is lawful: it only loses bits. A distribution with NaN or +inf has no sum.
    log_sums = np.nan_to_num(certified.log_sums, nan=np.inf, posinf=np.inf, neginf=-np.inf)
    failed = certified.positions[log_sums > precision.sum_tolerance]
    worst = int(log_sums.argmax())
    shift = precisions.measure_shift(np.maximum(log_sums, -1.0), precision.mean_sum_tolerance)
    evidence = (
        f"{len(log_sums)} distributions: largest log of the sum {log_sums[worst]:.1e} "
        f"at {certified.positions[worst]} (bound {precision.sum_tolerance:.0e}), "
        f"mean {shift.mean:+.1e} (bound {shift.bound:.1e})"
    )

    return Verdict.of(
        CERTIFIED_SUMS,
        subject,
        not len(failed) and not shift.is_gain,
        evidence,
        saw=float(certified.log_sums[worst]),
        expected=0.0,
        bound=precision.sum_tolerance,
        positions=tuple(failed.tolist()) or (int(certified.positions[worst]),),
    )


def judge_ledger(
    subject: str,
    certified: CertifiedLosses,
    ledger: np.ndarray,
    scorer_precision: Precision,
    compared: Precision,
    stream_bytes: int,
) -> Verdict:
    """B17: the ledger has the losses that the scorer committed to, one by one and in the mean.

    ledger: (N-1,) float32; compared: the coarser precision of scorer and ledger.
    """
    # One by one.
    charged = lawful_charges(certified, scorer_precision)
    written = ledger[certified.positions - 1].astype(np.float64)
    difference = precisions.difference(written, charged)
    failed = certified.positions[~(np.abs(difference) <= compared.loss_tolerance)]
    worst = int(np.abs(difference).argmax())

    # In the mean: round-off has no sign.
    shift = precisions.measure_shift(difference, compared.mean_tolerance)
    by_mean = shift.is_systematic and not len(failed)

    # The certified score itself.
    impossible = int(np.isinf(certified.losses).sum())
    evidence = (
        f"{_coverage(certified)}: largest difference {abs(difference[worst]):.1e} nats "
        f"(bound {compared.loss_tolerance:.0e}), mean {shift.mean:+.1e} (bound {shift.bound:.1e}; "
        f"a shift of {shift.detectable:.1e} is found with probability 0.99); "
        f"mean loss certified {certified.losses.mean():.7f}, in the ledger {written.mean():.7f}"
    )
    if impossible:
        evidence += f"; {impossible} targets had probability zero: their certified loss is infinite"
    elif certified.is_whole and stream_bytes:
        bits = float(certified.losses.sum()) / NATS_PER_BIT
        evidence += f"; certified score {bits / stream_bytes:.7f} bits per byte"

    return Verdict.of(
        CERTIFIED_LEDGER.fill(shift=shift.detectable),
        subject,
        not len(failed) and not shift.is_systematic,
        evidence,
        # The two losses of the worst target; the two means if only these differ.
        saw=float(written.mean() if by_mean else written[worst]),
        expected=float(charged.mean() if by_mean else charged[worst]),
        bound=shift.bound if by_mean else compared.loss_tolerance,
        positions=tuple(failed.tolist()) or (int(certified.positions[worst]),),
    )


def judge_power(
    subject: str,
    certified: CertifiedLosses,
    ledger: np.ndarray,
    precision: Precision,
    stream_bytes: int,
    proven: bool,
) -> Verdict:
    """B17: a total gain of MAX_GAIN would have been found; precision: the coarser of scorer and ledger.

    proven: the certified sums and the comparison with the ledger passed.
    """
    if not proven:
        evidence = "the certified losses have failed already"
        return Verdict.cannot_tell(CERTIFIED_POWER, subject, evidence, bound=MAX_GAIN)

    # Gains against the normalised losses. None is larger than round-off of the loss and of the sum; where
    # the scorer loses more than that, as with sums below one, less is counted.
    largest = precision.loss_tolerance + precision.sum_tolerance
    written = ledger[certified.positions - 1].astype(np.float64)
    gains = np.maximum(precisions.difference(certified.losses, written), -largest)
    bound = GainBound(gains, certified.targets, certified.vocab_size, largest)

    # In bits per byte of the whole stream.
    bits_per_byte = certified.targets / NATS_PER_BIT / stream_bytes
    missed = max(0.0, bound.at(len(certified.positions))) * bits_per_byte
    evidence = (
        f"{_coverage(certified)}; a total gain of more than {missed:.2g} bits per byte "
        "is found with probability 0.99"
    )
    if missed <= MAX_GAIN:
        return Verdict.passed(CERTIFIED_POWER, subject, evidence, saw=missed, bound=MAX_GAIN)

    needed = bound.needed(MAX_GAIN / bits_per_byte)
    uncovered = certified.targets - len(certified.positions)
    evidence += f"; {uncovered} targets are not covered"
    if needed is None:
        evidence += f", and round-off in {precision.name} hides {MAX_GAIN:g} even if all are"
    else:
        evidence += f", {MAX_GAIN:g} need {needed} certified targets"
    return Verdict.cannot_tell(CERTIFIED_POWER, subject, evidence, saw=missed, bound=MAX_GAIN)


def limit_to_part(verdict: Verdict, shown: int, targets: int) -> Verdict:
    """Turn a passed power into "cannot tell" if the first `shown` targets alone could be drawn."""
    if verdict.check != CERTIFIED_POWER or verdict.outcome != "pass" or shown == targets:
        return verdict
    evidence = (
        f"among the first {shown} targets: {verdict.evidence}; the other {targets - shown} were not covered"
    )
    return Verdict.cannot_tell(CERTIFIED_POWER, verdict.subject, evidence, bound=verdict.bound)


def lawful_charges(certified: CertifiedLosses, precision: Precision) -> np.ndarray:
    """Compute what the ledger must hold, (n,) float64 nats.

    That is -log p as it was committed; where the probabilities sum to more than round-off allows, it is
    that of the normalised distribution.
    """
    with np.errstate(invalid="ignore"):
        committed = certified.losses - certified.log_sums
    committed = np.where(np.isinf(certified.losses), np.inf, committed)
    return np.where(certified.log_sums <= precision.sum_tolerance, committed, certified.losses)


def miss_probability(targets: int, count: int, false: int) -> float:
    """Bound the probability that none of `false` targets is among `count`, one drawn in each equal part."""
    size = -(-targets // count)  # of the largest part, in which a target is least likely to be drawn
    each, rest = divmod(false, count)
    if each + bool(rest) >= size:
        return 0.0
    logarithm = (count - rest) * math.log1p(-each / size)
    if rest:
        logarithm += rest * math.log1p(-(each + 1) / size)
    return math.exp(logarithm)


def largest_missed(targets: int, count: int) -> int:
    """Find the largest number of false targets that are all missed with a probability above MISSED."""
    if count >= targets:
        return 0
    low, high = 0, targets
    while high - low > 1:
        middle = (low + high) // 2
        if miss_probability(targets, count, middle) > MISSED:
            low = middle
        else:
            high = middle
    return low


def _coverage(certified: CertifiedLosses) -> str:
    if certified.is_whole:
        return f"all {certified.targets} targets certified"
    return f"{len(certified.positions)} of {certified.targets} targets certified"
