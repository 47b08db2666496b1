"""Compress text with a packed model: `python -m tools.compressor compress|decompress MODEL IN OUT`.

This makes good what a score claims: the text is restored from the model and the compressed file
alone. The text is cut into streams that are coded in parallel (batched_kv.py), each starting with
BOS and no other context, all into one range-coded payload. A tokenizer that changes text costs
bytes, but never changes the restored text (stages/common/lossless_text.py). Input that is not UTF-8
is an error.

Both directions need the same floats, so everything runs in float32 with deterministic kernels in
one thread (more threads would split sums elsewhere), in the same order and shapes. Another
processor, GPU or version of torch may round differently. The file contains the hash of its text, so
that this, or a damaged file, is an error and never wrong text.
"""

import argparse
import dataclasses
import hashlib
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from stages.common import bpb, config, environment, range_coder
from stages.common.cli_errors import user_errors
from stages.common.lossless_text import LosslessTokenizer, split_text
from stages.common.parallel import ParallelParams, World, distributed
from stages.common.progress import Logger
from stages.pack.artifact import unpack
from stages.sliding_eval.params import Params
from tools import add_path_option, errors_name, require_file
from tools.compressor.batched_kv import BatchedScorer

MAGIC = b"CADZ"
VERSION = 1
HASH_BYTES = 8  # of a sha256 that are stored
# Magic, version, hash of model and tokenizer, hash of the texts, window, stride, streams coded in
# parallel, number of streams, bytes of the description of the float environment. That description
# follows, then the lengths of the streams.
HEADER_LAYOUT = struct.Struct(f"<4sB{HASH_BYTES}s{HASH_BYTES}sIIIIB")
MAX_ENVIRONMENT_BYTES = 255  # its length is one byte
MAX_LENGTH_SHIFT = 28  # bits; a stream length takes at most five groups of seven bits
MAX_PARALLEL = 4096  # streams
MAX_TOKENS = (
    1 << 28
)  # of all streams coded in parallel, padded to the longest; each takes eight bytes of memory
MIN_STREAM_CHARACTERS = 1000  # a stream begins without context, which costs some hundred bits


class RangeCoder(Protocol):
    """A range coder in either direction."""

    def code(self, cumulative: np.ndarray, symbol: int | None) -> int:
        """Code one symbol with cumulative frequencies (V + 1,); `symbol` is None to decode it. Return it."""
        ...


class Header(NamedTuple):
    """Contents of a compressed file before the payload."""

    model_hash: bytes  # of model and tokenizer
    text_hash: bytes
    window: int
    stride: int
    parallel: int  # streams coded side by side
    lengths: list[int]  # tokens of each stream, without BOS
    environment: str  # hardware and software that computed the floats

    def to_bytes(self) -> bytes:
        """Return the header as it is written to the file."""
        environment_bytes = self.environment.encode("utf-8")[:MAX_ENVIRONMENT_BYTES]
        fixed = HEADER_LAYOUT.pack(
            MAGIC,
            VERSION,
            self.model_hash,
            self.text_hash,
            self.window,
            self.stride,
            self.parallel,
            len(self.lengths),
            len(environment_bytes),
        )
        return fixed + environment_bytes + b"".join(map(_varint, self.lengths))


def parse_header(blob: bytes) -> tuple[Header, bytes]:
    """Return the header of a file and its payload; ValueError if it is not a file of this compressor."""
    if len(blob) < HEADER_LAYOUT.size or not blob.startswith(MAGIC):
        raise ValueError(f"not a file of this compressor: it does not begin with {MAGIC!r} and a header")
    fields = HEADER_LAYOUT.unpack_from(blob)
    _, version, model_hash, text_hash, window, stride, parallel, streams, environment_size = fields
    if version != VERSION:
        raise ValueError(f"the file has version {version}, expected {VERSION}")
    if not (1 <= stride <= window and 1 <= parallel <= MAX_PARALLEL):
        raise ValueError(f"damaged file: window {window}, stride {stride}, {parallel} streams in parallel")

    position = HEADER_LAYOUT.size + environment_size
    described = blob[HEADER_LAYOUT.size : position].decode("utf-8", errors="replace")
    lengths = []
    for _ in range(streams):
        length, position = _read_varint(blob, position)
        lengths.append(length)
    header = Header(model_hash, text_hash, window, stride, parallel, lengths, described)
    return header, blob[position:]


