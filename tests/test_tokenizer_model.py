"""Tokenizers (B11): rules that lengthen a text, files with more than a tokenizer, and the original text."""

from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from stages.audit.checks import budgets, coverage, tokenizer_model
from stages.audit.verdict import Verdict
from stages.common import bpb, challenge
from tests.zoo import bookkeeping
from tests.zoo.bookkeeping import TEXTS
from tools.audit_scorer import claims


def outcomes(verdicts: list[Verdict]) -> dict[str, str]:
    return {verdict.check.name: verdict.outcome for verdict in verdicts}


def test_the_rules_of_a_tokenizer_are_those_it_was_given(tmp_path: Path) -> None:
    path, _ = bookkeeping.normalised_stream(tmp_path, "65\t65 65\n61 62\t63\nBD\t31 2044 32\n", TEXTS)
    rules = tokenizer_model.normaliser_rules(path.read_bytes())
    assert rules.count == 3
    assert sorted(rules.lengthening) == [(b"e", b"ee"), ("\u00bd".encode(), "1\u20442".encode())]
    assert [tokenizer_model.is_unicode_rule(rule) for rule in sorted(rules.lengthening)] == [False, True]
    processor = bpb.load_tokenizer(path)
    assert processor.decode(processor.encode("eab")) == "eec"


@pytest.mark.parametrize("rules", ["identity", "nfkc", "nmt_nfkc", "nmt_nfkc_cf"])
def test_sentencepieces_own_rules_are_unicodes(rules: str, tmp_path: Path) -> None:
    path, stream = bookkeeping.normalised_stream(tmp_path, rules, TEXTS)
    found = tokenizer_model.normaliser_rules(path.read_bytes())
    assert (found.count > 100_000) == (rules != "identity")
    assert all(map(tokenizer_model.is_unicode_rule, found.lengthening))
    assert coverage.check_normaliser(stream.tokens, bpb.load_tokenizer(path)).outcome == "pass"
    assert tokenizer_model.tokenizer_excess_bytes(path) == 0


def test_lawful_tokenizers_pass_with_their_text(tmp_path: Path) -> None:
    for rules in ("identity", "nmt_nfkc"):
        assert set(outcomes(bookkeeping.lawful_tokenizer(tmp_path, b"", rules)).values()) <= {
            "pass",
            "cannot tell",
        }
    found = outcomes(bookkeeping.lawful_tokenizer(tmp_path, b"", "nmt_nfkc"))
    for check in (coverage.TEXT, coverage.NORMALISER, coverage.DENOMINATOR, budgets.TOKENIZER_FILE):
        assert found[check.name] == "pass"


def test_an_inflating_rule_is_found_by_encoding_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, stream = bookkeeping.normalised_stream(tmp_path, "65\t65 65\n", TEXTS)
    processor = bpb.load_tokenizer(path)
    assert "'e'" in coverage.check_normaliser(stream.tokens, processor).evidence

    def unreadable(data: bytes) -> tokenizer_model.NormaliserRules:
        raise ValueError("too many")

    monkeypatch.setattr(tokenizer_model, "normaliser_rules", unreadable)
    assert coverage.check_normaliser(stream.tokens, processor).outcome == "fail"
    path, stream = bookkeeping.normalised_stream(tmp_path, "identity", TEXTS)
    assert coverage.check_normaliser(stream.tokens, bpb.load_tokenizer(path)).outcome == "cannot tell"


