"""C2 and C3: is there one distribution, fixed before the token exists, and is it what was scored (B2, B3, B4)?

`predict` shows the distribution before the token is revealed, so that its sum is plain to see; but what counts is `score_stream`, the
fast path. Substitution ties them together: at one position the fast path is shown a instead of x_t, and must charge -log p(a) with the
p that was committed. Then q(a) = exp(-nll(x_t := a)) sums to one because p does. A vocabulary too large to be substituted whole is
sampled from r = p/2 + 1/(2V), and the sum Z is estimated by 1 + mean of (q(a) - p(a)) / r(a): unbiased, and exact where q = p.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stages.audit import probe_runner
from stages.audit.sampling import Draw
from stages.audit.verdict import Verdict, outcome
from stages.common.scorer import Scorer

RUN = 4  # consecutive targets committed to at each place: what skips every other target cannot fall between single ones
MARGIN = (
    8  # the fast path is called on up to so many tokens before the substituted one, and half as many after it
)


class Commitment(NamedTuple):
    """What a distribution probe saw at one position."""

    position: int
    log_sum: float  # logsumexp of predict()
    finite: bool
    repeated: (
        bool  # predict() gave the same bits again, before and after another fork had observed another token
    )
    charged: np.ndarray  # (up to RUN,) float64: -predict()[x] for x_t and the targets after it
    deviation: float  # largest |nll(x_t := a) + predict()[a]| over the substituted ids
    worst: int  # the id where
    prefix_moved: bool  # whether losses before t depended on the id at t
    total: float  # sum of q over the vocabulary, or its estimate
    ids: int  # substituted


@dataclass(frozen=True)
class Substitution:
    """A probe: read predict() at `position`, then score the piece [start, stop) with other ids there."""

    start: int
    position: int
    stop: int
    uniform: np.ndarray  # (K,) int64: ids drawn uniformly
    quantiles: np.ndarray  # (K,) float64 in [0, 1): where the ids drawn from p lie in its cumulative sum

    def run(self, scorer: Scorer, tokens: np.ndarray) -> Commitment:
        """Commit, then substitute."""
        target = int(tokens[self.position])
        stepper = scorer.fork()
        for token in tokens[self.start : self.position].tolist():
            stepper.observe(token)
        committed = probe_runner.distribution(stepper)
        repeated = _unmoved_by_others(stepper, committed, (target + 1) % len(committed))
        ids, drawn = self._ids(committed, target)
        charged = self._charged(stepper, committed, tokens)
        at = self.position - self.start
        nll = np.empty((len(ids), at + 1), dtype=np.float32)
        for row, substitute in zip(nll, ids.tolist(), strict=True):
            piece = tokens[self.start : self.stop].copy()
            piece[at] = substitute
            row[:] = probe_runner.score(scorer.fork(), piece)[: at + 1]
        deviation = np.nan_to_num(np.abs(nll[:, at] + committed[ids]), nan=np.inf)
        return Commitment(
            position=self.position,
            log_sum=log_sum_exp(committed),
            finite=bool(np.isfinite(committed).all()),
            repeated=repeated,
            charged=charged,
            deviation=float(deviation.max()),
            worst=int(ids[deviation.argmax()]),
            prefix_moved=bool(probe_runner.moved(nll[:, :at], nll[:1, :at]).any()),
            total=_total(committed, ids, nll[:, at].astype(np.float64), drawn),
            ids=len(ids),
        )

    def _charged(self, stepper: Scorer, committed: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """What the run's targets cost by the distributions committed before each; the stepper goes on over them."""
        run = tokens[self.position : self.position + RUN].tolist()
        charged = [-float(committed[run[0]])]
        for token, following in itertools.pairwise(run):
            stepper.observe(token)
            charged.append(-float(probe_runner.distribution(stepper)[following]))
        return np.array(charged)

    def _ids(self, committed: np.ndarray, target: int) -> tuple[np.ndarray, int]:
        """The ids to put at t, and how many of them, at the end, were drawn from r; 0 when they are the whole vocabulary."""
        if len(committed) <= len(self.uniform):
            return np.arange(len(committed)), 0
        cumulative = np.cumsum(np.exp(committed))
        likely = np.minimum(
            np.searchsorted(cumulative, self.quantiles * cumulative[-1], side="right"), len(committed) - 1
        )
        count = (len(likely) - 2) // 2 * 2  # even, so that half of them are likely ids, as r says
        drawn = np.where(np.arange(count) % 2 == 0, likely[:count], self.uniform[:count])
        return np.concatenate([[target, int(np.nan_to_num(committed, nan=-np.inf).argmax())], drawn]), len(
            drawn
        )


