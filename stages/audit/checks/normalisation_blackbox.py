"""C2 for a scorer that shows no distribution: do its scores sum to one all the same (B3)?

What is known of such a scorer are scores of streams. q(a) = exp(-nll(x_t := a)) is what it would have charged for a at t; over the whole
vocabulary these must sum to at most one. Up to `EXACT` ids all are tried. A larger vocabulary is sampled: a from a law r that is half
uniform, half the tokens that follow x_(t-1) in the stream, and e = q(a)/r(a), whose mean is the sum Z. If Z <= 1 everywhere, a gambler who
stakes a share s of his wealth at each draw, and so has

    wealth = product of (1 - s + s e),

expects never to have more than he began with; averaged over several s, and by Ville, P(wealth ever >= 2^k) <= 2^-k. So a scorer is
convicted when the gambler has won k bits against it, by the same bound as in canary.py, and not by a tolerance.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stages.audit import probe_runner
from stages.audit.sampling import Draw
from stages.audit.verdict import Verdict, outcome
from stages.common.scorer import Scorer

EXACT = 512  # ids
STAKES = (0.02, 0.1, 0.3, 0.8)


class Total(NamedTuple):
    """What the scores at one position came to."""

    position: int
    total: float  # the sum, or the mean of `drawn`
    drawn: np.ndarray  # (K,) float64: q(a) / r(a); empty where the sum is exact
    ids: int


@dataclass(frozen=True)
class Counterfactual:
    """A probe: the ids to put at `start`, and the law they were drawn from (None: they are all of them)."""

    start: int
    ids: np.ndarray  # (K,) int64
    law: np.ndarray | None  # (V,) float64

    def run(self, scorer: Scorer, tokens: np.ndarray) -> Total:
        """What each id would have cost."""
        q = np.exp(
            -np.array(
                [
                    float(probe_runner.score(scorer.fork(), np.array([a], dtype=np.uint16))[0])
                    for a in self.ids.tolist()
                ]
            )
        )
        if self.law is None:
            return Total(self.start, float(q.sum()), np.empty(0), len(q))
        ratios = q / self.law[self.ids]
        return Total(self.start, float(ratios.mean()), ratios, len(q))


def probes(
    key: bytes, positions: list[int], tokens: np.ndarray, vocab_size: int, draws: int
) -> list[Counterfactual]:
    """One probe for each position."""
    if vocab_size <= EXACT:
        return [Counterfactual(position, np.arange(vocab_size), None) for position in positions]
    drawn = Draw(key, "counterfactual")
    made = []
    for position in positions:
        law = _law(tokens, int(tokens[position - 1]), vocab_size)
        quantiles = drawn.below(1 << 53, draws) / float(1 << 53)
        ids = np.minimum(np.searchsorted(np.cumsum(law), quantiles, side="right"), vocab_size - 1)
        made.append(Counterfactual(position, ids, law))
    return made


def judge(subject: str, seen: list[Total], tolerance: float, bits: float) -> Verdict:
    """B3: no sum exceeds one, or the gambler's wealth never reaches 2^bits."""
    exact = all(not len(one.drawn) for one in seen)
    worst = max(seen, key=lambda one: one.total)
    drawn = np.concatenate([one.drawn for one in seen])
    won = 0.0 if exact else float(wealth(drawn).max())
    holds = all(one.total <= 1 + tolerance for one in seen) if exact else won <= bits
    evidence = (
        f"{sum(one.ids for one in seen)} substitutions at {len(seen)} positions, all ids at each: largest sum {worst.total:.7f}"
        if exact
        else f"{len(drawn)} substitutions drawn at {len(seen)} positions: sum {drawn.mean():.4f} on average (standard error "
        f"{drawn.std() / np.sqrt(len(drawn)):.4f}); a gambler against it was {won:+.1f} bits up at best, {bits:g} convict"
    )
    return Verdict(
        check="B3",
        name="counterfactual sum",
        subject=subject,
        conditions=("C2",),
        outcome=outcome(holds),
        evidence=evidence,
        saw=worst.total if exact else won,
        expected=1.0 if exact else "<= bound",
        bound=tolerance if exact else bits,
        positions=tuple(one.position for one in seen if not exact or holds or one.total > 1 + tolerance),
        sees="target-dependent gates, update before score, unnormalised mixtures, scores for the realised token only",
        blind="causality in time (B1)"
        if exact
        else "sums that exceed one by little, or through few tokens: the draws are not the vocabulary",
    )


def wealth(ratios: np.ndarray) -> np.ndarray:
    """log2 of the gambler's wealth after each draw, the mean over the stakes; (K,) float64."""
    stakes = np.array(STAKES)[:, None]
    each = np.cumsum(np.log2(1 - stakes + stakes * ratios[None]), axis=1)
    top = each.max(axis=0)
    return top + np.log2(np.exp2(each - top).mean(axis=0))


def _law(tokens: np.ndarray, previous: int, vocab_size: int) -> np.ndarray:
    follows = np.bincount(tokens[1:][tokens[:-1] == previous], minlength=vocab_size).astype(np.float64)
    follows = follows if follows.sum() else np.ones(vocab_size)
    return 0.5 * follows / follows.sum() + 0.5 / vocab_size
