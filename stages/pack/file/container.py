"""The file format of model.bin.

    offset  bytes
    0       8     magic
    8       4     version, little-endian
    12      32    sha256 of everything after it
    44      4     H, length of the compressed header
    48      H     header: brotli over canonical JSON
    48+H          streams, one after another, in the header's order, to the end of the file

    header  {"model": {...}, "tensors": [{"name", "shape", "form": [kind, size, rank], "streams": [{"codec", "bytes"}, ...]}, ...]}

The form says what the streams decode to:

    ["float16", 16, 0]     the values
    ["rows", bits, K]      int8 values row by row; float16 steps, one for each row
    ["groups", bits, K]    the same, and a byte for each group of 64 columns: 1 where steps are as much finer as makes 8 bits of the values
    ["lattice", states, K] int16 levels row by row, which follow a trellis of so many states; a float32 step; a signed byte for each row;
                           one for each column: exponents (pack/quantise/trellis_quantiser.py). The adaptive codec of the levels needs
                           these.

and, where K is above 0, a correction of that rank: K rows of int8, each a column of the one factor and a row of the other; K float32 steps
(pack/low_rank.py).

How long a stream is when decoded follows from form and shape, so that no length can contradict another.

The checksum catches damage; it cannot catch malice, so a reader believes nothing: the header must be exactly the canonical bytes of what it
says, within the limits below, and all is checked before anything is decoded. What is wrong is a ValueError.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, NoReturn, get_args

from stages.pack.entropy import codecs as codec
from stages.pack.entropy import delta_coder
from stages.pack.entropy.codecs import Layout
from stages.pack.low_rank import MAX_RANK
from stages.pack.trellis import STATES

MAGIC = b"\x89CADDIE\n"
VERSION = 5
CHECKSUM_START = len(MAGIC) + 4
HEADER_START = CHECKSUM_START + 32
MAX_HEADER_BYTES = 1 << 20  # decompressed; a record-size header takes 20 kB
MAX_TENSORS = 5_000  # a hundred and odd in the record's model
MAX_DIMENSIONS = 4
MAX_SIDE = 1 << 20  # of a dimension: a decoder keeps a few numbers for each column
MAX_RAW_BYTES = 1 << 28  # of all decoded streams together: seven times the record's model
MAX_DIGITS = 15  # of an integer in the header
NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
MAX_NAME_LENGTH = 200


GROUP_COLUMNS = 64  # of AWQ-lite (#1908)
FormKind = Literal["float16", "rows", "groups", "lattice"]
FORM_KINDS: tuple[FormKind, ...] = get_args(FormKind)


class Form(NamedTuple):
    """How a tensor's values are kept."""

    kind: FormKind
    size: int  # bits of a value, or states of the trellis
    rank: int = 0  # of the correction that is added


@dataclass(frozen=True)
class Stream:
    """Encoded bytes and the name of their codec."""

    codec: str
    payload: bytes


@dataclass(frozen=True)
class Entry:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    form: Form
    streams: tuple[Stream, ...]

    @property
    def payload_bytes(self) -> int:
        """Bytes of the file that are this tensor's."""
        return sum(len(stream.payload) for stream in self.streams)


