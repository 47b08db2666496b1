"""C2 for a scorer without predict(): do its scores sum to one all the same (B3)?

Only the losses of streams are known of such a scorer. q(a) = exp(-nll(x_t := a)) is the probability
that it would have charged for id a at t; over the whole vocabulary these must sum to at most one. Up to
`EXHAUSTIVE_VOCAB` ids all are tried. A larger vocabulary is sampled: a from a distribution r that is
half uniform, half the tokens that follow x_(t-1) in the stream, and e = q(a)/r(a), whose mean is the
sum Z. If Z <= 1 everywhere, a gambler who stakes a share s of his wealth at each draw has

    wealth = product of (1 - s + s e),

and never expects to have more than at the start; averaged over several s, and by Ville, P(wealth ever
>= 2^k) <= 2^-k. So a scorer fails when the gambler has won k bits against it, by the same bound as in
canary.py, and not by a tolerance.

The target itself is among the ids, at a random place, and its loss must be that of the ledger. The scorer
is run in a process that has seen nothing of the stream from t on, and so does not know which id is the
target's: a gate that favours the target cannot open for it alone.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stages.audit import probe_runner
from stages.audit.checks import normalisation
from stages.audit.precision import Precision, difference
from stages.audit.probe_runner import Cost
from stages.audit.sampling import KeyedRng
from stages.audit.verdict import Verdict, Words
from stages.common.scorer import Scorer

COUNTERFACTUAL_SUM = dataclasses.replace(normalisation.COUNTERFACTUAL_SUM, conditions=("C2",))
SAMPLED_COUNTERFACTUAL_SUM = dataclasses.replace(
    COUNTERFACTUAL_SUM,
    blind="sums that exceed one by little, or through few tokens: the draws are not the vocabulary",
    words=Words(expected="<= bound"),
)
CHARGED_BLINDLY = dataclasses.replace(
    normalisation.LEDGER_COMMITMENT,
    name="ledger equals blind score",
    sees="losses that need to know which of many ids is the target: target gates, tables of answers",
)
EXHAUSTIVE_VOCAB = 512  # ids: the largest vocabulary that is tried whole
STAKES = (0.02, 0.1, 0.3, 0.8)  # shares of the wealth; small ones detect small gains, large ones soon


class SumResult(NamedTuple):
    """Sum of the scored probabilities at one position."""

    position: int
    total: float  # the sum, or its estimate: the mean of `ratios`
    ratios: np.ndarray  # (K,) float64: q(a) / r(a); empty if the sum is exact
    ids: int  # number of ids tried
    charged: float  # loss of the target among them, nats


@dataclass(frozen=True)
class Counterfactual:
    """Probe: score each of the ids after tokens[:start]."""

    start: int
    ids: np.ndarray  # (K,) int64, in random order
    target_at: int  # index of the target among them
    # (V,) float64: r, from which the others were drawn; None: they are the whole vocabulary.
    sampled_from: np.ndarray | None

    @property
    def cost(self) -> Cost:
        """Work that `run` asks for."""
        return self.cost_of(len(self.ids))

    @staticmethod
    def cost_of(ids: int) -> Cost:
        """Cost of `ids` ids, one call each."""
        return Cost(calls=1, targets=1) * ids

    def run(self, scorer: Scorer, tokens: np.ndarray) -> SumResult:
        """Sum the probabilities of the ids, or estimate the sum over the vocabulary."""
        nll = [
            float(probe_runner.checked_score(scorer.fork(), np.array([a], dtype=np.uint16))[0])
            for a in self.ids.tolist()
        ]
        q = np.exp(-np.array(nll))
        charged = nll[self.target_at]
        if self.sampled_from is None:
            return SumResult(self.start, float(q.sum()), np.empty(0), len(q), charged)
        ratios = np.delete(q / self.sampled_from[self.ids], self.target_at)
        return SumResult(self.start, float(ratios.mean()), ratios, len(q), charged)


def probes(
    key: bytes, positions: list[int], tokens: np.ndarray, vocab_size: int, draws: int
) -> list[Counterfactual]:
    """Build one probe for each position of the stream (N,), with all ids or with `draws` of them."""
    rng = KeyedRng(key, "counterfactual")
    counterfactuals = []
    for position in positions:
        target = int(tokens[position])
        if vocab_size <= EXHAUSTIVE_VOCAB:
            ids = rng.permutation(vocab_size)
            at = int(np.flatnonzero(ids == target)[0])
            counterfactuals.append(Counterfactual(position, ids, at, None))
            continue
        r = _sampling_distribution(tokens, int(tokens[position - 1]), vocab_size)
        quantiles = rng.below(1 << 53, draws) / float(1 << 53)
        ids = np.minimum(np.searchsorted(np.cumsum(r), quantiles, side="right"), vocab_size - 1)
        at = rng.integer(0, draws + 1)
        counterfactuals.append(Counterfactual(position, np.insert(ids, at, target), at, r))
    return counterfactuals


def tried_ids(vocab_size: int, draws: int) -> int:
    """Number of ids that are tried at a position: all of a small vocabulary, or `draws` and the target."""
    return vocab_size if vocab_size <= EXHAUSTIVE_VOCAB else draws + 1


def judge(subject: str, results: list[SumResult], precision: Precision, bits: float) -> Verdict:
    """B3: the log of no sum exceeds zero by more than round-off.

    If the sums are sampled: the gambler never wins more than `bits` bits.
    """
    # All ids were tried: the sums are exact, and the largest is reported.
    if all(not len(result.ratios) for result in results):
        worst = max(results, key=lambda result: result.total)
        tolerance = math.expm1(precision.sum_tolerance)
        failed = [result for result in results if not result.total <= 1 + tolerance]

        return Verdict.of(
            COUNTERFACTUAL_SUM,
            subject,
            not failed,
            f"{sum(result.ids for result in results)} substitutions at {len(results)} positions, "
            f"all ids at each: largest sum {worst.total:.7f}",
            saw=worst.total,
            expected=1.0,
            bound=tolerance,
            positions=tuple(result.position for result in (failed or results)),
        )

    # Ids were sampled: their mean is only an estimate of the sum, so the gambler's bits decide.
    ratios = np.concatenate([result.ratios for result in results])
    won = float(log2_wealth(ratios).max())
    standard_error = ratios.std() / np.sqrt(len(ratios))

    return Verdict.of(
        SAMPLED_COUNTERFACTUAL_SUM,
        subject,
        won <= bits,
        f"{len(ratios)} substitutions drawn at {len(results)} positions: "
        f"sum {ratios.mean():.4f} on average (standard error {standard_error:.4f}); "
        f"a gambler against it was {won:+.1f} bits up at best, more than {bits:g} is a failure",
        saw=won,
        bound=bits,
        positions=tuple(result.position for result in results),
    )


def judge_charged(
    subject: str, ledger: np.ndarray | None, results: list[SumResult], precision: Precision
) -> Verdict:
    """B4: the ledger, (N-1,) float32, has the losses that a scorer charges that does not know the targets."""
    if ledger is None:
        evidence = "there is no complete ledger to compare with"
        return Verdict.cannot_tell(CHARGED_BLINDLY, subject, evidence, bound=precision.loss_tolerance)

    # The losses of the targets, in the ledger and here.
    positions = np.array([result.position for result in results])
    charged = np.array([result.charged for result in results])
    written = ledger[positions - 1].astype(np.float64)
    different = np.abs(difference(written, charged))

    # Those that differ by more than round-off.
    failed = positions[~(different <= precision.loss_tolerance)].tolist()
    worst = int(different.argmax())

    return Verdict.of(
        CHARGED_BLINDLY,
        subject,
        not failed,
        f"{len(positions)} targets, each scored among other ids in random order: "
        f"largest difference {different[worst]:.1e} nats",
        # The two losses of the worst target.
        saw=float(written[worst]),
        expected=float(charged[worst]),
        bound=precision.loss_tolerance,
        positions=tuple(failed or positions.tolist()),
    )


def log2_wealth(ratios: np.ndarray) -> np.ndarray:
    """Compute log2 of the gambler's wealth, the mean over the stakes, after each draw.

    ratios: (K,) float64; returns (K,) float64.
    """
    stakes = np.array(STAKES)[:, None]
    each = np.cumsum(np.log2(1 - stakes + stakes * ratios[None]), axis=1)
    top = each.max(axis=0)
    return top + np.log2(np.exp2(each - top).mean(axis=0))


def _sampling_distribution(tokens: np.ndarray, previous: int, vocab_size: int) -> np.ndarray:
    """Build r, (V,) float64: half uniform, half the frequencies of tokens (N,) that follow `previous`."""
    followers = np.bincount(tokens[1:][tokens[:-1] == previous], minlength=vocab_size).astype(np.float64)
    if not followers.sum():
        followers = np.ones(vocab_size)
    return 0.5 * followers / followers.sum() + 0.5 / vocab_size
