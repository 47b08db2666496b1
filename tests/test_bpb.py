"""The byte counter: parity with an independent slow version, known answers, and the defects D1 to D9."""

import json
import lzma
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from stages.common import bpb, shards
from stages.common.progress import Logger, Progress
from stages.tokenize import encode, import_shards, tokenizer
from stages.tokenize.encode import Encoded
from stages.tokenize.split import TextDocument
from stages.tokenize.tokenizer import Tokenizer
from tests import factories

RECORD = "fineweb_8192_bpe.model"
DOCUMENTS, TOKENS, BYTES = (
    901,
    679_261,
    2_504_310,
)  # of the first FineWeb validation documents, from the challenge's logs
BASE_BYTES = 38_918  # sum over the record tokenizer's base byte table
TRAIN_TOKENS = 35_295_546  # of the 16 training parts


def jsonl_texts(lines: Iterator[str]) -> Iterator[TextDocument]:
    for number, line in enumerate(lines):
        yield TextDocument(json.loads(line)["text"], f"line {number}")


@pytest.fixture(scope="module")
def record(shared_data: Path) -> Tokenizer:
    return tokenizer.load(shared_data / "tokenizers" / RECORD, 8192)


@pytest.fixture(scope="module")
def fineweb(shared_data: Path, record: Tokenizer) -> list[Encoded]:
    with (shared_data / "val" / "fineweb_val_first901.jsonl").open(encoding="utf-8") as file:
        return list(encode.encode(jsonl_texts(file), record, 2))


@pytest.fixture(scope="module")
def stream(fineweb: list[Encoded]) -> np.ndarray:
    return np.concatenate([one.tokens for one in fineweb])


def slow_bytes(tokens: np.ndarray, processor: sentencepiece.SentencePieceProcessor) -> Iterator[int]:
    """The challenge's rule of counted bytes, one token at a time, from the text of the rule."""

    def no_text(token: int) -> bool:
        return processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token)

    for before, token in zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True):
        piece = processor.id_to_piece(token)
        if no_text(token):
            yield 0
        elif processor.is_byte(token):
            yield 1
        elif piece[0] == "\u2581":
            yield len(piece[1:].encode()) + (0 if no_text(before) else 1)
        else:
            yield len(piece.encode())


# Known answers


def test_known_tokens_and_bytes_of_the_validation_documents(
    fineweb: list[Encoded], stream: np.ndarray, record: Tokenizer
) -> None:
    assert (len(fineweb), len(stream)) == (DOCUMENTS, TOKENS)
    assert int(bpb.target_bytes(stream, record.table).sum()) == BYTES
    assert sum(one.counted_bytes for one in fineweb) == BYTES
    assert sum(len(one.source.text.encode()) for one in fineweb) == BYTES


def test_known_sum_of_the_base_byte_table(record: Tokenizer) -> None:
    assert int(record.table.base_bytes.sum()) == BASE_BYTES


@pytest.mark.parametrize("name", ["fineweb_1024_bpe.model", "fineweb_8192_caseops_bpe.model"])
def test_the_other_models_of_the_challenge_load(shared_data: Path, name: str) -> None:
    loaded = tokenizer.load(shared_data / "tokenizers" / name, int(name.split("_")[1]))
    assert loaded.table.bos == 1
    assert int((loaded.table.base_bytes == 0).sum()) == 5  # pad, bos, eos, unk and the lone space


