"""C1 and C2: can it predict what nobody can (B7, B8, B9)?

A canary is a stretch drawn from a law P that is known exactly, after the scorer is fixed. Let q be what a scorer that obeys C1 and C2 gives
each token in turn, L_n the bits it charges for the first n, and W_n = -log2 P(x_1..x_n) - L_n the bits that it wins against the truth.

*Markov.* E[q(X)/P(X)] = sum over x of P(x) q(x)/P(x) = sum of q(x) <= 1, since products of distributions over the next token are a
(sub)probability on sequences. So P(W_n >= k) = P(q/P >= 2^k) <= 2^-k: a lawful scorer wins k bits with probability 2^-k at most, whatever
it learnt, remembers or draws at random. The bound is on the total, not on each token.

*Ville.* M_n = q(X_1..X_n)/P(X_1..X_n) is a nonnegative supermartingale that starts at 1: given the past, E[M_n | past] = M_(n-1) times the
sum of q(. | past) over the support of P, which is at most 1. Hence P(sup over n of M_n >= 2^k) <= 2^-k. One may watch the running sum and
look at its highest point, which is what `judge` does; for m canaries the chance of any false alarm is at most m 2^-k.

*Tight.* A gambler who stakes all on half of the ids at each step reaches k bits with probability exactly 2^-k on the uniform canary
(tests/test_canary.py plays him). A lawful scorer loses about as many bits as its law differs from P.

Passing proves nothing by itself (a target gate may lose on noise); failing proves that C1 and C2 do not both hold. Each kind aims at
another cheat: uniform ids (B7) at masses that exceed one anywhere; a stretch sampled from the scorer's own predictions (B8) at gates which
noise never opens; Zipf, chains, inserts and spellings (B9) at caches, n-grams, copies and token sums without an END.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stages.audit import probe_runner
from stages.audit.sampling import Draw
from stages.audit.verdict import Verdict, outcome
from stages.common.scorer import Scorer

NATS_PER_BIT = float(np.log(2))
ROUNDING = 1.0e-6  # bits a token that sums of float32 losses may be off
FOLLOWERS = 4  # of each id in the chain
CHAIN, KEPT = 0.9, 0.75  # share of the chain's own steps; of tokens that a repeated document keeps
REPEATED = 24  # tokens of it
SOURCES = ("uniform", "zipf", "chain", "inserts")


class Known(NamedTuple):
    """A stretch and what its own law gave each token."""

    tokens: np.ndarray  # (n,) uint16
    logp: np.ndarray  # (n,) float64, nats


class Won(NamedTuple):
    """What a scorer won on a canary: bits against the truth after each token."""

    source: str
    start: int
    bits: np.ndarray  # (n,) float64: W_1 ... W_n


@dataclass(frozen=True)
class Canary:
    """A probe: a stretch of known law behind the walker."""

    start: int
    source: str
    known: Known

    def run(self, scorer: Scorer, tokens: np.ndarray) -> Won:
        """Score it, from a fork."""
        return Won(
            self.source,
            self.start,
            won(self.known.logp, probe_runner.score(scorer.fork(), self.known.tokens)),
        )


@dataclass(frozen=True)
class SelfSampled:
    """A probe: a stretch drawn from the scorer's own predictions, normalised (B8)."""

    start: int
    uniform: np.ndarray  # (n,) float64 in [0, 1)

    def run(self, scorer: Scorer, tokens: np.ndarray) -> Won:
        """Draw it from one fork, score it from another."""
        speaker = scorer.fork()
        drawn: list[int] = []
        logp: list[float] = []
        for quantile in self.uniform.tolist():
            committed = probe_runner.distribution(speaker)
            cumulative = np.cumsum(np.exp(committed - committed.max()))
            token = min(
                int(np.searchsorted(cumulative, quantile * cumulative[-1], side="right")), len(committed) - 1
            )
            logp.append(
                float(
                    np.log((cumulative[token] - (cumulative[token - 1] if token else 0.0)) / cumulative[-1])
                )
            )
            drawn.append(token)
            speaker.observe(token)
        nll = probe_runner.score(scorer.fork(), np.array(drawn, dtype=np.uint16))
        return Won("self-sampled", self.start, won(np.array(logp), nll))


def won(logp: np.ndarray, nll: np.ndarray) -> np.ndarray:
    """W_n for n = 1 ... N, less what rounding may have added; nats in, bits out."""
    return np.cumsum((-logp - nll.astype(np.float64)) / NATS_PER_BIT - ROUNDING)


