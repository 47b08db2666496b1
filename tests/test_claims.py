"""Claims: fields that are refused, figures that are held against the audit's own, and the counted code."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.common import bpb
from tests.zoo import bookkeeping
from tests.zoo.bookkeeping import TEXTS
from tools.audit_scorer import claims, source


def written(folder: Path, claim: dict[str, Any]) -> Path:
    (folder / "claim.json").write_text(json.dumps(claim))
    return folder / "claim.json"


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({"budget_seconds": 6000}, "challenge.py"),
        ({"budget_seconds": 1}, "cannot be claimed"),
        ({"bbp": 1.0}, "unknown field bbp"),
        ({"seeds": [{"seed": 1, "nat": 2.5}]}, "unknown field nat"),
        ({"seeds": [3]}, "an object for each seed"),
        ({"seeds": 3}, "not iterable"),
    ],
)
def test_a_claim_with_other_fields_is_refused_in_one_line(
    claim: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        claims.read_claim(written(tmp_path, claim))
    assert str(caught.value).startswith(f"--claim {tmp_path / 'claim.json'}: ")
    assert "\n" not in str(caught.value)


def test_ledgers_of_seeds_are_read_and_their_hashes_compared(tmp_path: Path) -> None:
    for i, nll in enumerate(bookkeeping.seed_ledgers()):
        np.save(tmp_path / f"{i}.npy", nll)
    seeds = [{"seed": i, "nats": 2.48, "config": "a", "ledger": f"{i}.npy"} for i in range(3)]
    claim = claims.read_claim(written(tmp_path, {"seeds": seeds}))
    assert [run["ledger"].shape for run in claim["seeds"]] == [(4000,)] * 3
    assert len({run["ledger_sha256"] for run in claim["seeds"]}) == 3
    seeds[0]["ledger_sha256"] = "0" * 64
    with pytest.raises(ValueError, match="ledger_sha256"):
        claims.read_claim(written(tmp_path, {"seeds": seeds}))


def test_claimed_figures_are_held_against_the_audits_own(tmp_path: Path) -> None:
    path, stream = bookkeeping.normalised_stream(tmp_path, "identity", TEXTS)
    tokenizer = bpb.load_tokenizer(path)
    own = claims.OwnScore(2.5, tolerance=1e-4, source="the whole stream")

    def outcome(name: str, claim: dict[str, Any]) -> str:
        found = claims.check_claim("scorer", claim, stream, tokenizer, texts=TEXTS, own=own).verdicts
        (verdict,) = [verdict for verdict in found if verdict.check.name == name]
        return verdict.outcome

    # Scores and counts.
    for claimed, expected in (
        (2.5, "pass"),
        (2.49995, "pass"),
        (2.4998, "fail"),
        ("2.5", "fail"),
        (True, "fail"),
    ):
        assert outcome("claimed bits per byte", {"bpb": claimed}) == expected
    for field, right in (("targets", len(stream.tokens) - 1), ("documents", len(TEXTS))):
        assert outcome(f"claimed {field}", {field: right}) == "pass"
        assert outcome(f"claimed {field}", {field: right + 1}) == "fail"

    # Clocks, totals and text.
    assert outcome("training clock", {"training_seconds": 600.0}) == "pass"
    assert outcome("evaluation clock", {"evaluation_seconds": 600.1}) == "fail"
    assert outcome("official totals", {"official": True}) == "fail"
    assert outcome("original text", {}) == "pass"

    # Without the text it is said that nothing was compared with it; nothing is official unless it says so.
    found = claims.check_claim("scorer", {}, stream, tokenizer).verdicts
    assert ("original text", "cannot tell") in {(verdict.check.name, verdict.outcome) for verdict in found}
    assert "official totals" not in {verdict.check.name for verdict in found}


def test_an_incomplete_ledger_is_no_ledger(tmp_path: Path) -> None:
    nll = np.full(10, 2.5, dtype=np.float32)
    assert claims.complete_ledger({"ledger": nll}, 10) is nll
    assert claims.complete_ledger({"ledger": nll}, 11) is None
    assert claims.complete_ledger({"ledger": -nll}, 10) is None
    assert claims.complete_ledger({}, 10) is None


def test_all_code_is_counted_also_if_names_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "lonely_scorer.py").write_text("x = 1")
    (tmp_path / "other.bin").write_bytes(bytes(1000))
    alone = source.code_bytes("lonely_scorer:make", [])
    assert alone == {"/scorer/lonely_scorer.py": 5 + len("lonely_scorer.py")}

    # Files that are named with --code, and a package: everything in its highest folder.
    more = source.code_bytes("lonely_scorer:make", [tmp_path / "other.bin"])
    assert more == alone | {"/scorer/other.bin": 1000 + len("other.bin")}
    (tmp_path / "lonely_package" / "inner").mkdir(parents=True)
    (tmp_path / "lonely_package" / "__init__.py").write_text("")
    (tmp_path / "lonely_package" / "inner" / "data.bin").write_bytes(bytes(1000))
    found = source.code_bytes("lonely_package.inner.scorer:make", [])
    assert found["/scorer/lonely_package/inner/data.bin"] == 1000 + len("inner/data.bin")


def test_texts_are_read_from_json_lines_and_plain_text(tmp_path: Path) -> None:
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert list(claims.read_texts(tmp_path / "docs.jsonl")) == TEXTS
    (tmp_path / "one.txt").write_text(TEXTS[0])
    assert list(claims.read_texts(tmp_path / "one.txt")) == TEXTS[:1]
    with pytest.raises(ValueError, match="text"):
        list(claims.read_texts(tmp_path / "docs.jsonl", key="body"))
