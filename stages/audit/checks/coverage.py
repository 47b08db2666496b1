"""Metric reporting: every target once, over the right bytes, and a number that follows (B6, B11).

The bytes are counted here a second time, and not in the way of `stages.common.bpb`: from the decoded
text of each document instead of a table of pieces. A space right after BOS does not count, so a
document that begins with one has one byte less than its text, unless the decoder has already dropped
that space, as one with a dummy prefix does.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import sentencepiece

from stages.audit.verdict import Check, Numbers, Verdict
from stages.common import shards
from stages.common.bpb import SPACE_MARKER, byte_table, target_bytes
from stages.common.ledger import CHUNK_COLUMNS

NOT_LOSSES = "whether the losses are right (B1, B3, B4)"  # what no check of this module can detect
COVERAGE = Check(
    "B6",
    "coverage",
    conditions=("C4", "metric"),
    sees="dropped tails, subsets, targets scored twice, losses that are not numbers",
    blind=NOT_LOSSES,
)
REPORTED_BPB = Check(
    "B6",
    "reported bits per byte",
    conditions=("metric",),
    sees="a number that is not the sum of its ledger, over other bytes, or rounded in its favour",
    blind=NOT_LOSSES,
)
CHUNK_TABLE = Check(
    "B6",
    "chunk table",
    conditions=("C4", "metric"),
    sees="a table that leaves out, repeats or reorders targets",
    blind="whether chunks were processed in that order (B1)",
)
DENOMINATOR = Check(
    "B11",
    "denominator",
    conditions=("metric",),
    sees="spaces counted twice, byte-fallback pieces counted as three bytes, control tokens counted, "
    "another tokenizer",
    blind="text that the tokenizer lost before it was encoded; the manifest states it",
)
BYTE_TABLE = Check(
    "B11",
    "awkward texts",
    conditions=("metric",),
    sees="byte tables that are right on common text only",
    blind="texts that were not tried",
)
SUM_TOLERANCE = 1.0e-12  # relative, between two float64 sums of the same numbers
TABLE_TOLERANCE = 1.0e-6  # bits per byte: chunks.tsv has six decimals
AWKWARD_TEXTS = (  # spaces, other scripts, control characters, the tokenizer's space marker, private use
    "a",
    " a",
    "a  b",
    "\u00e9\u2603\U0001f600",
    "\t\r\n",
    "\u2581",
    "\ue000",
    "\x00",
    "na\u00efve 123",
    " ",
)

# Counts the bytes of each target of a stream (N,): (tokens, tokenizer) -> (N-1,) int64.
ByteCounter = Callable[[np.ndarray, sentencepiece.SentencePieceProcessor], np.ndarray]


class DocumentBytes(NamedTuple):
    """Bytes of the documents of a stream, counted by decoding."""

    counted: np.ndarray  # (D,) int64
    replaced: (
        np.ndarray
    )  # (D,) bool: the text holds a replacement character, so its bytes were not valid UTF-8


def check_ledger(subject: str, ledger: np.ndarray, targets: int) -> Verdict:
    """B6: the ledger holds exactly `targets` losses, each a finite number that is not negative."""
    # Shape first: without it the losses do not belong to targets.
    fault = ""
    positions: tuple[int, ...] = ()
    if ledger.dtype != np.float32 or ledger.shape != (targets,):
        fault = (
            f"the ledger holds {ledger.dtype} {ledger.shape}, expected float32 ({targets},): "
            "targets are missing or counted twice"
        )
    else:
        # One loss for each target: only their values can be wrong now.
        bad = np.flatnonzero(~(np.isfinite(ledger) & (ledger >= 0)))
        if len(bad):
            fault = (
                f"{len(bad)} losses are negative or not finite, "
                f"the first {ledger[bad[0]]} at target {bad[0] + 1}"
            )
            positions = tuple((bad[:3] + 1).tolist())

    # The numbers of losses and targets.
    evidence = fault or f"{ledger.size} losses for {targets} targets, all finite and not negative"
    numbers: Numbers = {"saw": ledger.size, "expected": targets, "bound": 0, "positions": positions}
    return Verdict.of(COVERAGE, subject, not fault, evidence, **numbers)


def check_reported(
    subject: str, ledger: np.ndarray | None, reported: Any, document_bytes: DocumentBytes
) -> Verdict:
    """B6: the reported bits per byte follow from the ledger (N-1,), in nats, and the decoded bytes."""
    total = int(document_bytes.counted.sum())
    recomputed = math.nan
    if ledger is not None and total:
        recomputed = math.fsum(ledger.tolist()) / math.log(2) / total
    number = float(reported) if isinstance(reported, (int, float)) else math.nan
    evidence = f"reported {number!r}; from the ledger over {total} decoded bytes {recomputed!r}"
    numbers: Numbers = {"saw": number, "expected": recomputed, "bound": SUM_TOLERANCE}
    if ledger is None:
        return Verdict.cannot_tell(REPORTED_BPB, subject, evidence, **numbers)
    holds = abs(number - recomputed) <= SUM_TOLERANCE * abs(recomputed)
    return Verdict.of(REPORTED_BPB, subject, holds, evidence, **numbers)


def check_chunks(
    subject: str, chunk_table: str, ledger: np.ndarray | None, target_bytes: np.ndarray
) -> Verdict:
    """B6: the text of chunks.tsv covers every target once, in order, and its figures follow from the ledger.

    ledger: (N-1,) float32 nats, or None without a complete one; target_bytes: (N-1,) int64.
    """
    # Follow the rows up to the first that is wrong.
    rows = _parse_chunk_table(chunk_table)
    fault = ""
    covered = 0  # targets of the rows that are right
    for number, row in enumerate(rows or []):
        fault = _chunk_fault(number, row, covered, ledger, target_bytes)
        if fault:
            break
        covered += int(row["targets"])

    # The whole: right columns, and all targets covered.
    first_bad = covered
    if rows is None:
        fault = f"the table lacks the columns {', '.join(CHUNK_COLUMNS)}"
        first_bad = 0
    elif not fault and covered != len(target_bytes):
        fault = f"the chunks cover {covered} of {len(target_bytes)} targets"

    return Verdict.of(
        CHUNK_TABLE,
        subject,
        not fault,
        fault or f"{len(rows or [])} chunks cover the targets in order, once, with their bytes",
        # The numbers of covered targets and of all.
        saw=covered,
        expected=len(target_bytes),
        bound=0,
        positions=(first_bad + 1,) if fault else (),
    )


def count_decoded_bytes(tokens: np.ndarray, tokenizer: sentencepiece.SentencePieceProcessor) -> DocumentBytes:
    """Count the bytes of each document of a stream (N,) by decoding it."""
    decoder_drops_space = tokenizer.decode([tokenizer.piece_to_id(SPACE_MARKER)]) == ""
    counted, replaced = [], []
    for document in shards.documents(tokens, tokenizer.bos_id()):
        text: str = tokenizer.decode(document[1:].tolist())
        uncounted_space = text.startswith(" ") and not decoder_drops_space
        counted.append(len(text.encode("utf-8")) - int(uncounted_space))
        replaced.append("\ufffd" in text)
    return DocumentBytes(np.array(counted, dtype=np.int64), np.array(replaced, dtype=bool))


def check_denominator(
    tokens: np.ndarray, bos: int, target_bytes: np.ndarray, document_bytes: DocumentBytes
) -> Verdict:
    """B11: for each document, the bytes that bits are divided by are those of its decoded text.

    tokens: (N,) uint16; target_bytes: (N-1,) int64.
    """
    # Compare document by document: in the sum over the stream two errors could cancel.
    starts = shards.document_starts(tokens, bos)
    per_document = np.add.reduceat(np.concatenate([[0], target_bytes]), starts)
    wrong = np.flatnonzero(per_document != document_bytes.counted)

    # Bytes of the whole stream.
    numbers: Numbers = {
        "saw": int(target_bytes.sum()),
        "expected": int(document_bytes.counted.sum()),
        "bound": 0,
        "positions": tuple(starts[wrong[:3]].tolist()),
    }

    evidence = (
        f"{len(starts)} documents decode to {document_bytes.counted.sum()} bytes, "
        "the same number as was counted for each"
    )
    if len(wrong):
        first = int(wrong[0])
        evidence = (
            f"{len(wrong)} of {len(starts)} documents differ, the first number {first}: "
            f"{per_document[first]} bytes counted, {document_bytes.counted[first]} decoded"
        )
        # A document of bytes that are not UTF-8 cannot be counted by decoding.
        if document_bytes.replaced[wrong].all():
            evidence += "; all of them hold bytes that are not UTF-8, which decoding replaces"
            return Verdict.cannot_tell(DENOMINATOR, "files", evidence, **numbers)

    return Verdict.of(DENOMINATOR, "files", not len(wrong), evidence, **numbers)


def check_table(
    tokenizer: sentencepiece.SentencePieceProcessor,
    texts: Sequence[str],
    count_bytes: ByteCounter | None = None,
) -> Verdict:
    """B11 on awkward texts: the bytes counted for the ids of each text are those of its decoded text.

    count_bytes: the counter to test; the project's own by default.
    """
    # Count each text in both ways.
    count_bytes = count_bytes or _count_by_table
    wrong = []
    for text in texts:
        tokens = np.array([tokenizer.bos_id(), *tokenizer.encode(text)], dtype=np.int64)
        expected = int(count_decoded_bytes(tokens, tokenizer).counted.sum())
        counted = int(count_bytes(tokens, tokenizer).sum())
        if counted != expected:
            wrong.append((text, counted, expected))

    # Report the first that is wrong.
    evidence = (
        f"{len(texts)} awkward texts (spaces, other scripts, control and private characters): "
        "all bytes counted once"
    )
    if wrong:
        text, counted, expected = wrong[0]
        evidence = (
            f"{len(wrong)} of {len(texts)} awkward texts are counted wrongly, "
            f"the first {text!r}: {counted} bytes for {expected}"
        )

    return Verdict.of(
        BYTE_TABLE,
        "files",
        not wrong,
        evidence,
        # Bytes of that text.
        saw=wrong[0][1] if wrong else 0,
        expected=wrong[0][2] if wrong else 0,
        bound=0,
    )


def _count_by_table(tokens: np.ndarray, tokenizer: sentencepiece.SentencePieceProcessor) -> np.ndarray:
    return target_bytes(tokens, byte_table(tokenizer))


def _chunk_fault(
    number: int, row: dict[str, float], first_target: int, ledger: np.ndarray | None, target_bytes: np.ndarray
) -> str:
    """Compare a row of chunks.tsv with the targets it should cover; returns "" if it is right."""
    span = slice(first_target, first_target + int(row["targets"]))
    size = int(target_bytes[span].sum())
    is_expected = row["chunk"] == number and row["first_target"] == first_target and row["bytes"] == size
    if not is_expected or row["targets"] <= 0:
        return f"chunk {number} is {row}, expected to begin at target {first_target} with {size} bytes"
    if ledger is not None and size:
        bpb = float(ledger[span].sum(dtype=np.float64)) / math.log(2) / size
        if abs(row["bpb"] - bpb) > TABLE_TOLERANCE:
            return f"chunk {number} says {row['bpb']} bpb, its ledger does not"
    return ""


def _parse_chunk_table(table: str) -> list[dict[str, float]] | None:
    """Parse chunks.tsv; None if its columns are others, a ValueError if a row does not consist of numbers."""
    lines = [line.split("\t") for line in table.splitlines()]
    if not lines or tuple(lines[0]) != CHUNK_COLUMNS:
        return None
    rows = []
    for cells in lines[1:]:
        try:
            rows.append(dict(zip(CHUNK_COLUMNS, map(float, cells), strict=True)))
        except ValueError as error:
            raise ValueError(
                f"the chunk table has the row {cells}, expected {len(CHUNK_COLUMNS)} numbers"
            ) from error
    return rows
