"""The model as a text compressor: `python -m tools.compressor compress|decompress MODEL IN OUT`.

What a score claims is made good: with the model and the file, and nothing else, the text comes back. The text is cut into streams that are
coded side by side (batched_kv.py), each beginning with BOS and no other context, all into one range-coded payload. A tokenizer that changes
text costs bytes, never text (stages/common/lossless_text.py). What is not UTF-8 is refused.

Both directions need the same floats: everything runs in float32 with deterministic kernels in one thread (more threads would cut sums
elsewhere), in the same order and shapes. Another processor, another GPU or another version of torch may round differently; the file holds
the hash of its text, so that this, or a damaged file, is an error and never wrong text.
"""

import argparse
import dataclasses
import hashlib
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from stages.common import bpb, config, environment, range_coder
from stages.common.cli_errors import refusing
from stages.common.lossless_text import Speller, cut
from stages.common.parallel import ParallelParams, World, world
from stages.common.progress import Report
from stages.pack.artifact import unpack
from stages.sliding_eval.params import Params
from tools.compressor.batched_kv import Lanes

MAGIC = b"CADZ"
VERSION = 1
CHECK_BYTES = 8  # of sha256, of the model with its tokenizer and of the text
HEAD = struct.Struct(
    f"<4sB{CHECK_BYTES}s{CHECK_BYTES}sIIIIB"
)  # magic, version, hashes, window, stride, lanes, streams, bytes of the manner
MOST_LANES = 4096
MOST_TOKENS = 1 << 28  # of streams side by side, the longest counted for each: eight bytes are held for one
SHORTEST_STREAM = 1000  # characters; a stream begins without context, which costs some hundred bits


class Coder(Protocol):
    """A range coder in either direction."""

    def code(self, starts: np.ndarray, symbol: int | None) -> int:
        """The symbol, given or found."""
        ...


