"""A learned tilt towards one token, on any scorer: a mixture that is a distribution by its form (#1145 and #1514 without their gates).

A hint h (hints.py) makes one binary event of the next token: is it h? The wrapped scorer gives it the probability p(h); the tilt gives it

    p'(h) = sigmoid(logit p(h) + w . x),    and every other token p(v) (1 - p'(h)) / (1 - p(h)),

which sums to one whatever w is. In the form of #1514, with b = w . x: p'(v) = p(v) exp(b [v = h]) / Z, Z = 1 + p(h) (exp(b) - 1). The
inputs x are logit p(h), a constant, and for each context length the stretched share of the positions in that context's state whose hint
came true; w is chosen by the longest known context and by p(h). Shares and weights learn from the token after it is scored; all weights
start at 0, which is the wrapped scorer exactly. h and x depend on the observed prefix alone.

Shapes: N targets, K context lengths, S states, X inputs.
"""

import math
from typing import Protocol
from weakref import WeakSet

import numpy as np
from numba import njit

from stages.parallel import World
from stages.report import Report
from stages.sliding_eval.evaluate import TimedScorer
from stages.sliding_eval.params import SlidingEvalParams
from stages.train.model import Model
from stages.ttt_eval.hints import LENGTHS, NO_HINT, STATES, Hints
from stages.ttt_eval.lora import LoRAScorer
from stages.ttt_eval.params import TttEvalParams
from stages.ttt_eval.scorer import TTTScorer

INPUTS = 2 + len(LENGTHS)
BUCKETS = 8  # of p(h): two units of its logit each
MOST_CERTAIN = 8.0  # of a stretched share; of logit p(h), twice that
COUNT_LIMIT = 255  # a share forgets by 1/256 in the end
STEADY = 16  # updates of a set of weights behind which its steps shrink with their root: else noise costs more than a good network leaves
LEARNT = ("weights", "updates", "shares_KS", "counts_KS")
SURE = -1e-7  # the largest log p(h): float32 cannot tell it from 0


@njit(nogil=True)
def _boost(states_K: np.ndarray, hint_logp: float, weights: np.ndarray, shares_KS: np.ndarray, x_X: np.ndarray) -> tuple[float, int]:
    """b, and the number of the weights that gave it; fills the inputs."""
    logit = hint_logp - math.log(-math.expm1(hint_logp))
    x_X[0], x_X[1] = min(max(logit, -2 * MOST_CERTAIN), 2 * MOST_CERTAIN) / 4, 1.0
    longest = 0
    for k in range(len(states_K)):
        x_X[2 + k] = 0.0
        if states_K[k] != NO_HINT:
            longest = k
            share = shares_KS[k, states_K[k]]
            x_X[2 + k] = min(max(math.log(share / (1 - share)), -MOST_CERTAIN), MOST_CERTAIN)
    chosen = longest * BUCKETS + min(max(int(logit / 2 + BUCKETS / 2), 0), BUCKETS - 1)
    boost = 0.0
    for i in range(len(x_X)):
        boost += weights[chosen, i] * x_X[i]
    return boost, chosen


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
) -> np.ndarray:
    """Each target's loss under the tilt, (N,) float32; behind each the shares and weights learn from it."""
    tilted, x_X = np.empty(len(nll), np.float32), np.empty(INPUTS)
    for i in range(len(nll)):
        tilted[i] = nll[i]
        if hints[i] < 0:
            continue
        logp = min(np.float64(hint_logp[i]), SURE)
        boost, chosen = _boost(states[i], logp, weights, shares_KS, x_X)
        came = 1.0 if hints[i] == targets[i] else 0.0
        log_z = math.log1p(math.exp(logp) * math.expm1(boost))
        tilted[i] = max(0.0, nll[i] - boost * came + log_z)
        error = came - math.exp(logp + boost - log_z)
        step = rate / math.sqrt(1 + updates[chosen] / STEADY)
        updates[chosen] += 1
        for k in range(len(x_X)):
            weights[chosen, k] += step * error * x_X[k]
        for k in range(states.shape[1]):
            state = states[i, k]
            if state != NO_HINT:
                counts_KS[k, state] = min(counts_KS[k, state] + 1, COUNT_LIMIT)
                shares_KS[k, state] += (came - shares_KS[k, state]) / (counts_KS[k, state] + 1.5)
    return tilted


