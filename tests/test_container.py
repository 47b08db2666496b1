"""The container and its codec: round trips, damage, malice."""

import hashlib
import json
import math
import tracemalloc
from typing import Any

import brotli
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.pack.entropy import codecs
from stages.pack.entropy.codecs import StreamLayout
from stages.pack.file import container
from stages.pack.file.container import Contents, EncodedStream, EncodedTensor
from stages.pack.forms import CorrectedForm, Float16Form, Form, GroupsForm, RowsForm, TrellisForm
from stages.pack.trellis import STATE_COUNTS
from tests.pack_inputs import ENCODER

EXAMPLES = settings(max_examples=60, deadline=None)
NAMES = st.from_regex(r"[a-z0-9_]{1,6}(\.[a-z0-9_]{1,6}){0,2}", fullmatch=True)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Compiling must not count as the time that an example takes."""
    codecs.compile_ahead("adaptive")


@st.composite
def entries(draw: st.DrawFn) -> tuple[tuple[EncodedTensor, ...], list[tuple[bytes, ...]]]:
    """Tensors of random bytes, and those bytes."""
    made, raws = [], []
    for name in draw(st.lists(NAMES, max_size=4, unique=True)):
        matrices: list[Form[Any]] = [
            RowsForm(draw(st.integers(2, 8))),
            GroupsForm(draw(st.integers(2, 7))),
            TrellisForm(draw(st.sampled_from(STATE_COUNTS))),
        ]
        rank = draw(st.integers(0, 2))
        if rank:
            matrices = [CorrectedForm(base, rank) for base in matrices]
        form = draw(st.sampled_from([Float16Form(), *matrices]))

        dimensions = st.just(2) if form.is_matrix else st.integers(0, 4)
        shape = tuple(draw(st.lists(st.integers(0, 5), min_size=(n := draw(dimensions)), max_size=n)))
        layouts = form.layouts(shape)
        raw = tuple(
            draw(st.binary(min_size=layout.raw_bytes, max_size=layout.raw_bytes)) for layout in layouts
        )
        # The arithmetic coder takes any integers of one state, but on a trellis only those that it allows
        # (test_level_coder.py). A series takes all numbers except the one with all bits set.
        raw = tuple(
            of.replace(b"\xff", b"\0") if layout.kind == "series" else of
            for of, layout in zip(raw, layouts, strict=True)
        )
        family = "adaptive" if form.header.kind != "lattice" and draw(st.booleans()) else "brotli"
        streams = ENCODER.encode(layouts, raw, family, 5)
        made.append(EncodedTensor(name, shape, form, streams))
        raws.append(raw)
    return tuple(made), raws


def example() -> Contents:
    """Three tensors, seven streams."""

    def stream(raw: bytes, layout: StreamLayout, by: str = "brotli") -> EncodedStream:
        return EncodedStream(by, codecs.encode(by, raw, layout, 11))

    matrix = EncodedTensor(
        "blocks.0.weight",
        (3, 4),
        RowsForm(6),
        (stream(bytes(range(12)), StreamLayout(1, 3, 4)), stream(bytes(6), StreamLayout(2, 1, 3))),
    )
    levels, step = (
        stream(bytes(12), StreamLayout(2, 2, 3, 8), "adaptive"),
        stream(bytes(4), StreamLayout(4, 1, 1), "plain"),
    )
    rows, columns = (
        stream(bytes(size), StreamLayout(1, 1, size, kind="series"), "series") for size in (2, 3)
    )
    on_axes = EncodedTensor("blocks.1.weight", (2, 3), TrellisForm(8), (levels, step, rows, columns))
    gain = EncodedTensor("gain", (2,), Float16Form(), (stream(b"abcd", StreamLayout(2, 1, 2)),))
    return Contents({"layers": 1, "rope_base": 10000.0}, (matrix, on_axes, gain))


def header_of(blob: bytes) -> Any:
    length = int.from_bytes(blob[44:48], "little")
    return json.loads(brotli.decompress(blob[48 : 48 + length]))


def forge(header: bytes, streams: bytes = b"") -> bytes:
    """A file with any header, and a checksum that is right."""
    packed = brotli.compress(header, quality=1)
    covered = len(packed).to_bytes(4, "little") + packed + streams
    return (
        container.MAGIC + container.VERSION.to_bytes(4, "little") + hashlib.sha256(covered).digest() + covered
    )


def canonical(header: Any) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode()


def read_all(blob: bytes) -> list[tuple[bytes, ...]]:
    return [container.decode_streams(entry) for entry in container.parse(blob).tensors]


@EXAMPLES
@given(entries())
def test_round_trip(case: tuple[tuple[EncodedTensor, ...], list[tuple[bytes, ...]]]) -> None:
    made, raws = case
    contents = Contents({"width": 8, "base": 0.5}, made)
    blob = container.serialise(contents)
    assert container.serialise(contents) == blob
    assert container.parse(blob) == contents
    assert read_all(blob) == raws


@EXAMPLES
@given(st.integers(1, 4), st.binary(max_size=60))
def test_codec_round_trip(item_bytes: int, raw: bytes) -> None:
    raw = raw[: len(raw) // item_bytes * item_bytes]
    assert codecs.unshuffle(codecs.shuffle(raw, item_bytes), item_bytes) == raw
    items = len(raw) // item_bytes
    payload = codecs.encode("brotli", raw, StreamLayout(item_bytes, 1, items), 11)
    assert codecs.decode("brotli", payload, StreamLayout(item_bytes, 1, items)) == raw
    for wrong in {items + 1, max(0, items - 1)} - {items}:
        with pytest.raises(ValueError, match="declared"):
            codecs.decode("brotli", payload, StreamLayout(item_bytes, 1, wrong))


def test_every_truncation_and_every_addition_is_refused() -> None:
    blob = container.serialise(example())
    for length in range(len(blob)):
        with pytest.raises(ValueError, match="model file"):
            container.parse(blob[:length])
    with pytest.raises(ValueError, match="sha256"):
        container.parse(blob + b"\0")


def test_every_bit_flip_is_refused() -> None:
    blob = container.serialise(example())
    for position in range(8 * len(blob)):
        flipped = bytearray(blob)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(ValueError, match="model file"):
            container.parse(bytes(flipped))


@EXAMPLES
@given(st.data())
def test_damage_below_a_right_checksum_is_refused_or_harmless(data: st.DataObject) -> None:
    """The worst a forger can do with random bytes: an error, or tensors of the sizes declared."""
    blob = container.serialise(example())
    covered = bytearray(blob[container.HEADER_START :])
    for _ in range(data.draw(st.integers(1, 3))):
        covered[data.draw(st.integers(0, len(covered) - 1))] = data.draw(st.integers(0, 255))
    covered = covered[: data.draw(st.integers(0, len(covered)))]
    forged = blob[: len(container.MAGIC) + 4] + hashlib.sha256(covered).digest() + bytes(covered)
    _refused_or_sized(forged)


@EXAMPLES
@given(st.data())
def test_any_json_in_the_header_is_refused_or_sized(data: st.DataObject) -> None:
    leaves = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=5)
        | st.lists(st.integers(-3, 2**40), max_size=3)
    )
    header = header_of(container.serialise(example()))
    record = data.draw(st.sampled_from(header["tensors"]))
    target = data.draw(st.sampled_from([header, record, record["streams"][0]]))
    target[data.draw(st.sampled_from(sorted(target)))] = data.draw(leaves)

    streams = b"".join(stream.payload for entry in example().tensors for stream in entry.streams)
    _refused_or_sized(forge(canonical(header), streams))


def _refused_or_sized(blob: bytes) -> None:
    try:
        contents = container.parse(blob)
        raws = read_all(blob)
    except ValueError:
        return
    for entry, raw in zip(contents.tensors, raws, strict=True):
        assert [len(part) for part in raw] == [layout.raw_bytes for layout in entry.form.layouts(entry.shape)]
        assert entry.form.is_matrix or len(raw[0]) == 2 * math.prod(entry.shape)


def hostile(change: str) -> bytes:
    """A forged file: the header of the example with one thing changed."""
    header = header_of(container.serialise(example()))
    first = header["tensors"][0]

    match change:
        case "duplicate name":
            header["tensors"][1]["name"] = first["name"]
        case "too large":
            first["shape"] = [2**20, 2**10]
        case "overflowing product":
            first["shape"] = [2**20, 2**20]
        case "many large":
            header["tensors"] = [first | {"name": f"t{i}", "shape": [2**14, 2**13]} for i in range(3)]
        case "long side":
            first["shape"] = [2**20 + 1, 0]

        case "negative size":
            first["shape"] = [-3, -4]
        case "negative length":
            first["streams"][0]["bytes"] = -1
        case "length beyond the file":
            first["streams"][0]["bytes"] += 1

        # Codecs, forms and streams.
        case "unknown codec":
            first["streams"][0]["codec"] = "pickle"
        case "unknown form":
            first["form"][0] = "object"

        case "form without size":
            first["form"].pop()
        case "impossible trellis":
            header["tensors"][1]["form"][1] = 3
        case "missing stream":
            first["streams"].pop()

        # Names, bits and ranks.
        case "odd name":
            first["name"] = "../\ud800"
        case "long name":
            first["name"] = "a" * 201
        case "boolean bits":
            first["form"][1] = True
        case "wide bits":
            first["form"][1] = 9

        case "rank of a vector":
            header["tensors"][2]["form"][2] = 1
        case "large rank":
            first["form"][2] = 17

        case "negative rank":
            first["form"][2] = -1
        case "boolean rank":
            first["form"][2] = True
        case "rank without its streams":
            first["form"][2] = 2

        # Groups, and the header as a whole.
        case "groups of eight bits":
            first["form"][:2] = ["groups", 8]
        case "groups without their stream":
            first["form"][0] = "groups"

        case "extra key":
            first["pickle"] = "x"
        case "five dimensions":
            header["tensors"][2]["shape"] = [1, 1, 1, 1, 2]
        case "too many tensors":
            header["tensors"] = [first | {"name": f"t{i}"} for i in range(container.MAX_TENSORS + 1)]
        case "list header":
            header = [header]

    streams = b"".join(stream.payload for entry in example().tensors for stream in entry.streams)
    return forge(canonical(header), streams)


CHANGES = {
    "duplicate name": "appears twice",
    "too large": "declare more than",
    "overflowing product": "declare more than",
    "many large": "declare more than",
    "long side": "is not a list of at most",
    "negative size": "is not a list of at most",
    "negative length": "impossible length",
    "length beyond the file": "the header declares",
    "unknown codec": "unknown codec",
    "unknown form": "impossible form",
    "form without size": "impossible form",
    "impossible trellis": "impossible form",
    "missing stream": "does not have 2 streams",
    "odd name": "words joined by dots",
    "long name": "words joined by dots",
    "boolean bits": "impossible form",
    "wide bits": "impossible form",
    "rank of a vector": "impossible form",
    "large rank": "impossible form",
    "negative rank": "impossible form",
    "boolean rank": "impossible form",
    "rank without its streams": "does not have 4 streams",
    "groups of eight bits": "impossible form",
    "groups without their stream": "does not have 3 streams",
    "extra key": "exactly the keys",
    "five dimensions": "is not a list of at most",
    "too many tensors": "list of at most 5000",
    "list header": "not a mapping",
}


@pytest.mark.parametrize("change", CHANGES)
def test_hostile_headers_are_refused(change: str) -> None:
    with pytest.raises(ValueError, match=CHANGES[change]):
        container.parse(hostile(change))


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 500_000,
        b'{"model":' * 100_000,
        b'{"model":{},"tensors":[] }',
        b'{"model":{},"model":{},"tensors":[]}',
        b'{"model":{"a":NaN},"tensors":[]}',
        b'{"model":{"a":1e999},"tensors":[]}',
        b'{"model":{"a":' + b"9" * 5000 + b'},"tensors":[]}',
        b"\xff\xfe",
        b"",
    ],
)
def test_headers_that_are_not_canonical_json_are_refused(header: bytes) -> None:
    with pytest.raises(ValueError, match="damaged model file"):
        container.parse(forge(header))


def test_decompression_bombs_stop_at_what_is_declared() -> None:
    bomb = brotli.compress(bytes(1 << 28), quality=1)
    header = header_of(container.serialise(example()))
    header["tensors"] = [header["tensors"][2]]
    header["tensors"][0]["streams"][0]["bytes"] = len(bomb)
    stream_bomb, header_bomb = forge(canonical(header), bomb), forge(b"")
    covered = len(bomb).to_bytes(4, "little") + bomb
    header_bomb = header_bomb[:12] + hashlib.sha256(covered).digest() + covered
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than the 4 bytes declared"):
        read_all(stream_bomb)
    with pytest.raises(ValueError, match="more than the 1048576 bytes declared"):
        read_all(header_bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 23, f"{peak} bytes at the peak"


def test_bytes_after_the_end_of_a_brotli_stream_are_refused() -> None:
    payload = codecs.encode("brotli", b"abcd", StreamLayout(2, 1, 2), 11)
    for tail in (b"\0", payload):
        with pytest.raises(ValueError, match="damaged"):
            codecs.decode("brotli", payload + tail, StreamLayout(2, 1, 2))


def test_another_version_and_another_file_say_so() -> None:
    blob = container.serialise(example())
    with pytest.raises(ValueError, match="version 1; this program reads version 5"):
        container.parse(blob[:8] + (1).to_bytes(4, "little") + blob[12:])
    with pytest.raises(ValueError, match="not a model file: it begins with b'PK"):
        container.parse(b"PK\3\4" + blob)
