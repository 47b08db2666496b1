"""Coverage-guided fuzzing of everything that reads a model.bin: `pip install atheris`, then

    python -m benchmarks.fuzz_container --seconds 300 --results FILE

An input is a header, as JSON, and streams. The frame with its checksum is put around them here, because
otherwise hardly an input would pass the checksum; and the header is compressed here, so that its text is
what mutates. The run ends with a defect if the reader raises anything but a ValueError, if it returns
weights of other shapes than declared, if it needs more memory than --megabytes, or if one input takes
longer than --input-seconds. The results have the number of inputs and the edges that they covered.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import numpy as np
import torch

from benchmarks._command import command_line, write_results
from stages.common import environment
from stages.pack.artifact import unpack
from stages.pack.entropy import codecs
from stages.pack.entropy.codecs import StreamLayout
from stages.pack.file import container
from stages.pack.file.container import Contents, EncodedStream, EncodedTensor
from stages.pack.forms import CorrectedForm, Float16Form, GroupsForm, RowsForm, TrellisForm

SEPARATOR = b"\0streams\0"  # between the header and the streams of an input
# The modules whose coverage guides the fuzzer.
INSTRUMENTED = (
    "stages.pack.file.container",
    "stages.pack.entropy.codecs",
    "stages.pack.forms",
    "stages.pack.file.load",
    "stages.pack.artifact",
    "stages.pack.exponents",
    "stages.pack.entropy.delta_coder",
    "stages.pack.low_rank",
)


def framed(data: bytes) -> bytes:
    """The file with an input's header and streams, its lengths and checksum right."""
    header, _, streams = data.partition(SEPARATOR)
    packed = codecs.brotli_compress(header, 1)
    covered = len(packed).to_bytes(4, "little") + packed + streams
    checksum = hashlib.sha256(covered).digest()
    return container.MAGIC + container.VERSION.to_bytes(4, "little") + checksum + covered


def one_input(data: bytes) -> None:
    """Read an input as a container, tensor by tensor, and as a model."""
    blob = framed(data)
    try:
        contents = container.parse(blob)
        for entry in contents.tensors:
            raw = container.decode_streams(entry)
            sizes = [layout.raw_bytes for layout in entry.form.layouts(entry.shape)]
            assert [len(stream) for stream in raw] == sizes
            assert container.decode(entry).shape == entry.shape
        unpack(blob)
    except ValueError:
        return


def seeds() -> list[bytes]:
    """Inputs to begin with: a file of every form and codec, and files of each tensor alone."""
    entries = _entries()
    made = []
    for chosen in [entries, *([entry] for entry in entries), ()]:
        blob = container.serialise(Contents({"layers": 1, "rope_base": 10000.0}, tuple(chosen)))
        end = 48 + int.from_bytes(blob[44:48], "little")
        header = codecs.brotli_decompress(blob[48:end], container.MAX_HEADER_BYTES)
        made.append(header + SEPARATOR + blob[end:])
    return made


def _entries() -> tuple[EncodedTensor, ...]:
    """A small tensor of each form; together they use all codecs."""

    def stream(raw: bytes, layout: StreamLayout, by: str) -> EncodedStream:
        return EncodedStream(by, codecs.encode(by, raw, layout, 5))

    # Fixed widths: integers and the rows' steps.
    rows = (
        stream(bytes(range(12)), StreamLayout(1, 3, 4), "adaptive"),
        stream(bytes(6), StreamLayout(2, 1, 3, kind="series"), "series"),
    )
    groups = stream(b"\1", StreamLayout(1, 1, 1), "brotli")
    correction = (
        stream(b"\1\2\3\4\5\6\7", StreamLayout(1, 1, 7), "adaptive"),
        stream(b"\0\0\x80?", StreamLayout(4, 1, 1), "brotli"),
    )

    # Trellis: levels, the step, and the exponents of rows and columns.
    levels = np.array([[0, 2, -4], [6, 0, 0]], "<i2").tobytes()
    trellis = (
        stream(levels, StreamLayout(2, 2, 3), "adaptive"),
        stream(b"\0\0\x80?", StreamLayout(4, 1, 1), "plain"),
        stream(bytes(2), StreamLayout(1, 1, 2, kind="series"), "series"),
        stream(bytes(3), StreamLayout(1, 1, 3, kind="series"), "series"),
    )

    gain = stream(b"\0<\0<", StreamLayout(2, 1, 2), "brotli")
    return (
        EncodedTensor("a.weight", (3, 4), RowsForm(6), rows),
        EncodedTensor("b.weight", (2, 3), TrellisForm(1), trellis),
        EncodedTensor("c.weight", (3, 4), CorrectedForm(GroupsForm(6), 1), (*rows, groups, *correction)),
        EncodedTensor("gain", (2,), Float16Form(), (gain,)),
    )


def functions_of(module: str) -> Iterator[FunctionType]:
    """The functions of a module, and those of its classes; compiled functions are left out."""
    for value in vars(sys.modules[module]).values():
        if getattr(value, "__module__", "") == module:
            members = vars(value).values() if isinstance(value, type) else [value]
            for member in members:
                # A property is the function that it calls.
                function = member.fget if isinstance(member, property) else member
                if isinstance(function, FunctionType) and function.__module__ == module:
                    yield function


def fuzz(arguments: list[str]) -> None:
    """Fuzz in this process; `arguments` are libFuzzer's options, which follow --inside."""
    import atheris  # only here: it is not a dependency

    for module in INSTRUMENTED:
        for function in functions_of(module):
            function.__code__ = atheris.instrument_func(function).__code__

    for data in seeds():
        one_input(data)  # compiles the compiled functions, before the clock of an input runs
    torch.set_num_threads(1)
    atheris.Setup([sys.argv[0], *arguments], one_input)
    atheris.Fuzz()


def main() -> None:
    """Run the fuzzer in a process of its own, read its statistics, and write the JSON file."""
    if "--inside" in sys.argv:
        fuzz(sys.argv[sys.argv.index("--inside") + 1 :])
        return

    parser = command_line(__doc__)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--megabytes", type=int, default=4096)
    parser.add_argument("--input-seconds", type=int, default=30)
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()

    command = [sys.executable, "-m", "benchmarks.fuzz_container", "--inside"]
    command += [f"-max_total_time={arguments.seconds}", f"-rss_limit_mb={arguments.megabytes}"]
    command += [f"-timeout={arguments.input_seconds}", "-max_len=4096", "-print_final_stats=1"]
    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(seeds()):
            (Path(folder) / f"seed{number}").write_bytes(data)
        started = time.monotonic()
        ended = subprocess.run([*command, folder], capture_output=True, text=True)
        seconds = time.monotonic() - started
        corpus = len(list(Path(folder).iterdir()))

    # libFuzzer prints its statistics on stderr.
    log = ended.stderr
    found = {name: int(value) for name, value in re.findall(r"^stat::(\w+):\s*(\d+)", log, re.MULTILINE)}
    covered = [int(value) for value in re.findall(r"\bcov: (\d+)", log)]

    result = {
        "defects": 0 if ended.returncode == 0 else 1,
        "seconds": seconds,
        "inputs_run": found.get("number_of_executed_units"),
        "peak_megabytes": found.get("peak_rss_mb"),
        "corpus": corpus,
        "edges_at_first_and_last": [covered[0], covered[-1]] if covered else None,
    } | environment.run_environment(torch.device("cpu"))
    write_results(arguments.results, result)

    print(json.dumps(result))
    if ended.returncode:
        sys.stderr.write(log[-4000:])
        sys.exit(1)


if __name__ == "__main__":
    main()