def probes(
    key: bytes, positions: list[int], length: int, vocab_size: int, substitutions: int
) -> list[Substitution]:
    """One probe for each position, in pieces whose lengths vary so that they cannot be told from ordinary calls."""
    draw = Draw(key, "substitution")
    made = []
    for position in positions:
        start = max(1, position - draw.one(0, MARGIN))
        stop = min(length, position + 1 + draw.one(0, MARGIN // 2))
        uniform = draw.below(vocab_size, substitutions)
        quantiles = draw.below(1 << 53, substitutions) / float(1 << 53)
        made.append(Substitution(start, position, stop, uniform, quantiles))
    return made


def judge_independence(subject: str, seen: list[Commitment]) -> Verdict:
    """B2: what is predicted does not move with the token, nor do earlier losses."""
    guilty = [one for one in seen if not one.repeated or one.prefix_moved]
    evidence = f"at {len(seen)} positions predict() gave the same bits before and after other forks observed other tokens"
    if guilty:
        what = (
            "an earlier loss moved with the token put there"
            if guilty[0].prefix_moved
            else "predict() moved when another fork went on"
        )
        evidence = f"at {len(guilty)} of {len(seen)} positions {what}"
    return Verdict(
        check="B2",
        name="own-token independence",
        subject=subject,
        conditions=("C1", "C2", "C3"),
        outcome=outcome(not guilty),
        evidence=evidence,
        saw=len(guilty),
        expected=0,
        bound=0,
        positions=tuple(one.position for one in (guilty or seen)),
        sees="state that a look at the distribution or another fork changes; earlier scores that depend on this token",
        blind="a fast path that has another distribution than predict() shows (B3)",
    )


def judge_sum(subject: str, seen: list[Commitment], tolerance: float) -> Verdict:
    """B3, first half: the committed probabilities sum to one."""
    deviation = np.array(
        [one.log_sum if one.finite else np.inf for one in seen]
    )  # a sum below one gives bits away, which is lawful
    deviation = np.nan_to_num(deviation, nan=np.inf)
    worst = seen[int(deviation.argmax())]
    guilty = deviation > tolerance
    return Verdict(
        check="B3",
        name="committed distribution sums to one",
        subject=subject,
        conditions=("C2",),
        outcome=outcome(not guilty.any()),
        evidence=f"largest log of the sum over {len(seen)} distributions {deviation.max():.1e}; all entries finite: "
        f"{'yes' if all(one.finite for one in seen) else 'no'}",
        saw=worst.log_sum,
        expected=0.0,
        bound=tolerance,
        positions=tuple(
            one.position for one, bad in zip(seen, guilty, strict=True) if bad or not guilty.any()
        ),
        sees="probabilities over the whole vocabulary that sum to more than one",
        blind="positions that were not drawn; whether these probabilities are the ones that are scored (substitution)",
    )


def judge_substitution(subject: str, seen: list[Commitment], vocab_size: int, tolerance: float) -> Verdict:
    """B3, second half: the fast path charges any token what was committed, so its sum over tokens is one too."""
    guilty = [one for one in seen if not one.deviation <= tolerance]
    worst = max(seen, key=lambda one: one.deviation)
    far = max(seen, key=lambda one: abs(one.total - 1))
    ids = sum(one.ids for one in seen)
    whole = all(one.ids == vocab_size for one in seen)
    evidence = (
        f"{ids} substitutions at {len(seen)} positions: largest difference from the committed distribution {worst.deviation:.1e} nats "
        f"(id {worst.worst} at {worst.position}); {'sum' if whole else 'estimated sum'} of the scored probabilities {far.total:.7f}"
    )
    return Verdict(
        check="B3",
        name="counterfactual sum",
        subject=subject,
        conditions=("C2", "C3"),
        outcome=outcome(not guilty),
        evidence=evidence,
        saw=far.total,
        expected=1.0,
        bound=tolerance,
        positions=tuple(one.position for one in (guilty or seen)),
        sees="target-dependent gates, update before score, unnormalised mixtures, scores for the realised token only",
        blind="causality in time (B1)"
        if whole
        else f"what favours few tokens only: {ids} pairs of position and id were tried",
    )


def judge_commitment(
    subject: str, ledger: np.ndarray | None, seen: list[Commitment], tolerance: float
) -> Verdict:
    """B4: the ledger's loss is the one that was committed before the token was known."""
    fields = {
        "check": "B4",
        "name": "ledger equals commitment",
        "subject": subject,
        "conditions": ("C1", "C2", "C3", "metric"),
        "bound": tolerance,
        "sees": "a ledger whose losses no distribution fixed beforehand explains, whatever wrote it",
        "blind": "targets that were not drawn",
    }
    if ledger is None:
        evidence = "there is no complete ledger to hold against the commitments"
        return Verdict(
            outcome="cannot tell", evidence=evidence, saw=0.0, expected=0.0, positions=(), **fields
        )  # type: ignore[arg-type]
    charged = np.concatenate([one.charged for one in seen])
    places = np.concatenate([one.position + np.arange(len(one.charged)) for one in seen])
    written = ledger[places - 1].astype(np.float64)
    deviation = np.nan_to_num(np.abs(written - charged), nan=np.inf)
    worst, guilty = int(deviation.argmax()), deviation > tolerance
    return Verdict(
        outcome=outcome(not guilty.any()),
        evidence=f"{len(charged)} targets in {len(seen)} runs: largest difference {deviation.max():.1e} nats",
        saw=float(written[worst]),
        expected=float(charged[worst]),
        positions=tuple(places[guilty].tolist()) if guilty.any() else tuple(one.position for one in seen),
        **fields,  # type: ignore[arg-type]
    )


def log_sum_exp(x: np.ndarray) -> float:
    """log of the sum of exp(x), float64."""
    top = float(x.max())
    return top + float(np.log(np.exp(x - top).sum())) if np.isfinite(top) else top


def _unmoved_by_others(scorer: Scorer, committed: np.ndarray, other_token: int) -> bool:
    stepped, streamed = scorer.fork(), scorer.fork()
    stepped.observe(other_token)
    probe_runner.score(streamed, np.array([other_token], dtype=np.uint16))
    return probe_runner.distribution(scorer).tobytes() == committed.tobytes()


def _total(committed: np.ndarray, ids: np.ndarray, nll: np.ndarray, drawn: int) -> float:
    if not drawn:
        return float(np.exp(-nll).sum())
    p, q = np.exp(committed[ids[-drawn:]]), np.exp(-nll[-drawn:])
    return 1.0 + float(((q - p) / (p / 2 + 1 / (2 * len(committed)))).mean())
