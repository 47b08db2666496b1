"""Train and val disjoint (B15): planted overlaps are found, nothing else, and shares equal a slow count."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from stages.audit.checks import contamination
from stages.audit.checks.contamination import SHINGLE_BYTES, check_passages, measure_overlap
from stages.common import bpb, shards
from stages.tokenize import tokenizer

GENERATOR = np.random.Generator(np.random.PCG64(11))
TRAIN = [GENERATOR.bytes(int(length)) for length in GENERATOR.integers(300, 900, 60)]
VAL = [GENERATOR.bytes(int(length)) for length in GENERATOR.integers(400, 900, 20)]
PASSAGE = TRAIN[7][200:260]  # 60 bytes


def given(documents: list[bytes]) -> Iterator[tuple[int, np.ndarray]]:
    yield from ((len(of) + 1, np.frombuffer(of, dtype=np.uint8)) for of in documents)


def found(train: list[bytes], val: list[bytes], rate: int = 1) -> contamination.Overlap:
    return measure_overlap(given(train), given(val), rate)


def slowly(train: list[bytes], val: list[bytes]) -> list[int]:
    held = {of[i : i + SHINGLE_BYTES] for of in train for i in range(len(of) - SHINGLE_BYTES + 1)}
    return [sum(of[i : i + SHINGLE_BYTES] in held for i in range(len(of) - SHINGLE_BYTES + 1)) for of in val]


def test_nothing_planted_nothing_found() -> None:
    clean = found(TRAIN, VAL)
    assert clean.shared.sum() == 0
    assert clean.kept.tolist() == [max(0, len(of) - SHINGLE_BYTES + 1) for of in VAL]
    verdict = check_passages(clean, share=0.0)
    assert (verdict.outcome, verdict.saw, verdict.positions) == ("pass", 0.0, ())


def test_a_planted_document_is_found_where_it_begins() -> None:
    val = [*VAL[:5], TRAIN[40], *VAL[5:]]
    planted = found(TRAIN, val)
    verdict = check_passages(planted)
    assert verdict.outcome == "fail"
    assert verdict.positions == (sum(len(of) + 1 for of in VAL[:5]),)
    assert planted.whole.nonzero()[0].tolist() == [5]
    assert verdict.evidence.startswith("1 of 21 val documents are, as text, one of 60 train documents")


def test_a_passage_of_60_bytes_in_the_middle_is_found_and_is_no_guilt_by_itself() -> None:
    val = [*VAL[:3], VAL[3][:300] + PASSAGE + VAL[3][300:], *VAL[4:]]
    planted = found(TRAIN, val)
    assert planted.shared.nonzero()[0].tolist() == [3]
    assert planted.shared[3] == 60 - SHINGLE_BYTES + 1
    verdict = check_passages(planted)
    assert verdict.outcome == "pass"
    assert "1 share a passage" in verdict.evidence
    assert check_passages(planted, share=0.0).outcome == "fail"
    short = found(TRAIN, [VAL[3][:300] + PASSAGE[: SHINGLE_BYTES - 1] + VAL[3][300:]])
    assert short.shared.sum() == 0


def test_a_document_mostly_of_trains_passages_fails_and_one_with_boilerplate_does_not() -> None:
    licence = GENERATOR.bytes(300)
    train = [*TRAIN, licence + b"one", licence + b"two"]
    patched = TRAIN[3][:150] + b"another word" + TRAIN[3][150:]
    mixed = found(train, [licence + VAL[0][:200], patched])
    assert mixed.shared.tolist() == slowly(train, [licence + VAL[0][:200], patched])
    verdict = check_passages(mixed)
    assert verdict.outcome == "fail"
    assert verdict.positions == (len(licence) + 200 + 1,)
    assert f"{mixed.shares[1]:.1%}" in verdict.evidence
    assert not mixed.whole.any()


@pytest.mark.parametrize("alphabet", [1, 2, 200])
def test_shares_are_those_of_a_slow_count(alphabet: int) -> None:
    def text(length: int) -> bytes:
        return GENERATOR.integers(0, alphabet, length, dtype=np.uint8).tobytes()

    train = [text(int(length)) for length in GENERATOR.integers(0, 400, 20)]
    val = [text(30) + of[40:200] + text(60) for of in train[:8]] + [b"", text(49), text(50), train[9]]
    assert found(train, val).shared.tolist() == slowly(train, val)


def test_sampled_shingles_keep_the_stated_share_and_find_long_passages() -> None:
    train, val = [GENERATOR.bytes(60_000)], [GENERATOR.bytes(40_000)]
    val[0] += train[0][5000:9000]
    sampled = found(train, val, rate=16)
    assert abs(sampled.kept[0] - (44_000 - 49) / 16) < 4 * np.sqrt(44_000 / 16)
    assert abs(sampled.shares[0] - 3951 / 43_951) < 0.03
    assert "one in 16 looked at" in check_passages(sampled).evidence
    missing = [
        not found([of], [VAL[0] + of[100:180] + VAL[1]], rate=16).shared.sum()
        for of in (GENERATOR.bytes(300) for _ in range(300))
    ]
    assert abs(np.mean(missing) - contamination.miss_probability(16, 80)) < 0.1
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
        planted, whole=np.zeros_like(planted.whole), shared=np.zeros_like(planted.shared)
    )
    assert check_passages(clean).outcome == "pass"