@dataclass(frozen=True)
class Contents:
    """What a file holds: the model's parameters as they were written, and the tensors, still encoded."""

    model: Mapping[str, Any]
    entries: tuple[Entry, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, by name."""
        return {entry.name: entry.shape for entry in self.entries}


def layouts(form: Form, shape: Sequence[int]) -> tuple[Layout, ...]:
    """What the streams of a tensor decode to."""
    if form.kind == "float16":
        size = math.prod(shape)
        return (Layout(2, 1, size, kind="series" if size <= delta_coder.LONGEST else "bytes"),)
    rows, columns = shape
    correction = (
        (Layout(1, form.rank, rows + columns, kind="matrix"), Layout(4, 1, form.rank)) if form.rank else ()
    )
    if form.kind == "lattice":
        exponents = Layout(1, 1, rows, kind="series"), Layout(1, 1, columns, kind="series")
        return Layout(2, rows, columns, form.size, kind="matrix"), Layout(4, 1, 1), *exponents, *correction
    groups = (Layout(1, 1, -(-columns // GROUP_COLUMNS)),) if form.kind == "groups" else ()
    return Layout(1, rows, columns, kind="matrix"), Layout(2, 1, rows, kind="series"), *groups, *correction


def write(contents: Contents) -> bytes:
    """The file's bytes; the same contents give the same bytes. Contents beyond the limits of `read` are a ValueError."""
    described = _header(contents)
    _records(described["tensors"])
    header = codec.deflate(_canonical(described), 11)
    streams = [stream.payload for entry in contents.entries for stream in entry.streams]
    covered = b"".join([len(header).to_bytes(4, "little"), header, *streams])
    return b"".join([MAGIC, VERSION.to_bytes(4, "little"), hashlib.sha256(covered).digest(), covered])


def read(blob: bytes) -> Contents:
    """Check the file and cut it into its encoded streams; a ValueError when it is not whole and well-formed."""
    covered = _check_frame(blob)
    header_end = 4 + int.from_bytes(covered[:4], "little")
    if header_end > len(covered):
        _refuse("its header is longer than the file")
    header = _parse(_inflate_header(covered[4:header_end]))
    _check_keys(header, ("model", "tensors"), "the header")
    if not isinstance(header["model"], dict):
        _refuse("its model parameters are not a mapping")
    entries = _cut(_records(header["tensors"]), covered[header_end:])
    return Contents(header["model"], entries)


def encode_streams(
    form: Form, shape: Sequence[int], raw: Sequence[bytes], family: str, quality: int
) -> tuple[Stream, ...]:
    """A tensor's streams from their raw bytes, by the codecs of a family (pack/entropy/codecs.py); `quality` is brotli's."""
    first, *others = layouts(form, shape)
    every = _informed(form, first, raw[1:]), *others
    return tuple(
        Stream(*codec.shortest(family, stream, of, quality)) for stream, of in zip(raw, every, strict=True)
    )


def decode_streams(entry: Entry) -> tuple[bytes, ...]:
    """The raw bytes of each stream of a tensor."""
    try:
        (first, *others), (layout, *others_layouts) = entry.streams, layouts(entry.form, entry.shape)
        side = [
            codec.decode(stream.codec, stream.payload, of)
            for stream, of in zip(others, others_layouts, strict=True)
        ]
        return codec.decode(first.codec, first.payload, _informed(entry.form, layout, side)), *side
    except ValueError as error:
        raise ValueError(f"damaged model file: tensor {entry.name}: {error}") from error


def _informed(form: Form, first: Layout, side: Sequence[bytes]) -> Layout:
    """What the first stream decodes to, knowing the others: levels on a lattice know its exponents."""
    return replace(first, exponents=side[1] + side[2]) if form.kind == "lattice" else first


def _header(contents: Contents) -> dict[str, Any]:
    tensors = [
        {
            "name": entry.name,
            "shape": list(entry.shape),
            "form": list(entry.form),
            "streams": [{"codec": stream.codec, "bytes": len(stream.payload)} for stream in entry.streams],
        }
        for entry in contents.entries
    ]
    return {"model": dict(contents.model), "tensors": tensors}


def _canonical(header: Any) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _check_frame(blob: bytes) -> bytes:
    """What the checksum covers, once magic, version and checksum are right."""
    if blob[: len(MAGIC)] != MAGIC:
        raise ValueError(f"not a model file: it begins with {blob[: len(MAGIC)]!r}, expected {MAGIC!r}")
    if len(blob) < HEADER_START + 4:
        _refuse(f"it ends after {len(blob)} bytes")
    version = int.from_bytes(blob[len(MAGIC) : CHECKSUM_START], "little")
    if version != VERSION:
        raise ValueError(f"model file of version {version}; this program reads version {VERSION}")
    covered = blob[HEADER_START:]
    if hashlib.sha256(covered).digest() != blob[CHECKSUM_START:HEADER_START]:
        _refuse("its sha256 does not match; copy it again, or make it again with `dvc repro pack`")
    return covered


def _inflate_header(payload: bytes) -> bytes:
    try:
        return codec.inflate(payload, MAX_HEADER_BYTES)
    except ValueError as error:
        raise ValueError(f"damaged model file: header: {error}") from error


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("ascii"), parse_int=_small_integer)
        canonical = _canonical(header)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"damaged model file: its header is not lawful JSON: {error}") from error
    if canonical != raw or not isinstance(header, dict):
        _refuse("its header is not a mapping in canonical form")
    return header


