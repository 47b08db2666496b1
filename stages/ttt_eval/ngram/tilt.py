"""A learned tilt of a network's distribution towards one token: #1145 and #1514 without their gates.

A hint h (table.py) makes one binary event of the next token: is it h? The network gives this the
probability p(h). The tilt gives it

    p'(h) = sigmoid(logit p(h) + b),    and every other token p(v) (1 - p'(h)) / (1 - p(h)),

which sums to one whatever the boost b is. In the form of #1514: p'(v) = p(v) exp(b [v = h]) / Z, Z
= 1 + p(h) (exp(b) - 1).

The boost is w . x. The inputs x are logit p(h), a constant, and for each context length the logit
of its hit rate: how often the hint came true at positions where that context was in the same state.
The weights w depend on the longest known context and on logit p(h): there is one set at each of a
few values of it, the knots, and between two knots w is interpolated. (With one set for each range
of logit p(h), losses jumped by a nat at the ends of a range, where two ways to compute the same
p(h) differ in their last bits.)

Hit rates and weights learn from the token after it is scored. All weights start at 0, which is the
network exactly. h and x depend on the observed prefix alone.

The logits of the decisions on a token's path through the byte tree (scoring/byte_tree.py), if the
scores have them, are tilted as well: the hint's mass, times exp(b), is added to the side that the
hint is on.

Shapes: N targets, K context lengths, S states of a context, W sets of weights, X inputs, D
decisions of the longest path.
"""

import copy
import math
from typing import NamedTuple

import numpy as np

from stages.common.jit import jit_entry
from stages.scoring.byte_tree import ByteTrees
from stages.scoring.byte_tree_logits import NO_HINT
from stages.scoring.queries import TargetScores
from stages.ttt_eval.ngram.table import CONTEXT_LENGTHS, SLOT_STATES, UNKNOWN, NgramTable

INPUTS = 2 + len(CONTEXT_LENGTHS)  # X
KNOTS = 8  # values of logit p(h) that have a set of weights, around 0
KNOT_SPACING = 2.0  # between two of them
MAX_RATE_LOGIT = 8.0  # largest logit of a hit rate; logit p(h) as an input goes up to twice that
MAX_RATE_COUNT = 255  # observations after which a hit rate forgets by 1/256 each
# Updates of a set of weights after which its steps shrink with the root of their number. With
# larger steps noise costs more than a good network leaves to gain.
STEADY_UPDATES = 16
MAX_LOG_PROB = -1e-7  # largest log p(h): float32 cannot tell it from 0


class TiltState(NamedTuple):
    """All that the tilt learns."""

    weights_WX: np.ndarray  # float64; W = K KNOTS, by longest known context and knot
    updates_W: np.ndarray  # float64: sum of the shares with which each set was updated
    hit_rates_KS: np.ndarray  # float64: share of hints that came true, by context length and state
    counts_KS: np.ndarray  # int64: how many there were, up to MAX_RATE_COUNT


class Boost(NamedTuple):
    """A boost b; its w is (1 - share) weights[lower] + share weights[lower + 1]."""

    boost: float
    lower: int
    share: float


def new_tilt_state() -> TiltState:
    """No tilt, and hints that come true half of the time."""
    sets = len(CONTEXT_LENGTHS) * KNOTS
    return TiltState(
        weights_WX=np.zeros((sets, INPUTS)),
        updates_W=np.zeros(sets),
        hit_rates_KS=np.full((len(CONTEXT_LENGTHS), SLOT_STATES), 0.5),
        counts_KS=np.zeros((len(CONTEXT_LENGTHS), SLOT_STATES), np.int64),
    )


