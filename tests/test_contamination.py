"""Train and val disjoint (B15): planted overlaps are found, nothing else, and shares equal a slow count."""

import dataclasses
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from stages.audit.checks import contamination
from stages.audit.checks.contamination import SHINGLE_BYTES, check_passages, measure_overlap
from stages.common import bpb, shards
from stages.tokenize import tokenizer
from tests.zoo import bookkeeping

GENERATOR = np.random.Generator(np.random.PCG64(11))


def letters(length: int, alphabet: int = 26) -> str:
    return (GENERATOR.integers(0, alphabet, length, dtype=np.uint8) + ord("a")).tobytes().decode()


TRAIN = [letters(int(length)) for length in GENERATOR.integers(300, 900, 60)]
VAL = [letters(int(length)) for length in GENERATOR.integers(400, 900, 20)]


def given(documents: list[str]) -> Iterator[tuple[int, np.ndarray]]:
    for text in documents:
        encoded = np.frombuffer(text.encode(), dtype=np.uint8)
        yield len(encoded) + 1, encoded


def found(train: list[str], val: list[str], rate: int = 1) -> contamination.Overlap:
    return measure_overlap(given(train), given(val), rate)


def slowly(train: list[str], val: list[str]) -> list[int]:
    held = {of[i : i + SHINGLE_BYTES] for of in train for i in range(len(of) - SHINGLE_BYTES + 1)}
    return [sum(of[i : i + SHINGLE_BYTES] in held for i in range(len(of) - SHINGLE_BYTES + 1)) for of in val]


def slow_fold(text: str) -> bytes:
    folded = b""
    for character in text:
        parts = unicodedata.normalize("NFKD", character).casefold()
        kept = unicodedata.normalize("NFC", "".join(part for part in parts if part.isalnum()))
        folded += kept.encode()[: len(character.encode())]
    return folded


def fold(text: bytes) -> bytes:
    return contamination.FoldTable().fold(np.frombuffer(text, dtype=np.uint8)).tobytes()


def test_a_text_is_folded_to_letters_and_digits_without_case_and_accents() -> None:
    awkward = "> \u201cStra\u00dfe\u201d 1,\n\u00c9t\u00e9\u2014\u00bd \ufb01x "
    awkward += "\U0001d400\u0663 \ud55c\uae00 \u212b \ufdfa"
    assert fold(awkward.encode()) == slow_fold(awkward)
    assert fold("> \u201cStra\u00dfe\u201d \u00c9t\u00e9".encode()) == b"strasseete"
    assert fold(b"a\xffb\xc3 \xe2\x82c\xf5\xed\xa0\x80d\xe2") == b"abcd"
    assert fold(b"") == b""
    text = "".join(map(chr, GENERATOR.integers(0x20, 0x3000, 3000).tolist()))
    assert fold(text.encode()) == slow_fold(text)


def test_nothing_planted_nothing_found() -> None:
    clean = found(TRAIN, VAL)
    assert clean.shared.sum() == 0
    assert clean.kept.tolist() == [max(0, len(of) - SHINGLE_BYTES + 1) for of in VAL]
    verdict = check_passages(clean, document_share=0.0, corpus_share=0.0)
    assert (verdict.outcome, verdict.saw, verdict.positions) == ("pass", 0.0, ())


def test_a_planted_document_is_found_where_it_begins() -> None:
    val = [*VAL[:5], TRAIN[40].upper() + "!", *VAL[5:]]
    planted = found(TRAIN, val)
    verdict = check_passages(planted)
    assert verdict.outcome == "fail"
    assert verdict.positions == (sum(len(of) + 1 for of in VAL[:5]),)
    assert planted.whole.nonzero()[0].tolist() == [5]
    assert verdict.evidence.startswith("1 of 21 val documents are, as letters and digits, one of 60 train")


def test_a_short_document_is_nobodys_own() -> None:
    assert not found([*TRAIN, "See also."], [*VAL, "See also."]).whole.any()
    assert found([*TRAIN, "a" * SHINGLE_BYTES], [*VAL, "a" * SHINGLE_BYTES]).whole.sum() == 1


def test_a_passage_in_the_middle_is_found_and_is_no_guilt_by_itself() -> None:
    passage = TRAIN[7][200:260]
    val = [*VAL[:3], VAL[3][:300] + passage + VAL[3][300:], *VAL[4:]]
    planted = found(TRAIN, val)
    assert planted.shared.nonzero()[0].tolist() == [3]
    assert planted.shared[3] == 60 - SHINGLE_BYTES + 1
    verdict = check_passages(planted)
    assert verdict.outcome == "pass"
    assert "1 share a passage" in verdict.evidence
    assert check_passages(planted, document_share=0.0).outcome == "fail"
    short = found(TRAIN, [VAL[3][:300] + "1" + passage[: SHINGLE_BYTES - 1] + "1" + VAL[3][300:]])
    assert short.shared.sum() == 0


def test_a_document_mostly_of_trains_passages_fails_and_one_with_boilerplate_does_not() -> None:
    licence = letters(300)
    train = [*TRAIN, licence + "one", licence + "two"]
    patched = TRAIN[3][:150] + "anotherword" + TRAIN[3][150:]
    val = [*VAL, licence + VAL[0][:200], patched]
    mixed = found(train, val)
    assert mixed.shared.tolist() == slowly(train, val)
    verdict = check_passages(mixed)
    assert verdict.outcome == "fail"
    assert verdict.positions == (sum(len(of) + 1 for of in val[:-1]),)
    assert f"{mixed.shares[-1]:.1%}" in verdict.evidence
    assert not mixed.whole.any()
    assert check_passages(found(train, val[:-1])).outcome == "pass"


