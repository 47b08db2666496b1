"""C1 and C2: can the scorer predict what nobody can (B7, B8, B9)?

A canary is a span of tokens drawn from a distribution P that is known exactly, after the scorer is
fixed. Let q be the probabilities that a scorer which obeys C1 and C2 gives each token in turn, L_n the
bits it charges for the first n tokens, and W_n = -log2 P(x_1..x_n) - L_n the bits that it wins against
the truth.

*Markov.* E[q(X)/P(X)] = sum over x of P(x) q(x)/P(x) = sum of q(x) <= 1, since products of
distributions over the next token are a (sub)probability on sequences. So P(W_n >= k) = P(q/P >= 2^k) <=
2^-k: a lawful scorer wins k bits with probability 2^-k at most, whatever it learnt, remembers or draws
at random. The bound is on the total, not on each token.

*Ville.* M_n = q(X_1..X_n)/P(X_1..X_n) is a nonnegative supermartingale that starts at 1: given the
past, E[M_n | past] = M_(n-1) times the sum of q(. | past) over the support of P, which is at most 1.
Hence P(sup over n of M_n >= 2^k) <= 2^-k. The running sum may therefore be watched and its maximum
tested, which is what `judge` does; for m canaries the probability of any false alarm is at most m 2^-k.

*Tight.* A gambler who stakes all on half of the ids at each step reaches k bits with probability
exactly 2^-k on the uniform canary (tests/test_canary.py simulates this). A lawful scorer loses about as
many bits as its distribution differs from P.

A pass proves nothing by itself (a target gate may lose on noise); a failure proves that C1 and C2 do
not both hold. Each kind aims at other cheats: uniform ids (B7) at probabilities that sum to more than
one anywhere; a span sampled from the scorer's own predictions (B8) at gates that noise never opens;
Zipf, chains, inserts and spellings (B9) at caches, n-grams, copies and sums over tokens without an END
event.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stages.audit import probe_runner
from stages.audit.probe_runner import Cost
from stages.audit.sampling import KeyedRng
from stages.audit.verdict import Check, Verdict, Words
from stages.common.scorer import Scorer

UNIFORM_CANARY = Check(
    "B7",
    "uniform canary",
    conditions=("C1", "C2"),
    sees="probabilities that sum to more than one, or that depend on the target, "
    "wherever that wins on this source",
    blind="cheats that lose on this source, as many do on noise: a pass says little, a failure is a proof",
    words=Words(expected="<= bound"),
)
SELF_SAMPLED_CANARY = dataclasses.replace(UNIFORM_CANARY, number="B8", name="self-sampled canary")
KNOWN_ENTROPY_CANARIES = dataclasses.replace(UNIFORM_CANARY, number="B9", name="known-entropy canaries")
NATS_PER_BIT = float(np.log(2))
SOURCES = ("uniform", "zipf", "chain", "inserts")
CHAIN_SUCCESSORS = 4  # "chain": random successors of each id
CHAIN_SHARE = 0.9  # "chain": probability of a step to one of them; else the next id is uniform
REPEATED_TOKENS = 24  # "inserts": length of the piece of the stream that is repeated
KEPT_SHARE = 0.75  # "inserts": probability that a token of it is kept; else it is uniform


class KnownTokens(NamedTuple):
    """Tokens of a canary, and the probability that its own distribution gave each of them."""

    tokens: np.ndarray  # (n,) uint16
    logp: np.ndarray  # (n,) float64, nats


class CanaryResult(NamedTuple):
    """Bits that a scorer won on a canary."""

    source: str
    start: int
    bits: np.ndarray  # (n,) float64: W_1 ... W_n


@dataclass(frozen=True)
class Canary:
    """Probe: score a canary after tokens[:start] (B7, B9)."""

    start: int
    source: str
    known: KnownTokens
    rounding: float  # nats, as in `bits_won`

    @property
    def cost(self) -> Cost:
        """Work that `run` asks for."""
        return self.cost_of(len(self.known.tokens))

    @staticmethod
    def cost_of(count: int) -> Cost:
        """Cost of a canary of `count` tokens."""
        return Cost(calls=1, targets=count)

    def run(self, scorer: Scorer, tokens: np.ndarray) -> CanaryResult:
        """Score the canary from a fork."""
        nll = probe_runner.checked_score(scorer.fork(), self.known.tokens)
        return CanaryResult(self.source, self.start, bits_won(self.known.logp, nll, self.rounding))


@dataclass(frozen=True)
class SelfSampled:
    """Probe: score a span drawn from the scorer's own predictions, normalised (B8)."""

    start: int
    quantiles: np.ndarray  # (n,) float64 in [0, 1)
    rounding: float  # nats, as in `bits_won`

    @property
    def cost(self) -> Cost:
        """Work that `run` asks for."""
        return self.cost_of(len(self.quantiles))

    @staticmethod
    def cost_of(count: int) -> Cost:
        """Cost of `count` tokens: predicted and observed one by one, then scored."""
        return Cost(targets=count, predictions=count) + Cost(calls=1, targets=count)

    def run(self, scorer: Scorer, tokens: np.ndarray) -> CanaryResult:
        """Draw the span from one fork, score it with another."""
        sampler = scorer.fork()
        drawn: list[int] = []
        logp: list[float] = []
        for quantile in self.quantiles.tolist():
            # Inverse transform sampling from exp(predict()), normalised to a sum of one.
            predicted = probe_runner.checked_predict(sampler)
            cumulative = np.cumsum(np.exp(predicted - predicted.max()))
            total = cumulative[-1]
            token = int(np.searchsorted(cumulative, quantile * total, side="right"))
            token = min(token, len(predicted) - 1)
            below = cumulative[token - 1] if token else 0.0

            drawn.append(token)
            logp.append(float(np.log((cumulative[token] - below) / total)))
            sampler.observe(token)
        nll = probe_runner.checked_score(scorer.fork(), np.array(drawn, dtype=np.uint16))
        return CanaryResult("self-sampled", self.start, bits_won(np.array(logp), nll, self.rounding))


