"""B15 on the text: documents and passages of val that are also in train, found by shingles of 24 letters.

Hashes of token ids (documents.u64, budgets.check_disjoint) detect a document that was tokenized alike.
Here the text itself is compared, folded: letters and digits alone, case folded, without accents, white
space, punctuation or quoting marks. Every 24 consecutive bytes of a folded document, about five words,
are a shingle; its hash is a rolling polynomial (Karp and Rabin 1987), mixed to 64 bits. A shingle is
kept if its hash is at most 2^64 / `rate`: the same ones in train and in val, wherever they are. With
rate 1 all are kept, and no shared passage of 24 folded bytes is missed; otherwise one of L bytes is
missed with probability (1 - 1 / rate)^(L - 23). Memory holds val's kept shingles, about 40 bytes for
each, and a block of train.

A shared passage alone is not a failure: licences, signatures and quotations are in many texts. There
are three bounds: a val document must not be a train document, at most MAX_DOCUMENT_SHARE of its
shingles may be in train, and at most MAX_CORPUS_SHARE of the different shingles of all val documents.
Measured shares, with every shingle:

                                     corpus   documents: lowest, median, highest
    docstrings of the default pipeline
      as they are                     0.053   0.00  0.10  0.58
      first 74 % of each in train     0.72    0.67  0.76  0.96
      one word in eight changed       0.37    0.15  0.38  0.78
      pieces of 49 bytes, scattered   0.40    0.30  0.43  0.80
    901 documents of FineWeb's val, 64 MB of other prose
      as they are                     0.003   0.00  0.00  0.08
      first 74 % of each in train     0.74    0.69  0.74  0.82
      one word in eight changed       0.28    0.09  0.28  0.56
      pieces of 49 bytes, scattered   0.42    0.35  0.42  0.53

Upper case and quoting marks change nothing. A few changed copies stay below both shares: one word in
eight changed is found from about a third of val on.
"""

import hashlib
import unicodedata
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

SHINGLE_BYTES = 24  # of folded text: shorter ones are common by chance, longer ones miss a changed word
MIN_KEPT_SHINGLES = 20  # of a document whose share is judged; a shorter one is compared as a whole only
MIN_CORPUS_SHINGLES = 500  # of all val documents, if their share is judged
MAX_DOCUMENT_SHARE = 0.65  # of a document's shingles: above 0.58, the most that documentation repeats
MAX_CORPUS_SHARE = 0.1  # of all different shingles: twice 0.053, which documentation repeats; prose 0.003
SAMPLING_DEVIATIONS = 4.0  # by which a share of sampled shingles must exceed its bound: by chance 3e-5
CODE_POINTS = 0x110000  # of Unicode
FOLDED_BYTES = 4  # UTF-8 bytes of a code point, and at most as many of what it is folded to
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
    sees="val documents in train, whole or in large part; pieces or changed copies of half of val, "
    "whatever their case, punctuation, white space, order or tokenizer",
    blind="changed copies of less than a third of val; text that was encoded, translated or paraphrased; "
    "training data that was not shown",
)


@dataclass(frozen=True)
class Overlap:
    """The part of val that is in train, by val document in stream order."""

    starts: np.ndarray  # (D,) int64: position of its BOS in the stream
    kept: np.ndarray  # (D,) int64: number of its kept shingles
    shared: np.ndarray  # (D,) int64: number of those that are also in train
    whole: np.ndarray  # (D,) bool: its folded text is that of a train document
    distinct: int  # number of different kept shingles of all documents
    distinct_shared: int  # number of those that are also in train
    train_documents: int
    rate: int  # one in `rate` shingles was kept

    @property
    def shares(self) -> np.ndarray:
        """Share of each document's kept shingles that is in train, (D,) float64.

        0 if there are too few to judge.
        """
        return np.where(self.kept >= MIN_KEPT_SHINGLES, self.shared / np.maximum(1, self.kept), 0.0)

    @property
    def corpus_share(self) -> float:
        """Share of all different kept shingles that is in train; 0 if there are too few to judge."""
        return self.distinct_shared / self.distinct if self.distinct >= MIN_CORPUS_SHINGLES else 0.0

    def limits(self, share: float, kept: np.ndarray) -> np.ndarray:
        """Raise a bound on a share of `kept` shingles (n,) by what the sampling of shingles may add."""
        if self.rate == 1:
            return np.full(kept.shape, share)
        return share + SAMPLING_DEVIATIONS * np.sqrt(share * (1 - share) / np.maximum(1, kept))