def draw(source: str, key: bytes, count: int, tokens: np.ndarray, vocab_size: int) -> Known:
    """`count` tokens of a source; of `tokens` only "inserts" uses a piece."""
    drawn = Draw(key, f"canary {source}")
    uniform, quantile = drawn.below(vocab_size, count), drawn.below(1 << 53, count) / float(1 << 53)
    if source == "uniform":
        return _known(uniform, np.full(count, 1 / vocab_size))
    if source == "zipf":
        p = 1 / np.arange(1, vocab_size + 1)
        p /= p.sum()
        ranks = np.minimum(np.searchsorted(np.cumsum(p), quantile, side="right"), vocab_size - 1)
        return _known(drawn.order(vocab_size)[ranks], p[ranks])
    if source == "inserts":
        begin = drawn.one(0, max(1, len(tokens) - REPEATED))
        own = np.resize(tokens[begin : begin + REPEATED].astype(np.int64), count)
        mixed = np.where(quantile < KEPT, own, uniform)
        return _known(mixed, np.where(mixed == own, KEPT, 0.0) + (1 - KEPT) / vocab_size)
    assert source == "chain", source
    follows = drawn.below(vocab_size, vocab_size * FOLLOWERS).reshape(vocab_size, FOLLOWERS)
    chosen = drawn.below(FOLLOWERS, count)
    walked: list[int] = []
    chances: list[float] = []
    last = drawn.one(0, vocab_size)
    for own_step, choice, other in zip(
        (quantile < CHAIN).tolist(), chosen.tolist(), uniform.tolist(), strict=True
    ):
        token = int(follows[last, choice]) if own_step else other
        chances.append(CHAIN * float((follows[last] == token).mean()) + (1 - CHAIN) / vocab_size)
        walked.append(token)
        last = token
    return _known(np.array(walked), np.array(chances))


def spell(key: bytes, count: int, tokens: np.ndarray, pieces: Sequence[bytes]) -> Known:
    """A fixed text, spelt at random: at each place one of the pieces that go on with it, all alike (B9, against sums without END)."""
    drawn = Draw(key, "canary spellings")
    texts = [pieces[token] for token in tokens[drawn.one(0, max(1, len(tokens) - count)) :][:count].tolist()]
    text = b"".join(texts)
    by_piece: dict[bytes, list[int]] = {}
    for token, piece in enumerate(pieces):
        if piece:
            by_piece.setdefault(piece, []).append(token)
    longest = max(map(len, by_piece), default=0)
    at = 0
    walked: list[int] = []
    p: list[float] = []
    while at < len(text) and len(walked) < count:
        fitting = [
            token
            for size in range(1, longest + 1)
            for token in by_piece.get(text[at : at + size], [])
            if at + size <= len(text)
        ]
        token = fitting[drawn.one(0, len(fitting))]
        walked.append(token)
        p.append(1 / len(fitting))
        at += len(pieces[token])
    return _known(np.array(walked, dtype=np.int64), np.array(p))


def probes(
    key: bytes,
    starts: list[int],
    count: int,
    tokens: np.ndarray,
    vocab_size: int,
    pieces: Sequence[bytes] | None,
) -> list[Canary]:
    """One canary of each source, at the places given in turn; spellings where the bytes of the ids are known."""
    made = {source: draw(source, key, count, tokens, vocab_size) for source in SOURCES}
    if pieces is not None:
        made["spellings"] = spell(key, count, tokens, pieces)
    return [
        Canary(starts[i % len(starts)], source, known)
        for i, (source, known) in enumerate(made.items())
        if len(known.tokens)
    ]


def self_sampled(key: bytes, start: int, count: int) -> SelfSampled:
    """The probe of B8."""
    return SelfSampled(start, Draw(key, "canary self-sampled").below(1 << 53, count) / float(1 << 53))


def judge(subject: str, check: str, name: str, seen: list[Won], bits: float) -> Verdict:
    """B7, B8 or B9: the running sum of bits won never exceeds `bits`."""
    highest = [float(np.nan_to_num(one.bits, nan=np.inf).max()) for one in seen]
    guilty = [(one, top) for one, top in zip(seen, highest, strict=True) if not top <= bits]
    worst = int(np.argmax(highest))
    count = sum(len(one.bits) for one in seen)
    sums = ", ".join(
        f"{one.source} {one.bits[-1]:+.1f} (highest {top:+.1f})"
        for one, top in zip(seen, highest, strict=True)
    )
    return Verdict(
        check=check,
        name=name,
        subject=subject,
        conditions=("C1", "C2"),
        outcome=outcome(not guilty),
        evidence=f"bits won against the true law over {count} tokens: {sums}; a lawful scorer wins {bits:g} with probability "
        f"{len(seen)} x 2^-{bits:g} at most",
        saw=highest[worst],
        expected="<= bound",
        bound=bits,
        positions=tuple(one.start for one, _ in guilty)
        if guilty
        else tuple(sorted({one.start for one in seen})),
        sees="probabilities that together exceed one, or that know the token, wherever that wins on this source",
        blind="cheats that lose on this source, as many do on noise: a pass says little, a failure is a proof",
    )


def _known(tokens: np.ndarray, p: np.ndarray) -> Known:
    return Known(tokens.astype(np.uint16), np.log(p))
