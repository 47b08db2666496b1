"""C2 and C3: is there one distribution, fixed before the token is known, and is it scored (B2, B3, B4)?

`predict` shows the distribution before the token is revealed, so its sum can be computed; but the
losses come from `score_stream`, the fast path. Substitution ties the two together: at one position t
the fast path is shown an id a instead of x_t, and must charge -log p(a) with the p that was committed.
Then q(a) = exp(-nll(x_t := a)) sums to one because p does. If the vocabulary is too large to substitute
every id, ids are sampled from r = p/2 + 1/(2V), and the sum Z of q is estimated by 1 + mean of (q(a) -
p(a)) / r(a): unbiased, and exact where q = p.

A probability may be zero: its logarithm is -inf, and the loss of that id must be infinite too.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stages.audit import probe_runner
from stages.audit.precision import Precision, difference
from stages.audit.probe_runner import Cost
from stages.audit.sampling import KeyedRng
from stages.audit.verdict import Check, Verdict
from stages.common.scorer import Scorer

OWN_TOKEN = Check(
    "B2",
    "own-token independence",
    conditions=("C1", "C2", "C3"),
    sees="state that predict() or another fork changes; earlier scores that depend on this token",
    blind="a fast path that uses another distribution than predict() shows (B3)",
)
COMMITTED_SUM = Check(
    "B3",
    "committed distribution sums to one",
    conditions=("C2",),
    sees="probabilities over the whole vocabulary that sum to more than one",
    blind="positions that were not drawn; whether these probabilities are the ones that are scored "
    "(substitution)",
)
COUNTERFACTUAL_SUM = Check(
    "B3",
    "counterfactual sum",
    conditions=("C2", "C3"),
    sees="target-dependent gates, update before score, unnormalised mixtures, "
    "scores for the realised token only",
    blind="causality in time (B1)",
)
SAMPLED_COUNTERFACTUAL_SUM = dataclasses.replace(
    COUNTERFACTUAL_SUM,
    blind="advantages of a few tokens only: {tried} pairs of position and id were tried",
)
LEDGER_COMMITMENT = Check(
    "B4",
    "ledger equals commitment",
    conditions=("C1", "C2", "C3", "metric"),
    sees="a ledger whose losses no distribution fixed beforehand explains, whatever wrote it",
    blind="targets that were not drawn",
)
# Consecutive targets whose distributions are read at each position: a scorer that skips every other
# target cannot fall between them.
RUN_TARGETS = 4
# Tokens before the substituted one in the same call of the fast path; half as many after it.
MAX_TOKENS_BEFORE = 8
MAX_PIECE = MAX_TOKENS_BEFORE + MAX_TOKENS_BEFORE // 2 - 1  # tokens: up to 7 before, and up to 3 after


class Commitment(NamedTuple):
    """Finding of a distribution probe at one position t."""

    position: int
    log_sum: float  # log of the sum of exp(predict())
    proper: bool  # no entry of predict() is NaN or +inf
    repeated: bool  # predict() gave the same again after other forks had observed another token
    charged: np.ndarray  # (up to RUN_TARGETS,) float64, nats: -predict()[x] for x_t and the targets after it
    deviation: float  # largest |nll(x_t := a) + predict()[a]| over the substituted ids, in nats
    worst_id: int  # the id with that deviation
    prefix_changed: bool  # losses before t depended on the id at t
    total: float  # sum of q over the vocabulary, or its estimate
    ids: int  # number of substituted ids


@dataclass(frozen=True)
class Substitution:
    """Probe: read predict() at `position`, then score the piece [start, stop) with other ids there."""

    start: int
    position: int
    stop: int
    uniform: np.ndarray  # (K,) int64: ids drawn uniformly
    # (K,) float64 in [0, 1): positions in the cumulative sum of p, for ids drawn from p
    quantiles: np.ndarray
    vocab_size: int
    rounding: float  # nats by which equal losses may differ

    @property
    def cost(self) -> Cost:
        """Work that `run` asks for."""
        return self.cost_of(
            self.position - self.start, self.stop - self.start, len(self.uniform), self.vocab_size
        )

    @staticmethod
    def cost_of(before: int, piece: int, substitutions: int, vocab_size: int) -> Cost:
        """Cost of a piece of `piece` tokens, `before` of them before the substituted one."""
        # The committed distribution, again after two forks, then those of the next targets.
        committed = Cost(targets=before, predictions=1)
        repeated = Cost(calls=1, targets=2, predictions=1)
        charged = Cost(targets=RUN_TARGETS - 1, predictions=RUN_TARGETS - 1)

        # One call for each id.
        ids = vocab_size if vocab_size <= substitutions else 2 + _drawn(substitutions)
        return committed + repeated + charged + Cost(calls=1, targets=piece) * ids

    def run(self, scorer: Scorer, tokens: np.ndarray) -> Commitment:
        """Read the distribution, then substitute; tokens: (N,) uint16."""
        # The distribution that the scorer commits to before it knows x_t.
        stepper = scorer.fork()
        for token in tokens[self.start : self.position].tolist():
            stepper.observe(token)
        committed = probe_runner.checked_predict(stepper)
        target = int(tokens[self.position])
        repeated = _repeats_after_forks(stepper, committed, (target + 1) % len(committed), self.rounding)
        ids, sampled = self._ids(committed, target)
        charged = self._charged(stepper, committed, tokens)

        # Losses of the fast path up to t, one row for each id in the place of x_t.
        at = self.position - self.start
        nll = np.empty((len(ids), at + 1), dtype=np.float32)
        for row, substitute in zip(nll, ids.tolist(), strict=True):
            piece = tokens[self.start : self.stop].copy()
            piece[at] = substitute
            row[:] = probe_runner.checked_score(scorer.fork(), piece)[: at + 1]

        # Each id must be charged what was committed for it, and must not change a loss before t.
        deviation = np.abs(difference(nll[:, at], -committed[ids]))
        prefix_changed = bool(probe_runner.differs(nll[:, :at], nll[:1, :at], self.rounding).any())

        return Commitment(
            position=self.position,
            log_sum=log_sum_exp(committed),
            proper=not (np.isnan(committed) | (committed == np.inf)).any(),
            repeated=repeated,
            charged=charged,
            deviation=float(deviation.max()),
            worst_id=int(ids[deviation.argmax()]),
            prefix_changed=prefix_changed,
            total=_sum_of_scored(committed, ids, nll[:, at].astype(np.float64), sampled),
            ids=len(ids),
        )

    def _charged(self, stepper: Scorer, committed: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Read the losses of x_t and the next targets, each from the distribution committed before it.

        Advances the stepper.
        """
        run = tokens[self.position : self.position + RUN_TARGETS].tolist()
        charged = [-float(committed[run[0]])]
        for token, following in itertools.pairwise(run):
            stepper.observe(token)
            charged.append(-float(probe_runner.checked_predict(stepper)[following]))
        return np.array(charged)

    def _ids(self, committed: np.ndarray, target: int) -> tuple[np.ndarray, int]:
        """Choose the ids (K,) to put at t.

        Also returns how many of them, the last ones, were drawn from r; 0 if every id is tried.
        committed: (V,) float64.
        """
        if self.vocab_size <= len(self.uniform):
            return np.arange(self.vocab_size), 0

        # The target and the likeliest id, then ids drawn from p and uniformly in turn: half and half,
        # as r says.
        cumulative = np.cumsum(np.exp(committed))
        from_p = np.searchsorted(cumulative, self.quantiles * cumulative[-1], side="right")
        from_p = np.minimum(from_p, self.vocab_size - 1)
        count = _drawn(len(from_p))
        drawn = np.where(np.arange(count) % 2 == 0, from_p[:count], self.uniform[:count])
        likeliest = int(np.nan_to_num(committed, nan=-np.inf).argmax())
        return np.concatenate([[target, likeliest], drawn]), len(drawn)