class FoldTable:
    """The letters and digits that each character is folded to, found when it is first met.

    A character is case folded and freed of its accents. What is neither letter nor digit is dropped.
    """

    def __init__(self) -> None:
        """Begin with no character known."""
        # Row of a code point: 1 + the number of its folded bytes, or 0 if unknown, and those bytes.
        self.rows = np.zeros((CODE_POINTS, 1 + FOLDED_BYTES), dtype=np.uint8)

    def fold(self, text: np.ndarray) -> np.ndarray:
        """Fold a text of UTF-8 bytes (n,) uint8; bytes that are not UTF-8 are dropped."""
        out = np.empty(len(text), dtype=np.uint8)
        read, written, unknown = 0, 0, 0
        while read < len(text):
            read, written, unknown = fold_known(text, read, written, self.rows, out)
            if read < len(text):
                self._learn(chr(unknown))
        return out[:written]

    def _learn(self, character: str) -> None:
        """Find what a character is folded to: at most as many bytes as it has itself."""
        decomposed = unicodedata.normalize("NFKD", character).casefold()
        letters = "".join(part for part in decomposed if part.isalnum())
        size = len(character.encode("utf-8", "replace"))
        folded = unicodedata.normalize("NFC", letters).encode("utf-8", "replace")[:size]
        row = self.rows[ord(character)]
        row[1 : 1 + len(folded)] = np.frombuffer(folded, dtype=np.uint8)
        row[0] = 1 + len(folded)


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
    folds = FoldTable()
    lengths, hashes, digests = [], [], []
    for length, text in val:
        folded = folds.fold(text)
        lengths.append(length)
        hashes.append(sampled_shingles(folded, limit))
        digests.append(_digest(folded))
    all_hashes = np.concatenate(hashes) if hashes else np.empty(0, dtype=np.uint64)
    table = ShingleTable(all_hashes)

    # Train: mark the shingles of val that occur in it.
    val_digests = set(digests) - {None}
    found_digests: set[bytes | None] = set()
    train_documents = 0
    for _, text in train:
        train_documents += 1
        folded = folds.fold(text)
        mark(sampled_shingles(folded, limit), table.keys, table.marks)
        digest = _digest(folded)
        if digest in val_digests:
            found_digests.add(digest)

    # Count the marks of each val document, and of all.
    marked = look_up(all_hashes, table.keys, table.marks, np.empty(len(all_hashes), dtype=np.uint8))
    kept = np.array([len(document_hashes) for document_hashes in hashes], dtype=np.int64)
    ends = np.cumsum([0, *kept.tolist()])
    marks_before = np.concatenate([[0], np.cumsum(marked, dtype=np.int64)])

    return Overlap(
        starts=np.cumsum([0, *lengths], dtype=np.int64)[:-1],
        kept=kept,
        shared=marks_before[ends[1:]] - marks_before[ends[:-1]],
        whole=np.array([digest in found_digests for digest in digests], dtype=bool),
        distinct=int(np.count_nonzero(table.keys)),
        distinct_shared=int(np.count_nonzero(table.marks)),
        train_documents=train_documents,
        rate=rate,
    )


def find_overlap(
    train: Path, val: Path, tokenizer: sentencepiece.SentencePieceProcessor, rate: int = 1
) -> Overlap:
    """Run `measure_overlap` on two folders of shards."""
    return measure_overlap(
        document_texts(shards.find(train), tokenizer), document_texts(shards.find(val), tokenizer), rate
    )


