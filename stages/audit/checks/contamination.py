"""B15 on the text: documents and passages of val that are also in train, found by shingles of 50 bytes.

Hashes of token ids (documents.u64, budgets.check_disjoint) detect a document that was tokenized alike.
Here the text itself is compared. Every 50 consecutive bytes of a document are a shingle; its hash is a
rolling polynomial (Karp and Rabin 1987), mixed to 64 bits. A shingle is kept if its hash is at most
2^64 / `rate`: the same ones in train and in val, wherever they are. With rate 1 all are kept, and no
shared passage of 50 bytes is missed; otherwise one of L bytes is missed with probability (1 - 1 /
rate)^(L - 49). Memory holds val's kept shingles, about 40 bytes for each, and a block of train.

A shared passage alone is not a failure: licences, signatures and quotations are in many texts. A val
document fails if all its text is a train document, or if more than `share` of its shingles are in
train; smaller shares are reported. Of the default pipeline's 137 documents, docstrings of packages that
repeat themselves, 99 share a passage with train, and the worst 48 % of its shingles.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from stages.audit.verdict import Check, Verdict
from stages.common import shards
from stages.common.jit import jit_entry, jit_internal
from stages.common.lossless_text import LosslessTokenizer
from stages.tokenize.duplicates import documents

SHINGLE_BYTES = 50
MIN_KEPT_SHINGLES = 20  # of a document whose share is judged; a shorter one is compared as a whole only
MAX_SHARED = (
    0.75  # share of a document's shingles that boilerplate may make up, unless the caller says otherwise
)
BASE: Any = np.uint64(
    0x9E3779B97F4A7C15
)  # of the polynomial modulo 2^64; odd, so that no byte's weight vanishes
MIX: Any = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))  # MurmurHash3's finaliser (Appleby)
SHIFT: Any = np.uint64(33)  # likewise
EMPTY: Any = np.uint64(0)  # marks an empty slot of the hash table; a hash of 0 becomes 1
SHARED_PASSAGES = Check(
    "B15",
    "passages shared by train and val",
    conditions=("data",),
    sees="val documents in train, whole or in large part, also if tokenized or cut otherwise",
    blind=f"text that was changed every {SHINGLE_BYTES} bytes, translated or paraphrased; "
    "training data that was not shown",
)


@dataclass(frozen=True)
class Overlap:
    """The part of val that is in train, by val document in stream order."""

    starts: np.ndarray  # (D,) int64: position of its BOS in the stream
    kept: np.ndarray  # (D,) int64: number of its kept shingles
    shared: np.ndarray  # (D,) int64: number of those that are also in train
    whole: np.ndarray  # (D,) bool: its text is the text of a train document
    train_documents: int
    rate: int  # one in `rate` shingles was kept

    @property
    def shares(self) -> np.ndarray:
        """Share of each document's kept shingles that is in train, (D,) float64.

        0 if there are too few to judge.
        """
        return np.where(self.kept >= MIN_KEPT_SHINGLES, self.shared / np.maximum(1, self.kept), 0.0)


class ShingleTable:
    """Hash table of val's kept shingles, each with a mark that says whether train has it.

    Open addressing, at most half full.
    """

    def __init__(self, hashes: np.ndarray) -> None:
        """Insert hashes (n,) uint64, without marks."""
        size = 1 << max(4, (2 * len(hashes)).bit_length())
        self.keys = np.zeros(size, dtype=np.uint64)
        self.marks = np.zeros(size, dtype=np.uint8)
        insert(hashes, self.keys)


def document_texts(
    paths: list[Path], tokenizer: sentencepiece.SentencePieceProcessor
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each document of a stream of shards: its length and its text.

    The length is in tokens, BOS included; the text is (bytes,) uint8.
    """
    lossless = LosslessTokenizer(tokenizer)
    ends = np.cumsum([0, *map(len, lossless.token_bytes)])
    letters = np.frombuffer(b"".join(lossless.token_bytes), dtype=np.uint8)
    for document in documents(paths, lossless.bos):
        ids = document.tokens.astype(np.int64)
        text = np.empty(int((ends[ids + 1] - ends[ids]).sum()), dtype=np.uint8)
        yield len(ids), spell(ids, ends, letters, text)


