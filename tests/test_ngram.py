"""The tilt is a distribution, learns after it scores, and at first is the network."""

import copy
import dataclasses
import hashlib
import math
from typing import Literal

import numpy as np
import pytest
import torch

from stages.audit import sampling
from stages.audit.audit_scorer import AuditCase, AuditedStream, ClaimedEvaluation, audit_scorer
from stages.audit.checks import coverage
from stages.audit.precision import FLOAT32
from stages.audit.verdict import failure_message, failures
from stages.common import bpb, ledger, shards
from stages.common.progress import Logger
from stages.common.scorer import Scorer
from stages.scoring.queries import NetworkScorer, Queries, TargetScores
from stages.sliding_eval.scorer import SlidingScorer
from stages.ttt_eval.build import build_scorer
from stages.ttt_eval.ensemble import EnsembleScorer
from stages.ttt_eval.lora.scorer import LoRAScorer
from stages.ttt_eval.ngram.table import (
    AGREES_FLAG,
    CONTEXT_LENGTHS,
    MAX_HITS,
    MAX_MISSES,
    SLOT_STATES,
    UNKNOWN,
    NgramTable,
)
from stages.ttt_eval.ngram.tilt import INPUTS, NgramTilt, _boost, new_tilt_state
from stages.ttt_eval.sgd.scorer import TTTScorer
from tests import factories
from tests.factories import SLIDING, TINY, TTT, make_world, random_model
from tests.zoo import lawful
from tests.zoo.harness import PARAMS

RATE = 0.05
CODES = np.arange(1, 1 + max(lawful.VOCAB, TINY.vocab_size), dtype=np.uint64)


class HintedBigram(lawful.Bigram):
    """A cheap scorer to tilt: it adapts, and its distributions are exact."""

    warm_up_targets = 0

    def fork(self) -> "HintedBigram":
        return copy.deepcopy(self)

    def score(self, tokens: np.ndarray, queries: Queries[np.ndarray] | None) -> TargetScores[np.ndarray]:
        hints = np.zeros(len(tokens), np.int64) if queries is None else queries.hint_ids_N
        rows: list[tuple[float, float]] = []
        for token in tokens.tolist():
            if self.last is not None:
                law = self.predict()
                rows.append((-law[token], law[hints[len(rows)]]))
            self.observe(token)
        return TargetScores(*np.array(rows, dtype=np.float32).reshape(-1, 2).T.copy())


def stream(count: int, vocab: int = lawful.VOCAB, seed: int = 0) -> np.ndarray:
    """Random tokens in which phrases return: what a pair of tokens does not tell, a longer context does."""
    generator = np.random.Generator(np.random.PCG64(seed))
    phrases = generator.integers(4, vocab, (12, 24))
    parts: list[np.ndarray] = [np.array([lawful.BOS])]
    while sum(map(len, parts)) < count:
        parts.append(
            phrases[generator.integers(12)] if generator.random() < 0.5 else generator.integers(4, vocab, 8)
        )
        if generator.random() < 0.1:
            parts.append(np.array([lawful.BOS]))
    return np.concatenate(parts)[:count].astype(np.uint16)


def tilted(targets: int, rate: float = RATE, network: NetworkScorer | None = None) -> EnsembleScorer:
    no_boundaries = np.zeros(len(CODES), bool)
    tilt = NgramTilt(CODES, targets, rate)
    return EnsembleScorer(network or HintedBigram(targets), no_boundaries, torch.device("cpu"), tilt)


# NgramTable