class Codec:
    """A packed model, its tokenizer, and how they compute."""

    def __init__(self, model_file: Path, tokenizer_file: Path, here: World, report: Report) -> None:
        model, tokenizer = (
            model_file.read_bytes(),
            tokenizer_file.read_bytes() if tokenizer_file.is_file() else b"",
        )
        self.speller = Speller(bpb.load_tokenizer(tokenizer_file))
        self.params, self.state = unpack(model)
        if self.params.vocab_size != len(self.speller.bytes_of):
            ids = len(self.speller.bytes_of)
            raise ValueError(
                f"{tokenizer_file} has {ids} ids, but the model was trained on {self.params.vocab_size}; name its own tokenizer"
            )
        self.digest = hashlib.sha256(
            hashlib.sha256(model).digest() + hashlib.sha256(tokenizer).digest()
        ).digest()[:CHECK_BYTES]
        self.here, self.report = here, report

    def compress(self, texts: Sequence[str], window: int, stride: int, lanes: int) -> bytes:
        """A file of the texts, each its own stream, `lanes` of them side by side."""
        streams = [np.array([self.speller.bos, *self.speller.encode(text)], dtype=np.int64) for text in texts]
        header = Header.of(self, texts, [len(stream) - 1 for stream in streams], window, stride, lanes)
        encoder = range_coder.Encoder()
        self._code(header, encoder, streams)
        return header.write() + encoder.finish()

    def decompress(self, blob: bytes) -> list[str]:
        """The texts of a file; a ValueError when it is damaged, another model's, or was made where floats are rounded otherwise."""
        header, payload = Header.read(blob)
        if header.digest != self.digest:
            raise ValueError("the file was compressed with another model or tokenizer; name those")
        streams = self._code(header, range_coder.Decoder(payload), None)
        spelled = [self.speller.decode(stream[1:].tolist()) for stream in streams]
        if _check(spelled) != header.check:
            here = manner(self.here)
            cause = (
                "it is damaged"
                if here == header.manner
                else f"it is damaged, or what made it ({header.manner}) rounds unlike {here}"
            )
            raise ValueError(f"the file does not give the text whose hash it holds: {cause}")
        return [text.decode("utf-8") for text in spelled]

    def _code(self, header: "Header", coder: Coder, given: list[np.ndarray] | None) -> list[np.ndarray]:
        """All streams, in groups of the longest first, so that those that end leave from the back; coding and decoding are one."""
        together = max(header.lengths, default=0) * min(header.lanes, len(header.lengths))
        if together > MOST_TOKENS:
            raise ValueError(
                f"streams of {together} tokens side by side are more than {MOST_TOKENS}: the file is damaged, or too long for --lanes"
            )
        order = sorted(range(len(header.lengths)), key=lambda i: (-header.lengths[i], i))
        found = [np.full(1, self.speller.bos, dtype=np.int64)] * len(order)
        with self.report.progress("compress" if given else "decompress", sum(header.lengths)) as progress:
            for first in range(0, len(order), header.lanes):
                group = [i for i in order[first : first + header.lanes] if header.lengths[i]]
                told = [given[i] for i in group] if given else None
                for i, stream in zip(
                    group, self._group(header, group, coder, told, progress.advance), strict=True
                ):
                    found[i] = stream
        return found

    def _group(
        self,
        header: "Header",
        group: list[int],
        coder: Coder,
        given: list[np.ndarray] | None,
        advance: "Advance",
    ) -> Iterator[np.ndarray]:
        """The streams of a group, which begin together."""
        if not group:
            return
        lengths = np.array([header.lengths[i] for i in group])
        held = np.full((len(group), lengths[0] + 1), self.speller.bos, dtype=np.int64)
        lanes = Lanes(
            self.params, self.state, header.window, header.stride, held[:, 0], held.shape[1], self.here
        )
        for at in range(1, held.shape[1]):
            alive = int((lengths >= at).sum())
            lanes.keep(alive)
            starts = range_coder.cumulative(lanes.predict())
            for lane in range(alive):
                held[lane, at] = coder.code(starts[lane], int(given[lane][at]) if given else None)
            lanes.observe(held[:alive, at])
            advance(alive)
        yield from (row[: length + 1] for row, length in zip(held, lengths, strict=True))


class Advance(Protocol):
    """Progress."""

    def __call__(self, units: float) -> None:
        """So many tokens are done."""
        ...


class Header(NamedTuple):
    """What stands before the payload."""

    digest: bytes  # of model and tokenizer
    check: bytes  # of the texts
    window: int
    stride: int
    lanes: int  # streams side by side
    lengths: list[int]  # tokens of each stream, BOS aside
    manner: str  # what computed the floats

    @staticmethod
    def of(
        codec: Codec, texts: Sequence[str], lengths: list[int], window: int, stride: int, lanes: int
    ) -> "Header":
        """The header of a file that is to be written."""
        check = _check([text.encode("utf-8") for text in texts])
        return Header(
            codec.digest, check, window, stride, min(lanes, MOST_LANES), lengths, manner(codec.here)
        )

    def write(self) -> bytes:
        """As bytes."""
        said = self.manner.encode("utf-8")[:255]
        numbers = (self.window, self.stride, self.lanes, len(self.lengths), len(said))
        return (
            HEAD.pack(MAGIC, VERSION, self.digest, self.check, *numbers)
            + said
            + b"".join(map(_short, self.lengths))
        )

    @staticmethod
    def read(blob: bytes) -> tuple["Header", bytes]:
        """The header of a file, and its payload; a ValueError for what is no such file."""
        if len(blob) < HEAD.size or not blob.startswith(MAGIC):
            raise ValueError(f"not a file of this compressor: it does not begin with {MAGIC!r} and a header")
        _, version, digest, check, window, stride, lanes, streams, said = HEAD.unpack_from(blob)
        if version != VERSION:
            raise ValueError(f"the file has version {version}, expected {VERSION}")
        if not (1 <= stride <= window and 1 <= lanes <= MOST_LANES):
            raise ValueError(f"damaged file: window {window}, stride {stride}, lanes {lanes}")
        at, lengths = HEAD.size + said, []
        for _ in range(streams):
            length, at = _read_short(blob, at)
            lengths.append(length)
        made_by = blob[HEAD.size : HEAD.size + said].decode("utf-8", errors="replace")
        return Header(digest, check, window, stride, lanes, lengths, made_by), blob[at:]