@jit_entry
def _boost(state: TiltState, states_K: np.ndarray, hint_logp: float, x_X: np.ndarray) -> Boost:
    """Compute b for a hint of log-probability `hint_logp`, and fill its inputs x."""
    # Inputs, and the longest known context.
    logit = hint_logp - math.log(-math.expm1(hint_logp))
    x_X[0] = min(max(logit, -2 * MAX_RATE_LOGIT), 2 * MAX_RATE_LOGIT) / 4
    x_X[1] = 1.0
    longest = 0
    for k in range(len(states_K)):
        x_X[2 + k] = 0.0
        if states_K[k] != UNKNOWN:
            longest = k
            rate = state.hit_rates_KS[k, states_K[k]]
            x_X[2 + k] = min(max(math.log(rate / (1 - rate)), -MAX_RATE_LOGIT), MAX_RATE_LOGIT)

    # The two knots around logit p(h), and the dot product with the weights between them.
    position = min(max(logit / KNOT_SPACING + (KNOTS - 1) / 2, 0.0), KNOTS - 1.0)
    knot = min(int(position), KNOTS - 2)
    lower = longest * KNOTS + knot
    share = position - knot
    boost = 0.0
    for i in range(len(x_X)):
        weight = (1 - share) * state.weights_WX[lower, i] + share * state.weights_WX[lower + 1, i]
        boost += weight * x_X[i]
    return Boost(boost, lower, share)