def bits_won(logp: np.ndarray, nll: np.ndarray, rounding: float) -> np.ndarray:
    """Compute W_1 ... W_n in bits.

    logp: (n,) float64, nats, of the true distribution; nll: (n,) float32, nats, that the scorer charged;
    rounding: nats by which the log of a lawful sum may exceed zero (Precision.sum_tolerance), which are
    taken off at each token.
    """
    return np.cumsum((-logp - nll.astype(np.float64) - rounding) / NATS_PER_BIT)


def draw_canary(source: str, key: bytes, count: int, tokens: np.ndarray, vocab_size: int) -> KnownTokens:
    """Draw `count` tokens from one of SOURCES; only "inserts" uses a piece of the stream `tokens` (N,)."""
    rng = KeyedRng(key, f"canary {source}")
    uniform = rng.below(vocab_size, count)
    quantiles = rng.below(1 << 53, count) / float(1 << 53)

    if source == "uniform":
        return _known(uniform, np.full(count, 1 / vocab_size))

    if source == "zipf":
        # Probability proportional to 1 / rank, over ids in random order.
        p = 1 / np.arange(1, vocab_size + 1)
        p /= p.sum()
        ranks = np.minimum(np.searchsorted(np.cumsum(p), quantiles, side="right"), vocab_size - 1)
        return _known(rng.permutation(vocab_size)[ranks], p[ranks])

    if source == "inserts":
        # A piece of the stream again and again, some of its tokens replaced by uniform ones.
        begin = rng.integer(0, max(1, len(tokens) - REPEATED_TOKENS))
        repeated = np.resize(tokens[begin : begin + REPEATED_TOKENS].astype(np.int64), count)
        mixed = np.where(quantiles < KEPT_SHARE, repeated, uniform)
        return _known(mixed, np.where(mixed == repeated, KEPT_SHARE, 0.0) + (1 - KEPT_SHARE) / vocab_size)

    assert source == "chain", source
    return _draw_chain(rng, count, vocab_size, uniform, quantiles)


