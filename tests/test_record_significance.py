"""Claims of a record: t distribution, Welch's test and bootstrap against simulations; the leaderboard."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from stages.common import config, paired_bootstrap, student_t
from stages.common.student_t import upper_tail
from tools.record import leaderboard, significance

ROOT = Path(__file__).resolve().parent.parent
BYTES_PER_TOKEN = 151_078_222 / 40_540_160  # SP8192


def slow_tail(t: float, degrees: float) -> float:
    """The density of Student's t summed over the angle whose tangent is t / sqrt(degrees)."""

    def mass(start: float) -> float:
        angles = np.linspace(start, math.pi / 2, 200_001)
        return float(np.trapezoid(np.cos(angles) ** (degrees - 1), angles))

    return mass(math.atan(t / math.sqrt(degrees))) / mass(-math.pi / 2)


@pytest.mark.parametrize("degrees", [2.0, 2.7, 4.0, 30.0, 900.0])
@pytest.mark.parametrize("t", [-3.0, -0.2, 0.7, 2.5, 12.0])
def test_the_tail_is_the_integral_of_the_density(t: float, degrees: float) -> None:
    assert upper_tail(t, degrees) == pytest.approx(slow_tail(t, degrees), rel=1e-5, abs=1e-12)


def test_tails_with_closed_forms() -> None:
    for t in (0.1, 1.0, 5.0, 400.0):
        assert upper_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, rel=1e-10)
        assert upper_tail(t, 2) == pytest.approx(0.5 * (1 - t / math.sqrt(2 + t * t)), rel=1e-8)
    assert upper_tail(1.959963985, 1e9) == pytest.approx(0.025, rel=1e-6)
    assert upper_tail(math.inf, 3) == 0
    with pytest.raises(ValueError, match="at least two seeds"):
        upper_tail(1.0, 0)


def test_both_readings_of_the_challenge_s_nats() -> None:
    found = significance.margins(BYTES_PER_TOKEN)
    assert found["token"] == pytest.approx(0.00194, abs=5e-6)
    assert found["byte"] == pytest.approx(0.00721, abs=5e-6)


def test_welch_against_simulation() -> None:
    """If the truth is exactly on the margin, p is below 0.05 in one of twenty records."""
    generator = np.random.Generator(np.random.PCG64(0))
    ours, theirs = generator.normal(1.0, 0.001, (4000, 3)), generator.normal(1.005, 0.0005, (4000, 3))
    p = [
        student_t.welch(student_t.seed_statistics(list(a)), student_t.seed_statistics(list(b)), 0.005)
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.015)


def test_welch_with_equal_samples_is_the_textbook_s_t_test() -> None:
    ours, theirs = student_t.seed_statistics([1.0, 1.1, 1.2]), student_t.seed_statistics([1.5, 1.6, 1.7])
    assert student_t.welch(ours, theirs, 0.0) == pytest.approx(
        upper_tail(0.5 / math.sqrt(2 * 0.01 / 3), 4), rel=1e-12
    )
    exact = student_t.SeedStatistics(1.6, None, None)
    assert student_t.welch(ours, exact, 0.0) == pytest.approx(
        upper_tail(0.5 / math.sqrt(0.01 / 3), 2), rel=1e-12
    )
    assert student_t.welch(student_t.SeedStatistics(1.0, 0.0, 3), exact, 0.1) == 0
    assert student_t.welch(student_t.SeedStatistics(1.0, 0.0, 3), exact, 0.7) == 1
    with pytest.raises(ValueError, match="at least two seeds"):
        student_t.welch(student_t.seed_statistics([1.0]), exact, 0.0)


def test_seeds_needed_is_the_first_number_that_shows_it() -> None:
    ours, theirs = student_t.SeedStatistics(1.0780, 0.0006, 3), student_t.SeedStatistics(1.0810, 0.0002, 3)
    margin = significance.margins(BYTES_PER_TOKEN)["token"]
    needed = significance.seeds_needed(ours, theirs, margin)
    assert needed is not None
    assert (
        student_t.welch(ours._replace(seeds=needed), theirs, margin)
        < 0.01
        <= student_t.welch(ours._replace(seeds=needed - 1), theirs, margin)
    )
    assert significance.seeds_needed(ours, theirs, 0.003) is None  # a gain that is not above the margin
    assert (
        significance.seeds_needed(ours, student_t.SeedStatistics(1.0810, 0.02, 2), margin) is None
    )  # theirs scatter too much