def slow_hints(tokens: np.ndarray) -> tuple[list[int], list[list[int]]]:
    """Hints (N) and states (N, K), with a dictionary for each length: context -> [token, hits, misses]."""
    lengths = CONTEXT_LENGTHS.tolist()
    memory: list[dict[tuple[int, ...], list[int]]] = [{} for _ in lengths]
    hints, states = [], []

    for i, token in enumerate(tokens.tolist()):
        contexts = [tuple(tokens[i - n : i].tolist()) if n <= i else None for n in lengths]

        # The hint is that of the longest context that was seen; the states tell who agrees with it.
        hint = -1
        row = [UNKNOWN] * len(lengths)
        for k in reversed(range(len(lengths))):
            found = memory[k].get(contexts[k]) if contexts[k] else None  # type: ignore[arg-type]
            if found:
                hint = found[0] if hint < 0 else hint
                row[k] = 4 * found[1] + found[2] + (AGREES_FLAG if found[0] == hint else 0)
        states.append(row)
        hints.append(hint)

        # Then every context learns the token.
        for k, context in enumerate(contexts):
            if context is None:
                continue

            slot = memory[k].setdefault(context, [token, 0, 0])
            if slot[0] == token:
                slot[1] = min(slot[1] + 1, MAX_HITS)
                slot[2] -= slot[2] > 0 and slot[1] % 4 == 0
            else:
                slot[1] //= 2
                slot[2] = min(slot[2] + 1, MAX_MISSES)
                if slot[1] == 0:
                    slot[0], slot[1] = token, 1

    return hints, states


def test_hints_equal_dictionaries_and_come_before_the_token() -> None:
    tokens = stream(3000)
    tokens[2000:2100] = 7  # a run: many hits
    hints, states = NgramTable(CODES, 1 << 20).update(tokens)
    expected = slow_hints(tokens)
    # Of two million slots a few are hit twice.
    assert (hints != expected[0]).mean() < 1e-3
    assert (states != expected[1]).mean() < 1e-3
    assert states.max() >= AGREES_FLAG + 4 * MAX_HITS
    one_by_one = NgramTable(CODES, 1 << 20)
    for i in range(300):
        hint, state = one_by_one.peek()
        assert hint == hints[i]
        np.testing.assert_array_equal(state, states[i])
        one_by_one.update(tokens[i : i + 1])


def test_tables_that_are_too_small_still_give_hints() -> None:
    crowded = NgramTable(CODES, 10)
    hints, _ = crowded.update(stream(20_000))
    assert (hints >= 0).mean() > 0.2
    assert crowded.arrays.tables.shape == (len(CONTEXT_LENGTHS), 1024)


def test_the_same_hints_with_other_names_for_the_ids() -> None:
    """Even in tables where most contexts collide: what collides depends on what the ids say."""
    names = np.random.Generator(np.random.PCG64(8)).permutation(len(CODES))
    codes, tokens = np.empty_like(CODES), stream(5000)
    codes[names] = CODES
    hints, states = NgramTable(CODES, 10).update(tokens)
    renamed, renamed_states = NgramTable(codes, 10).update(names[tokens].astype(np.uint16))
    np.testing.assert_array_equal(renamed, np.where(hints >= 0, names[hints], -1))
    np.testing.assert_array_equal(renamed_states, states)


# The tilt


def test_weights_at_zero_are_the_wrapped_scorer_bit_for_bit() -> None:
    tokens = stream(3000)
    np.testing.assert_array_equal(
        tilted(len(tokens) - 1, rate=0.0).score_stream(tokens), HintedBigram(0).score_stream(tokens)
    )
    short = stream(200, TINY.vocab_size)
    trained = TTTScorer(random_model(6), SLIDING, TTT, make_world(), len(short) - 1)
    wrapped = TTTScorer(random_model(6), SLIDING, TTT, make_world(), len(short) - 1)
    np.testing.assert_array_equal(
        tilted(len(short) - 1, 0.0, wrapped).score_stream(short), trained.score_stream(short)
    )


def test_it_learns_what_pairs_do_not_tell() -> None:
    tokens = stream(20_000)
    plain, tilt = HintedBigram(0).score_stream(tokens), tilted(len(tokens) - 1).score_stream(tokens)
    assert tilt.dtype == np.float32
    assert tilt[10_000:].mean() < plain[10_000:].mean() - 0.3