def draw_spelling(key: bytes, count: int, tokens: np.ndarray, token_bytes: Sequence[bytes]) -> KnownTokens:
    """Draw a random spelling of a fixed text (B9).

    At each place one of the ids that continue the text is drawn, all equally likely.

    Aims at sums over tokens without an END event. tokens: the stream (N,), from which the text is taken.
    """
    rng = KeyedRng(key, "canary spellings")
    begin = rng.integer(0, max(1, len(tokens) - count))
    text = b"".join(token_bytes[token] for token in tokens[begin:][:count].tolist())
    ids_by_bytes: dict[bytes, list[int]] = {}
    for token, piece in enumerate(token_bytes):
        if piece:
            ids_by_bytes.setdefault(piece, []).append(token)
    longest = max(map(len, ids_by_bytes), default=0)

    at = 0  # in the text
    drawn: list[int] = []
    p: list[float] = []
    while at < len(text) and len(drawn) < count:
        fitting: list[int] = []
        for size in range(1, min(longest, len(text) - at) + 1):
            fitting += ids_by_bytes.get(text[at : at + size], [])
        token = fitting[rng.integer(0, len(fitting))]
        drawn.append(token)
        p.append(1 / len(fitting))
        at += len(token_bytes[token])
    return _known(np.array(drawn, dtype=np.int64), np.array(p))


def probes(
    key: bytes,
    starts: list[int],
    count: int,
    tokens: np.ndarray,
    vocab_size: int,
    token_bytes: Sequence[bytes] | None,
    rounding: float,
) -> dict[str, Canary]:
    """Build a probe for each source, at the given starts in turn.

    "spellings" are among the sources if the bytes of the ids are known. rounding: nats, as in `bits_won`.
    """
    known = {source: draw_canary(source, key, count, tokens, vocab_size) for source in SOURCES}
    if token_bytes is not None:
        known["spellings"] = draw_spelling(key, count, tokens, token_bytes)

    canaries = {}
    for i, (source, span) in enumerate(known.items()):
        if len(span.tokens):
            canaries[source] = Canary(starts[i % len(starts)], source, span, rounding)
    return canaries


def self_sampled_probe(key: bytes, start: int, count: int, rounding: float) -> SelfSampled:
    """Build the probe of B8, with `count` tokens; rounding: nats, as in `bits_won`."""
    quantiles = KeyedRng(key, "canary self-sampled").below(1 << 53, count) / float(1 << 53)
    return SelfSampled(start, quantiles, rounding)


def judge(check: Check, subject: str, results: list[CanaryResult], bits: float) -> Verdict:
    """Judge B7, B8 or B9: the running sum of bits won never exceeds `bits`."""
    # Highest point of each running sum; NaN counts as infinite, which is a failure.
    highest = [float(np.where(np.isnan(result.bits), np.inf, result.bits).max()) for result in results]
    failed = [result.start for result, top in zip(results, highest, strict=True) if not top <= bits]

    # For each source, the bits won at its end and at the highest point.
    tokens = sum(len(result.bits) for result in results)
    sums = ", ".join(
        f"{result.source} {result.bits[-1]:+.1f} (highest {top:+.1f})"
        for result, top in zip(results, highest, strict=True)
    )

    return Verdict.of(
        check,
        subject,
        not failed,
        f"bits won against the true distribution over {tokens} tokens: {sums}; "
        f"a lawful scorer wins {bits:g} with probability {len(results)} x 2^-{bits:g} at most",
        # The most bits that were won on one of the canaries.
        saw=highest[int(np.argmax(highest))],
        bound=bits,
        positions=tuple(failed or sorted({result.start for result in results})),
    )


def _draw_chain(
    rng: KeyedRng, count: int, vocab_size: int, uniform: np.ndarray, quantiles: np.ndarray
) -> KnownTokens:
    """Draw a Markov chain with random successors of each id; uniform, quantiles: (count,)."""
    successors = rng.below(vocab_size, vocab_size * CHAIN_SUCCESSORS).reshape(vocab_size, CHAIN_SUCCESSORS)
    choices = rng.below(CHAIN_SUCCESSORS, count)
    last = rng.integer(0, vocab_size)
    drawn: list[int] = []
    p: list[float] = []
    for step in range(count):
        follows_chain = quantiles[step] < CHAIN_SHARE
        token = int(successors[last, choices[step]]) if follows_chain else int(uniform[step])
        # An id may be among the successors more than once, and may also be drawn as a uniform one.
        among_successors = float((successors[last] == token).mean())
        p.append(CHAIN_SHARE * among_successors + (1 - CHAIN_SHARE) / vocab_size)
        drawn.append(token)
        last = token
    return _known(np.array(drawn), np.array(p))


def _known(tokens: np.ndarray, p: np.ndarray) -> KnownTokens:
    return KnownTokens(tokens.astype(np.uint16), np.log(p))