@jit_entry(makes_arrays=True)
def _score_and_learn(
    state: TiltState,
    hints_N: np.ndarray,
    states_NK: np.ndarray,
    targets_N: np.ndarray,
    nll_N: np.ndarray,
    hint_logp_N: np.ndarray,
    rate: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Each target's loss under the tilt, (N,) float32 nats, and its boost, (N,).

    Hit rates and weights learn from each target after it is scored.

    `hints_N` and `states_NK` are the table's, `nll_N` and `hint_logp_N` the network's losses and
    log-probabilities of the hints, `rate` the weights' learning rate.
    """
    tilted_nll_N = np.empty(len(nll_N), np.float32)
    boosts_N = np.zeros(len(nll_N))
    x_X = np.empty(INPUTS)
    for i in range(len(nll_N)):
        tilted_nll_N[i] = nll_N[i]
        if hints_N[i] < 0 or math.isnan(hint_logp_N[i]):
            continue

        # Score.
        hint_logp = min(np.float64(hint_logp_N[i]), MAX_LOG_PROB)
        boost, lower, upper_share = _boost(state, states_NK[i], hint_logp, x_X)
        boosts_N[i] = boost
        hit = 1.0 if hints_N[i] == targets_N[i] else 0.0
        log_z = math.log1p(math.exp(hint_logp) * math.expm1(boost))
        tilted_nll_N[i] = max(0.0, nll_N[i] - boost * hit + log_z)

        # A gradient step of both sets of weights.
        error = hit - math.exp(hint_logp + boost - log_z)
        for chosen, share in ((lower, 1 - upper_share), (lower + 1, upper_share)):
            step = rate * share / math.sqrt(1 + state.updates_W[chosen] / STEADY_UPDATES)
            state.updates_W[chosen] += share
            for k in range(len(x_X)):
                state.weights_WX[chosen, k] += step * error * x_X[k]

        # Hit rates of the known contexts.
        for k in range(states_NK.shape[1]):
            s = states_NK[i, k]
            if s != UNKNOWN:
                state.counts_KS[k, s] = min(state.counts_KS[k, s] + 1, MAX_RATE_COUNT)
                state.hit_rates_KS[k, s] += (hit - state.hit_rates_KS[k, s]) / (state.counts_KS[k, s] + 1.5)
    return tilted_nll_N, boosts_N


@jit_entry
def _tilt_path_(
    trees: ByteTrees,
    trees_N: np.ndarray,
    targets_N: np.ndarray,
    hints_N: np.ndarray,
    hint_log_odds_N: np.ndarray,
    paths_DN: np.ndarray,
) -> None:
    """Add the hints to path logits that leave them out, in place.

    `hint_log_odds_N` are the tilted log-odds of each hint against all else. A side with the mass R
    of what is not the hint becomes R + H, if the hint, of mass H, is on it.
    """
    for i in range(len(targets_N)):
        if hints_N[i] < 0:
            continue
        first = trees.path_start_TV[trees_N[i], targets_N[i]]
        end = trees.path_start_TV[trees_N[i], targets_N[i] + 1]
        hint_rank = trees.rank_TV[trees_N[i], hints_N[i]]
        hint_mass = math.exp(hint_log_odds_N[i])

        # Follow the path down to where the hint is on neither side.
        mass = 1.0  # of all tokens below the decision but the hint
        for e in range(first, end):
            if not trees.low_E[e] <= hint_rank < trees.high_E[e]:
                break
            logit = np.float64(paths_DN[e - first, i])
            right = mass / (1 + math.exp(-logit))
            left = mass / (1 + math.exp(logit))

            # Add the hint's mass to its side, and go on with the path's side.
            hint_is_right = hint_rank >= trees.middle_E[e]
            log_right = math.log(right + hint_mass if hint_is_right else right)
            log_left = math.log(left if hint_is_right else left + hint_mass)
            paths_DN[e - first, i] = log_right - log_left
            mass = right if trees.goes_right_E[e] else left


class Hints(NamedTuple):
    """Entries of the table before each of N targets."""

    ids_N: np.ndarray  # int64: the hint, or NO_HINT
    states_NK: np.ndarray  # uint8: states of the contexts

    def last(self, count: int) -> "Hints":
        """Those before the last `count` targets."""
        first = len(self.ids_N) - count
        return Hints(self.ids_N[first:], self.states_NK[first:])


def no_hints(targets: int) -> Hints:
    """Hints where there is no table."""
    return Hints(np.full(targets, NO_HINT), np.full((targets, len(CONTEXT_LENGTHS)), UNKNOWN, np.uint8))


class NgramTilt:
    """The n-gram table of an observed prefix, and the tilt that has learned from it.

    `text_hashes_V` are those of the ids (table.py); the stream's length `n_targets`, a public
    constant, sizes the table; `rate` is the learning rate of the weights.
    """

    def __init__(self, text_hashes_V: np.ndarray, n_targets: int, rate: float) -> None:
        self.rate = rate
        self.table = NgramTable(text_hashes_V, n_targets)
        self.state = new_tilt_state()

    def copy(self) -> "NgramTilt":
        """An independent copy."""
        twin = copy.copy(self)
        twin.table = self.table.copy()
        twin.state = copy.deepcopy(self.state)
        return twin

    def observe(self, tokens: np.ndarray) -> Hints:
        """Append tokens (N,) to the table; returns the hints before each."""
        hints, states = self.table.update(tokens)
        return Hints(hints.astype(np.int64), states)

    def score_and_learn_(
        self,
        scores: TargetScores[np.ndarray],
        hints: Hints,
        targets_N: np.ndarray,
        trees_N: np.ndarray,
        trees: ByteTrees | None,
    ) -> None:
        """Tilt the scores of consecutive targets, and learn from each target after it.

        The scores, which were queried with the hints, are changed in place: losses, and path logits,
        into which the hints are put back. `trees` are needed if there are path logits.
        """
        assert scores.hint_logp_N is not None, "the scores were queried without hints"
        scores.nll_N[:], boosts_N = _score_and_learn(
            self.state, hints.ids_N, hints.states_NK, targets_N, scores.nll_N, scores.hint_logp_N, self.rate
        )
        if scores.path_logits_DN is not None:
            assert trees is not None, "path logits are those of byte trees"
            hint_log_odds_N = scores.hint_logit_N + boosts_N
            _tilt_path_(trees, trees_N, targets_N, hints.ids_N, hint_log_odds_N, scores.path_logits_DN)

    def distribution(self, logp_V: np.ndarray) -> np.ndarray:
        """Tilt log-probabilities of the next token, (V,) float64; nothing is learned."""
        hint, states_K = self.table.peek()
        if hint < 0 or math.isnan(logp_V[hint]):
            return logp_V
        boost = _boost(self.state, states_K, min(logp_V[hint], MAX_LOG_PROB), np.empty(INPUTS)).boost
        tilted_V = logp_V - math.log1p(math.exp(logp_V[hint]) * math.expm1(boost))
        tilted_V[hint] += boost
        return tilted_V
