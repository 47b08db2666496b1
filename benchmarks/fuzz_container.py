"""Coverage-guided fuzzing of everything that reads a model.bin: `pip install atheris`, then

    python -m benchmarks.fuzz_container --seconds 300 --results FILE

An input is a header, as JSON, and streams; the frame around them gets its right checksum, or no input would come past it, and the header is
compressed here, so that its text is what mutates. Anything but a ValueError, or weights of the declared shapes, ends the run, as do more
memory than --megabytes and an input that takes longer than --input-seconds. Results say how many inputs were run and what they covered.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from stages.common import environment
from stages.pack.artifact import unpack
from stages.pack.entropy import codecs
from stages.pack.entropy.codecs import Layout
from stages.pack.file import container, tensors
from stages.pack.file.container import Contents, Entry, Form, Stream

SEPARATOR = b"\0streams\0"


def framed(data: bytes) -> bytes:
    """A file of the input's header and streams, with lengths and checksum that are right."""
    header, _, streams = data.partition(SEPARATOR)
    packed = codecs.deflate(header, 1)
    covered = len(packed).to_bytes(4, "little") + packed + streams
    return (
        container.MAGIC + container.VERSION.to_bytes(4, "little") + hashlib.sha256(covered).digest() + covered
    )


def one_input(data: bytes) -> None:
    """Read it as a container, tensor by tensor, and as a model."""
    blob = framed(data)
    try:
        contents = container.read(blob)
        for entry in contents.entries:
            raw = container.decode_streams(entry)
            sizes = [layout.raw_bytes for layout in container.layouts(entry.form, entry.shape)]
            assert [len(stream) for stream in raw] == sizes
            assert tensors.decode(entry).shape == entry.shape
        unpack(blob)
    except ValueError:
        return


def seeds() -> list[bytes]:
    """One file of every form and codec, taken apart as `framed` puts it together."""

    def stream(raw: bytes, layout: Layout, by: str) -> Stream:
        return Stream(by, codecs.encode(by, raw, layout, 5))

    rows = (
        stream(bytes(range(12)), Layout(1, 3, 4), "adaptive"),
        stream(bytes(6), Layout(2, 1, 3, kind="series"), "series"),
    )
    levels = np.array([[0, 2, -4], [6, 0, 0]], "<i2").tobytes()
    step = stream(b"\0\0\x80?", Layout(4, 1, 1), "plain")
    exponents = [stream(bytes(size), Layout(1, 1, size, kind="series"), "series") for size in (2, 3)]
    correction = (
        stream(b"\1\2\3\4\5\6\7", Layout(1, 1, 7), "adaptive"),
        stream(b"\0\0\x80?", Layout(4, 1, 1), "brotli"),
    )
    groups = stream(b"\1", Layout(1, 1, 1), "brotli")
    entries = (
        Entry("a.weight", (3, 4), Form("rows", 6), rows),
        Entry(
            "b.weight",
            (2, 3),
            Form("lattice", 1),
            (stream(levels, Layout(2, 2, 3), "adaptive"), step, *exponents),
        ),
        Entry("c.weight", (3, 4), Form("groups", 6, 1), (*rows, groups, *correction)),
        Entry("gain", (2,), Form("float16", 16), (stream(b"\0<\0<", Layout(2, 1, 2), "brotli"),)),
    )
    made = []
    for chosen in [entries, *([entry] for entry in entries), ()]:
        blob = container.write(Contents({"layers": 1, "rope_base": 10000.0}, tuple(chosen)))
        end = 48 + int.from_bytes(blob[44:48], "little")
        made.append(codecs.inflate(blob[48:end], container.MAX_HEADER_BYTES) + SEPARATOR + blob[end:])
    return made


def fuzz(arguments: list[str]) -> None:
    """The process that is fuzzed; libFuzzer's options follow --inside."""
    import atheris  # only here: it is no dependency

    for module in (
        "stages.pack.file.container",
        "stages.pack.entropy.codecs",
        "stages.pack.file.tensors",
        "stages.pack.file.load",
        "stages.pack.artifact",
        "stages.pack.quantise.trellis_quantiser",
        "stages.pack.entropy.delta_coder",
        "stages.pack.low_rank",
    ):
        for value in vars(sys.modules[module]).values():
            if callable(value) and getattr(value, "__module__", "") == module and hasattr(value, "__code__"):
                value.__code__ = atheris.instrument_func(value).__code__
    for data in seeds():
        one_input(data)  # compiles what is compiled, before the clock of an input runs
    torch.set_num_threads(1)
    atheris.Setup([sys.argv[0], *arguments], one_input)
    atheris.Fuzz()


def main() -> None:
    if "--inside" in sys.argv:
        fuzz(sys.argv[sys.argv.index("--inside") + 1 :])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--megabytes", type=int, default=4096)
    parser.add_argument("--input-seconds", type=int, default=30)
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(seeds()):
            (Path(folder) / f"seed{number}").write_bytes(data)
        limits = [
            f"-max_total_time={arguments.seconds}",
            f"-rss_limit_mb={arguments.megabytes}",
            f"-timeout={arguments.input_seconds}",
        ]
        words = [
            sys.executable,
            "-m",
            "benchmarks.fuzz_container",
            "--inside",
            *limits,
            "-max_len=4096",
            "-print_final_stats=1",
            folder,
        ]
        started = time.monotonic()
        ended = subprocess.run(words, capture_output=True, text=True)
        log = ended.stderr
        inputs = len(list(Path(folder).iterdir()))
    found = {name: int(value) for name, value in re.findall(r"^stat::(\w+):\s*(\d+)", log, re.MULTILINE)}
    covered = [int(value) for value in re.findall(r"\bcov: (\d+)", log)]
    result = {
        "defects": 0 if ended.returncode == 0 else 1,
        "seconds": time.monotonic() - started,
        "inputs_run": found.get("number_of_executed_units"),
        "peak_megabytes": found.get("peak_rss_mb"),
        "corpus": inputs,
        "edges_at_first_and_last": [covered[0], covered[-1]] if covered else None,
    } | environment.facts(torch.device("cpu"))
    arguments.results.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    print(json.dumps(result))
    if ended.returncode:
        sys.stderr.write(log[-4000:])
        sys.exit(1)


if __name__ == "__main__":
    main()
