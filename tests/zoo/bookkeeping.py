"""Cheats outside the scorer: in bytes, clocks, files, data and seeds.

Each function audits one cheat and returns the verdicts.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import sentencepiece

from stages.audit.audit_scorer import AuditedStream
from stages.audit.checks import budgets, contamination, coverage, significance
from stages.audit.sandbox.clean_room import ClaimedMetric, check_clean_room, run_in_clean_room
from stages.audit.verdict import Verdict
from stages.common import bpb, shards
from stages.tokenize import tokenizer
from tests import toy_program
from tools.audit_scorer import claims

TEXTS = [
    f"Document {i} says that {i * i} is the square of {i}; caf\u00e9 {chr(0x2603 + i)}.\n" * 2
    for i in range(30)
]
VOCAB = 300
# Counts the bytes of each target of a stream (N,): (tokens, table) -> (N-1,) int64.
ByteCounter = Callable[[np.ndarray, bpb.ByteTable], np.ndarray]


def tokenize_texts(folder: Path) -> tuple[sentencepiece.SentencePieceProcessor, np.ndarray]:
    """Train a tokenizer with byte fallback, and encode TEXTS as a stream, (N,) uint16."""
    known_texts = [text.replace("\u2603", "") for text in TEXTS[:5]]
    (folder / "tokenizer.model").write_bytes(tokenizer.train(known_texts, VOCAB, 1))
    processor = bpb.load_tokenizer(folder / "tokenizer.model")
    tokens = np.concatenate([[processor.bos_id(), *processor.encode(text)] for text in TEXTS])
    return processor, tokens.astype(np.uint16)


def check_bytes(count_bytes: ByteCounter, folder: Path) -> list[Verdict]:
    """Run the audit's checks of counted bytes (B11) on a byte counter."""
    processor, tokens = tokenize_texts(folder)
    table = bpb.byte_table(processor)
    decoded = coverage.count_decoded_bytes(tokens, processor)
    counted = count_bytes(tokens, table)
    return [
        coverage.check_denominator(tokens, processor.bos_id(), counted, decoded),
        coverage.check_table(
            processor, coverage.AWKWARD_TEXTS, lambda tokens, processor: count_bytes(tokens, table)
        ),
    ]


def lawful_bytes(folder: Path, key: bytes) -> list[Verdict]:
    """Count bytes as the project does."""
    return check_bytes(bpb.target_bytes, folder)


def doubled_space(folder: Path, key: bytes) -> list[Verdict]:
    """The leading space is in the table, and added once more (#1698, #1727, #1734)."""

    def count_bytes(tokens: np.ndarray, table: bpb.ByteTable) -> np.ndarray:
        return bpb.target_bytes(tokens, table) + table.leading_space[tokens[1:]]

    return check_bytes(count_bytes, folder)


def three_byte_fallback(folder: Path, key: bytes) -> list[Verdict]:
    """A byte-fallback piece counts as the bytes of a replacement character (Scylla: #1143, #1184, #1289)."""
    processor, _ = tokenize_texts(folder)
    fallback = np.array([i for i in range(VOCAB) if processor.is_byte(i)])

    def count_bytes(tokens: np.ndarray, table: bpb.ByteTable) -> np.ndarray:
        return bpb.target_bytes(tokens, table) + 2 * np.isin(tokens[1:], fallback)

    return check_bytes(count_bytes, folder)


def wrong_denominator(folder: Path, key: bytes) -> list[Verdict]:
    """Bits are divided by the bytes of a transformed text, with a mark before each capital (CaseOps:
    #2071, #2138).
    """
    processor, tokens = tokenize_texts(folder)
    table = bpb.byte_table(processor)
    counted = bpb.target_bytes(tokens, table)
    nll = np.full(len(counted), 1.5, dtype=np.float32)
    transformed = int(counted.sum()) + sum(letter.isupper() for text in TEXTS for letter in text)

    claim = {"ledger": nll, "bpb": float(nll.sum()) / np.log(2) / transformed, "bytes": transformed}
    decoded = coverage.count_decoded_bytes(tokens, processor)
    stream = AuditedStream(tokens, table.bos, counted, decoded)
    return claims.check_claim("scorer", claim, stream, processor)[0]


def over_the_cap(folder: Path, key: bytes) -> list[Verdict]:
    """The code is counted packed and shipped raw (#1835, #1858, #1959)."""
    return [budgets.check_sizes({"model.bin": 15_976_144, "train_gpt.py": 59_295}, 16_000_000)]


def overlap(folder: Path, key: bytes, spelt: bool = False) -> list[Verdict]:
    """Documents of val are in train (--val-docs: #2018, #2118, #2130).

    They are tokenized alike there, or spelt byte by byte.
    """
    processor, tokens = tokenize_texts(folder)
    bos = processor.bos_id()
    val_documents = list(shards.documents(tokens, bos))

    # Train: documents of its own, and five of val.
    texts = [f"Nothing of this stands elsewhere, number {i}." for i in range(20)]
    documents = [np.array([bos, *processor.encode(text)], dtype=np.uint16) for text in texts]
    if spelt:
        id_of_byte = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        for text in TEXTS[5:10]:
            ids = [id_of_byte[byte] for byte in text.encode()]
            documents.append(np.array([bos, *ids], dtype=np.uint16))
    else:
        documents += val_documents[5:10]
    train = np.concatenate(documents)

    for side, side_tokens in (("train", train), ("val", tokens)):
        (folder / side).mkdir(exist_ok=True)
        shards.write(folder / side / f"{side}_000000.bin", side_tokens)
    val_hashes = budgets.document_hashes(tokens, bos)
    listed = np.concatenate([np.sort(budgets.document_hashes(train, bos)), np.sort(val_hashes)])
    found = contamination.find_overlap(folder / "train", folder / "val", processor)
    return [
        budgets.check_disjoint(val_hashes, listed, len(documents), len(val_documents)),
        contamination.check_passages(found),
    ]


def chosen_seeds(folder: Path, key: bytes) -> list[Verdict]:
    """The best three of five seeds, one of another configuration, no real gain (#1769, #2118, #2124)."""
    seeds = ((1, 2.4990), (2, 2.4972), (3, 2.4994))
    runs = [{"seed": seed, "nats": nats, "config": "a"} for seed, nats in seeds]
    mixed = [*runs[:2], runs[2] | {"config": "b"}]
    return [significance.check_seeds(mixed, [2.5]), significance.check_seeds(runs, [2.5])]


def in_clean_room(line: str) -> Callable[[Path, bytes], list[Verdict]]:
    """Build a cheat of one more line in the toy program, run in the clean room.

    OUTSIDE in that line stands for a folder that the program must not open.
    """

    def run(folder: Path, key: bytes) -> list[Verdict]:
        (folder / "outside").mkdir()
        for name in ("features.npz", "val_0.bin", "helper.py"):
            (folder / "outside" / name).write_bytes(b"x = 1\n")
        artifact = toy_program.toy_artifact(folder, line.replace("OUTSIDE", str(folder / "outside")))
        return check_clean_room(
            "clean room",
            run_in_clean_room(artifact, capabilities=toy_program.CAPABILITIES),
            ClaimedMetric("toy_bpb", 1.25, budget_seconds=60.0),
            late_seconds=1.2,
        )

    return run