def test_bytes_that_no_tokenizer_needs_are_counted(tmp_path: Path) -> None:
    path, _ = bookkeeping.normalised_stream(tmp_path, "nmt_nfkc", TEXTS)
    model = path.read_bytes()
    own = [field for field in tokenizer_model.fields(model) if field.number == tokenizer_model.NORMALISER]
    rules = next(
        field.data for field in tokenizer_model.fields(own[0].data) if field.number == tokenizer_model.RULES
    )

    def excess(*added: bytes) -> int:
        path.write_bytes(model + b"".join(added))
        return tokenizer_model.tokenizer_excess_bytes(path)

    message = bookkeeping._message
    assert excess() == 0
    slack = tokenizer_model.OPTION_BYTES + 100
    assert excess(message(999, bytes(50_000))) >= 50_000 - slack
    assert excess(message(1, message(1, b"x" * 50_000))) >= 50_000 - slack
    assert excess(message(1, message(1, b"zq") + message(9, bytes(50_000)))) >= 50_000 - slack
    assert excess(*[message(1, message(1, b"zq"))] * 10_000) >= 40_000 - slack
    assert excess(message(2, message(1, bytes(50_000)))) >= 50_000 - slack
    assert excess(message(3, message(tokenizer_model.RULES, rules + bytes(50_000)))) >= 50_000 - slack
    twice = message(tokenizer_model.RULES, rules) * 2
    assert excess(message(3, twice)) >= 2 * len(rules) - slack
    assert excess(message(3, message(tokenizer_model.RULES, rules))) >= len(rules) - slack

    (tmp_path / "other.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        tokenizer_model.tokenizer_excess_bytes(tmp_path / "other.model")


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_table_of_rules_is_an_error_and_not_a_crash(seed: int, tmp_path: Path) -> None:
    path, _ = bookkeeping.normalised_stream(tmp_path, "65\t65 65\n61 62\t63\n", TEXTS)
    model = path.read_bytes()
    normaliser = next(field for field in tokenizer_model.fields(model) if field.number == 3)
    table = next(field.data for field in tokenizer_model.fields(normaliser.data) if field.number == 2)
    generator = np.random.Generator(np.random.PCG64(seed))
    for _ in range(200):
        damaged = np.frombuffer(table, dtype=np.uint8).copy()
        damaged[generator.integers(0, len(damaged), 3)] = generator.integers(0, 256, 3)
        try:
            rules = tokenizer_model.read_rules(damaged.tobytes())
        except ValueError:
            continue
        assert rules.needed_bytes <= len(table)


def test_each_document_is_held_against_its_text(tmp_path: Path) -> None:
    path, stream = bookkeeping.normalised_stream(tmp_path, "identity", TEXTS)
    tokenizer = bpb.load_tokenizer(path)

    def check(texts: list[str], tokens: np.ndarray = stream.tokens) -> Verdict:
        counted = bpb.target_bytes(tokens, bpb.byte_table(tokenizer))
        return coverage.check_text(tokens, counted, tokenizer, texts)

    assert check(TEXTS).outcome == "pass"
    assert check([*TEXTS, "more"]).outcome == "pass"
    assert "has 29 documents" in check(TEXTS[:-1]).evidence
    assert "another text" in check([*TEXTS[:7], TEXTS[8], TEXTS[7], *TEXTS[9:]]).evidence
    assert check([text.replace("square", "cube") for text in TEXTS]).outcome == "fail"
    assert check([text.upper() for text in TEXTS]).outcome == "cannot tell"
    # The end of the stream may be cut, but no document before it.
    assert check(TEXTS, stream.tokens[:-20]).outcome == "pass"
    cut = np.delete(stream.tokens, np.arange(20, 30))
    assert check(TEXTS, cut).outcome == "fail"


def test_counted_bytes_are_at_most_those_of_the_text(tmp_path: Path) -> None:
    path, stream = bookkeeping.normalised_stream(tmp_path, "identity", TEXTS)
    tokenizer = bpb.load_tokenizer(path)
    counted = stream.target_bytes.copy()
    counted[5] += 1
    assert (
        "bytes counted, its text has"
        in coverage.check_text(stream.tokens, counted, tokenizer, TEXTS).evidence
    )
    counted[5] -= 2
    assert coverage.check_text(stream.tokens, counted, tokenizer, TEXTS).outcome == "fail"

    # A half is three characters after normalisation: more in one document, but not in all.
    halves = ["\u00bd" * 20, "ab   \ufb01" * 40]
    path, stream = bookkeeping.normalised_stream(tmp_path, "nmt_nfkc", halves)
    tokenizer = bpb.load_tokenizer(path)
    assert coverage.check_text(stream.tokens, stream.target_bytes, tokenizer, halves).outcome == "pass"
    path, stream = bookkeeping.normalised_stream(tmp_path, "nmt_nfkc", halves[:1])
    verdict = coverage.check_text(stream.tokens, stream.target_bytes, tokenizer, halves[:1])
    assert (verdict.outcome, verdict.saw, verdict.expected) == ("fail", 100, 40)


def test_official_totals() -> None:
    tokens, size, text = (
        challenge.VALIDATION_TOKENS,
        challenge.VALIDATION_BYTES,
        challenge.VALIDATION_TEXT_BYTES,
    )
    cut = challenge.VALIDATION_TARGETS + 1
    assert coverage.check_official(tokens, 50_000, text).outcome == "pass"
    assert coverage.check_official(cut, 50_000, size).outcome == "pass"
    assert coverage.check_official(cut, 50_000, size + 1).outcome == "fail"
    assert coverage.check_official(cut, 49_999, size).outcome == "fail"
    assert coverage.check_official(tokens, 50_000, text + 1).outcome == "fail"
    caseops = challenge.CASEOPS_VALIDATION_TARGETS + 1
    assert coverage.check_official(caseops, 50_000, challenge.CASEOPS_VALIDATION_BYTES).outcome == "pass"
    assert coverage.check_official(caseops, 50_000, 164_594_398).outcome == "fail"
    assert coverage.check_official(60_000_000, 50_000, text).outcome == "pass"
    assert coverage.check_official(60_000_000, 50_000, text - 100_000).outcome == "fail"


@pytest.mark.parametrize("name", ["fineweb_8192_bpe", "fineweb_8192_caseops_bpe"])
def test_the_records_tokenizers_and_text_pass(name: str, shared_data: Path) -> None:
    path = shared_data / "tokenizers" / f"{name}.model"
    texts = list(claims.read_texts(shared_data / "val" / "fineweb_val_first901.jsonl"))
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokens = np.concatenate([[tokenizer.bos_id(), *tokenizer.encode(text)] for text in texts]).astype(
        np.uint16
    )
    counted = bpb.target_bytes(tokens, bpb.byte_table(tokenizer))
    assert counted.sum() == 2_504_310
    assert tokenizer_model.tokenizer_excess_bytes(path) == 0
    assert coverage.check_normaliser(tokens, tokenizer).outcome == "pass"
    verdict = coverage.check_text(tokens, counted, tokenizer, texts)
    assert (verdict.outcome, verdict.saw) == ("pass", 2_504_310)