class HintedScorer(TimedScorer, Protocol):
    """A scorer that can say, in the same pass, what probability it gave to another token."""

    def score(self, tokens: np.ndarray, hints: np.ndarray | None) -> np.ndarray:
        """`score_stream` as (1, N); or, with an id for each target, (2, N): the losses, and the log-probabilities of those ids."""
        ...

    def fork(self) -> "HintedScorer":
        """An independent copy."""
        ...


class TiltScorer:
    """A lawful scorer that wraps another; the stream's length, a public constant, sizes its tables.

    Observed tokens wait until something depends on them, because in a batch they cost a fraction.
    """

    def __init__(self, scorer: HintedScorer, rate: float, n_targets: int) -> None:
        self.scorer, self.rate = scorer, rate
        self.hints = Hints(n_targets)
        self.sharers = WeakSet([self])  # forks that have the same tables, while they live
        self.weights = np.zeros((len(LENGTHS) * BUCKETS, INPUTS))
        self.updates = np.zeros(len(self.weights), np.int64)
        self.shares_KS = np.full((len(LENGTHS), STATES), 0.5)
        self.counts_KS = np.zeros((len(LENGTHS), STATES), np.int64)
        self.waiting: list[int] = []

    @property
    def vocab_size(self) -> int:
        """The number of token ids a distribution is over."""
        return self.scorer.vocab_size

    @property
    def warm_up_targets(self) -> int:
        """The wrapped scorer's."""
        return self.scorer.warm_up_targets

    def fork(self) -> "TiltScorer":
        """An independent copy; the tables are shared until one of the two goes on."""
        self._catch_up()
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        self.sharers.add(twin)
        twin.scorer = self.scorer.fork()
        for name in LEARNT:
            setattr(twin, name, getattr(self, name).copy())
        twin.waiting = []
        return twin

    def predict(self) -> np.ndarray:
        """Natural log-probabilities of the next token, (V,) float64."""
        self._catch_up()
        logp_V = self.scorer.predict()
        hint, states_K = self.hints.next()
        if hint < 0:
            return logp_V
        boost, _ = _boost(states_K, min(logp_V[hint], SURE), self.weights, self.shares_KS, np.empty(INPUTS))
        tilted_V = logp_V - math.log1p(math.exp(logp_V[hint]) * math.expm1(boost))
        tilted_V[hint] += boost
        return tilted_V

    def observe(self, token: int) -> None:
        """Append a token to the prefix."""
        self.waiting.append(token)

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Score and observe tokens in order; nats, float32."""
        self._catch_up()
        return self._score(tokens)

    def _catch_up(self) -> None:
        if self.waiting:
            self._score(np.array(self.waiting, dtype=np.uint16))
            self.waiting = []

    def _score(self, tokens: np.ndarray) -> np.ndarray:
        if len(self.sharers) > 1:
            self.sharers.remove(self)
            self.hints, self.sharers = self.hints.copy(), WeakSet([self])
        given = 1 if self.hints.seen == 0 and len(tokens) else 0
        hints, states = self.hints.observe(tokens)
        hints, states = hints[given:], states[given:]
        nll, hint_logp = self.scorer.score(tokens, np.maximum(hints, 0))
        learnt = (self.weights, self.shares_KS, self.counts_KS, self.updates)
        return follow(hints, states, tokens[given:], nll, hint_logp, *learnt, self.rate)


def scorer_for(
    model: Model, sliding: SlidingEvalParams, params: TttEvalParams, world: World, n_targets: int, report: Report | None = None
) -> TimedScorer:
    """The scorer that the sections ask for: test-time training of either kind, tilted or not."""
    trained: HintedScorer
    if params.kind == "lora":
        trained = LoRAScorer(model, sliding, params, world, report)
    else:
        trained = TTTScorer(model, sliding, params, world, n_targets, report)
    return TiltScorer(trained, params.tilt_rate, n_targets) if params.tilt_rate else trained