class TextCompressor:
    """A packed model and its tokenizer, ready to compress and decompress."""

    def __init__(self, model_file: Path, tokenizer_file: Path, world: World, logger: Logger) -> None:
        self.tokenizer = LosslessTokenizer(bpb.load_tokenizer(tokenizer_file))
        model = model_file.read_bytes()
        with errors_name(model_file):
            self.params, self.state = unpack(model)
        ids = len(self.tokenizer.token_bytes)
        if self.params.vocab_size != ids:
            raise ValueError(
                f"{tokenizer_file} has {ids} ids, but the model was trained on {self.params.vocab_size};"
                " name its own tokenizer"
            )
        tokenizer = tokenizer_file.read_bytes()
        both = hashlib.sha256(model).digest() + hashlib.sha256(tokenizer).digest()
        self.model_hash = hashlib.sha256(both).digest()[:HASH_BYTES]
        self.world = world
        self.logger = logger

    def compress(self, texts: Sequence[str], window: int, stride: int, parallel: int) -> bytes:
        """Return a compressed file of the texts, each its own stream, `parallel` of them side by side."""
        streams = []
        for text in texts:
            streams.append(np.array([self.tokenizer.bos, *self.tokenizer.encode(text)], dtype=np.int64))
        header = Header(
            self.model_hash,
            _hash_texts([text.encode("utf-8") for text in texts]),
            window,
            stride,
            min(parallel, MAX_PARALLEL),
            [len(stream) - 1 for stream in streams],
            float_environment(self.world),
        )
        encoder = range_coder.RangeEncoder()
        self._code(header, encoder, streams)
        return header.to_bytes() + encoder.finish()

    def decompress(self, blob: bytes) -> list[str]:
        """Return the texts of a compressed file.

        Raises ValueError if it is damaged, if it was made with another model, or where floats are
        rounded differently.
        """
        header, payload = parse_header(blob)
        if header.model_hash != self.model_hash:
            raise ValueError("the file was compressed with another model or tokenizer; name those")
        streams = self._code(header, range_coder.RangeDecoder(payload), None)
        texts = [self.tokenizer.decode(stream[1:].tolist()) for stream in streams]
        if _hash_texts(texts) != header.text_hash:
            environment_here = float_environment(self.world)
            cause = "it is damaged"
            if environment_here != header.environment:
                cause += f", or what made it ({header.environment}) rounds unlike {environment_here}"
            raise ValueError(f"the file does not give the text whose hash it holds: {cause}")
        return [text.decode("utf-8") for text in texts]

    def _code(self, header: Header, coder: RangeCoder, given: list[np.ndarray] | None) -> list[np.ndarray]:
        """Encode the streams `given`, or decode if it is None; return each with its BOS, (length + 1,).

        Streams are coded in groups of header.parallel, the longest first, so that those that end
        are always the last of the group.
        """
        memory = max(header.lengths, default=0) * min(header.parallel, len(header.lengths))
        if memory > MAX_TOKENS:
            raise ValueError(
                f"streams of {memory} tokens side by side are more than {MAX_TOKENS}:"
                " the file is damaged, or too long for --parallel"
            )

        order = sorted(range(len(header.lengths)), key=lambda i: (-header.lengths[i], i))
        coded = [np.full(1, self.tokenizer.bos, dtype=np.int64)] * len(order)  # an empty stream is its BOS
        with self.logger.progress("compress" if given else "decompress", sum(header.lengths)) as progress:
            for first in range(0, len(order), header.parallel):
                group = [i for i in order[first : first + header.parallel] if header.lengths[i]]
                if group:
                    given_group = [given[i] for i in group] if given else None
                    streams = self._code_group(header, group, coder, given_group, progress.advance)
                    for i, stream in zip(group, streams, strict=True):
                        coded[i] = stream
        return coded

    def _code_group(
        self,
        header: Header,
        group: list[int],
        coder: RangeCoder,
        given: list[np.ndarray] | None,
        advance: Callable[[float], None],
    ) -> list[np.ndarray]:
        """Code the streams with these numbers in parallel; they are sorted by length, the longest first."""
        lengths = np.array([header.lengths[i] for i in group])
        tokens_BN = np.full((len(group), lengths[0] + 1), self.tokenizer.bos, dtype=np.int64)
        scorer = BatchedScorer(
            self.params,
            self.state,
            header.window,
            header.stride,
            tokens_BN[:, 0],
            tokens_BN.shape[1],
            self.world,
        )
        for position in range(1, tokens_BN.shape[1]):
            # Streams that have ended are the last ones.
            active = int((lengths >= position).sum())
            scorer.keep_first(active)

            cumulative = range_coder.cumulative_frequencies(scorer.predict())
            for b in range(active):
                symbol = int(given[b][position]) if given else None
                tokens_BN[b, position] = coder.code(cumulative[b], symbol)
            scorer.observe(tokens_BN[:active, position])
            advance(active)
        return [row[: length + 1] for row, length in zip(tokens_BN, lengths, strict=True)]


