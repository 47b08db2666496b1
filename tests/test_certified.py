"""Certified score and precision: losses, draws, power; which shifts are found, and how often by chance."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from stages.audit import precision, report, sampling
from stages.audit.checks import certified
from stages.audit.precision import BFLOAT16, FLOAT32, FLOAT64
from stages.audit.probe_runner import ProtocolError
from stages.audit.verdict import Verdict
from tests.zoo import lawful, unnormalised
from tests.zoo.harness import BYTES, KEY, PARAMS, TOKENS, audit, failed_checks

STREAM_BYTES = int(BYTES.sum())


class Watched(lawful.Bigram):
    """Notes how many tokens it had observed at each predict()."""

    def __init__(self, n_targets: int) -> None:
        super().__init__(n_targets)
        self.predicted_after: list[int] = []

    def predict(self) -> np.ndarray:
        self.predicted_after.append(self.observed)
        return super().predict()


def certify_bigram(count: int = 0) -> tuple[certified.CertifiedLosses, np.ndarray]:
    """Certified losses of the lawful bigram, and its ledger."""
    positions = sampling.certified_positions(KEY, len(TOKENS), count)
    losses = certified.certify(lawful.Bigram(len(BYTES)), TOKENS, positions)
    return losses, lawful.Bigram(len(BYTES)).score_stream(TOKENS)


def judge(
    losses: certified.CertifiedLosses, ledger: np.ndarray | None, of: precision.Precision = FLOAT32
) -> dict[str, Verdict]:
    """Verdicts of B17 by the name of their check."""
    verdicts = certified.judge("x", losses, ledger, of, of, STREAM_BYTES)
    return {verdict.check.name: verdict for verdict in verdicts}


def test_a_token_is_handed_over_after_its_prediction_and_in_order() -> None:
    scorer = Watched(len(BYTES))
    positions = np.array([1, 2, 700, 701, 2999])
    passed: list[int] = []
    losses = certified.certify(scorer, TOKENS, positions, passed.append)
    assert scorer.predicted_after == positions.tolist()
    assert scorer.observed == 2999  # the last token is never handed over
    assert np.cumsum(passed).tolist() == positions.tolist()
    ledger = lawful.Bigram(len(BYTES)).score_stream(TOKENS)
    assert losses.losses == pytest.approx(ledger[positions - 1], abs=1e-6)
    assert not losses.is_whole


def test_the_certified_score_of_a_whole_stream_is_that_of_its_ledger() -> None:
    losses, ledger = certify_bigram()
    assert losses.is_whole
    bits = float(ledger.sum(dtype=np.float64)) / math.log(2) / STREAM_BYTES
    assert certified.certified_bits_per_byte(losses, BYTES) == pytest.approx(bits, rel=1e-7)
    verdicts = judge(losses, ledger)
    assert {verdict.outcome for verdict in verdicts.values()} == {"pass"}
    assert f"certified score {bits:.6f}" in verdicts["ledger equals certified score"].evidence


def test_certified_losses_are_normalised_and_a_sum_below_one_is_lawful() -> None:
    positions = np.arange(1, 500)
    leaky = certified.certify(lawful.Leaky(len(BYTES)), TOKENS, positions)
    plain = certified.certify(lawful.Bigram(len(BYTES)), TOKENS, positions)
    excess = certified.certify(unnormalised.HashedBuckets(len(BYTES)), TOKENS, positions)
    assert leaky.losses == pytest.approx(plain.losses, abs=1e-12)
    assert leaky.log_sums == pytest.approx(math.log(0.9))
    assert certified.judge_sums("x", leaky, FLOAT32).outcome == "pass"
    verdict = certified.judge_sums("x", excess, FLOAT32)
    assert verdict.outcome == "fail"
    assert verdict.saw == pytest.approx(math.log(2))
    assert verdict.positions[:3] == (1, 2, 3)


def test_small_excess_everywhere_fails_in_the_mean_of_the_sums() -> None:
    losses, ledger = certify_bigram()
    shown = losses._replace(losses=losses.losses, log_sums=np.full(len(losses.losses), 0.0046))
    assert judge(shown, ledger, BFLOAT16)["certified sums"].outcome == "fail"
    assert judge(losses, ledger, BFLOAT16)["certified sums"].outcome == "pass"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_distribution_that_is_none_fails_and_a_wrong_shape_breaks_the_protocol(bad: float) -> None:
    class Broken(lawful.Bigram):
        def predict(self) -> np.ndarray:
            logp = super().predict()
            if self.observed == 5:
                logp[3] = bad
            return logp

    class Short(lawful.Bigram):
        def predict(self) -> np.ndarray:
            return super().predict()[:-1]

    losses = certified.certify(Broken(9), TOKENS, np.arange(1, 9))
    verdict = certified.judge_sums("x", losses, FLOAT32)
    assert (verdict.outcome, verdict.positions) == ("fail", (5,))
    with pytest.raises(ProtocolError, match="predict returned"):
        certified.certify(Short(9), TOKENS, np.arange(1, 9))


def test_an_impossible_token_has_an_infinite_loss_and_the_ledger_must_say_so() -> None:
    class Impossible(lawful.Bigram):
        def predict(self) -> np.ndarray:
            logp = super().predict()
            if self.observed == 5:
                logp[int(TOKENS[5])] = -np.inf
            return logp

    losses = certified.certify(Impossible(9), TOKENS[:50], np.arange(1, 50))
    assert np.flatnonzero(np.isinf(losses.losses)).tolist() == [4]
    ledger = losses.losses - losses.log_sums
    verdict = judge(losses, ledger.astype(np.float32))["ledger equals certified score"]
    assert verdict.outcome == "pass"
    assert "1 targets had probability zero" in verdict.evidence
    ledger[4] = 2.0
    verdict = judge(losses, ledger.astype(np.float32))["ledger equals certified score"]
    assert (verdict.outcome, verdict.positions) == ("fail", (5,))


def test_positions_are_one_in_each_equal_part_and_follow_from_the_key() -> None:
    positions = sampling.certified_positions(KEY, 1001, 30)
    edges = 1 + 1000 * np.arange(31) // 30
    assert ((positions >= edges[:-1]) & (positions < edges[1:])).all()
    assert np.array_equal(positions, sampling.certified_positions(KEY, 1001, 30))
    assert not np.array_equal(positions, sampling.certified_positions(b"another ledger", 1001, 30))
    for count in (0, 1000, 5000):
        assert np.array_equal(sampling.certified_positions(KEY, 1001, count), np.arange(1, 1001))

    # Every target of a part is drawn equally often.
    drawn = np.concatenate(
        [sampling.certified_positions(bytes([i, j]), 41, 10) for i in range(64) for j in range(8)]
    )
    counts = np.bincount(drawn, minlength=41)[1:]
    assert counts.min() > 80
    assert counts.max() < 180


@pytest.mark.parametrize("false", [3, 30, 100, 250])
def test_the_miss_probability_bounds_every_way_to_spread_false_targets(false: int) -> None:
    targets, count, runs = 1000, 40, 1500
    bound = certified.miss_probability(targets, count, false)
    evenly = (np.arange(false) * targets // false) + 1
    generator = np.random.Generator(np.random.PCG64(1))
    for where in (evenly, np.arange(1, false + 1), generator.permutation(targets)[:false] + 1):
        keys = (b"%d" % run for run in range(runs))
        missed = sum(
            not np.isin(sampling.certified_positions(key, targets + 1, count), where).any() for key in keys
        )
        assert missed / runs <= bound + 4 * math.sqrt(bound * (1 - bound) / runs) + 1e-9
    if false <= count:  # one in a part: the bound is reached
        assert bound == pytest.approx((1 - count / targets) ** false)


def test_the_largest_missed_number_is_the_largest() -> None:
    for targets, count in ((1000, 40), (40_540_799, 80_000), (500, 499), (7, 2)):
        largest = certified.largest_missed(targets, count)
        assert certified.miss_probability(targets, count, largest) > certified.MISSED
        assert certified.miss_probability(targets, count, largest + 1) <= certified.MISSED
    assert certified.largest_missed(500, 500) == 0
    assert certified.largest_missed(40_540_799, 80_000) == 2332


@pytest.mark.parametrize(("count", "outcome"), [(0, "pass"), (2900, "cannot tell"), (256, "cannot tell")])
def test_the_power_says_what_was_not_covered(count: int, outcome: str) -> None:
    losses, ledger = certify_bigram(count)
    verdict = judge(losses, ledger)["certified power"]
    assert verdict.outcome == outcome
    if count:
        assert f"{count} of 2999 targets certified" in verdict.evidence
        assert f"{2999 - count} targets are not covered" in verdict.evidence
        assert "0.0005 need" in verdict.evidence


def test_80000_certified_targets_are_enough_for_the_official_stream_in_float32() -> None:
    """40,540,799 targets, 151,080,891 bytes, V = 8192; the limit is 0.0013 nats per target."""
    generator = np.random.Generator(np.random.PCG64(2))
    limit = certified.MAX_GAIN * math.log(2) * 151_080_891 / 40_540_799
    drawn = generator.normal(0, 1e-6, 80_000)
    bound = certified.GainBound(drawn, 40_540_799, 8192, FLOAT32.loss_tolerance + FLOAT32.sum_tolerance)
    needed = bound.needed(limit)
    assert bound.at(80_000) <= limit
    assert needed is not None
    assert 60_000 < needed < 80_000
    assert bound.at(needed) <= limit < bound.at(needed - 1)

    # In bfloat16 round-off hides more, so more are needed.
    rounded = certified.GainBound(30_000 * drawn, 40_540_799, 8192, 0.54)
    more = rounded.needed(limit)
    assert more is not None
    assert 80_000 < more < 250_000


@pytest.mark.parametrize("share", [0.003, 0.02, 1.0])
def test_a_gain_above_the_stated_bound_does_not_pass(share: float) -> None:
    """A total gain above the stated bound, at some targets or at all, is found with probability 0.99."""
    losses, ledger = certify_bigram()
    largest = FLOAT32.loss_tolerance + FLOAT32.sum_tolerance
    generator = np.random.Generator(np.random.PCG64(3))
    passes = 0
    for run in range(400):
        # The same total, spread over a share of the targets.
        positions = sampling.certified_positions(b"%d" % run, len(TOKENS), 1500)
        count = max(1, round(share * len(ledger)))
        chosen = generator.permutation(len(ledger))[:count]
        honest = losses.losses.copy()
        gain = np.zeros(len(ledger))
        gain[chosen] = honest.mean() * 0.05 / share if share < 1 else 5e-6
        gain = np.minimum(gain, honest)

        part = losses._replace(
            positions=positions, losses=honest[positions - 1], log_sums=losses.log_sums[positions - 1]
        )
        cheating = (honest - gain).astype(np.float32)
        bound = certified.GainBound(gain[positions - 1], len(ledger), lawful.VOCAB, largest)
        found = judge(part, cheating)["ledger equals certified score"].outcome == "fail"
        passes += not found and bound.at(1500) < gain.mean()
    assert passes <= 400 * certified.MISSED + 4 * math.sqrt(400 * certified.MISSED)


@pytest.mark.parametrize("n", [30, 256, 3000])
def test_round_off_is_no_shift_whatever_its_distribution(n: int) -> None:
    """None of 1,500 runs is convicted: the probability of that is 1e-6 for each."""
    generator = np.random.Generator(np.random.PCG64(4))
    runs = 500
    normal = generator.normal(0, 3e-7, (runs, n))
    rare = generator.choice([-1e-4, 0.0, 1e-4], (runs, n), p=[0.001, 0.998, 0.001])
    heavy_tailed = generator.standard_cauchy((runs, n)) * 1e-7
    for differences in (*normal, *rare, *heavy_tailed):
        assert not precision.measure_shift(differences, 0.0).is_systematic


@pytest.mark.parametrize(
    ("tolerances", "deviation", "shift", "n"),
    [(FLOAT32, 3e-7, 1e-6, 3000), (FLOAT32, 1e-6, 1e-6, 80_000), (BFLOAT16, 0.03, 0.0046, 6000)],
)
def test_a_systematic_shift_is_convicted(
    tolerances: precision.Precision, deviation: float, shift: float, n: int
) -> None:
    generator = np.random.Generator(np.random.PCG64(5))
    for sign in (-1, 1):
        differences = sign * shift + generator.normal(0, deviation, n)
        measured = precision.measure_shift(differences, tolerances.mean_tolerance)
        assert measured.is_systematic
        assert measured.is_gain == (sign > 0)
        assert measured.detectable <= shift


def test_a_shift_of_the_detectable_size_is_convicted_99_times_in_100() -> None:
    generator = np.random.Generator(np.random.PCG64(6))
    detectable = precision.measure_shift(generator.normal(0, 1e-6, 3000), 5e-7).detectable
    convicted = sum(
        precision.measure_shift(generator.normal(detectable, 1e-6, 3000), 5e-7).is_systematic
        for _ in range(300)
    )
    assert convicted >= 297


def test_too_few_differences_have_no_mean() -> None:
    for n in (0, 1, 20):
        shift = precision.measure_shift(np.full(n, 1e-3), 5e-7)
        assert not shift.is_systematic
        assert shift.detectable == math.inf
    assert precision.measure_shift(np.array([np.inf] * 200), 5e-7).is_systematic


def test_infinities_are_equal_and_nan_is_not() -> None:
    one = np.array([np.inf, -np.inf, np.inf, np.nan, 1.0, np.nan], dtype=np.float32)
    other = np.array([np.inf, -np.inf, -np.inf, np.nan, 0.5, 1.0], dtype=np.float32)
    assert precision.difference(one, other).tolist() == [0, 0, np.inf, np.inf, 0.5, np.inf]


def test_a_precision_is_declared_by_name() -> None:
    assert precision.of_scorer(lawful.Bigram(1)) is FLOAT32
    assert precision.of_scorer(lawful.BFloat16(1)) is BFLOAT16
    assert precision.coarser(FLOAT32, BFLOAT16) is precision.coarser(BFLOAT16, FLOAT64) is BFLOAT16

    class Unknown(lawful.Bigram):
        precision = "float8"

    with pytest.raises(ValueError, match="'float8' is not known"):
        precision.of_scorer(Unknown(1))


def test_a_larger_precision_finds_less_and_says_so() -> None:
    losses, ledger = certify_bigram()
    lowered = ledger - np.float32(4e-5)
    assert judge(losses, lowered)["ledger equals certified score"].outcome == "fail"
    verdict = judge(losses, lowered, BFLOAT16)["ledger equals certified score"]
    assert verdict.outcome == "pass"
    assert verdict.check.sees.endswith("a systematic shift of 5.0e-05 nats")


def test_a_declared_precision_reaches_every_check(tmp_path: Path) -> None:
    """Rounded losses of one batch pass in bfloat16, and fail in float32."""

    class Undeclared(lawful.BFloat16Logits):
        precision = "float32"

    assert not failed_checks(audit(lawful.BFloat16Logits, tmp_path))
    failed = failed_checks(audit(Undeclared, tmp_path))
    assert {
        "B3 counterfactual sum",
        "B4 ledger equals commitment",
        "B17 ledger equals certified score",
    } <= failed


def test_a_ledger_of_the_wrong_length_leaves_the_sums() -> None:
    losses, _ = certify_bigram(300)
    outcomes = {name: verdict.outcome for name, verdict in judge(losses, None).items()}
    assert outcomes == {
        "certified sums": "pass",
        "ledger equals certified score": "cannot tell",
        "certified power": "cannot tell",
    }


def test_conditions_cannot_be_told_from_too_few_certified_targets(tmp_path: Path) -> None:
    """A scorer without predict() has no certified score: its conditions are told from its other checks."""

    class Fast(lawful.Bigram):
        predicts = False

    outcomes = []
    for factory, count in ((lawful.Bigram, 0), (lawful.Bigram, 50), (Fast, 0)):
        params = dataclasses.replace(PARAMS, certified_targets=count)
        verdicts = audit(factory, tmp_path, params=params)
        table = report.outcomes_by_condition(verdicts)
        outcomes.append([table[condition][factory.__name__] for condition in ("C1", "C2", "C3", "C4")])
    assert outcomes == [["pass"] * 4, ["cannot tell"] * 4, ["cannot tell"] * 4]
    (without,) = [verdict for verdict in verdicts if verdict.check.number == "B17"]
    assert (without.outcome, without.check) == ("cannot tell", certified.NO_DISTRIBUTION)


def test_positions_depend_on_the_ledger(tmp_path: Path) -> None:
    """A ledger cannot be edited between the certified targets: the edit moves them."""
    params = dataclasses.replace(PARAMS, certified_targets=50)
    audits = [
        audit(lawful.Bigram, tmp_path, params=params),
        audit(lawful.Bigram, tmp_path, params=params, edit=lambda nll: nll + np.float32(1e-6)),
    ]
    worst = []
    for verdicts in audits:
        worst += [verdict.positions for verdict in verdicts if verdict.check.name == "certified sums"]
    assert worst[0] != worst[1]