def test_a_boost_moves_as_little_as_the_probability_that_it_stands_on() -> None:
    """Two ways to compute one p(h) differ in their last bits.

    Weights that changed abruptly between ranges of p(h) made losses jump by a nat there.
    """
    random = np.random.Generator(np.random.PCG64(6))
    tilt = new_tilt_state()
    tilt.weights_WX[:] = random.normal(size=tilt.weights_WX.shape)
    tilt.hit_rates_KS[:] = random.uniform(0.1, 0.9, tilt.hit_rates_KS.shape)
    states = random.integers(0, SLOT_STATES, len(CONTEXT_LENGTHS)).astype(np.uint8)
    x = np.empty(INPUTS)
    logits = np.arange(-20, 14, 1e-3)
    boosts = np.array([_boost(tilt, states, -np.logaddexp(0, -logit), x).boost for logit in logits])
    assert np.ptp(boosts) > 1
    assert np.abs(np.diff(boosts)).max() < 0.02


def test_noise_cannot_be_beaten() -> None:
    """The canary bound: n uniform ids of V cost n log2 V - 64 bits, except in one of 2^64 streams."""
    tokens = np.random.Generator(np.random.PCG64(3)).integers(0, lawful.VOCAB, 20_000).astype(np.uint16)
    bits = tilted(len(tokens) - 1).score_stream(tokens).sum(dtype=np.float64) / math.log(2)
    plain = HintedBigram(0).score_stream(tokens).sum(dtype=np.float64) / math.log(2)
    assert (len(tokens) - 1) * math.log2(lawful.VOCAB) - 64 < bits < plain + 0.005 * len(tokens)


def test_distributions_sum_to_one_late_in_a_long_stream_and_are_what_is_scored() -> None:
    tokens = stream(30_000)
    scorer = tilted(len(tokens) - 1)
    places = np.sort(np.random.Generator(np.random.PCG64(1)).integers(20_000, 29_999, 25))
    at, moved = 0, 0
    for place in places.tolist():
        scorer.score_stream(tokens[at:place])
        at = place
        law = scorer.predict()
        assert abs(np.exp(law).sum() - 1) < 1e-9
        moved += np.abs(law - scorer.network.predict()).max() > 1e-3
        # The counterfactual sum: what `score_stream` would have charged for each id in this place (float32).
        charged = [
            scorer.fork().score_stream(np.array([token], dtype=np.uint16))[0] for token in range(lawful.VOCAB)
        ]
        np.testing.assert_allclose(charged, -law, atol=1e-5)
        assert abs(np.exp(-np.array(charged, dtype=np.float64)).sum() - 1) < 1e-6
    assert moved >= 20


def test_pieces_predictions_and_the_whole_stream_agree() -> None:
    tokens = stream(400, TINY.vocab_size)
    whole = tilted(399, network=SlidingScorer(random_model(6), SLIDING, make_world())).score_stream(tokens)
    pieces = tilted(399, network=SlidingScorer(random_model(6), SLIDING, make_world()))
    parts = np.concatenate([pieces.score_stream(part) for part in np.split(tokens, [1, 20, 33, 34, 200])])
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    one_by_one = tilted(399, network=SlidingScorer(random_model(6), SLIDING, make_world()))
    one_by_one.observe(int(tokens[0]))
    for target in range(200):
        if target % 3 == 0:  # between them tokens wait, and are scored together
            law = one_by_one.predict()
            assert abs(np.logaddexp.reduce(law)) < 1e-12
            assert abs(law[tokens[target + 1]] + whole[target]) < 1e-5
        one_by_one.observe(int(tokens[target + 1]))


def test_scores_come_before_updates() -> None:
    tokens = stream(2000)
    base = tilted(1999).score_stream(tokens)
    for position in (300, 700, 701, 1500, 1999):
        changed = tokens.copy()
        changed[position] = (changed[position] + 5) % lawful.VOCAB
        scores = tilted(1999).score_stream(changed)
        np.testing.assert_array_equal(scores[: position - 1], base[: position - 1])
        assert scores[position - 1] != base[position - 1]


def test_forks_are_independent_in_both_directions() -> None:
    tokens = stream(3000)
    straight = tilted(2999)
    straight.score_stream(tokens[:1500])
    expected = straight.score_stream(tokens[1500:])
    for first in ("original", "fork"):
        scorer = tilted(2999)
        for token in tokens[:1500].tolist():
            scorer.observe(token)
        twin = scorer.fork()
        other, kept = (scorer, twin) if first == "original" else (twin, scorer)
        other.score_stream(np.full(300, 9, dtype=np.uint16))
        np.testing.assert_array_equal(kept.score_stream(tokens[1500:]), expected)


