"""The model as a text compressor, compared with programs: a file's first documents, coded and restored.

    pip install --target DIR pyppmd
    PYTHONPATH=DIR python -m benchmarks.compressor --text FILE --model FILE --tokenizer FILE \\
        [--preset NAME] --results FILE

The FILE of --text holds JSON lines with the key `text`; --preset gives window, stride and device. The
model codes every document as a stream of its own; `python -m tools.compressor` restores the text in
another process. The programs get all documents as one file, and windows larger than it. The model has
learnt from other text and the programs have not, so the rate is also given with the bytes of the model.
"""

import argparse
import bz2
import hashlib
import importlib
import importlib.metadata
import itertools
import json
import lzma
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import brotli

from benchmarks._command import command_line, write_results
from benchmarks._preset import preset_file
from stages.common import config, environment
from stages.common.parallel import distributed
from stages.common.progress import Logger
from stages.sliding_eval.params import Params
from tools.compressor.cli import TextCompressor, reproducible

ORDERS = range(2, 9)  # of PPMd's model; the order that gives the smallest file is taken
PPMD_MEMORY = 1 << 28  # bytes


def read_documents(path: Path, count: int) -> list[str]:
    """The first `count` documents of a file of JSON lines."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in itertools.islice(file, count)]


def by_programs(text: bytes) -> dict[str, int]:
    """Bytes of the compressed text, by program."""
    found = {
        "xz -9e": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
        "brotli 11": len(brotli.compress(text, quality=11, lgwin=24)),
        "bzip2 -9": len(bz2.compress(text)),
    }
    try:
        pyppmd = importlib.import_module("pyppmd")
    except ImportError:
        sys.stderr.write("pyppmd is not installed, so PPMd is left out\n")
        return found
    made = {order: pyppmd.compress(text, max_order=order, mem_size=PPMD_MEMORY) for order in ORDERS}
    order = min(made, key=lambda of: len(made[of]))
    assert pyppmd.decompress(made[order], max_order=order, mem_size=PPMD_MEMORY) == text
    return found | {f"PPMd var.H, order {order}": len(made[order])}


def by_model(texts: list[str], params: Params, arguments: argparse.Namespace) -> dict[str, Any]:
    """Size and seconds of the model's file, which another process restores to the same text."""
    window = params.sliding_eval.window
    stride = params.sliding_eval.stride
    with tempfile.TemporaryDirectory() as name, distributed(reproducible(params.parallel)) as world:
        packed = Path(name) / "packed"
        restored = Path(name) / "restored"

        # Compress in this process.
        codec = TextCompressor(arguments.model, arguments.tokenizer, world, Logger())
        tokens = sum(len(codec.tokenizer.encode(text)) for text in texts)
        started = time.monotonic()
        packed.write_bytes(codec.compress(texts, window, stride, arguments.parallel))
        compressed = time.monotonic()

        # Decompress in another.
        command = [sys.executable, "-m", "tools.compressor", "decompress", arguments.model, packed, restored]
        subprocess.run([*map(str, command), "--tokenizer", str(arguments.tokenizer)], check=True)
        ended = time.monotonic()
        assert restored.read_bytes() == "".join(texts).encode("utf-8"), "the restored text is another"

        return {
            "bytes": packed.stat().st_size,
            "tokens": tokens,
            "streams": len(texts),
            "streams_at_once": arguments.parallel,
            "window": window,
            "stride": stride,
            "restored_by_another_process": True,
            "compress_seconds": compressed - started,
            "decompress_seconds": ended - compressed,
        } | environment.run_environment(world.device)


def main() -> None:
    """Print one line for each compressor, and write the JSON file."""
    parser = command_line(__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=100, help="number of them (default: %(default)s)")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--preset", default="smoke")
    parser.add_argument(
        "--parallel", type=int, default=128, help="documents in a batch (default: %(default)s)"
    )
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()

    texts = read_documents(arguments.text, arguments.documents)
    text = "".join(texts).encode("utf-8")
    with preset_file(arguments.preset) as file:
        model = by_model(texts, config.load(file, Params, []), arguments)
    model["model_bytes"] = arguments.model.stat().st_size
    model["tokenizer_bytes"] = arguments.tokenizer.stat().st_size

    sizes = {"model": model["bytes"]} | by_programs(text)
    with_model = model["bytes"] + model["model_bytes"] + model["tokenizer_bytes"]
    sha256 = hashlib.sha256(text).hexdigest()

    result = {
        "text": {"bytes": len(text), "documents": len(texts), "sha256": sha256},
        "model": model,
        "bits_a_byte": {name: 8 * size / len(text) for name, size in sizes.items()},
        "bits_a_byte_with_model_and_tokenizer": 8 * with_model / len(text),
        "bytes": sizes,
    }
    write_results(arguments.results, result)
    for name, size in sorted(sizes.items(), key=lambda item: item[1]):
        print(f"{name:<24} {size:>9,} bytes {8 * size / len(text):7.4f} bits a byte")


if __name__ == "__main__":
    main()
