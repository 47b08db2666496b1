"""A learned tilt towards one token, on any scorer: a mixture that is a distribution by its form (#1145 and #1514 without their gates).

A hint h (table.py) makes one binary event of the next token: is it h? The wrapped scorer gives it the probability p(h); the tilt gives it

    p'(h) = sigmoid(logit p(h) + w . x),    and every other token p(v) (1 - p'(h)) / (1 - p(h)),

which sums to one whatever w is. In the form of #1514, with b = w . x: p'(v) = p(v) exp(b [v = h]) / Z, Z = 1 + p(h) (exp(b) - 1). The
inputs x are logit p(h), a constant, and for each context length the stretched share of the positions in that context's state whose hint
came true. w is chosen by the longest known context, and lies between the weights of the two nearest of a few values of logit p(h): with
one set for each range of it losses jumped by a nat at its ends, where two ways to compute the same p(h) differ in their last bits. Shares
and weights learn from the token after it is scored; all weights start at 0, which is the wrapped scorer exactly. h and x depend on the
observed prefix alone.

Who asks for the decisions on a token's path through the tree of bytes (scoring/byte_tree.py) gets them as they stand under the tilt: what
the hint has is added, times exp(b), to whichever side it is on.

Shapes: N targets, K context lengths, S states, X inputs, D decisions of the longest path.
"""

import math
from typing import Self

import numpy as np
from numba import njit

from stages.common.copy_on_write import Shared
from stages.scoring.byte_tree import Trees
from stages.scoring.evaluate import AskedScorer
from stages.scoring.queries import Asked
from stages.ttt_eval.ngram.table import LENGTHS, STATES, UNKNOWN, Hints
from stages.ttt_eval.wrapper import Wrapper

INPUTS = 2 + len(LENGTHS)
KNOTS, APART = 8, 2.0  # values of logit p(h) that have weights, around 0, and what lies between two
MOST_CERTAIN = 8.0  # of a stretched share; of logit p(h), twice that
COUNT_LIMIT = 255  # a share forgets by 1/256 in the end
STEADY = 16  # updates of a set of weights behind which its steps shrink with their root: else noise costs more than a good network leaves
LEARNT = ("weights", "updates", "shares_KS", "counts_KS")
SURE = -1e-7  # the largest log p(h): float32 cannot tell it from 0


@njit(nogil=True)
def _boost(
    states_K: np.ndarray, hint_logp: float, weights: np.ndarray, shares_KS: np.ndarray, x_X: np.ndarray
) -> tuple[float, int, float]:
    """b, the number of the first of the two sets of weights that gave it, and the share of the second; fills the inputs."""
    logit = hint_logp - math.log(-math.expm1(hint_logp))
    x_X[0], x_X[1] = min(max(logit, -2 * MOST_CERTAIN), 2 * MOST_CERTAIN) / 4, 1.0
    longest = 0
    for k in range(len(states_K)):
        x_X[2 + k] = 0.0
        if states_K[k] != UNKNOWN:
            longest = k
            share = shares_KS[k, states_K[k]]
            x_X[2 + k] = min(max(math.log(share / (1 - share)), -MOST_CERTAIN), MOST_CERTAIN)
    place = min(max(logit / APART + (KNOTS - 1) / 2, 0.0), KNOTS - 1.0)
    below = min(int(place), KNOTS - 2)
    first, share, boost = longest * KNOTS + below, place - below, 0.0
    for i in range(len(x_X)):
        boost += ((1 - share) * weights[first, i] + share * weights[first + 1, i]) * x_X[i]
    return boost, first, share


