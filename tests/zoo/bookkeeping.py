"""Cheats outside the scorer: in bytes, clocks, files, data and seeds.

Each function audits one cheat and returns the verdicts.
"""

import io
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from stages.audit.audit_scorer import AuditedStream
from stages.audit.checks import budgets, contamination, coverage, significance, tokenizer_model
from stages.audit.sandbox.artifact import counted_bytes
from stages.audit.sandbox.clean_room import ClaimedMetric, check_clean_room, run_in_clean_room
from stages.audit.verdict import Verdict
from stages.common import bpb, shards
from stages.tokenize import tokenizer
from tests import toy_program
from tools.audit_scorer import claims, source

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


def normalised_stream(folder: Path, rules: str, texts: list[str]) -> tuple[Path, AuditedStream]:
    """Train a tokenizer whose normaliser has these rules, and encode the texts with it.

    rules: the name of a set of rules, or lines of a table of them (SentencePiece's .tsv).
    """
    options: dict[str, Any] = {"normalization_rule_name": rules}
    if "\t" in rules:
        (folder / "rules.tsv").write_text(rules)
        options = {"normalization_rule_tsv": str(folder / "rules.tsv")}

    # A small tokenizer of them.
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:5]),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )

    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())

    # The stream, and its bytes as the project counts them.
    processor = bpb.load_tokenizer(path)
    tokens = np.concatenate([[processor.bos_id(), *processor.encode(text)] for text in texts])
    tokens = tokens.astype(np.uint16)
    counted = bpb.target_bytes(tokens, bpb.byte_table(processor))
    decoded = coverage.count_decoded_bytes(tokens, processor)
    return path, AuditedStream(tokens, processor.bos_id(), counted, decoded)


def check_tokenizer(
    folder: Path, rules: str, given: list[str] | None, encoded: list[str] = TEXTS
) -> list[Verdict]:
    """Audit the bytes of a stream whose tokenizer has these rules, with the original text or without."""
    path, stream = normalised_stream(folder, rules, encoded)
    processor = bpb.load_tokenizer(path)
    verdicts = claims.check_claim("scorer", {}, stream, processor, texts=given).verdicts
    return [*verdicts, budgets.check_tokenizer_file(path)]


def inflating_tokenizer(folder: Path, key: bytes, with_text: bool = False) -> list[Verdict]:
    """The normaliser doubles every letter e, and bits are divided by the bytes of both."""
    return check_tokenizer(folder, "65\t65 65\n", TEXTS if with_text else None)


def padded_text(folder: Path, key: bytes) -> list[Verdict]:
    """Every document is followed by text that costs nothing, before an honest tokenizer sees it."""
    return check_tokenizer(folder, "identity", TEXTS, [text + "a" * 200 for text in TEXTS])


def shortened_text(folder: Path, key: bytes) -> list[Verdict]:
    """Words that are hard to predict are left out of every document."""
    kept = [" ".join(word for word in text.split(" ") if not word.isdigit()) for text in TEXTS]
    return check_tokenizer(folder, "identity", TEXTS, kept)


def lawful_tokenizer(folder: Path, key: bytes, rules: str = "identity") -> list[Verdict]:
    """A tokenizer without rules, or with those of Unicode; the text has characters that these change."""
    texts = [f"{text}  \u00bd of  {i}\u00b2 \uff21\ufb01 \u2026\u200b" for i, text in enumerate(TEXTS)]
    return check_tokenizer(folder, rules, texts, texts)


def stuffed_tokenizer(folder: Path, key: bytes, in_piece: bool = False) -> list[Verdict]:
    """Two megabytes of answers in a field of tokenizer.model that nobody reads, or in the text of a piece."""
    path, _ = normalised_stream(folder, "identity", TEXTS)
    answers = bytes(65 + i % 26 for i in range(2_000_000))
    payload = _message(tokenizer_model.PIECE, _message(1, answers)) if in_piece else _message(999, answers)
    path.write_bytes(path.read_bytes() + payload)
    return [budgets.check_tokenizer_file(path)]