def _small_integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _records(tensors: Any) -> list[dict[str, Any]]:
    """The records of the tensors, checked one by one and together."""
    if not isinstance(tensors, list) or len(tensors) > MAX_TENSORS:
        _refuse(f"its tensors are not a list of at most {MAX_TENSORS}")
    seen: set[str] = set()
    raw_bytes = 0
    for record in tensors:
        _check_record(record)
        if record["name"] in seen:
            _refuse(f"tensor {record['name']} appears twice")
        seen.add(record["name"])
        raw_bytes += sum(layout.raw_bytes for layout in layouts(Form(*record["form"]), record["shape"]))
        if raw_bytes > MAX_RAW_BYTES:
            _refuse(f"its tensors declare more than {MAX_RAW_BYTES} bytes")
    return tensors


def _check_record(record: Any) -> None:
    _check_keys(record, ("name", "shape", "form", "streams"), "the record of a tensor")
    name, shape, form, streams = (record[key] for key in ("name", "shape", "form", "streams"))
    if not isinstance(name, str) or len(name) > MAX_NAME_LENGTH or not NAME.fullmatch(name):
        _refuse("the name of a tensor is not words joined by dots")
    if not isinstance(form, list) or len(form) != 3 or not _is_form(*form):
        _refuse(f"tensor {name} is kept in an impossible form")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not all(_is_size(size) and size <= MAX_SIDE for size in shape)
    ):
        _refuse(f"the shape of tensor {name} is not a list of at most {MAX_DIMENSIONS} sizes")
    if form[0] != "float16" and len(shape) != 2:
        _refuse(f"tensor {name} is quantised and has {len(shape)} dimensions, expected 2")
    expected = len(layouts(Form(*form), shape))
    if not isinstance(streams, list) or len(streams) != expected:
        _refuse(f"tensor {name} does not have {expected} streams")
    for stream in streams:
        _check_keys(stream, ("codec", "bytes"), f"a stream of tensor {name}")
        if not isinstance(stream["codec"], str) or stream["codec"] not in codec.CODECS:
            _refuse(f"a stream of tensor {name} has an unknown codec; known are {', '.join(codec.CODECS)}")
        if not _is_size(stream["bytes"]):
            _refuse(f"a stream of tensor {name} has an impossible length")


def _cut(records: list[dict[str, Any]], body: bytes) -> tuple[Entry, ...]:
    declared = sum(stream["bytes"] for record in records for stream in record["streams"])
    if declared != len(body):
        _refuse(f"its streams take {len(body)} bytes, the header declares {declared}")
    entries, position = [], 0
    for record in records:
        streams = []
        for stream in record["streams"]:
            streams.append(Stream(stream["codec"], body[position : position + stream["bytes"]]))
            position += stream["bytes"]
        entries.append(Entry(record["name"], tuple(record["shape"]), Form(*record["form"]), tuple(streams)))
    return tuple(entries)


def _is_form(kind: Any, size: Any, rank: Any) -> bool:
    if type(size) is not int or type(rank) is not int or kind not in FORM_KINDS:
        return False
    if not 0 <= rank <= (0 if kind == "float16" else MAX_RANK):
        return False
    return {
        "float16": size == 16,
        "rows": 2 <= size <= 8,
        "groups": 2 <= size <= 7,
        "lattice": size in STATES,
    }[kind]


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_RAW_BYTES


def _check_keys(value: Any, keys: tuple[str, ...], what: str) -> None:
    if not isinstance(value, dict) or set(value) != set(keys):
        _refuse(f"{what} does not have exactly the keys {', '.join(keys)}")


def _refuse(what: str) -> NoReturn:
    raise ValueError(f"damaged model file: {what}")
