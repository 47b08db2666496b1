"""The file format of model.bin: serialises and parses the file, encodes and decodes its streams.

    offset  bytes
    0       8     magic
    8       4     version, little-endian
    12      32    sha256 of everything after it
    44      4     H, length of the compressed header
    48      H     header: brotli over canonical JSON
    48+H          streams, one after another, in the header's order, to the end of the file

    header  {"model": {parameter: value, ...}, "tensors": [tensor, ...]}
    tensor  {"name": ..., "shape": [...], "form": [kind, bits_or_states, rank], "streams": [stream, ...]}
    stream  {"codec": ..., "bytes": encoded length}

The form says what the streams of a tensor decode to:

    ["float16", 16, 0]      the values
    ["rows", bits, K]       int8 values row by row; float16 steps, one for each row
    ["groups", bits, K]     the same, and a byte for each group of 64 columns: 1 where the steps are
                            2^(8 - bits) times finer, so that the values have 8 bits
    ["lattice", states, K]  int16 levels row by row, which follow a trellis with that number of
                            states; a float32 step; the exponents of the rows, then those of the
                            columns, each a signed byte (pack/quantise/trellis_quantiser.py). The
                            adaptive codec needs the exponents to decode the levels.

If K is above 0, a low-rank correction follows (pack/low_rank.py): K rows of int8, each a column of
one factor and then a row of the other; K float32 steps.

The decoded length of a stream follows from form and shape, so that no declared length can
contradict another.

The checksum catches damage, not malice, so a reader trusts nothing: the header must be exactly the
canonical bytes of its own content, within the limits below, and everything is checked before
anything is decoded. Every fault is a ValueError.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, NoReturn, get_args

from stages.pack.entropy import codecs, delta_coder
from stages.pack.entropy.codecs import StreamLayout
from stages.pack.low_rank import MAX_RANK
from stages.pack.trellis import STATE_COUNTS

MAGIC = b"\x89CADDIE\n"
VERSION = 5
CHECKSUM_START = len(MAGIC) + 4
HEADER_START = CHECKSUM_START + 32  # of the header's length; the checksum covers everything from here on

# Limits of what a reader accepts.
MAX_HEADER_BYTES = 1 << 20  # decompressed; the header of a record-size model takes 20 kB
MAX_TENSORS = 5_000  # the record's model has a little over a hundred
MAX_DIMENSIONS = 4
MAX_SIDE = 1 << 20  # size of one dimension; a decoder keeps a few numbers for each column
MAX_RAW_BYTES = 1 << 28  # all decoded streams together: seven times the record's model
MAX_DIGITS = 15  # decimal digits of an integer in the header
MAX_NAME_LENGTH = 200
NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")

HEADER_QUALITY = 11  # brotli's best; the header is small
GROUP_COLUMNS = 64  # columns that share one flag in the form "groups" (AWQ-lite, #1908)
FormKind = Literal["float16", "rows", "groups", "lattice"]
FORM_KINDS: tuple[FormKind, ...] = get_args(FormKind)


class Form(NamedTuple):
    """The way in which a tensor's values are stored."""

    kind: FormKind
    bits_or_states: int  # bits of a value; for "lattice" the number of states of the trellis
    rank: int = 0  # K, rank of the low-rank correction; 0 is none


@dataclass(frozen=True)
class EncodedStream:
    """Encoded bytes and the name of their codec."""

    codec: str
    payload: bytes


@dataclass(frozen=True)
class EncodedTensor:
    """One tensor of the file, still encoded."""

    name: str
    shape: tuple[int, ...]
    form: Form
    streams: tuple[EncodedStream, ...]

    @property
    def payload_bytes(self) -> int:
        """Bytes of the file that hold this tensor's streams."""
        return sum(len(stream.payload) for stream in self.streams)


