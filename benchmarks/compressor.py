"""The model as a text compressor beside programs: the first documents of a file, every one its own stream, there and back.

    pip install --target DIR pyppmd
    PYTHONPATH=DIR python -m benchmarks.compressor --text FILE --model FILE --tokenizer FILE [--preset NAME] --results FILE

FILE of --text holds JSON lines with the key `text`; --preset gives window, stride and device. The file made is decompressed by
`python -m tools.compressor` in a process of its own, and compared with the text. Programs get the same documents as one file, and
windows larger than it. The model has learnt from other text beforehand and they have not: its bytes stand beside the rate.
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

from benchmarks._preset import preset_file
from stages.common import config, environment
from stages.common.parallel import world
from stages.common.progress import Report
from stages.sliding_eval.params import Params
from tools.compressor.cli import Codec, exact

ORDERS = range(2, 9)  # of PPMd; the best is taken, which favours it
PPMD_MEMORY = 1 << 28


def read(path: Path, count: int) -> list[str]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in itertools.islice(file, count)]


def by_programs(text: bytes) -> dict[str, int]:
    """Bytes of the text by each program."""
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
    """The model's file, decompressed by another process, with what it took."""
    window, stride = params.sliding_eval.window, params.sliding_eval.stride
    with tempfile.TemporaryDirectory() as name, world(exact(params.parallel)) as here:
        packed, again = Path(name) / "packed", Path(name) / "again"
        codec = Codec(arguments.model, arguments.tokenizer, here, Report())
        tokens = sum(len(codec.speller.encode(text)) for text in texts)
        started = time.monotonic()
        packed.write_bytes(codec.compress(texts, window, stride, arguments.lanes))
        middle = time.monotonic()
        command = [sys.executable, "-m", "tools.compressor", "decompress", arguments.model, packed, again]
        subprocess.run([*map(str, command), "--tokenizer", str(arguments.tokenizer)], check=True)
        ended = time.monotonic()
        assert again.read_bytes() == "".join(texts).encode("utf-8"), "what came back is not the text"
        return {
            "bytes": packed.stat().st_size,
            "tokens": tokens,
            "streams": len(texts),
            "streams_at_once": arguments.lanes,
            "window": window,
            "stride": stride,
            "restored_by_another_process": True,
            "compress_seconds": middle - started,
            "decompress_seconds": ended - middle,
        } | environment.facts(here.device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument(
        "--documents", type=int, default=100, help="how many, from the first on (default: %(default)s)"
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--preset", default="smoke")
    parser.add_argument(
        "--lanes", type=int, default=128, help="documents side by side (default: %(default)s)"
    )
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()
    texts = read(arguments.text, arguments.documents)
    text = "".join(texts).encode("utf-8")
    with preset_file(arguments.preset) as file:
        model = by_model(texts, config.load(file, Params, []), arguments)
    sizes = {"model": model["bytes"]} | by_programs(text)
    result = {
        "text": {"bytes": len(text), "documents": len(texts), "sha256": hashlib.sha256(text).hexdigest()},
        "model": model
        | {
            "model_bytes": arguments.model.stat().st_size,
            "tokenizer_bytes": arguments.tokenizer.stat().st_size,
        },
        "bits_a_byte": {name: 8 * size / len(text) for name, size in sizes.items()},
        "bytes": sizes,
    }
    with_model = model["bytes"] + arguments.model.stat().st_size + arguments.tokenizer.stat().st_size
    result["bits_a_byte_with_model_and_tokenizer"] = 8 * with_model / len(text)
    arguments.results.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    for name, size in sorted(sizes.items(), key=lambda item: item[1]):
        print(f"{name:<24} {size:>9,} bytes {8 * size / len(text):7.4f} bits a byte")


if __name__ == "__main__":
    main()
