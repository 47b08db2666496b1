"""Metric reporting: every target once, over the right bytes, and the reported number follows (B6, B11).

The bytes are counted here a second time and in another way than `stages.common.bpb` does: not from a table of pieces but from the decoded
text of each document. After BOS no space is counted, so a document that begins with one has one byte less than its text, unless the decoder
has dropped that space already, as one with a dummy prefix does.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import sentencepiece

from stages.audit.verdict import Verdict, outcome
from stages.common import shards
from stages.common.bpb import SPACE_MARKER, byte_table, target_bytes
from stages.common.ledger import CHUNK_COLUMNS

RELATIVE = 1.0e-12  # between two float64 sums of one set of numbers
ROUNDING = 1.0e-6  # the chunk table has six decimals
FUZZ = (
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


SizeOf = Callable[[np.ndarray, sentencepiece.SentencePieceProcessor], np.ndarray]


class DocumentBytes(NamedTuple):
    """Bytes of each document by its decoded text, (D,) int64, and whether the text held a replacement character."""

    counted: np.ndarray
    replaced: np.ndarray


def check_ledger(subject: str, ledger: np.ndarray, targets: int) -> Verdict:
    """B6: exactly N-1 losses, each a finite number that is not negative."""
    evidence, positions = (
        f"{len(ledger.reshape(-1))} losses for {targets} targets, all finite and not negative",
        (),
    )
    if ledger.dtype != np.float32 or ledger.shape != (targets,):
        evidence = f"the ledger holds {ledger.dtype} {ledger.shape}, expected float32 ({targets},): targets are missing or counted twice"
        holds = False
    else:
        bad = np.flatnonzero(~(np.isfinite(ledger) & (ledger >= 0)))
        holds = len(bad) == 0
        if not holds:
            evidence = f"{len(bad)} losses are negative or not finite, the first {ledger[bad[0]]} at target {bad[0] + 1}"
            positions = tuple((bad[:3] + 1).tolist())
    return Verdict(
        check="B6",
        name="coverage",
        subject=subject,
        conditions=("C4", "metric"),
        outcome=outcome(holds),
        evidence=evidence,
        saw=int(ledger.size),
        expected=targets,
        bound=0,
        positions=positions,
        sees="dropped tails, subsets, targets scored twice, losses that are none",
        blind="whether the losses are right (B1, B3, B4)",
    )


def check_reported(
    subject: str, ledger: np.ndarray | None, reported: Any, document_bytes: DocumentBytes
) -> Verdict:
    """B6 and B11: the reported bits per byte follow from the ledger and the decoded bytes."""
    total = int(document_bytes.counted.sum())
    recomputed = math.nan if ledger is None or not total else math.fsum(ledger.tolist()) / math.log(2) / total
    number = float(reported) if isinstance(reported, (int, float)) else math.nan
    holds = abs(number - recomputed) <= RELATIVE * abs(recomputed)
    return Verdict(
        check="B6",
        name="reported bits per byte",
        subject=subject,
        conditions=("metric",),
        outcome="cannot tell" if ledger is None else outcome(holds),
        evidence=f"reported {number!r}; from the ledger over {total} decoded bytes {recomputed!r}",
        saw=number,
        expected=recomputed,
        bound=RELATIVE,
        positions=(),
        sees="a number that is not the sum of its ledger, over other bytes, or rounded in its favour",
        blind="whether the losses are right (B1, B3, B4)",
    )


def check_chunks(subject: str, table: str, ledger: np.ndarray | None, target_bytes: np.ndarray) -> Verdict:
    """B6: the chunk table covers every target once, in order, and its figures follow from the ledger."""
    fault, first_bad, rows = "", 0, _rows(table)
    covered = 0
    for number, row in enumerate(rows or []):
        part = slice(covered, covered + int(row["targets"]))
        size = int(target_bytes[part].sum())
        if (row["chunk"], row["first_target"], row["bytes"]) != (number, covered, size) or row[
            "targets"
        ] <= 0:
            fault, first_bad = (
                f"chunk {number} is {row}, expected to begin at target {covered} with {size} bytes",
                covered,
            )
        elif (
            ledger is not None
            and size
            and abs(row["bpb"] - float(ledger[part].sum(dtype=np.float64)) / math.log(2) / size) > ROUNDING
        ):
            fault, first_bad = f"chunk {number} says {row['bpb']} bpb, its ledger does not", covered
        if fault:
            break
        covered += int(row["targets"])
    if rows is None:
        fault = f"the table has not the columns {', '.join(CHUNK_COLUMNS)}"
    elif not fault and covered != len(target_bytes):
        fault, first_bad = f"the chunks cover {covered} of {len(target_bytes)} targets", covered
    return Verdict(
        check="B6",
        name="chunk table",
        subject=subject,
        conditions=("C4", "metric"),
        outcome=outcome(not fault),
        evidence=fault or f"{len(rows or [])} chunks cover the targets in order, once, with their bytes",
        saw=covered,
        expected=len(target_bytes),
        bound=0,
        positions=(first_bad + 1,) if fault else (),
        sees="a table that leaves out, repeats or reorders targets",
        blind="whether chunks were processed in that order (B1)",
    )


def count_documents(tokens: np.ndarray, tokenizer: sentencepiece.SentencePieceProcessor) -> DocumentBytes:
    """The bytes of each document of a stream by decoding it."""
    strips = tokenizer.decode([tokenizer.piece_to_id(SPACE_MARKER)]) == ""
    counted, replaced = [], []
    for document in shards.documents(tokens, tokenizer.bos_id()):
        text: str = tokenizer.decode(document[1:].tolist())
        counted.append(len(text.encode("utf-8")) - (1 if text.startswith(" ") and not strips else 0))
        replaced.append("\ufffd" in text)
    return DocumentBytes(np.array(counted, dtype=np.int64), np.array(replaced, dtype=bool))


def check_denominator(
    tokens: np.ndarray, bos: int, target_bytes: np.ndarray, document_bytes: DocumentBytes
) -> Verdict:
    """B11: for each document, the bytes that bits are divided by are those of its decoded text."""
    starts = shards.document_starts(tokens, bos)
    per_document = np.add.reduceat(np.concatenate([[0], target_bytes]), starts)
    wrong = np.flatnonzero(per_document != document_bytes.counted)
    unreadable = bool(len(wrong)) and bool(document_bytes.replaced[wrong].all())
    evidence = f"{len(starts)} documents decode to {document_bytes.counted.sum()} bytes, as many as were counted for each"
    if len(wrong):
        first = int(wrong[0])
        evidence = (
            f"{len(wrong)} of {len(starts)} documents differ, the first number {first}: {per_document[first]} bytes counted, "
            f"{document_bytes.counted[first]} decoded"
        )
        if unreadable:
            evidence += "; all of them hold bytes that are no UTF-8, which decoding replaces"
    return Verdict(
        check="B11",
        name="denominator",
        subject="files",
        conditions=("metric",),
        outcome="cannot tell" if unreadable else outcome(not len(wrong)),
        evidence=evidence,
        saw=int(target_bytes.sum()),
        expected=int(document_bytes.counted.sum()),
        bound=0,
        positions=tuple(starts[wrong[:3]].tolist()),
        sees="spaces counted twice, byte-fallback pieces counted as three bytes, control tokens counted, another tokenizer",
        blind="text that the tokenizer lost before it was encoded; the manifest states it",
    )


def _sizes(tokens: np.ndarray, tokenizer: sentencepiece.SentencePieceProcessor) -> np.ndarray:
    return target_bytes(tokens, byte_table(tokenizer))


def check_table(
    tokenizer: sentencepiece.SentencePieceProcessor, texts: Sequence[str], size_of: SizeOf = _sizes
) -> Verdict:
    """B11 on awkward texts: for each, the counted bytes of its ids behind BOS are those of its decoded text.

    `size_of` gives the bytes of each target of a stream, (N-1,): the project's own unless another is to be judged.
    """
    wrong = []
    for text in texts:
        tokens = np.array([tokenizer.bos_id(), *tokenizer.encode(text)], dtype=np.int64)
        expected = int(count_documents(tokens, tokenizer).counted.sum())
        counted = int(size_of(tokens, tokenizer).sum())
        if counted != expected:
            wrong.append((text, counted, expected))
    evidence = f"{len(texts)} awkward texts (spaces, other scripts, control and private characters): all bytes counted once"
    if wrong:
        text, counted, expected = wrong[0]
        evidence = f"{len(wrong)} of {len(texts)} awkward texts are counted wrongly, the first {text!r}: {counted} bytes for {expected}"
    return Verdict(
        check="B11",
        name="awkward texts",
        subject="files",
        conditions=("metric",),
        outcome=outcome(not wrong),
        evidence=evidence,
        saw=wrong[0][1] if wrong else 0,
        expected=wrong[0][2] if wrong else 0,
        bound=0,
        positions=(),
        sees="byte tables that are right on common text only",
        blind="texts that were not tried",
    )


def _rows(table: str) -> list[dict[str, float]] | None:
    lines = [line.split("\t") for line in table.splitlines()]
    if not lines or tuple(lines[0]) != CHUNK_COLUMNS:
        return None
    return [_row(cells) for cells in lines[1:]]


def _row(cells: Sequence[str]) -> dict[str, float]:
    try:
        return dict(zip(CHUNK_COLUMNS, map(float, cells), strict=True))
    except ValueError as error:
        raise ValueError(
            f"the chunk table has the row {cells}, expected {len(CHUNK_COLUMNS)} numbers"
        ) from error
