"""B15: documents of train that are documents of val, and passages of train that stand in val, by shingles of 50 bytes.

Hashes of token ids (documents.u64, files.check_disjoint) show a document that was tokenized alike. Here it is the text that is compared.
Every 50 bytes in a row of a document are a shingle; its hash is a polynomial that rolls along the text (Karp and Rabin 1987), mixed to
64 bits. Kept are the shingles whose hash lies below 2^64 / `rate`: the same ones in train and in val, wherever they stand. With rate 1 that
is all of them, and no shared passage of 50 bytes is missed; otherwise one of L bytes is missed with probability (1 - 1 / rate)^(L - 49).
Memory holds val's kept shingles, about 40 bytes for each, and a block of train.

A shared passage alone is no guilt: licences, signatures and quotations stand in many texts. A val document is convicted when all its text
is a train document, or when more than `share` of its shingles are in train; what is below is reported. Of the default pipeline's 137
documents, docstrings of packages that repeat themselves, 99 share a passage with train, and the worst 48 % of its shingles.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from stages.audit.verdict import Verdict, outcome
from stages.common import shards
from stages.common.jit import inner, outer
from stages.common.lossless_text import Speller
from stages.tokenize.duplicates import documents

SHINGLE_BYTES = 50
FEWEST = 20  # kept shingles of a document from which a share is taken; a shorter one is compared as a whole
SHARED = 0.75  # of a document's shingles: what boilerplate may make up of it, unless a caller says otherwise
BASE: Any = np.uint64(
    0x9E3779B97F4A7C15
)  # of the polynomial modulo 2^64: odd, so that no byte's weight vanishes
MIX: Any = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))  # MurmurHash3's finaliser (Appleby)
SHIFT: Any = np.uint64(33)
ABSENT: Any = np.uint64(0)  # marks an empty place of the table; a hash of 0 counts as 1


@dataclass(frozen=True)
class Overlap:
    """What of val is in train: an entry for each val document, in stream order."""

    starts: np.ndarray  # position of its BOS in the stream, (D,) int64
    kept: np.ndarray  # its kept shingles, (D,) int64
    shared: np.ndarray  # those that are in train too, (D,) int64
    whole: np.ndarray  # whether its text is one of train's documents, (D,) bool
    train_documents: int
    rate: int

    @property
    def shares(self) -> np.ndarray:
        """The share of each document's kept shingles that is in train, (D,) float64; 0 where there are too few to say."""
        return np.where(self.kept >= FEWEST, self.shared / np.maximum(1, self.kept), 0.0)


class Table:
    """The kept shingles of val, each with a mark that says whether train has it: open addressing, at most half full."""

    def __init__(self, hashes: np.ndarray) -> None:
        size = 1 << max(4, (2 * len(hashes)).bit_length())
        self.keys, self.marks = np.zeros(size, dtype=np.uint64), np.zeros(size, dtype=np.uint8)
        insert(hashes, self.keys)


def texts(
    paths: list[Path], tokenizer: sentencepiece.SentencePieceProcessor
) -> Iterator[tuple[int, np.ndarray]]:
    """Each document of a stream of shards: its number of tokens, BOS included, and its text, (bytes,) uint8."""
    speller = Speller(tokenizer)
    ends = np.cumsum([0, *map(len, speller.bytes_of)])
    letters = np.frombuffer(b"".join(speller.bytes_of), dtype=np.uint8)
    for document in documents(paths, speller.bos):
        ids = document.tokens.astype(np.int64)
        room = np.empty(int((ends[ids + 1] - ends[ids]).sum()), dtype=np.uint8)
        yield len(ids), spell(ids, ends, letters, room)