def _message(number: int, value: bytes) -> bytes:
    """Encode a field of bytes of a protocol buffer."""
    return _varint(number << 3 | tokenizer_model.BYTES) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Encode a number of seven bits a byte."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def part_as_official(folder: Path, key: bytes) -> list[Verdict]:
    """The first 48,000 documents are claimed as the validation set."""
    return [coverage.check_official(38_900_000, 48_000, 145_000_000)]


def number_of_another_run(folder: Path, key: bytes) -> list[Verdict]:
    """A number without a ledger, which the scorer does not reach."""
    path, stream = normalised_stream(folder, "identity", TEXTS)
    own = claims.OwnScore(2.5, tolerance=1e-6, source="the whole stream")
    processor = bpb.load_tokenizer(path)
    return claims.check_claim("scorer", {"bpb": 0.5}, stream, processor, own=own).verdicts


def sparse_file(path: Path, size: int) -> None:
    """Create a file of `size` bytes that takes no room on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


def beside_the_module(folder: Path, key: bytes) -> list[Verdict]:
    """30 MB in the scorer's package, which are not in the artifact."""
    sparse_file(folder / "artifact" / "model.bin", 15_000_000)
    sparse_file(folder / "package" / "inner" / "answers.bin", 30_000_000)
    for name in ("__init__.py", "scorer.py"):
        (folder / "package" / name).write_text("")
    sizes = counted_bytes(folder / "artifact")
    code = source.bytes_in_code_folder([folder / "package"])
    return [budgets.check_sizes(sizes | code, 16_000_000)]


def in_names(folder: Path, key: bytes) -> list[Verdict]:
    """540 kB of answers in the names of empty files."""
    sparse_file(folder / "artifact" / "model.bin", 15_900_000)
    for i in range(2_250):
        (folder / "artifact" / f"{i:0240}").touch()
    return [budgets.check_sizes(counted_bytes(folder / "artifact"), 16_000_000)]


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


def prose(seed: int, documents: int, words: int = 160) -> list[str]:
    """Make documents of words that have nothing else in common."""
    generator = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = []
    for _ in range(documents):
        spelt = ["".join(generator.choices(letters, k=generator.randrange(2, 9))) for _ in range(words)]
        lines = [" ".join(spelt[i : i + 12]) for i in range(0, words, 12)]
        texts.append(",\n".join(lines) + ".")
    return texts


def first_part(text: str) -> str:
    """Keep the first 74 % of a document."""
    return text[: int(0.74 * len(text))]


def one_word_in_eight(text: str) -> str:
    """Change every eighth word."""
    words = text.split(" ")
    words[::8] = ["otherwise"] * len(words[::8])
    return " ".join(words)


def quoted(text: str) -> str:
    """Put a quoting mark before each line."""
    return "\n".join(f"> {line}" for line in text.split("\n"))


def scattered(text: str) -> str:
    """Cut a document into pieces of 49 bytes, the last first, with other words between them."""
    pieces = [text[i : i + 49] for i in range(0, len(text), 49)]
    return " and elsewhere ".join(reversed(pieces))


def changed_copies(folder: Path, key: bytes, change: Callable[[str], str]) -> list[Verdict]:
    """Each val document is in train, changed so that no document and few long passages are equal."""
    val = prose(1, 12)
    train = [*prose(2, 40), *map(change, val)]
    return [check_overlap(train, val)]


def lawful_overlap(folder: Path, key: bytes) -> list[Verdict]:
    """A licence in all documents of train and val, and a quotation of a sentence."""
    licence = prose(3, 1, words=40)[0]
    val = [licence + text for text in prose(1, 12)]
    train = [licence + text for text in prose(2, 40)]
    train[5] += val[3][500:620]
    return [check_overlap(train, val)]