def test_pieces_of_many_documents_fail_together_though_none_does_alone() -> None:
    part = [of[:120] for of in VAL]
    spread = found([*TRAIN, *part], VAL)
    assert spread.shares.max() < contamination.MAX_DOCUMENT_SHARE
    verdict = check_passages(spread)
    assert (verdict.outcome, verdict.bound) == ("fail", contamination.MAX_CORPUS_SHARE)
    assert verdict.saw == spread.corpus_share == spread.distinct_shared / spread.distinct
    assert check_passages(found([*TRAIN, *part[:5]], VAL)).outcome == "pass"
    # A val of a few lines has no share that could be judged.
    assert found(TRAIN, [letters(200)]).corpus_share == 0.0


def test_lawful_overlap_passes_with_and_without_sampling(tmp_path: Path) -> None:
    (verdict,) = bookkeeping.lawful_overlap(tmp_path, b"")
    assert verdict.outcome == "pass"
    val = bookkeeping.prose(1, 40)
    assert bookkeeping.check_overlap(bookkeeping.prose(2, 90), val, rate=16).outcome == "pass"
    copies = [bookkeeping.one_word_in_eight(text) for text in val]
    assert bookkeeping.check_overlap([*bookkeeping.prose(2, 90), *copies], val, rate=16).outcome == "fail"


@pytest.mark.parametrize("alphabet", [1, 2, 26])
def test_shares_are_those_of_a_slow_count(alphabet: int) -> None:
    train = [letters(int(length), alphabet) for length in GENERATOR.integers(0, 400, 20)]
    val = [letters(30, alphabet) + of[40:200] + letters(60, alphabet) for of in train[:8]]
    val += ["", letters(SHINGLE_BYTES - 1, alphabet), letters(SHINGLE_BYTES, alphabet), train[9]]
    overlap = found(train, val)
    assert overlap.shared.tolist() == slowly(train, val)
    shingles = {of[i : i + SHINGLE_BYTES] for of in val for i in range(len(of) - SHINGLE_BYTES + 1)}
    assert overlap.distinct == len(shingles)
    assert overlap.distinct_shared == sum(any(shingle in of for of in train) for shingle in shingles)


def test_sampled_shingles_keep_the_stated_share_and_find_long_passages() -> None:
    train, val = [letters(60_000)], [letters(40_000)]
    val[0] += train[0][5000:9000]
    sampled = found(train, val, rate=16)
    assert abs(sampled.kept[0] - (44_000 - SHINGLE_BYTES + 1) / 16) < 4 * np.sqrt(44_000 / 16)
    assert abs(sampled.shares[0] - 3977 / 43_977) < 0.03
    assert "one in 16 looked at" in check_passages(sampled).evidence
    missing = [
        not found([of], [VAL[0] + of[100:154] + VAL[1]], rate=16).shared.sum()
        for of in (letters(300) for _ in range(300))
    ]
    assert abs(np.mean(missing) - contamination.miss_probability(16, 54)) < 0.1
    # What chance adds to a share of few sampled shingles does not convict.
    kept = np.array([25, 10_000])
    assert sampled.limits(0.65, kept)[0] > 1.0
    assert 0.65 < sampled.limits(0.65, kept)[1] < 0.67
    assert found(TRAIN, VAL).limits(0.65, kept).tolist() == [0.65, 0.65]
    with pytest.raises(ValueError, match="1 or more"):
        found(TRAIN, VAL, rate=0)


def test_shards_are_read_as_text(tmp_path: Path) -> None:
    texts = [
        f"Document {i} says that {i * i} is the square of {i}; na\u00efve \u2603 {i}.\n" * 2
        for i in range(30)
    ]
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.train(texts, 320, 1))
    processor = bpb.load_tokenizer(tmp_path / "tokenizer.model")
    # The copy in train is tokenized byte by byte: no hash of token ids finds it.
    letters = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in texts[22].encode()]
    sides = {
        "train": [*map(processor.encode, texts[:20]), letters],
        "val": list(map(processor.encode, texts[20:])),
    }

    for side, documents in sides.items():
        (tmp_path / side).mkdir()
        ids = [np.array([processor.bos_id(), *of], dtype=np.uint16) for of in documents]
        shards.write(tmp_path / side / "a_0.bin", np.concatenate(ids[:7]))
        shards.write(tmp_path / side / "a_1.bin", np.concatenate(ids[7:]))
    spelled = [
        text.tobytes().decode()
        for _, text in contamination.document_texts(shards.find(tmp_path / "val"), processor)
    ]
    assert spelled == texts[20:]

    planted = contamination.find_overlap(tmp_path / "train", tmp_path / "val", processor)
    assert planted.whole.nonzero()[0].tolist() == [2]
    assert planted.starts[2] == sum(len(processor.encode(text)) + 1 for text in texts[20:22])
    assert check_passages(planted).outcome == "fail"
    clean = dataclasses.replace(
        planted,
        whole=np.zeros_like(planted.whole),
        shared=np.zeros_like(planted.shared),
        distinct_shared=0,
    )
    assert check_passages(clean).outcome == "pass"