def check_passages(
    overlap: Overlap,
    document_share: float = MAX_DOCUMENT_SHARE,
    corpus_share: float = MAX_CORPUS_SHARE,
) -> Verdict:
    """B15: no val document is a train document, or shares too much with train, nor do all together."""
    # Failed documents; whole copies come first, then the largest shares.
    shares = overlap.shares
    too_much = shares > overlap.limits(document_share, overlap.kept)
    failed = np.flatnonzero(overlap.whole | too_much)
    worst_first = failed[np.argsort(-np.where(overlap.whole[failed], 2.0, shares[failed]), kind="stable")]

    # The corpus: pieces of many documents, of which none has much in train.
    of_all = overlap.corpus_share
    corpus_fails = of_all > float(overlap.limits(corpus_share, np.array(overlap.distinct)))

    # If shingles were sampled, the evidence says how likely a passage is missed.
    sampled = ""
    if overlap.rate > 1:
        missed = miss_probability(overlap.rate, 300)
        sampled = (
            f" (one in {overlap.rate} looked at: "
            f"a passage of 300 letters is missed with probability {missed:.1e})"
        )

    # Evidence: whole copies, documents that share too much, and all that is shared.
    evidence = (
        f"{overlap.whole.sum()} of {len(overlap.whole)} val documents are, as letters and digits, one of "
        f"{overlap.train_documents} train documents; "
        f"{too_much.sum()} have more than {document_share:.0%} of their {SHINGLE_BYTES}-byte shingles "
        "in train (up to that is allowed as boilerplate); "
        f"{int((overlap.shared > 0).sum())} share a passage, "
        f"{overlap.distinct_shared / max(1, overlap.distinct):.2%} of all different shingles are shared, "
        f"{corpus_share:.0%} are allowed{sampled}; "
        f"the largest share of a document is {shares.max(initial=0.0):.1%}"
    )

    # The share that decides: of the corpus if only that is too much, else the largest of a document.
    largest = 1.0 if overlap.whole.any() else float(shares.max(initial=0.0))
    is_corpus = corpus_fails and not len(failed)
    return Verdict.of(
        SHARED_PASSAGES,
        "files",
        not len(failed) and not corpus_fails,
        evidence,
        saw=of_all if is_corpus else largest,
        expected=0.0,
        bound=corpus_share if is_corpus else document_share,
        positions=tuple(overlap.starts[worst_first[:3]].tolist()),
    )


def miss_probability(rate: int, passage_bytes: int) -> float:
    """Compute the probability that none of a shared passage's shingles is kept."""
    return (1 - 1 / rate) ** max(0, passage_bytes - SHINGLE_BYTES + 1)


def sampled_shingles(text: np.ndarray, limit: np.uint64) -> np.ndarray:
    """Hash the shingles of a folded text (n,) uint8 and keep hashes up to `limit`, in order, uint64."""
    hashes = np.empty(max(0, len(text) - SHINGLE_BYTES + 1), dtype=np.uint64)
    return hashes[: _keep(text, limit, hashes)].copy()


def _digest(folded: np.ndarray) -> bytes | None:
    """Compute the digest of a folded text (n,) uint8; None for one too short to be anybody's own."""
    return hashlib.sha256(folded.tobytes()).digest() if len(folded) >= SHINGLE_BYTES else None


@jit_entry
def fold_known(
    text: np.ndarray, start: int, written: int, rows: np.ndarray, out: np.ndarray
) -> tuple[int, int, int]:
    """Fold text (n,) from `start` on, up to the end or a character that `rows` does not know.

    rows: as in FoldTable; out: (n,) uint8, of which `written` bytes are in use. Returns how much was
    read and written, and the unknown code point.
    """
    at = start
    while at < len(text):
        # Decode one character of UTF-8; a byte that begins none is skipped.
        point = np.int64(text[at])
        size = 1
        if point >= 0x80:
            size = 2 + (point >= 0xE0) + (point >= 0xF0)
            if point < 0xC2 or point > 0xF4 or at + size > len(text):
                at += 1
                continue

            # Each further byte adds six bits.
            point &= 0xFF >> (size + 1)
            valid = True
            for k in range(1, size):
                following = np.int64(text[at + k])
                valid = valid and (following & 0xC0) == 0x80
                point = (point << 6) | (following & 0x3F)
            if not valid or point >= CODE_POINTS or 0xD800 <= point < 0xE000:
                at += 1
                continue

        # Write what it is folded to.
        count = np.int64(rows[point, 0])
        if count == 0:
            return at, written, point
        for k in range(1, count):
            out[written] = rows[point, k]
            written += 1
        at += size
    return at, written, 0


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
