"""The zoo: each cheat is convicted by the test that names it; lawful scorers are not, whatever is drawn."""

from pathlib import Path

import pytest

from stages.audit.verdict import convicted, reason
from tests.zoo import causal, harness, lawful, paper
from tests.zoo.registry import CHEATS, Cheat


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.name)
def test_a_cheat_is_convicted_by_the_test_that_names_it(cheat: Cheat, tmp_path: Path) -> None:
    verdicts = cheat.run(tmp_path, harness.KEY)
    assert cheat.convicted_by in harness.failed(verdicts)
    for verdict in convicted(verdicts):
        assert verdict.saw != verdict.expected, reason(verdict)


@pytest.mark.parametrize("scorer", lawful.LAWFUL)
def test_a_lawful_scorer_passes_everything_whatever_is_drawn(
    scorer: type[lawful.Bigram], tmp_path: Path
) -> None:
    """A sample; benchmarks/audit_matrix.py has more than 200 such runs."""
    for seed in (1, 2):
        verdicts = harness.audit(scorer, tmp_path, key=bytes([seed]), tokens=lawful.stream(1500, seed))
        assert {verdict.outcome for verdict in verdicts} == {"pass"}, [
            reason(verdict) for verdict in convicted(verdicts)
        ]


def test_each_way_to_cheat_with_time_is_told_from_the_others(tmp_path: Path) -> None:
    graphs = {
        scorer: next(verdict for verdict in harness.audit(scorer, tmp_path) if verdict.check == "B1c")
        for scorer in (causal.LongestFirst, causal.Circular, causal.SmearAcrossBos)
    }
    assert "another order" in graphs[causal.LongestFirst].evidence
    assert "circle" in graphs[causal.Circular].evidence
    assert "declared to score each document by itself" in graphs[causal.SmearAcrossBos].evidence


def test_only_the_text_shows_documents_that_were_tokenized_otherwise(tmp_path: Path) -> None:
    assert harness.failed(paper.overlap(tmp_path, harness.KEY, spelt=True)) == {
        "B15 passages shared by train and val"
    }


def test_lawful_bytes_pass(tmp_path: Path) -> None:
    assert {verdict.outcome for verdict in paper.lawful_bytes(tmp_path, harness.KEY)} == {"pass"}
