"""The zoo: each cheat fails the test that is named for it; lawful scorers pass, whatever is drawn."""

from pathlib import Path

import pytest

from stages.audit.verdict import failure_message, failures
from tests.zoo import acausal, bookkeeping, harness, lawful
from tests.zoo.registry import CHEATS, Cheat


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.name)
def test_a_cheat_fails_the_test_that_is_named_for_it(cheat: Cheat, tmp_path: Path) -> None:
    verdicts = cheat.run(tmp_path, harness.KEY)
    assert cheat.detected_by in harness.failed_checks(verdicts)
    for verdict in failures(verdicts):
        saw, expected, _ = verdict.shown_numbers
        assert saw != expected, failure_message(verdict)


@pytest.mark.parametrize("scorer", lawful.LAWFUL)
def test_a_lawful_scorer_passes_everything_whatever_is_drawn(
    scorer: type[lawful.Bigram], tmp_path: Path
) -> None:
    """A sample; benchmarks/audit_matrix.py has more than 500 such runs."""
    for seed in (1, 2):
        verdicts = harness.audit(scorer, tmp_path, key=bytes([seed]), tokens=lawful.random_stream(1500, seed))
        assert {verdict.outcome for verdict in verdicts} == {"pass"}, [
            failure_message(verdict) for verdict in failures(verdicts)
        ]


def test_each_way_to_cheat_with_time_is_told_from_the_others(tmp_path: Path) -> None:
    graphs = {
        scorer: next(verdict for verdict in harness.audit(scorer, tmp_path) if verdict.check.number == "B1c")
        for scorer in (acausal.LongestFirst, acausal.Circular, acausal.SmearAcrossBos)
    }
    assert "another order" in graphs[acausal.LongestFirst].evidence
    assert "circle" in graphs[acausal.Circular].evidence
    assert "declared to score each document by itself" in graphs[acausal.SmearAcrossBos].evidence


def test_only_the_text_shows_documents_that_were_tokenized_otherwise(tmp_path: Path) -> None:
    assert harness.failed_checks(bookkeeping.overlap(tmp_path, harness.KEY, spelt=True)) == {
        "B15 passages shared by train and val"
    }


def test_lawful_bytes_pass(tmp_path: Path) -> None:
    assert {verdict.outcome for verdict in bookkeeping.lawful_bytes(tmp_path, harness.KEY)} == {"pass"}