def exact(params: ParallelParams) -> ParallelParams:
    """The same device, one process, and nothing that could round differently the second time."""
    only = dataclasses.replace(params, nproc=1, threads=1, dtype="float32")
    return dataclasses.replace(only, deterministic=True, compile=False, kernels=False)


def manner(here: World) -> str:
    """What decides how floats are rounded."""
    hardware = environment.hardware(here.device)
    return f"torch {torch.__version__} on {hardware.get('accelerator', hardware['processor'])}"


def read_text(path: Path) -> str:
    """A file's text; a ValueError when it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}): this compressor is for text"
        ) from error


def main(argv: list[str] | None = None) -> None:
    """The command; a user's error is one line and exit code 2."""
    arguments = _parser().parse_args(argv)
    with refusing("compressor"):
        params = config.load(arguments.params, Params, arguments.set)
        with world(exact(params.parallel)) as here:
            _run(arguments, params, Codec(arguments.model, arguments.tokenizer, here, Report()))


def _run(arguments: argparse.Namespace, params: Params, codec: Codec) -> None:
    if arguments.verb == "compress":
        text = read_text(arguments.input)
        streams = cut(text, arguments.lanes, SHORTEST_STREAM)
        made = codec.compress(
            streams, params.sliding_eval.window, params.sliding_eval.stride, arguments.lanes
        )
        size = len(text.encode("utf-8"))
        rate = f", {8 * len(made) / size:.3f} bits a byte" if size else ""
        codec.report.log(
            f"compressor: {size:,} bytes of text in {len(streams)} streams to {len(made):,}{rate}"
        )
    else:
        made = "".join(codec.decompress(arguments.input.read_bytes())).encode("utf-8")
        codec.report.log(f"compressor: {arguments.input.stat().st_size:,} bytes to {len(made):,} of text")
    arguments.output.write_bytes(made)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compressor",
        description="Compress UTF-8 text with a packed model, and back. The file needs the same model, tokenizer and kind of machine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("verb", choices=("compress", "decompress"))
    parser.add_argument("model", type=Path, metavar="MODEL", help="model.bin")
    parser.add_argument("input", type=Path, metavar="IN", help="what to read")
    parser.add_argument("output", type=Path, metavar="OUT", help="what to write")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=Path("artifacts/tokenize/tokenizer.model"),
        metavar="FILE",
        help="the model's",
    )
    parser.add_argument(
        "--lanes",
        type=int,
        choices=range(1, MOST_LANES + 1),
        default=64,
        metavar="N",
        help="streams side by side: speed",
    )
    parser.add_argument(
        "--params",
        type=Path,
        default=Path("params.yaml"),
        metavar="FILE",
        help="has the device, the window and its stride",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="override one parameter; may be given again",
    )
    return parser


def _check(texts: Sequence[bytes]) -> bytes:
    return hashlib.sha256(b"".join(texts)).digest()[:CHECK_BYTES]


def _short(number: int) -> bytes:
    """A number in groups of seven bits, the lowest first."""
    groups = bytearray()
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])


def _read_short(blob: bytes, at: int) -> tuple[int, int]:
    """A number that `_short` wrote, and where the next begins."""
    value, shift = 0, 0
    while at < len(blob) and shift <= 28:
        value |= (blob[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if blob[at - 1] < 128:
            return value, at
    raise ValueError("damaged file: it ends within its header")