@dataclass(frozen=True)
class Contents:
    """The content of a file: the model parameters as they were written, and the encoded tensors."""

    model: Mapping[str, Any]
    tensors: tuple[EncodedTensor, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, by name."""
        return {tensor.name: tensor.shape for tensor in self.tensors}


def layouts(form: Form, shape: Sequence[int]) -> tuple[StreamLayout, ...]:
    """Layouts of a tensor's decoded streams, in the order of the file."""
    if form.kind == "float16":
        size = math.prod(shape)
        return (StreamLayout(2, 1, size, kind="series" if size <= delta_coder.MAX_NUMBERS else "bytes"),)

    rows, columns = shape
    correction: tuple[StreamLayout, ...] = ()
    if form.rank:
        correction = StreamLayout(1, form.rank, rows + columns, kind="matrix"), StreamLayout(4, 1, form.rank)

    if form.kind == "lattice":
        levels = StreamLayout(2, rows, columns, form.bits_or_states, kind="matrix")
        step = StreamLayout(4, 1, 1)
        exponents = StreamLayout(1, 1, rows, kind="series"), StreamLayout(1, 1, columns, kind="series")
        return levels, step, *exponents, *correction

    values = StreamLayout(1, rows, columns, kind="matrix")
    steps = StreamLayout(2, 1, rows, kind="series")
    groups = (StreamLayout(1, 1, -(-columns // GROUP_COLUMNS)),) if form.kind == "groups" else ()
    return values, steps, *groups, *correction


def serialise(contents: Contents) -> bytes:
    """Make the file's bytes, a pure function of the contents.

    Raises ValueError for contents that `parse` would reject.
    """
    header = _header(contents)
    _check_records(header["tensors"])
    compressed = codecs.brotli_compress(_canonical(header), HEADER_QUALITY)
    streams = [stream.payload for tensor in contents.tensors for stream in tensor.streams]
    covered = b"".join([len(compressed).to_bytes(4, "little"), compressed, *streams])
    return b"".join([MAGIC, VERSION.to_bytes(4, "little"), hashlib.sha256(covered).digest(), covered])


def parse(blob: bytes) -> Contents:
    """Check a file and split it into its encoded streams.

    Raises ValueError when it is truncated or malformed.
    """
    covered = _check_frame(blob)
    header_end = 4 + int.from_bytes(covered[:4], "little")
    if header_end > len(covered):
        _raise_damaged("its header is longer than the file")
    header = _parse_header(_decompress_header(covered[4:header_end]))
    _check_keys(header, ("model", "tensors"), "the header")
    if not isinstance(header["model"], dict):
        _raise_damaged("its model parameters are not a mapping")
    tensors = _split_streams(_check_records(header["tensors"]), covered[header_end:])
    return Contents(header["model"], tensors)


def encode_streams(
    form: Form, shape: Sequence[int], raw: Sequence[bytes], family: str, quality: int
) -> tuple[EncodedStream, ...]:
    """Encode a tensor's streams from their raw bytes, each by the shortest codec of a family.

    `quality` is brotli's, 0 to 11.
    """
    first, *others = layouts(form, shape)
    raw_layouts = _with_exponents(form, first, raw[1:]), *others
    return tuple(
        EncodedStream(*codecs.encode_shortest(family, stream, layout, quality))
        for stream, layout in zip(raw, raw_layouts, strict=True)
    )


def decode_streams(tensor: EncodedTensor) -> tuple[bytes, ...]:
    """Decode a tensor's streams to their raw bytes.

    Raises ValueError, which names the tensor, when one is damaged.
    """
    try:
        first, *others = tensor.streams
        first_layout, *other_layouts = layouts(tensor.form, tensor.shape)
        # The first stream last: levels on a trellis can only be decoded with the exponents, which
        # are other streams.
        decoded = [
            codecs.decode(stream.codec, stream.payload, layout)
            for stream, layout in zip(others, other_layouts, strict=True)
        ]
        first_layout = _with_exponents(tensor.form, first_layout, decoded)
        return codecs.decode(first.codec, first.payload, first_layout), *decoded
    except ValueError as error:
        raise ValueError(f"damaged model file: tensor {tensor.name}: {error}") from error


def _with_exponents(form: Form, first: StreamLayout, others: Sequence[bytes]) -> StreamLayout:
    """Add the exponents of rows and columns, from the other streams, to the layout of trellis levels."""
    return replace(first, exponents=others[1] + others[2]) if form.kind == "lattice" else first


def _header(contents: Contents) -> dict[str, Any]:
    tensors = [
        {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "form": list(tensor.form),
            "streams": [{"codec": stream.codec, "bytes": len(stream.payload)} for stream in tensor.streams],
        }
        for tensor in contents.tensors
    ]
    return {"model": dict(contents.model), "tensors": tensors}


def _canonical(header: Any) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _check_frame(blob: bytes) -> bytes:
    """Check magic, version and checksum; returns the bytes that the checksum covers."""
    if blob[: len(MAGIC)] != MAGIC:
        raise ValueError(f"not a model file: it begins with {blob[: len(MAGIC)]!r}, expected {MAGIC!r}")
    if len(blob) < HEADER_START + 4:
        _raise_damaged(f"it ends after {len(blob)} bytes")
    version = int.from_bytes(blob[len(MAGIC) : CHECKSUM_START], "little")
    if version != VERSION:
        raise ValueError(f"model file of version {version}; this program reads version {VERSION}")
    covered = blob[HEADER_START:]
    if hashlib.sha256(covered).digest() != blob[CHECKSUM_START:HEADER_START]:
        _raise_damaged("its sha256 does not match; copy it again, or make it again with `dvc repro pack`")
    return covered


def _decompress_header(payload: bytes) -> bytes:
    try:
        return codecs.brotli_decompress(payload, MAX_HEADER_BYTES)
    except ValueError as error:
        raise ValueError(f"damaged model file: header: {error}") from error


def _parse_header(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("ascii"), parse_int=_parse_small_integer)
        canonical = _canonical(header)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"damaged model file: its header is not valid JSON: {error}") from error
    if canonical != raw or not isinstance(header, dict):
        _raise_damaged("its header is not a mapping in canonical form")
    return header


def _parse_small_integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:  # Python's own conversion of very many digits takes quadratic time
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _check_records(tensors: Any) -> list[dict[str, Any]]:
    """Check the header's records of tensors one by one and together; returns them."""
    if not isinstance(tensors, list) or len(tensors) > MAX_TENSORS:
        _raise_damaged(f"its tensors are not a list of at most {MAX_TENSORS}")
    names: set[str] = set()
    raw_bytes = 0
    for record in tensors:
        _check_record(record)
        if record["name"] in names:
            _raise_damaged(f"tensor {record['name']} appears twice")
        names.add(record["name"])
        raw_bytes += sum(layout.raw_bytes for layout in layouts(Form(*record["form"]), record["shape"]))
        if raw_bytes > MAX_RAW_BYTES:
            _raise_damaged(f"its tensors declare more than {MAX_RAW_BYTES} bytes")
    return tensors


def _check_record(record: Any) -> None:
    _check_keys(record, ("name", "shape", "form", "streams"), "the record of a tensor")
    name, shape, form, streams = (record[key] for key in ("name", "shape", "form", "streams"))

    # The name comes first, since all further messages quote it.
    if not isinstance(name, str) or len(name) > MAX_NAME_LENGTH or not NAME.fullmatch(name):
        _raise_damaged("the name of a tensor is not words joined by dots")
    if not isinstance(form, list) or len(form) != 3 or not _is_form(*form):
        _raise_damaged(f"tensor {name} is kept in an impossible form")

    is_shape = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
    if not is_shape or not all(_is_size(size) and size <= MAX_SIDE for size in shape):
        _raise_damaged(f"the shape of tensor {name} is not a list of at most {MAX_DIMENSIONS} sizes")
    if form[0] != "float16" and len(shape) != 2:
        _raise_damaged(f"tensor {name} is quantised and has {len(shape)} dimensions, expected 2")

    expected = len(layouts(Form(*form), shape))
    if not isinstance(streams, list) or len(streams) != expected:
        _raise_damaged(f"tensor {name} does not have {expected} streams")
    for stream in streams:
        _check_keys(stream, ("codec", "bytes"), f"a stream of tensor {name}")
        if not isinstance(stream["codec"], str) or stream["codec"] not in codecs.CODECS:
            _raise_damaged(
                f"a stream of tensor {name} has an unknown codec; known are {', '.join(codecs.CODECS)}"
            )
        if not _is_size(stream["bytes"]):
            _raise_damaged(f"a stream of tensor {name} has an impossible length")


def _split_streams(records: list[dict[str, Any]], body: bytes) -> tuple[EncodedTensor, ...]:
    """Cut `body` into the streams that the checked records declare; they must fill it exactly."""
    declared = sum(stream["bytes"] for record in records for stream in record["streams"])
    if declared != len(body):
        _raise_damaged(f"its streams take {len(body)} bytes, the header declares {declared}")
    tensors = []
    position = 0
    for record in records:
        streams = []
        for stream in record["streams"]:
            streams.append(EncodedStream(stream["codec"], body[position : position + stream["bytes"]]))
            position += stream["bytes"]
        form = Form(*record["form"])
        tensors.append(EncodedTensor(record["name"], tuple(record["shape"]), form, tuple(streams)))
    return tuple(tensors)


def _is_form(kind: Any, bits_or_states: Any, rank: Any) -> bool:
    if type(bits_or_states) is not int or type(rank) is not int or kind not in FORM_KINDS:
        return False
    if not 0 <= rank <= (0 if kind == "float16" else MAX_RANK):
        return False
    return {
        "float16": bits_or_states == 16,
        "rows": 2 <= bits_or_states <= 8,
        "groups": 2 <= bits_or_states <= 7,
        "lattice": bits_or_states in STATE_COUNTS,
    }[kind]


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_RAW_BYTES


def _check_keys(value: Any, keys: tuple[str, ...], what: str) -> None:
    if not isinstance(value, dict) or set(value) != set(keys):
        _raise_damaged(f"{what} does not have exactly the keys {', '.join(keys)}")


def _raise_damaged(fault: str) -> NoReturn:
    raise ValueError(f"damaged model file: {fault}")