def check_overlap(train: list[str], val: list[str], rate: int = 1) -> Verdict:
    """Run the audit's check of shared passages (B15) on two lists of documents."""
    sides = []
    for texts in (train, val):
        encoded = [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]
        sides.append([(len(text) + 1, text) for text in encoded])
    return contamination.check_passages(contamination.measure_overlap(sides[0], sides[1], rate))


def seed_ledgers() -> list[np.ndarray]:
    """Make the ledgers of three runs: mean 2.48, each with its own noise, (4000,) float32."""
    generator = np.random.Generator(np.random.PCG64(3))
    common = generator.gamma(2.0, 1.24, 4000)
    ledgers = [common * generator.uniform(0.9, 1.1, 4000) for _ in range(3)]
    return [(nll * (2.48 / nll.mean())).astype(np.float32) for nll in ledgers]


def seed_runs(seeds: tuple[Any, ...], ledgers: list[np.ndarray], gain: float = 0.0) -> list[dict[str, Any]]:
    """Build the records of runs: each states the mean of its ledger, less `gain`."""
    runs = []
    for seed, nll in zip(seeds, ledgers, strict=True):
        mean = float(nll.mean(dtype=np.float64))
        runs.append({"seed": seed, "nats": round(mean - gain, 4), "config": "a", "ledger": nll})
    return runs


def lawful_seeds(folder: Path, key: bytes) -> list[Verdict]:
    """Three runs with a ledger each."""
    return [significance.check_seeds(seed_runs((1, 2, 3), seed_ledgers()), [2.5], targets=4000)]


def one_seed_under_three_names(folder: Path, key: bytes) -> list[Verdict]:
    """The seeds 1, 1.0 and true are one."""
    return [significance.check_seeds(seed_runs((1, 1.0, True), seed_ledgers()), [2.5])]


def one_run_under_three_seeds(folder: Path, key: bytes) -> list[Verdict]:
    """One ledger for all seeds, with noise of the last digit."""
    nll = seed_ledgers()[0]
    ledgers = [nll, nll.copy(), nll * np.float32(1 + 1e-6)]
    return [significance.check_seeds(seed_runs((1, 2, 3), ledgers), [2.5])]


def losses_beside_the_ledgers(folder: Path, key: bytes) -> list[Verdict]:
    """Each seed's loss is stated 0.03 nats lower than its ledger."""
    return [significance.check_seeds(seed_runs((1, 2, 3), seed_ledgers(), gain=0.03), [2.5])]


def chosen_seeds(folder: Path, key: bytes) -> list[Verdict]:
    """The best three of five seeds, one of another configuration, no real gain (#1769, #2118, #2124)."""
    seeds = ((1, 2.4990), (2, 2.4972), (3, 2.4994))
    runs = [{"seed": seed, "nats": nats, "config": "a"} for seed, nats in seeds]
    mixed = [*runs[:2], runs[2] | {"config": "b"}]
    return [significance.check_seeds(mixed, [2.5]), significance.check_seeds(runs, [2.5])]


def in_clean_room(line: str) -> Callable[[Path, bytes], list[Verdict]]:
    """Build a cheat of one more line in the toy program, run in the clean room.

    OUTSIDE in that line is replaced by a folder that the program must not open.
    """

    def run(folder: Path, key: bytes) -> list[Verdict]:
        (folder / "outside").mkdir()
        for name in ("features.npz", "val_0.bin", "helper.py"):
            (folder / "outside" / name).write_bytes(b"x = 1\n")
        artifact = toy_program.toy_artifact(folder, line.replace("OUTSIDE", str(folder / "outside")))
        return check_clean_room(
            "clean room",
            run_in_clean_room(artifact),
            ClaimedMetric("toy_bpb", 1.25, budget_seconds=60.0),
            late_seconds=1.2,
        )

    return run


def answers_in_shared_memory(folder: Path, key: bytes) -> list[Verdict]:
    """Answers that an earlier process left in a file in /dev/shm."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        return in_clean_room(f"open({file.name!r}).close()")(folder, key)