def probes(
    key: bytes, positions: list[int], length: int, vocab_size: int, substitutions: int, rounding: float
) -> list[Substitution]:
    """Build one probe for each position of a stream of `length` tokens, with up to `substitutions` ids.

    Lengths of the pieces vary, so that they cannot be told from ordinary calls. rounding: nats by which
    equal losses may differ.
    """
    rng = KeyedRng(key, "substitution")
    substitution_probes = []
    for position in positions:
        start = max(1, position - rng.integer(0, MAX_TOKENS_BEFORE))
        stop = min(length, position + 1 + rng.integer(0, MAX_TOKENS_BEFORE // 2))
        uniform = rng.below(vocab_size, substitutions)
        quantiles = rng.below(1 << 53, substitutions) / float(1 << 53)
        substitution_probes.append(
            Substitution(start, position, stop, uniform, quantiles, vocab_size, rounding)
        )
    return substitution_probes


def judge_independence(subject: str, findings: list[Commitment], rounding: float) -> Verdict:
    """B2: predict() and earlier losses do not change with the token at t by more than `rounding` nats."""
    # Two ways to depend on a token before it is scored.
    failed = [finding for finding in findings if not finding.repeated or finding.prefix_changed]
    evidence = (
        f"at {len(findings)} positions predict() gave the same "
        "before and after other forks observed other tokens"
    )
    if failed:
        reason = "predict() changed after another fork had observed a token"
        if failed[0].prefix_changed:
            reason = "an earlier loss changed with the token put there"
        evidence = f"at {len(failed)} of {len(findings)} positions {reason}"

    return Verdict.of(
        OWN_TOKEN,
        subject,
        not failed,
        evidence,
        # Numbers of positions.
        saw=len(failed),
        expected=0,
        bound=0,
        positions=tuple(finding.position for finding in (failed or findings)),
    )


def judge_sum(subject: str, findings: list[Commitment], precision: Precision) -> Verdict:
    """B3, first half: the committed probabilities sum to one."""
    # A sum below one is lawful: it only loses bits. So is a probability of zero.
    tolerance = precision.sum_tolerance
    log_sums = np.array([finding.log_sum if finding.proper else np.inf for finding in findings])
    failed = [finding for finding, log_sum in zip(findings, log_sums, strict=True) if log_sum > tolerance]
    all_proper = all(finding.proper for finding in findings)
    return Verdict.of(
        COMMITTED_SUM,
        subject,
        not failed,
        f"largest log of the sum over {len(findings)} distributions {log_sums.max():.1e}; "
        f"entries that are NaN or +inf: {'none' if all_proper else 'some'}",
        saw=findings[int(log_sums.argmax())].log_sum,
        expected=0.0,
        bound=tolerance,
        positions=tuple(finding.position for finding in (failed or findings)),
    )


def judge_substitution(
    subject: str, findings: list[Commitment], vocab_size: int, precision: Precision
) -> Verdict:
    """B3, second half: the fast path charges any id what was committed, so its sum is one too."""
    tolerance = precision.loss_tolerance
    failed = [finding for finding in findings if finding.deviation > tolerance]
    worst = max(findings, key=lambda finding: finding.deviation)
    farthest = max(findings, key=lambda finding: abs(finding.total - 1))

    # How many ids were tried decides what the check cannot detect.
    ids = sum(finding.ids for finding in findings)
    all_ids = all(finding.ids == vocab_size for finding in findings)

    return Verdict.of(
        COUNTERFACTUAL_SUM if all_ids else SAMPLED_COUNTERFACTUAL_SUM.fill(tried=ids),
        subject,
        not failed,
        f"{ids} substitutions at {len(findings)} positions: largest difference from the committed "
        f"distribution {worst.deviation:.1e} nats (id {worst.worst_id} at {worst.position}); "
        f"{'sum' if all_ids else 'estimated sum'} of the scored probabilities {farthest.total:.7f}",
        # The sum of scored probabilities that is farthest from one.
        saw=farthest.total,
        expected=1.0,
        bound=tolerance,
        positions=tuple(finding.position for finding in (failed or findings)),
    )


def judge_commitment(
    subject: str, ledger: np.ndarray | None, findings: list[Commitment], precision: Precision
) -> Verdict:
    """B4: the ledger's losses are those that were committed before each token was known.

    ledger: (N-1,) float32, or None without a complete one; precision: the coarser one of the scorer and
    its ledger.
    """
    tolerance = precision.loss_tolerance
    if ledger is None:
        evidence = "there is no complete ledger to compare with the committed distributions"
        return Verdict.cannot_tell(LEDGER_COMMITMENT, subject, evidence, bound=tolerance)

    # Compare each target; the worst is reported.
    charged = np.concatenate([finding.charged for finding in findings])
    targets = np.concatenate([finding.position + np.arange(len(finding.charged)) for finding in findings])
    written = ledger[targets - 1].astype(np.float64)
    deviation = np.abs(difference(written, charged))
    failed = targets[deviation > tolerance].tolist()
    worst = int(deviation.argmax())

    return Verdict.of(
        LEDGER_COMMITMENT,
        subject,
        not failed,
        f"{len(charged)} targets in {len(findings)} runs: largest difference {deviation.max():.1e} nats",
        # The two losses of the worst target.
        saw=float(written[worst]),
        expected=float(charged[worst]),
        bound=tolerance,
        positions=tuple(failed or (finding.position for finding in findings)),
    )


def log_sum_exp(x: np.ndarray) -> float:
    """Compute the log of the sum of exp(x) without overflow; x: (n,) float64."""
    top = float(x.max())
    return top + float(np.log(np.exp(x - top).sum())) if np.isfinite(top) else top


def _drawn(substitutions: int) -> int:
    """Number of substituted ids that are drawn: an even one, as half of them are drawn from p."""
    return (substitutions - 2) // 2 * 2


def _repeats_after_forks(scorer: Scorer, committed: np.ndarray, other_token: int, rounding: float) -> bool:
    """Test whether predict() gives the same after two forks have observed, and scored, another token."""
    observing = scorer.fork()
    scoring = scorer.fork()
    observing.observe(other_token)
    probe_runner.checked_score(scoring, np.array([other_token], dtype=np.uint16))
    return not probe_runner.differs(probe_runner.checked_predict(scorer), committed, rounding).any()


def _sum_of_scored(committed: np.ndarray, ids: np.ndarray, nll: np.ndarray, sampled: int) -> float:
    """Sum q(a) = exp(-nll) over the vocabulary, or estimate the sum if ids were sampled.

    committed: (V,) float64; ids, nll: (K,), of which the last `sampled` were drawn from r.
    """
    if not sampled:
        return float(np.exp(-nll).sum())
    p = np.exp(committed[ids[-sampled:]])
    q = np.exp(-nll[-sampled:])
    r = p / 2 + 1 / (2 * len(committed))
    return 1.0 + float(((q - p) / r).mean())
