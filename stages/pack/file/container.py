"""The file format of model.bin: serialises and parses the file, encodes and decodes its streams.

    offset  bytes
    0       8     magic
    8       4     version, little-endian
    12      32    sha256 of everything after it
    44      4     H, length of the compressed header
    48      H     header: brotli over canonical JSON
    48+H          streams, one after another, in the header's order, to the end of the file

    header  {"model": {parameter: value, ...}, "tensors": [tensor, ...]}
    tensor  {"name": ..., "shape": [...], "form": [kind, number, rank], "streams": [stream, ...]}
    stream  {"codec": ..., "bytes": encoded length}

The form says what the streams of a tensor decode to (pack/forms.py).

The decoded length of a stream follows from form and shape, so that no declared length can
contradict another.

The checksum catches damage, not malice, so a reader trusts nothing: the header must be exactly the
canonical bytes of its own content, within the limits below, and everything is checked before
anything is decoded. Every fault is a ValueError.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from stages.pack import forms
from stages.pack.entropy import codecs
from stages.pack.forms import Form

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
    form: Form[Any]
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


def decode(tensor: EncodedTensor) -> np.ndarray:
    """Decode one tensor to float32 weights, in its shape.

    Raises ValueError, which names the tensor, when it is damaged.
    """
    streams = decode_streams(tensor)
    with _errors_name(tensor):
        values = tensor.form.from_streams(streams, tensor.shape)
        with np.errstate(over="ignore", invalid="ignore"):  # the result is checked
            weights = tensor.form.dequantise(values)
        return forms.require_finite(weights)


def decode_streams(tensor: EncodedTensor) -> tuple[bytes, ...]:
    """Decode a tensor's streams to their raw bytes.

    Raises ValueError, which names the tensor, when one is damaged.
    """
    layouts = tensor.form.layouts(tensor.shape)
    raw = [b""] * len(layouts)
    with _errors_name(tensor):
        # Streams that can only be decoded with the exponents come last: those are other streams.
        for index in sorted(range(len(layouts)), key=lambda index: bool(layouts[index].exponent_streams)):
            stream = tensor.streams[index]
            layout = layouts[index].with_exponents(raw)
            raw[index] = codecs.decode(stream.codec, stream.payload, layout)
    return tuple(raw)


@contextlib.contextmanager
def _errors_name(tensor: EncodedTensor) -> Iterator[None]:
    """Context manager: a ValueError says that this tensor is damaged."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"damaged model file: tensor {tensor.name}: {error}") from error


def _header(contents: Contents) -> dict[str, Any]:
    tensors = [
        {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "form": list(tensor.form.header),
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
        form = _check_record(record)
        if record["name"] in names:
            _raise_damaged(f"tensor {record['name']} appears twice")
        names.add(record["name"])
        raw_bytes += sum(layout.raw_bytes for layout in form.layouts(record["shape"]))
        if raw_bytes > MAX_RAW_BYTES:
            _raise_damaged(f"its tensors declare more than {MAX_RAW_BYTES} bytes")
    return tensors


def _check_record(record: Any) -> Form[Any]:
    """Check the record of one tensor; returns its form."""
    _check_keys(record, ("name", "shape", "form", "streams"), "the record of a tensor")
    name, shape, streams = (record[key] for key in ("name", "shape", "streams"))

    # The name comes first, since all further messages quote it.
    if not isinstance(name, str) or len(name) > MAX_NAME_LENGTH or not NAME.fullmatch(name):
        _raise_damaged("the name of a tensor is not words joined by dots")
    try:
        form = forms.parse_header(record["form"])
    except ValueError as error:
        raise ValueError(
            f"damaged model file: tensor {name} is stored in an impossible form: {error}"
        ) from error

    is_shape = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
    if not is_shape or not all(_is_size(size) and size <= MAX_SIDE for size in shape):
        _raise_damaged(f"the shape of tensor {name} is not a list of at most {MAX_DIMENSIONS} sizes")
    if form.is_matrix and len(shape) != 2:
        _raise_damaged(f"tensor {name} is quantised and has {len(shape)} dimensions, expected 2")

    expected = len(form.layouts(shape))
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
    return form


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
        form = forms.parse_header(record["form"])
        tensors.append(EncodedTensor(record["name"], tuple(record["shape"]), form, tuple(streams)))
    return tuple(tensors)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_RAW_BYTES


def _check_keys(value: Any, keys: tuple[str, ...], what: str) -> None:
    if not isinstance(value, dict) or set(value) != set(keys):
        _raise_damaged(f"{what} does not have exactly the keys {', '.join(keys)}")


def _raise_damaged(fault: str) -> NoReturn:
    raise ValueError(f"damaged model file: {fault}")