@pytest.mark.slow
def test_known_tokens_of_the_training_parts(shared_data: Path, record: Tokenizer) -> None:
    total = 0
    for path in sorted((shared_data / "train").glob("*.jsonl.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as file:
            total += sum(len(one.tokens) for one in encode.encode(jsonl_texts(file), record, 2))
    assert total == TRAIN_TOKENS


# Parity, and the defects of docs/defects.md


def test_the_table_equals_the_slow_rule(stream: np.ndarray, record: Tokenizer) -> None:
    random = np.random.default_rng(0)
    noise = random.integers(0, 8192, size=20_000).astype(np.uint16)  # every id, in every neighbourhood
    for tokens in (stream[:50_000], noise):
        assert bpb.target_bytes(tokens, record.table).tolist() == list(slow_bytes(tokens, record.processor))


def test_codes_are_of_what_ids_say_and_of_nothing_else() -> None:
    of = factories.table()
    said = list(zip(of.texts, of.leading_space.tolist(), of.boundary.tolist(), strict=True))
    assert len(set(of.text_hashes.tolist())) == len(set(said)) < of.vocab_size
    assert len(set(zip(of.text_hashes.tolist(), said, strict=True))) == len(set(said))


def test_d1_leading_space_is_counted_once(fineweb: list[Encoded], record: Tokenizer) -> None:
    for one in fineweb:
        decoded = record.processor.decode(one.tokens[1:].tolist())
        assert int(bpb.target_bytes(one.tokens, record.table).sum()) == len(
            decoded.encode()
        ) - decoded.startswith(" ")


def test_d2_the_marker_is_not_corrupted(record: Tokenizer) -> None:
    assert bpb.SPACE_MARKER == "\u2581"
    the = record.processor.piece_to_id("\u2581the")
    assert (record.table.base_bytes[the], record.table.leading_space[the]) == (3, True)
    space = record.processor.piece_to_id("\u2581")
    assert (record.table.base_bytes[space], record.table.leading_space[space]) == (0, True)


def test_d3_a_byte_fallback_token_is_one_byte(record: Tokenizer) -> None:
    byte_ids = [i for i in range(8192) if record.processor.is_byte(i)]
    assert [record.table.base_bytes[i] for i in byte_ids] == [1] * 256
    (one,) = encode.encode([TextDocument("\U0001f9ff\u0bb9", "it")], record, 1)
    assert record.processor.is_byte(int(one.tokens[2]))
    assert one.counted_bytes == 7


def test_d4_caseops_shards_are_refused(shared_data: Path, tmp_path: Path) -> None:
    caseops = tokenizer.load(shared_data / "tokenizers" / "fineweb_8192_caseops_bpe.model", 8192)
    assert sorted(tokenizer.miscounted_ids(caseops)) == [4, 5, 6, 7]
    shards.write(tmp_path / "a.bin", np.array([1, 900, 4, 901], dtype=np.uint16))
    with pytest.raises(ValueError, match=r"token id 4 .* at position 2 is a private-use mark \(CaseOps\)"):
        import_shards.import_side([tmp_path / "a.bin"], tmp_path / "val", "val", caseops, 1, _progress())


def test_d5_the_document_is_what_can_be_decoded(fineweb: list[Encoded], record: Tokenizer) -> None:
    for one in fineweb:
        assert one.text == record.processor.decode(one.tokens[1:].tolist())
    (lossy,) = encode.encode([TextDocument("  two  spaces\n\u2460", "it")], record, 1)
    assert (lossy.text, lossy.counted_bytes) == ("two spaces 1", 12)


def test_d6_every_document_begins_with_bos(fineweb: list[Encoded], stream: np.ndarray) -> None:
    assert int((stream == 1).sum()) == DOCUMENTS
    assert all(one.tokens[0] == 1 for one in fineweb)
    assert len(shards.document_starts(stream, 1)) == DOCUMENTS
    with pytest.raises(ValueError, match="does not begin with BOS"):
        shards.document_starts(stream[1:], 1)


def test_d7_all_documents_are_counted(fineweb: list[Encoded], stream: np.ndarray, record: Tokenizer) -> None:
    counted = bpb.target_bytes(stream, record.table)
    assert len(counted) == TOKENS - 1  # D9: nothing dropped at the tail
    assert int((counted == 0).sum()) == DOCUMENTS - 1 + sum(
        int(record.table.base_bytes[one.tokens[1]] == 0) for one in fineweb
    )  # zero bytes: BOS, and a document's first token where it is the lone space


def test_a_miscounted_piece_is_named(record: Tokenizer) -> None:
    wrong = list(record.table.texts)
    the = record.processor.piece_to_id("\u2581the")
    wrong[the] += b"!"
    spoiled = Tokenizer(
        b"",
        record.processor,
        bpb.ByteTable(tuple(wrong), record.table.leading_space, record.table.boundary, 1),
    )
    first = rf"first at piece '\u2581the' \(id {the}: 5 for 4\)"
    with pytest.raises(ValueError, match=rf"book 7: \d+ bytes counted for \d+ bytes of text, {first}"):
        list(encode.encode([TextDocument("in the end", "book 7")], spoiled, 1))


def test_bits_per_byte_of_a_uniform_guess() -> None:
    nll = np.full(1000, math.log(8192), dtype=np.float32)
    counted = np.full(1000, 4)
    assert bpb.bits_per_byte(nll, counted) == pytest.approx(13 / 4, rel=1e-7)
    with pytest.raises(ValueError, match="another stream"):
        bpb.bits_per_byte(nll[1:], counted)
    with pytest.raises(ValueError, match="no bytes"):
        bpb.bits_per_byte(nll, 0 * counted)


def _progress() -> Progress:
    return Logger(is_main=False).progress("adopt", 1)