def test_tables_are_copied_for_a_fork_that_lives_and_for_no_other() -> None:
    """An audit forks thousands of times, and the tables of a long stream are large."""
    tokens = stream(900)
    scorer = tilted(899)
    scorer.score_stream(tokens[:300])

    def tables_of(of: EnsembleScorer) -> np.ndarray:
        assert of.tilt is not None
        return of.tilt.value.table.arrays.tables

    tables, twin = tables_of(scorer), scorer.fork()
    scorer.score_stream(tokens[300:400])
    assert tables_of(scorer) is not tables
    assert tables_of(twin) is tables
    twin.score_stream(tokens[300:400])  # nobody else has them any more
    assert tables_of(twin) is tables
    scorer.fork()
    own = tables_of(scorer)
    np.testing.assert_array_equal(scorer.score_stream(tokens[400:]), twin.score_stream(tokens[400:]))
    assert tables_of(scorer) is own


@pytest.mark.parametrize(("kind", "rate"), [("sgd", RATE), ("lora", RATE)])
def test_the_audit_passes_adaptive_scorers(
    tmp_path_factory: pytest.TempPathFactory, kind: Literal["sgd", "lora"], rate: float
) -> None:
    tokens = stream(600, TINY.vocab_size)
    counted = (tokens[1:] != lawful.BOS).astype(np.int64)
    per_document = np.array([len(document) - 1 for document in shards.documents(tokens, lawful.BOS)])
    documents = coverage.DocumentBytes(per_document, np.zeros(len(per_document), dtype=bool))

    lora = dataclasses.replace(TTT.lora, lr=0.001, documents=40)
    params = dataclasses.replace(TTT, kind=kind, tilt_rate=rate, chunk=128, lora=lora)
    of_kind = {
        "sgd": dataclasses.replace(PARAMS, substitutions=TINY.vocab_size),
        "lora": dataclasses.replace(
            PARAMS, substitutions=8, perturbations=7, order_documents=3, call_splits=1, canary_targets=96
        ),
    }

    model = random_model(6)

    def make(n_targets: int) -> Scorer:
        return build_scorer("ttt_eval", SLIDING, params, factories.scorer_inputs(model, n_targets))

    nll = make(len(tokens) - 1).score_stream(tokens)
    table = tmp_path_factory.mktemp("chunks") / "chunks.tsv"
    ledger.write_chunks(table, nll, counted, 128)

    case = AuditCase(
        f"{kind}, tilt {rate}",
        make,
        AuditedStream(tokens, lawful.BOS, counted, documents),
        sampling.Boundaries(window=SLIDING.stride, chunk=128),
        hashlib.sha256(b"tilt").digest(),
        of_kind[kind],
    )
    claim = ClaimedEvaluation(nll, table.read_text(), bpb.bits_per_byte(nll, counted), FLOAT32)
    verdicts = audit_scorer(case, claim, Logger(is_main=False))
    failed = [failure_message(verdict) for verdict in failures(verdicts)]
    assert {verdict.outcome for verdict in verdicts} == {"pass"}, failed


def test_a_negative_rate_is_an_error() -> None:
    with pytest.raises(ValueError, match="tilt_rate: -1 is negative"):
        dataclasses.replace(TTT, tilt_rate=-1)


def test_the_kind_decides() -> None:
    inputs = factories.scorer_inputs(random_model(6), 100)
    kinds: tuple[tuple[Literal["sgd", "lora"], type], ...] = (("sgd", TTTScorer), ("lora", LoRAScorer))
    for kind, expected in kinds:
        params = dataclasses.replace(TTT, kind=kind)
        assert type(build_scorer("ttt_eval", SLIDING, params, inputs)) is expected
        tilted_scorer = build_scorer("ttt_eval", SLIDING, dataclasses.replace(params, tilt_rate=RATE), inputs)
        assert isinstance(tilted_scorer, EnsembleScorer)
        assert type(tilted_scorer.network) is expected
    assert type(build_scorer("sliding_eval", SLIDING, TTT, inputs)) is SlidingScorer