@njit(nogil=True)
def follow(
    hints: np.ndarray,
    states: np.ndarray,
    targets: np.ndarray,
    nll: np.ndarray,
    hint_logp: np.ndarray,
    weights: np.ndarray,
    shares_KS: np.ndarray,
    counts_KS: np.ndarray,
    updates: np.ndarray,
    rate: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Each target's loss under the tilt, (N,) float32, and its boost, (N,); behind each the shares and weights learn from it."""
    tilted, boosts, x_X = np.empty(len(nll), np.float32), np.zeros(len(nll)), np.empty(INPUTS)
    for i in range(len(nll)):
        tilted[i] = nll[i]
        if hints[i] < 0 or math.isnan(hint_logp[i]):
            continue
        logp = min(np.float64(hint_logp[i]), SURE)
        boost, first, second_share = _boost(states[i], logp, weights, shares_KS, x_X)
        boosts[i] = boost
        came = 1.0 if hints[i] == targets[i] else 0.0
        log_z = math.log1p(math.exp(logp) * math.expm1(boost))
        tilted[i] = max(0.0, nll[i] - boost * came + log_z)
        error = came - math.exp(logp + boost - log_z)
        for chosen, share in ((first, 1 - second_share), (first + 1, second_share)):
            step = rate * share / math.sqrt(1 + updates[chosen] / STEADY)
            updates[chosen] += share
            for k in range(len(x_X)):
                weights[chosen, k] += step * error * x_X[k]
        for k in range(states.shape[1]):
            state = states[i, k]
            if state != UNKNOWN:
                counts_KS[k, state] = min(counts_KS[k, state] + 1, COUNT_LIMIT)
                shares_KS[k, state] += (came - shares_KS[k, state]) / (counts_KS[k, state] + 1.5)
    return tilted, boosts


@njit(nogil=True)
def bend(
    trees: Trees,
    trees_N: np.ndarray,
    targets: np.ndarray,
    hints: np.ndarray,
    heights: np.ndarray,
    paths_DN: np.ndarray,
) -> None:
    """Add the hints to the decisions of paths without them, in place; `heights`: the tilted log-odds of each hint against all else.

    A side that has the mass R of what is not the hint, and the hint, which has H, becomes R + H.
    """
    for i in range(len(targets)):
        if hints[i] < 0:
            continue
        first, end = trees.first_TV[trees_N[i], targets[i]], trees.first_TV[trees_N[i], targets[i] + 1]
        place, mass, hinted = trees.place_TV[trees_N[i], hints[i]], 1.0, math.exp(heights[i])
        for e in range(first, end):
            if not trees.low_E[e] <= place < trees.high_E[e]:
                break
            logit = np.float64(paths_DN[e - first, i])
            right, left = mass / (1 + math.exp(-logit)), mass / (1 + math.exp(logit))
            is_right = place >= trees.middle_E[e]
            paths_DN[e - first, i] = math.log(right + hinted if is_right else right) - math.log(
                left if is_right else left + hinted
            )
            mass = right if trees.right_E[e] else left


class TiltScorer(Wrapper):
    """A lawful scorer that wraps another; the stream's length, a public constant, sizes its tables. `codes_V`: of the ids (table.py)."""

    def __init__(self, scorer: AskedScorer, rate: float, codes_V: np.ndarray, n_targets: int) -> None:
        super().__init__(scorer)
        self.rate = rate
        self.hints = Shared(Hints(codes_V, n_targets), Hints.copy)
        self.weights = np.zeros((len(LENGTHS) * KNOTS, INPUTS))
        self.updates = np.zeros(len(self.weights))
        self.shares_KS = np.full((len(LENGTHS), STATES), 0.5)
        self.counts_KS = np.zeros((len(LENGTHS), STATES), np.int64)

    def fork(self) -> Self:
        """An independent copy; the tables are shared until one of the two goes on."""
        twin = super().fork()
        twin.hints = self.hints.fork()
        for name in LEARNT:
            setattr(twin, name, getattr(self, name).copy())
        return twin

    def _bend(self, logp_V: np.ndarray) -> np.ndarray:
        hint, states_K = self.hints.value.next()
        if hint < 0 or math.isnan(logp_V[hint]):
            return logp_V
        boost, _, _ = _boost(
            states_K, min(logp_V[hint], SURE), self.weights, self.shares_KS, np.empty(INPUTS)
        )
        tilted_V = logp_V - math.log1p(math.exp(logp_V[hint]) * math.expm1(boost))
        tilted_V[hint] += boost
        return tilted_V

    def _score(self, tokens: np.ndarray, asked: Asked | None) -> np.ndarray:
        own = self.hints.own()
        given = 1 if own.seen == 0 and len(tokens) else 0
        hints, states = own.observe(tokens)
        hints, states, targets = (
            hints[given:].astype(np.int64),
            states[given:],
            tokens[given:].astype(np.int64),
        )
        trees_N, forest = (np.zeros_like(hints), None) if asked is None else (asked.about_2N[1], asked.forest)
        answers = self.scorer.score(tokens, Asked(np.stack((hints, trees_N)), forest))
        learnt = (self.weights, self.shares_KS, self.counts_KS, self.updates)
        answers[0], boosts = follow(hints, states, targets, answers[0], answers[1], *learnt, self.rate)
        if forest is not None:
            bend(forest.trees, trees_N, targets, hints, answers[2] + boosts, answers[3:])
        return answers
