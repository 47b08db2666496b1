"""Cheats that no scorer shows: in bytes, clocks, files, data and seeds. Each is a case that returns the verdicts on it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import sentencepiece

from stages.audit.audit_scorer import Stream
from stages.audit.checks import budgets, contamination, coverage, significance
from stages.audit.sandbox.clean_room import Claim, check_clean_room, visit
from stages.audit.verdict import Verdict
from stages.common import bpb, shards
from stages.tokenize import tokenizer
from tests import test_clean_room
from tools.audit_scorer import claims

TEXTS = [
    f"Document {i} says that {i * i} is the square of {i}; caf\u00e9 {chr(0x2603 + i)}.\n" * 2
    for i in range(30)
]
SizeOf = Callable[[np.ndarray, bpb.ByteTable], np.ndarray]


def made(folder: Path) -> tuple[sentencepiece.SentencePieceProcessor, np.ndarray]:
    """A tokenizer with byte fallback, and the documents as it encodes them."""
    (folder / "tokenizer.model").write_bytes(
        tokenizer.train([text.replace("\u2603", "") for text in TEXTS[:5]], 300, 1)
    )
    processor = bpb.load_tokenizer(folder / "tokenizer.model")
    tokens = np.concatenate([[processor.bos_id(), *processor.encode(text)] for text in TEXTS])
    return processor, tokens.astype(np.uint16)


def sizes(size_of: SizeOf, folder: Path) -> list[Verdict]:
    """What the audit says of a byte table."""
    processor, tokens = made(folder)
    decoded = coverage.count_documents(tokens, processor)
    return [
        coverage.check_denominator(
            tokens, processor.bos_id(), size_of(tokens, bpb.byte_table(processor)), decoded
        ),
        coverage.check_table(
            processor, coverage.FUZZ, lambda tokens, processor: size_of(tokens, bpb.byte_table(processor))
        ),
    ]


def lawful_bytes(folder: Path, key: bytes) -> list[Verdict]:
    return sizes(bpb.target_bytes, folder)


def doubled_space(folder: Path, key: bytes) -> list[Verdict]:
    """The leading space is in the table, and added once more (#1698, #1727, #1734)."""
    return sizes(
        lambda tokens, table: bpb.target_bytes(tokens, table) + table.leading_space[tokens[1:]], folder
    )


def three_byte_fallback(folder: Path, key: bytes) -> list[Verdict]:
    """A byte-fallback piece counts as the bytes of a replacement character (Scylla: #1143, #1184, #1289)."""
    fallback = np.array([i for i in range(300) if made(folder)[0].is_byte(i)])
    return sizes(
        lambda tokens, table: bpb.target_bytes(tokens, table) + 2 * np.isin(tokens[1:], fallback), folder
    )


def wrong_denominator(folder: Path, key: bytes) -> list[Verdict]:
    """Bits are divided by the bytes of the transformed text, here with a mark before each capital (CaseOps: #2071, #2138)."""
    processor, tokens = made(folder)
    table = bpb.byte_table(processor)
    size, decoded = bpb.target_bytes(tokens, table), coverage.count_documents(tokens, processor)
    nll = np.full(len(size), 1.5, dtype=np.float32)
    transformed = int(size.sum()) + sum(character.isupper() for text in TEXTS for character in text)
    claim = {"ledger": nll, "bpb": float(nll.sum()) / np.log(2) / transformed, "bytes": transformed}
    return claims.check("scorer", claim, Stream(tokens, table.bos, size, decoded), processor)[0]


def over_the_cap(folder: Path, key: bytes) -> list[Verdict]:
    """The code is counted packed and shipped raw (#1835, #1858, #1959)."""
    return [budgets.check_sizes({"model.bin": 15_976_144, "train_gpt.py": 59_295}, 16_000_000)]


def overlap(folder: Path, key: bytes, spelt: bool = False) -> list[Verdict]:
    """Documents of val lie in train (--val-docs: #2018, #2118, #2130), tokenized alike or spelt byte by byte."""
    processor, tokens = made(folder)
    bos = processor.bos_id()
    val = list(shards.documents(tokens, bos))
    copied = val[5:10]
    if spelt:
        byte_of = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        copied = [
            np.array([bos, *(byte_of[byte] for byte in text.encode())], dtype=np.uint16)
            for text in TEXTS[5:10]
        ]
    unlike = [
        np.array([bos, *processor.encode(f"Nothing of this stands elsewhere, number {i}.")], dtype=np.uint16)
        for i in range(20)
    ]
    train = np.concatenate([*unlike, *copied])
    for side, held in (("train", train), ("val", tokens)):
        (folder / side).mkdir(exist_ok=True)
        shards.write(folder / side / f"{side}_000000.bin", held)
    hashes = budgets.document_hashes(tokens, bos)
    listed = np.concatenate([np.sort(budgets.document_hashes(train, bos)), np.sort(hashes)])
    return [
        budgets.check_disjoint(hashes, listed, 25, len(val)),
        contamination.check_passages(contamination.find(folder / "train", folder / "val", processor)),
    ]


def chosen_seeds(folder: Path, key: bytes) -> list[Verdict]:
    """The best three of five seeds, one of them with other parameters, and a gain within the noise (#1769, #2118, #2124)."""
    runs = [
        {"seed": seed, "nats": nats, "config": "a"} for seed, nats in ((1, 2.4990), (2, 2.4972), (3, 2.4994))
    ]
    runs[2]["config"] = "b"
    return [
        significance.check_seeds(runs, [2.5]),
        significance.check_seeds([run | {"config": "a"} for run in runs], [2.5]),
    ]


def in_the_room(line: str) -> Callable[[Path, bytes], list[Verdict]]:
    """An artifact of a few lines with one line more, in the clean room; OUTSIDE is a folder that it has no business in."""

    def run(folder: Path, key: bytes) -> list[Verdict]:
        (folder / "outside").mkdir()
        for name in ("features.npz", "val_0.bin", "helper.py"):
            (folder / "outside" / name).write_bytes(b"x = 1\n")
        artifact = test_clean_room.made(folder, line.replace("OUTSIDE", str(folder / "outside")))
        return check_clean_room(
            visit(artifact, means=test_clean_room.MEANS),
            Claim("toy_bpb", 1.25, budget_seconds=60.0),
            late_seconds=1.2,
        )

    return run