def test_a_claim_is_said_in_both_units() -> None:
    answers = significance.over_seeds(
        student_t.SeedStatistics(1.0780, 0.0001, 3),
        student_t.SeedStatistics(1.0810, 0.0002, 3),
        BYTES_PER_TOKEN,
    )
    assert [(answer.unit, answer.shown) for answer in answers] == [("token", True), ("byte", False)]
    text = significance.verdict(answers)
    assert "0.005 nats per token (0.00194 bpb; the gain is +0.00300): shown" in text
    assert "0.005 nats per byte (0.00721 bpb; the gain is +0.00300): not shown" in text
    assert "no number of seeds" in text
    assert significance.as_json(answers)["tests"][0]["seeds_needed"] <= 3


def test_paired_ledgers_against_a_plain_count_and_the_bootstrap() -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    documents = np.repeat(np.arange(300), generator.integers(5, 60, 300))
    counted = generator.integers(0, 6, len(documents))
    theirs = [generator.gamma(2.0, 1.0, len(documents)).astype(np.float32) for _ in range(3)]
    ours = [(nll - generator.normal(0.05, 0.3, len(nll))).clip(0).astype(np.float32) for nll in theirs]
    found = significance.paired_gain(ours, theirs, counted, documents)
    bits = sum(float(np.sum(nll, dtype=np.float64)) for nll in theirs) - sum(
        float(np.sum(nll, dtype=np.float64)) for nll in ours
    )
    assert found.gain_bpb == pytest.approx(bits / 3 / math.log(2) / counted.sum(), rel=1e-9)
    means = [np.stack(side).mean(axis=0, dtype=np.float64).astype(np.float32) for side in (ours, theirs)]
    drawn = paired_bootstrap.paired_difference(means[0], means[1], counted, documents)
    assert (drawn.high - drawn.low) / 2 == pytest.approx(1.96 * found.error_bpb, rel=0.08)
    assert found.documents == 300
    answers = significance.over_documents(found, 3.0)
    assert all(answer.shown == (answer.p < 0.01) for answer in answers)
    assert significance.over_documents(significance.PairedGain(1.0, 0.0, 5), 3.0)[0].p == 0


def test_the_leaderboard_is_whole() -> None:
    """The rows to compare with, and the credits under the default parameters and under others."""
    board = leaderboard.read_leaderboard(ROOT / leaderboard.FILE)
    assert board.row("1493") == board.row("#1493")
    assert board.row("1493").mean == 1.081
    assert board.row("1493").deviation == pytest.approx(
        student_t.seed_statistics([1.08079, 1.08103, 1.08118]).deviation, abs=5e-6
    )
    assert board.row("2135").status == "accepted"
    scored = [row for row in board.rows if row.mean is not None]
    assert len(scored) > 50
    assert all(0.9 < row.mean < 1.2 for row in scored if row.mean is not None)
    assert (
        min(row.mean for row in scored if row.mean is not None and row.status in ("merged", "accepted"))
        == 1.05651
    )
    parameters = config.read_parameters(ROOT / "params.yaml")
    base = {credit.number for credit in board.credited(parameters)}
    assert {1394, 1331, 1437, 549, 1412, 1204, 1493} <= base
    assert 1797 not in base
    corrected = config.override(parameters, ["pack.lqer_rank=4", "ttt_eval.kind=lora"])
    assert {1797, 1767} <= {credit.number for credit in board.credited(corrected)}
    assert 1858 not in {credit.number for credit in board.credited(corrected)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [{"number": 1}]}, "rows[0].mean: missing key"),
        ({"rows": [{"number": "1"}]}, "rows[0].number: saw '1'"),
        ({"rows": None}, "rows: saw None, expected a list"),
        ({"credits": [{"number": 1, "what": "x", "when": ["a ! b"]}]}, "'a ! b' is neither"),
        ({"other": 1}, "other: unknown key"),
    ],
)
def test_a_wrong_file_is_named(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "leaderboard.yaml"
    path.write_text(yaml.safe_dump({"rows": [], "credits": [], "own": []} | change))
    with pytest.raises(ValueError, match=re.escape(message)):
        leaderboard.read_leaderboard(path)


def test_what_cannot_be_claimed_against_is_said() -> None:
    board = leaderboard.read_leaderboard(ROOT / leaderboard.FILE)
    with pytest.raises(ValueError, match=r"7 is not in data/leaderboard\.yaml"):
        board.row("7")
    with pytest.raises(ValueError, match="#1879 reports no score"):
        board.row("1879")
    with pytest.raises(ValueError, match="which is not a parameter"):
        leaderboard.Credit(1, None, "x", ("pack.nothing = 1",)).applies({"pack": {}})
    with pytest.raises(ValueError, match="does not exist"):
        leaderboard.read_leaderboard(Path("nowhere.yaml"))
