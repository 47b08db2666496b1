"""Shards and documents.u64: the challenge's format in both directions; no val document is in train."""

import struct
from array import array
from pathlib import Path

import numpy as np
import pytest

from stages.common import shards
from stages.tokenize import duplicates, split
from stages.tokenize.encode import Encoded
from stages.tokenize.split import TextDocument
from stages.tokenize.writer import SideWriter

BOS = 1


def random_documents(count: int, seed: int = 0, longest: int = 50) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [
        np.concatenate([[BOS], random.integers(2, 60_000, size=random.integers(1, longest))]).astype(
            np.uint16
        )
        for _ in range(count)
    ]


def encoded(tokens: np.ndarray) -> Encoded:
    return Encoded(TextDocument("ab", "it"), "ab", tokens, 2)


def write_side(folder: Path, documents: list[np.ndarray], shard_tokens: int = 1 << 20) -> SideWriter:
    with SideWriter(folder, shard_tokens) as writer:
        for document in documents:
            writer.add(encoded(document))
    return writer


def test_a_shard_is_what_the_challenge_s_scripts_read(tmp_path: Path) -> None:
    tokens = np.array([1, 5, 65_535], dtype=np.uint16)
    shards.write(tmp_path / "a.bin", tokens)
    content = (tmp_path / "a.bin").read_bytes()
    assert struct.unpack("<256i", content[:1024]) == (20240520, 1, 3) + (0,) * 253
    assert struct.unpack("<3H", content[1024:]) == (1, 5, 65_535)
    assert shards.view(tmp_path / "a.bin").tolist() == tokens.tolist()


def test_the_streaming_writer_writes_the_same_shards(tmp_path: Path) -> None:
    documents = random_documents(40)
    writer = write_side(tmp_path / "train", documents)
    shards.write(tmp_path / "expected.bin", np.concatenate(documents))
    assert (tmp_path / "train" / "train_000000.bin").read_bytes() == (tmp_path / "expected.bin").read_bytes()
    assert writer.totals.tokens == sum(map(len, documents))


def test_a_full_shard_is_followed_by_another_that_begins_with_bos(tmp_path: Path) -> None:
    documents = random_documents(100)
    writer = write_side(tmp_path / "val", documents, shard_tokens=200)
    paths = shards.find(tmp_path / "val")
    assert len(paths) == len(writer.shards) > 5
    for path in paths:
        assert shards.view(path)[0] == BOS
        assert len(shards.view(path)) <= 200
        assert writer.shards[f"val/{path.name}"].tokens == len(shards.view(path))
    assert shards.stream(tmp_path / "val").tolist() == np.concatenate(documents).tolist()


@pytest.mark.parametrize("block", [1, 3, 64, 1 << 22])
def test_documents_are_found_across_blocks_and_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    documents = random_documents(30)
    stream = np.concatenate(documents)
    for i, part in enumerate(np.array_split(stream, 7)):
        shards.write(tmp_path / f"{i}.bin", part)
    monkeypatch.setattr(duplicates, "BLOCK_TOKENS", block)
    found = list(duplicates.documents(shards.find(tmp_path), BOS))
    assert [one.tokens.tolist() for one in found] == [document.tolist() for document in documents]
    assert all(shards.view(one.path)[one.position] == BOS for one in found)


def test_documents_u64_round_trip(tmp_path: Path) -> None:
    sides = [
        array("Q", [duplicates.document_hash(document) for document in random_documents(n, n)])
        for n in (20, 7)
    ]
    train, val = (duplicates.sorted_hashes(side) for side in sides)
    duplicates.write_hashes(tmp_path / "documents.u64", train, val)
    assert (tmp_path / "documents.u64").stat().st_size == 8 * 27
    read = duplicates.read_hashes(tmp_path / "documents.u64", 20, 7)
    assert [part.tolist() for part in read] == [sorted(side) for side in sides]
    with pytest.raises(ValueError, match="expected 208 for 20 train and 6 val"):
        duplicates.read_hashes(tmp_path / "documents.u64", 20, 6)
    duplicates.write_hashes(tmp_path / "documents.u64", train[::-1], val)
    with pytest.raises(ValueError, match="hashes of train are not sorted"):
        duplicates.read_hashes(tmp_path / "documents.u64", 20, 7)


def test_d8_a_val_document_in_train_is_found(tmp_path: Path) -> None:
    train, val = random_documents(50, 1), random_documents(20, 2)
    train.insert(31, val[13])
    sides = [write_side(tmp_path / name, documents) for name, documents in (("train", train), ("val", val))]
    hits = duplicates.common_hashes(*(duplicates.sorted_hashes(side.hashes) for side in sides))
    assert hits.tolist() == [duplicates.document_hash(val[13])]
    shared = duplicates.first_duplicate(tmp_path / "train", tmp_path / "val", BOS, hits)
    assert shared is not None
    assert shared.train.position == sum(map(len, train[:31]))
    assert shared.val.position == sum(map(len, val[:13]))


def test_d8_equal_hashes_of_different_documents_accuse_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split, "HASH_BYTES", 1)  # 8-bit hashes collide
    sides = [
        write_side(tmp_path / name, random_documents(40, seed)) for seed, name in enumerate(("train", "val"))
    ]
    hits = duplicates.common_hashes(*(duplicates.sorted_hashes(side.hashes) for side in sides))
    assert len(hits) > 0
    assert duplicates.first_duplicate(tmp_path / "train", tmp_path / "val", BOS, hits) is None


def test_common_equals_the_intersection_of_sets() -> None:
    random = np.random.default_rng(0)
    for train_size, val_size in [(0, 5), (5, 0), (50, 50), (200, 3)]:
        train, val = (
            np.sort(random.integers(0, 99, size=size).astype(np.uint64)) for size in (train_size, val_size)
        )
        assert duplicates.common_hashes(train, val).tolist() == sorted(
            set(train.tolist()) & set(val.tolist())
        )