def reproducible(params: ParallelParams) -> ParallelParams:
    """Return parameters for the same device with one process and nothing that could round differently."""
    return dataclasses.replace(
        params,
        nproc=1,
        threads=1,
        dtype="float32",
        deterministic=True,
        compile=False,
        kernels=False,
    )


def float_environment(world: World) -> str:
    """Describe the hardware and software that decide how floats are rounded."""
    hardware = environment.hardware(world.device)
    return f"torch {torch.__version__} on {hardware.get('accelerator', hardware['processor'])}"


def read_text(path: Path) -> str:
    """Return a file's text; ValueError if it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}): this compressor is for text"
        ) from error


def main(argv: list[str] | None = None) -> None:
    """Run the command; a user error is one line and exit code 2."""
    arguments = _parser().parse_args(argv)
    with user_errors("compressor"):
        require_file(arguments.model, "run `dvc repro pack` first, or name another")
        require_file(arguments.tokenizer, "run `dvc repro tokenize` first, or name another with --tokenizer")
        require_file(arguments.input, "name another")
        params = config.load(arguments.params, Params, arguments.set)
        with distributed(reproducible(params.parallel)) as world:
            compressor = TextCompressor(arguments.model, arguments.tokenizer, world, Logger())
            if arguments.verb == "compress":
                output = _compress_file(compressor, arguments, params)
            else:
                output = _decompress_file(compressor, arguments)
            arguments.output.write_bytes(output)


def _compress_file(compressor: TextCompressor, arguments: argparse.Namespace, params: Params) -> bytes:
    text = read_text(arguments.input)
    streams = split_text(text, arguments.parallel, MIN_STREAM_CHARACTERS)
    window = params.sliding_eval.window
    stride = params.sliding_eval.stride
    compressed = compressor.compress(streams, window, stride, arguments.parallel)
    size = len(text.encode("utf-8"))
    rate = f", {8 * len(compressed) / size:.3f} bits a byte" if size else ""
    compressor.logger.log(
        f"compressor: {size:,} bytes of text in {len(streams)} streams to {len(compressed):,}{rate}"
    )
    return compressed


def _decompress_file(compressor: TextCompressor, arguments: argparse.Namespace) -> bytes:
    compressed = arguments.input.read_bytes()
    with errors_name(arguments.input):
        text = "".join(compressor.decompress(compressed)).encode("utf-8")
    compressor.logger.log(f"compressor: {len(compressed):,} bytes to {len(text):,} of text")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compressor",
        description="Compress UTF-8 text with a packed model, or decompress it."
        " Decompression needs the same model, tokenizer, device and versions of the packages,"
        " and on a GPU the same hardware; window and stride are read from the compressed file.",
    )

    # Files.
    parser.add_argument("verb", choices=("compress", "decompress"))
    parser.add_argument("model", type=Path, metavar="MODEL", help="model.bin")
    parser.add_argument("input", type=Path, metavar="IN", help="file to read")
    parser.add_argument("output", type=Path, metavar="OUT", help="file to write")
    add_path_option(parser, "--tokenizer", "artifacts/tokenize/tokenizer.model", "tokenizer of the model")

    # Speed.
    parser.add_argument(
        "--parallel",
        type=int,
        choices=range(1, MAX_PARALLEL + 1),
        default=64,
        metavar="N",
        help="streams that are compressed in parallel: more are faster, and take more memory"
        " (default: %(default)s)",
    )

    # Parameters of the run.
    parser.add_argument(
        "--params",
        type=Path,
        default=Path("params.yaml"),
        metavar="FILE",
        help="parameter file: device, window and stride (default: %(default)s)",
    )

    # Changes to single parameters, instead of another file.
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="override one parameter; may be given again",
    )
    return parser


def _hash_texts(texts: Sequence[bytes]) -> bytes:
    return hashlib.sha256(b"".join(texts)).digest()[:HASH_BYTES]


def _varint(number: int) -> bytes:
    """Encode a number in groups of seven bits, the lowest first; the high bit marks that more follow."""
    groups = bytearray()
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])


def _read_varint(blob: bytes, position: int) -> tuple[int, int]:
    """Decode a number of `_varint`; return it and the position after it."""
    value = 0
    shift = 0
    while position < len(blob) and shift <= MAX_LENGTH_SHIFT:
        group = blob[position]
        value |= (group & 127) << shift
        position += 1
        shift += 7
        if group < 128:
            return value, position
    raise ValueError("damaged file: it ends within its header")