def overlap(
    train: Iterable[tuple[int, np.ndarray]], val: Iterable[tuple[int, np.ndarray]], rate: int = 1
) -> Overlap:
    """Hold train's documents against val's; both are what `texts` yields, train read once and val before it."""
    if rate < 1:
        raise ValueError(f"one in {rate} shingles is to be kept; expected 1 or more, 1 for all of them")
    limit = np.uint64(((1 << 64) - 1) // rate)
    lengths, hashes, digests = [], [], []
    for length, text in val:
        lengths.append(length)
        hashes.append(kept_shingles(text, limit))
        digests.append(hashlib.sha256(text.tobytes()).digest())
    together = np.concatenate(hashes) if hashes else np.empty(0, dtype=np.uint64)
    table, seen, count = Table(together), set[bytes](), 0
    wanted = set(digests)
    for _, text in train:
        count += 1
        mark(kept_shingles(text, limit), table.keys, table.marks)
        digest = hashlib.sha256(text.tobytes()).digest()
        if digest in wanted:
            seen.add(digest)
    marked = look_up(together, table.keys, table.marks, np.empty(len(together), dtype=np.uint8))
    kept = np.array([len(of) for of in hashes], dtype=np.int64)
    ends = np.cumsum([0, *kept.tolist()])
    running = np.concatenate([[0], np.cumsum(marked, dtype=np.int64)])
    starts = np.cumsum([0, *lengths], dtype=np.int64)[:-1]
    whole = np.array([digest in seen for digest in digests], dtype=bool)
    return Overlap(starts, kept, running[ends[1:]] - running[ends[:-1]], whole, count, rate)


def check_passages(found: Overlap, share: float = SHARED) -> Verdict:
    """B15 on the text: no val document is a train document, or made of train's passages by more than `share`."""
    shares = found.shares
    guilty = np.flatnonzero(found.whole | (shares > share))
    order = guilty[np.argsort(-np.where(found.whole[guilty], 2.0, shares[guilty]), kind="stable")]
    kept, documents_touched = max(1, int(found.kept.sum())), int((found.shared > 0).sum())
    evidence = (
        f"{found.whole.sum()} of {len(found.whole)} val documents are, as text, one of {found.train_documents} train documents; "
        f"{(shares > share).sum()} have more than {share:.0%} of their {SHINGLE_BYTES}-byte shingles in train (so much is allowed for "
        f"boilerplate); {documents_touched} share a passage, {found.shared.sum() / kept:.2%} of all shingles are shared"
        f"{_sampled(found.rate)}; the largest share of a document is {shares.max(initial=0.0):.1%}"
    )
    return Verdict(
        check="B15",
        name="passages shared by train and val",
        subject="files",
        conditions=("data",),
        outcome=outcome(not len(guilty)),
        evidence=evidence,
        saw=float(shares.max(initial=0.0)) if not found.whole.any() else 1.0,
        expected=0.0,
        bound=share,
        positions=tuple(found.starts[order[:3]].tolist()),
        sees="val documents in train, whole or in large part, tokenized or cut otherwise",
        blind=f"text that was changed every {SHINGLE_BYTES} bytes, translated or paraphrased; training data that was not shown",
    )


def find(train: Path, val: Path, tokenizer: sentencepiece.SentencePieceProcessor, rate: int = 1) -> Overlap:
    """`overlap` of two folders of shards."""
    return overlap(texts(shards.find(train), tokenizer), texts(shards.find(val), tokenizer), rate)


def missed(rate: int, passage_bytes: int) -> float:
    """The probability that none of a shared passage's shingles is kept."""
    return (1 - 1 / rate) ** max(0, passage_bytes - SHINGLE_BYTES + 1)


def _sampled(rate: int) -> str:
    return (
        ""
        if rate == 1
        else f" (one in {rate} looked at: a passage of 500 bytes is missed with probability {missed(rate, 500):.1e})"
    )


def kept_shingles(text: np.ndarray, limit: np.uint64) -> np.ndarray:
    """The hashes of a text's shingles that are kept, in order, uint64."""
    room = np.empty(max(0, len(text) - SHINGLE_BYTES + 1), dtype=np.uint64)
    return room[: _keep(text, limit, room)].copy()


@outer
def spell(ids: np.ndarray, ends: np.ndarray, letters: np.ndarray, out: np.ndarray) -> np.ndarray:
    """The bytes of ids, where those of id i are letters[ends[i] : ends[i + 1]]."""
    at = 0
    for i in ids:
        for j in range(ends[i], ends[i + 1]):
            out[at] = letters[j]
            at += 1
    return out


@inner
def _mixed(rolled: int) -> int:
    value = (rolled ^ (rolled >> SHIFT)) * MIX[0]
    value = (value ^ (value >> SHIFT)) * MIX[1]
    value ^= value >> SHIFT
    return value if value != ABSENT else np.uint64(1)


@inner
def _leaving() -> int:
    """The weight of the byte that leaves: BASE to the power of a shingle's length."""
    power = np.uint64(1)
    for _ in range(SHINGLE_BYTES):
        power *= BASE
    return power


@outer
def _keep(text: np.ndarray, limit: int, out: np.ndarray) -> int:
    rolled, gone, count = np.uint64(0), _leaving(), 0
    for i in range(len(text)):
        rolled = rolled * BASE + np.uint64(text[i])
        if i >= SHINGLE_BYTES:
            rolled -= gone * np.uint64(text[i - SHINGLE_BYTES])
        if i >= SHINGLE_BYTES - 1:
            value = _mixed(rolled)
            if value <= limit:
                out[count] = value
                count += 1
    return count


@inner
def _place(value: int, keys: np.ndarray) -> int:
    """Where a hash is in the table, or where it would go."""
    last = np.uint64(len(keys) - 1)
    place = value & last
    while keys[place] != ABSENT and keys[place] != value:
        place = (place + np.uint64(1)) & last
    return place


@outer
def insert(hashes: np.ndarray, keys: np.ndarray) -> None:
    """Put hashes into a table that has room for them."""
    for value in hashes:
        keys[_place(value, keys)] = value


@outer
def mark(hashes: np.ndarray, keys: np.ndarray, marks: np.ndarray) -> None:
    """Mark those of the hashes that are in the table."""
    for value in hashes:
        place = _place(value, keys)
        if keys[place] == value:
            marks[place] = 1


@outer
def look_up(hashes: np.ndarray, keys: np.ndarray, marks: np.ndarray, out: np.ndarray) -> np.ndarray:
    """The marks of hashes that are in the table, uint8."""
    for i in range(len(hashes)):
        out[i] = marks[_place(hashes[i], keys)]
    return out
