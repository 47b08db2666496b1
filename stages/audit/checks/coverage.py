"""Metric reporting: every target once, over the right bytes, and a number that follows (B6, B11).

The bytes are counted here a second time, and not in the way of `stages.common.bpb`: from the decoded
text of each document instead of a table of pieces. A space right after BOS does not count, so a
document that begins with one has one byte less than its text, unless the decoder has already dropped
that space, as one with a dummy prefix does.

A tokenizer may change the text before it cuts it into pieces, so the decoded text need not be the
original one. With the original text each document is compared with it (`check_text`); without it the
tokenizer alone can be examined (`check_normaliser`): no rule of it may make a text longer, except the
rules of Unicode's normalisation, such as "1" "\u2044" "2" for the one character of a half.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import sentencepiece

from stages.audit.checks import tokenizer_model
from stages.audit.verdict import Check, Numbers, Verdict, Words
from stages.common import challenge, shards
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
NORMALISER = Check(
    "B11",
    "normaliser adds no bytes",
    conditions=("metric",),
    sees="rules of the tokenizer that make a text longer, in its table and by encoding texts",
    blind="a text that was changed before it was tokenized: the original text shows that",
)
TEXT = Check(
    "B11",
    "original text",
    conditions=("metric",),
    sees="counted bytes that the text does not have; documents changed, shortened, or of another text",
    blind="whether the given text is the challenge's",
    words=Words(expected="the bytes of the original text"),
)
OFFICIAL_TOTALS = Check(
    "B11",
    "official totals",
    conditions=("metric", "C4"),
    sees="a part of the validation set as the whole, bytes of a transformed text",
    blind="which text it is that has these totals",
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

MAX_SAMPLED_PIECES = 20_000  # texts of pieces that the normaliser is tried on
PRINTABLE = [chr(code) for code in range(0x20, 0x7F)]  # ASCII
# Characters that a tokenizer may drop or turn into a space: spaces, controls, marks of direction and width,
# the replacement character, and SentencePiece's marker.
NOT_COMPARED = re.compile(
    "[\\s\x00-\x1f\x7f-\x9f\u00ad\u115f\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff0-\ufffd\u2581]+"
)
CUT_BYTES = 65_536  # of the validation text that a cut to whole windows may leave out, on eight GPUs

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


def check_normaliser(tokens: np.ndarray, tokenizer: sentencepiece.SentencePieceProcessor) -> Verdict:
    """B11: the tokenizer makes no text longer, as far as Unicode's normalisation does not.

    Its rules are read from its file, and texts are encoded: ASCII letters, their pairs, and the pieces
    of the stream (N,).
    """
    # Rules that lengthen: only those of Unicode are lawful.
    unreadable = ""
    added: list[tuple[str, int, int]] = []
    rules = tokenizer_model.NormaliserRules(0, (), 0)
    try:
        rules = tokenizer_model.normaliser_rules(tokenizer.serialized_model_proto())
    except ValueError as error:
        unreadable = f"the table of its rules cannot be followed: {error}"
    for rule in rules.lengthening:
        if not tokenizer_model.is_unicode_rule(rule):
            key = rule.key.decode("utf-8", "replace")
            added.append((key, len(rule.replacement), len(rule.key)))

    # Texts, encoded: a pair can have a rule of its own.
    texts = [*PRINTABLE, *(first + second for first in PRINTABLE for second in PRINTABLE)]
    pieces = np.unique(tokens)[:MAX_SAMPLED_PIECES].tolist()
    texts += [tokenizer.id_to_piece(i).replace(SPACE_MARKER, " ") for i in pieces if _is_text(tokenizer, i)]

    # The bytes of their ids, against their own.
    encoded = [np.array([tokenizer.bos_id(), *ids], dtype=np.int64) for ids in tokenizer.encode(texts)]
    table = byte_table(tokenizer)
    for text, ids in zip(texts, encoded, strict=True):
        counted = int(target_bytes(ids, table).sum())
        allowed = longest_form(text)
        if counted > allowed:
            added.append((text, counted, allowed))

    # A text that grows convicts, whatever else is known.
    if added:
        text, counted, allowed = added[0]
        evidence = (
            f"the tokenizer turns {text!r} into {counted} bytes, it has {allowed}: bytes are added to text"
        )
        return Verdict.failed(NORMALISER, "files", evidence, saw=counted, expected=allowed, bound=0)
    if unreadable:
        return Verdict.cannot_tell(NORMALISER, "files", unreadable)

    evidence = (
        f"{rules.count} rules of the tokenizer, of which {len(rules.lengthening)} make a text longer, all "
        f"as Unicode's normalisation does; {len(texts)} texts were encoded, none has more bytes"
    )
    return Verdict.passed(NORMALISER, "files", evidence, saw=0, expected=0, bound=0)


def check_text(
    tokens: np.ndarray,
    target_bytes: np.ndarray,
    tokenizer: sentencepiece.SentencePieceProcessor,
    texts: Iterable[str],
) -> Verdict:
    """B11: the documents of the stream are these texts, and are counted with no more bytes than they have.

    tokens: (N,); target_bytes: (N-1,) int64; texts: of the documents in stream order; more may follow.
    A document may lose white space, control characters, and what Unicode's normalisation changes.
    """
    starts = shards.document_starts(tokens, tokenizer.bos_id())
    per_document = np.add.reduceat(np.concatenate([[0], target_bytes]), starts).tolist()
    decoder_drops_space = tokenizer.decode([tokenizer.piece_to_id(SPACE_MARKER)]) == ""

    # Each document: its text, then its bytes.
    faults: list[tuple[int, str]] = []
    normalised, untold = 0, 0
    counted_total, original_total = 0, 0
    originals = iter(texts)
    for number, document in enumerate(shards.documents(tokens, tokenizer.bos_id())):
        text = next(originals, None)
        if text is None:
            faults.append((number, f"the text has {number} documents, the stream {len(starts)}"))
            break
        decoded: str = tokenizer.decode(document[1:].tolist())
        size, counted = len(text.encode("utf-8")), per_document[number]
        is_last = number == len(starts) - 1

        # Equal, equal but for what a tokenizer may lose, or cut at the end of the stream.
        if decoded == text:
            size -= int(text.startswith(" ") and not decoder_drops_space)
            if counted != size:
                faults.append((number, f"{counted} bytes counted, its text has {size}"))
        elif same_text(decoded, text, is_last):
            normalised += 1
        elif same_text(_without_case(decoded), _without_case(text), is_last):
            untold += 1
        else:
            faults.append((number, "its tokens decode to another text"))

        # The bytes, of which even a normalised text has no more.
        if counted > longest_form(text):
            faults.append((number, f"{counted} bytes counted, its text has {size}"))
        counted_total += counted
        original_total += size

    # The sum: what normalisation adds to one document it takes from others.
    if not faults and counted_total > original_total:
        faults.append((0, f"{counted_total} bytes counted in all, the text has {original_total}"))

    # The bytes of all documents, and where the first that are wrong begin.
    numbers: Numbers = {
        "saw": counted_total,
        "expected": original_total,
        "bound": 0,
        "positions": tuple(int(starts[number]) for number, _ in faults[:3]),
    }
    if faults:
        number, fault = faults[0]
        evidence = f"{len(faults)} of {len(starts)} documents are wrong, the first number {number}: {fault}"
        return Verdict.failed(TEXT, "files", evidence, **numbers)

    # A text in other letters may be complete or not: its author has to show how it is restored.
    if untold:
        evidence = (
            f"{untold} of {len(starts)} documents decode to their text only if case and private marks are "
            "left out of account; that the text can be restored is not shown"
        )
        return Verdict.cannot_tell(TEXT, "files", evidence, **numbers)
    lossy = f"; {normalised} lost white space or were normalised" if normalised else ""
    evidence = (
        f"{len(starts)} documents decode to the given text, {counted_total} bytes counted of "
        f"{original_total}{lossy}"
    )
    return Verdict.passed(TEXT, "files", evidence, **numbers)


def check_official(tokens: int, documents: int, counted_bytes: int) -> Verdict:
    """B11: a stream of the challenge's validation set has its documents, and its tokens and bytes.

    The totals of tokenizers that are not known are held against the bytes of the text alone.
    """
    # The bytes that a stream of N tokens must have, from the smallest number to the largest.
    text_bytes = challenge.VALIDATION_TEXT_BYTES
    known = {
        challenge.VALIDATION_TOKENS: (challenge.VALIDATION_BYTES, text_bytes),
        challenge.VALIDATION_TARGETS + 1: (challenge.VALIDATION_BYTES, challenge.VALIDATION_BYTES),
        challenge.CASEOPS_VALIDATION_TARGETS + 1: (challenge.CASEOPS_VALIDATION_BYTES, text_bytes),
    }
    least, most = known.get(tokens, (text_bytes - CUT_BYTES, text_bytes))

    holds = documents == challenge.VALIDATION_DOCUMENTS and least <= counted_bytes <= most
    evidence = (
        f"{tokens} tokens of {documents} documents and {counted_bytes} bytes; the validation set has "
        f"{challenge.VALIDATION_DOCUMENTS} documents and, in a stream of that length, {least} to {most} bytes"
    )
    return Verdict.of(
        OFFICIAL_TOTALS, "files", holds, evidence, saw=counted_bytes, expected=most, bound=most - least
    )


def longest_form(text: str) -> int:
    """Count the UTF-8 bytes of a text, or of its normalised form if that is longer."""
    return max(len(form.encode("utf-8")) for form in (text, *tokenizer_model.unicode_forms(text)))


def same_text(decoded: str, original: str, may_be_cut: bool = False) -> bool:
    """Compare two texts in NFKC without the characters that a tokenizer may lose."""
    found, expected = _comparable(decoded), _comparable(original)
    return expected.startswith(found) if may_be_cut else expected == found


def _comparable(text: str) -> str:
    composed = unicodedata.normalize("NFKC", NOT_COMPARED.sub("", text))
    return NOT_COMPARED.sub("", composed)


def _without_case(text: str) -> str:
    """Fold case, and drop characters of private use, by which transformed texts mark capitals."""
    return re.sub("[\ue000-\uf8ff]", "", text).casefold()


def _is_text(tokenizer: sentencepiece.SentencePieceProcessor, i: int) -> bool:
    """Tell if an id is a piece of text, not a byte or a control piece."""
    return not (
        tokenizer.is_byte(i) or tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i)
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
