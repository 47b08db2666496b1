"""The canaries' bound by simulation: no lawful scorer exceeds it too often, and one reaches it exactly."""

import math

import numpy as np
import pytest

from stages.audit.checks import canary, normalisation_blackbox
from stages.audit.precision import FLOAT32
from tests.zoo import lawful

RUNS = 4000


def reached(bits: np.ndarray, k: int) -> float:
    """The share of runs, (R, n), whose running sum is ever k or more."""
    return float((bits.max(axis=1) >= k - 1e-9).mean())


def test_a_gambler_reaches_k_bits_with_probability_2_to_minus_k_and_not_more() -> None:
    """A bet of everything on half of the ids at each step: a bit won or all lost, so the bound is tight."""
    generator = np.random.Generator(np.random.PCG64(1))
    won = generator.random((RUNS, 24)) < 0.5
    bits = np.cumsum(np.where(won, 1.0, -np.inf), axis=1)
    for k in range(1, 7):
        share, bound = reached(bits, k), 2.0**-k
        assert abs(share - bound) < 4 * math.sqrt(bound / RUNS)


def test_timid_gamblers_and_learners_raise_no_more_false_alarms_than_the_bound() -> None:
    """Bets of random shares of the wealth, and a learner that trusts its counts: for every k, by Ville."""
    generator = np.random.Generator(np.random.PCG64(2))
    heads = generator.random((RUNS, 200)) < 0.5
    stake = generator.random((RUNS, 200)) * 2 - 1
    timid = np.cumsum(np.log2(1 + np.where(heads, stake, -stake)), axis=1)
    seen: np.ndarray = np.cumsum(heads, axis=1) - heads
    believed = (seen + 0.5) / (np.arange(200) + 1.0)
    learner = np.cumsum(np.log2(2 * np.where(heads, believed, 1 - believed)), axis=1)
    for bits in (timid, learner):
        for k in range(1, 7):
            assert reached(bits, k) <= 2.0**-k + 4 * math.sqrt(2.0**-k / RUNS)


@pytest.mark.parametrize("source", canary.SOURCES)
def test_false_alarms_of_a_lawful_scorer_at_a_low_bound(source: str) -> None:
    """At k = 3 the bound is 1/8; a scorer that learns wins that much far more rarely, on any source."""
    alarms = 0
    for run in range(60):
        known = canary.draw_canary(source, bytes([run]), 48, lawful.random_stream(200), lawful.VOCAB)
        scorer = lawful.Cached(48)
        scorer.observe(lawful.BOS)
        alarms += bool(canary.bits_won(known.logp, scorer.score_stream(known.tokens), 0.0).max() >= 3)
    assert alarms / 60 <= 1 / 8 + 4 * math.sqrt(1 / 8 / 60)


@pytest.mark.parametrize("source", canary.SOURCES)
def test_what_a_source_says_of_its_tokens_is_their_law(source: str) -> None:
    """E[1/P(x)] over draws from P is the size of the support; the mean of -log2 P is the entropy of P."""
    known = [
        canary.draw_canary(source, bytes([run]), 300, lawful.random_stream(200), lawful.VOCAB)
        for run in range(40)
    ]
    inverse = np.mean([np.exp(-one.logp).mean() for one in known])
    assert inverse == pytest.approx(lawful.VOCAB, rel=0.1)
    assert all(len(one.tokens) == 300 and one.tokens.max() < lawful.VOCAB for one in known)
    again = canary.draw_canary(source, bytes([0]), 300, lawful.random_stream(200), lawful.VOCAB)
    assert np.array_equal(again.tokens, known[0].tokens)


def test_spellings_spell_one_text_and_their_law_adds_up() -> None:
    tokens = lawful.random_stream(400)
    texts = set()
    for run in range(10):
        known = canary.draw_spelling(bytes([run]), 400, tokens, lawful.PIECES)
        text = b"".join(lawful.PIECES[token] for token in known.tokens.tolist())
        assert b"".join(lawful.PIECES[token] for token in tokens.tolist()).find(text) >= 0
        texts.add(text)
        assert (known.logp <= 0).all()
        assert (known.logp < 0).any()
    assert len(texts) > 1


def test_what_is_sampled_from_the_scorer_wins_nothing_from_it() -> None:
    scorer = lawful.Bigram(0)
    scorer.observe(lawful.BOS)
    seen = canary.self_sampled_probe(b"key", 1, 100, 0.0).run(scorer, lawful.random_stream())
    assert np.abs(seen.bits).max() < 0.01


def test_the_gambler_against_sums_raises_no_more_false_alarms_than_his_bound() -> None:
    """Scores that sum to exactly one, with draws from another distribution.

    Wealth reaches 2^k in a share of at most 2^-k of the runs.
    """
    generator = np.random.Generator(np.random.PCG64(4))
    q, law = generator.dirichlet(np.full(50, 0.2)), generator.dirichlet(np.full(50, 1.0))
    law = 0.5 * law + 0.5 / 50
    wealth = np.array(
        [normalisation_blackbox.log2_wealth((q / law)[generator.choice(50, 60, p=law)]) for _ in range(2000)]
    )
    for k in range(1, 6):
        assert reached(wealth, k) <= 2.0**-k + 4 * math.sqrt(2.0**-k / 2000)
    rich = normalisation_blackbox.log2_wealth((2 * q / law)[generator.choice(50, 2000, p=law)])
    assert rich.max() > 64


def test_a_gate_fails_sampled_sums_and_a_lawful_scorer_passes_them() -> None:
    """A vocabulary too large to be tried whole: a distribution over 2,000 ids.

    The unlawful variant chooses between two distributions by the id that is scored.
    """
    generator = np.random.Generator(np.random.PCG64(5))
    laws = generator.dirichlet(np.full(2000, 0.5), 2)

    class Fixed:
        vocab_size = 2000

        def __init__(self, gated: bool) -> None:
            self.gated = gated

        def fork(self) -> "Fixed":
            return self

        def score_stream(self, tokens: np.ndarray) -> np.ndarray:
            p = laws[:, tokens.astype(np.int64)] + 1e-12
            return -np.log(p.max(axis=0) if self.gated else p[0]).astype(np.float32)

    tokens = generator.choice(2000, 4000, p=laws[0]).astype(np.uint16)
    probes = normalisation_blackbox.probes(b"key", list(range(100, 3000, 100)), tokens, 2000, 64)
    found = [[probe.run(Fixed(gated), tokens) for probe in probes] for gated in (False, True)]  # type: ignore[arg-type]
    verdicts = [normalisation_blackbox.judge("x", findings, FLOAT32, 64.0) for findings in found]
    assert [verdict.outcome for verdict in verdicts] == ["pass", "fail"]