def measure_overlap(
    train: Iterable[tuple[int, np.ndarray]], val: Iterable[tuple[int, np.ndarray]], rate: int = 1
) -> Overlap:
    """Compare the documents of train and val, as `document_texts` yields them.

    Val is read first, then train, each once.
    """
    if rate < 1:
        raise ValueError(f"one in {rate} shingles is to be kept; expected 1 or more, 1 for all of them")

    # Val: the kept shingles of each document, and a digest of its whole text.
    limit = np.uint64(((1 << 64) - 1) // rate)
    lengths, hashes, digests = [], [], []
    for length, text in val:
        lengths.append(length)
        hashes.append(sampled_shingles(text, limit))
        digests.append(hashlib.sha256(text.tobytes()).digest())
    all_hashes = np.concatenate(hashes) if hashes else np.empty(0, dtype=np.uint64)
    table = ShingleTable(all_hashes)

    # Train: mark the shingles of val that occur in it.
    val_digests = set(digests)
    found_digests: set[bytes] = set()
    train_documents = 0
    for _, text in train:
        train_documents += 1
        mark(sampled_shingles(text, limit), table.keys, table.marks)
        digest = hashlib.sha256(text.tobytes()).digest()
        if digest in val_digests:
            found_digests.add(digest)

    # Count the marks of each val document.
    marked = look_up(all_hashes, table.keys, table.marks, np.empty(len(all_hashes), dtype=np.uint8))
    kept = np.array([len(document_hashes) for document_hashes in hashes], dtype=np.int64)
    ends = np.cumsum([0, *kept.tolist()])
    marks_before = np.concatenate([[0], np.cumsum(marked, dtype=np.int64)])
    shared = marks_before[ends[1:]] - marks_before[ends[:-1]]
    starts = np.cumsum([0, *lengths], dtype=np.int64)[:-1]
    whole = np.array([digest in found_digests for digest in digests], dtype=bool)
    return Overlap(starts, kept, shared, whole, train_documents, rate)


def find_overlap(
    train: Path, val: Path, tokenizer: sentencepiece.SentencePieceProcessor, rate: int = 1
) -> Overlap:
    """Run `measure_overlap` on two folders of shards."""
    return measure_overlap(
        document_texts(shards.find(train), tokenizer), document_texts(shards.find(val), tokenizer), rate
    )


def check_passages(overlap: Overlap, share: float = MAX_SHARED) -> Verdict:
    """B15: no val document is a train document, or has more than `share` of its shingles in train."""
    # Failed documents; whole copies come first, then the largest shares.
    shares = overlap.shares
    failed = np.flatnonzero(overlap.whole | (shares > share))
    worst_first = failed[np.argsort(-np.where(overlap.whole[failed], 2.0, shares[failed]), kind="stable")]

    # If shingles were sampled, the evidence says how likely a passage is missed.
    sampled = ""
    if overlap.rate > 1:
        missed = miss_probability(overlap.rate, 500)
        sampled = (
            f" (one in {overlap.rate} looked at: "
            f"a passage of 500 bytes is missed with probability {missed:.1e})"
        )

    # Evidence: whole copies, documents that share too much, and all that is shared.
    all_kept = max(1, int(overlap.kept.sum()))
    evidence = (
        f"{overlap.whole.sum()} of {len(overlap.whole)} val documents are, as text, one of "
        f"{overlap.train_documents} train documents; "
        f"{(shares > share).sum()} have more than {share:.0%} of their {SHINGLE_BYTES}-byte shingles "
        "in train (up to that is allowed as boilerplate); "
        f"{int((overlap.shared > 0).sum())} share a passage, "
        f"{overlap.shared.sum() / all_kept:.2%} of all shingles are shared{sampled}; "
        f"the largest share of a document is {shares.max(initial=0.0):.1%}"
    )

    return Verdict.of(
        SHARED_PASSAGES,
        "files",
        not len(failed),
        evidence,
        # The largest share of a document.
        saw=1.0 if overlap.whole.any() else float(shares.max(initial=0.0)),
        expected=0.0,
        bound=share,
        positions=tuple(overlap.starts[worst_first[:3]].tolist()),
    )


def miss_probability(rate: int, passage_bytes: int) -> float:
    """Compute the probability that none of a shared passage's shingles is kept."""
    return (1 - 1 / rate) ** max(0, passage_bytes - SHINGLE_BYTES + 1)


def sampled_shingles(text: np.ndarray, limit: np.uint64) -> np.ndarray:
    """Hash the shingles of a text (n,) uint8 and keep hashes up to `limit`, in order, uint64."""
    hashes = np.empty(max(0, len(text) - SHINGLE_BYTES + 1), dtype=np.uint64)
    return hashes[: _keep(text, limit, hashes)].copy()


@jit_entry
def spell(ids: np.ndarray, ends: np.ndarray, letters: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Concatenate the bytes of ids (n,) into out; those of id i are letters[ends[i] : ends[i + 1]]."""
    at = 0
    for i in ids:
        for j in range(ends[i], ends[i + 1]):
            out[at] = letters[j]
            at += 1
    return out


@jit_internal
def _mix(rolled: int) -> int:
    """Finalise a polynomial hash; never EMPTY."""
    value = (rolled ^ (rolled >> SHIFT)) * MIX[0]
    value = (value ^ (value >> SHIFT)) * MIX[1]
    value ^= value >> SHIFT
    return value if value != EMPTY else np.uint64(1)


@jit_internal
def _leaving_weight() -> int:
    """Compute the weight of the byte that leaves the window: BASE to the power of a shingle's length."""
    power = np.uint64(1)
    for _ in range(SHINGLE_BYTES):
        power *= BASE
    return power


@jit_entry
def _keep(text: np.ndarray, limit: int, out: np.ndarray) -> int:
    """Write the kept hashes of text (n,) into out, and return their number."""
    leaving_weight = _leaving_weight()
    rolled = np.uint64(0)
    count = 0
    for i in range(len(text)):
        rolled = rolled * BASE + np.uint64(text[i])
        if i >= SHINGLE_BYTES:
            rolled -= leaving_weight * np.uint64(text[i - SHINGLE_BYTES])
        if i >= SHINGLE_BYTES - 1:
            value = _mix(rolled)
            if value <= limit:
                out[count] = value
                count += 1
    return count


@jit_internal
def _slot(value: int, keys: np.ndarray) -> int:
    """Find the slot of a hash in the table, or the empty slot where it belongs (linear probing)."""
    last = np.uint64(len(keys) - 1)
    slot = value & last
    while keys[slot] != EMPTY and keys[slot] != value:
        slot = (slot + np.uint64(1)) & last
    return slot


@jit_entry
def insert(hashes: np.ndarray, keys: np.ndarray) -> None:
    """Insert hashes (n,) into a table (size,) that has room for them."""
    for value in hashes:
        keys[_slot(value, keys)] = value


@jit_entry
def mark(hashes: np.ndarray, keys: np.ndarray, marks: np.ndarray) -> None:
    """Mark those of the hashes (n,) that are in the table (size,)."""
    for value in hashes:
        slot = _slot(value, keys)
        if keys[slot] == value:
            marks[slot] = 1


@jit_entry
def look_up(hashes: np.ndarray, keys: np.ndarray, marks: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Read the marks of hashes (n,) that are in the table into out (n,) uint8."""
    for i in range(len(hashes)):
        out[i] = marks[_slot(hashes[i], keys)]
    return out
