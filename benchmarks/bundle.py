"""The counted code by other wrappers: what python-minifier (PyPI), base85 and LZMA would make of the same modules.

    pip install --target DIR python-minifier
    PYTHONPATH=DIR python -m benchmarks.bundle --results FILE

All carry the same modules and parameters. `text` says what is compressed: the sources as they are, stripped as stages/bundle does it, or
minified with names kept or shortened within functions; names that another module imports stay in any case. `wrapped` says how the
compressed bytes become a file: raw in a Latin-1 literal as in train_gpt.py, or as base85, which the records use, as LZMA is;
LZMA is in its best setting for this text (lc=3, pb=0); brotli has a dictionary.
"""

import argparse
import base64
import functools
import importlib
import importlib.metadata
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brotli
import torch

from stages.bundle import closure, importer_template
from stages.bundle.__main__ import embedded
from stages.bundle.params import Params
from stages.common import config, environment

ROOT = Path(__file__).resolve().parent.parent
LZMA_FILTERS = [
    {
        "id": lzma.FILTER_LZMA1,
        "preset": 9 | lzma.PRESET_EXTREME,
        "lc": 3,
        "lp": 0,
        "pb": 0,
        "nice_len": 273,
        "depth": 1000,
    }
]
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "brotli": functools.partial(
        brotli.compress, mode=brotli.MODE_TEXT, quality=11, lgwin=importer_template.LARGEST_WINDOW
    ),
    "lzma": functools.partial(lzma.compress, format=lzma.FORMAT_RAW, filters=LZMA_FILTERS),
}
WRAPPERS: dict[str, Callable[[bytes], bytes]] = {
    "latin-1 literal": importer_template.wrap,
    "base85": lambda packed: importer_template.wrap(base64.b85encode(packed)),
}


def texts() -> dict[str, dict[str, str]]:
    """The modules' texts by path, in each way of making them small."""
    plain = {
        path.as_posix(): closure.read(ROOT / path)
        for path in sorted(closure.closure(ROOT, importer_template.ENTRY))
    }
    return {
        "as it is": plain,
        "stripped": importer_template.sources(ROOT),
        "python-minifier, names kept": {path: minified(text, rename=False) for path, text in plain.items()},
        "python-minifier, local names shortened": {
            path: minified(text, rename=True) for path, text in plain.items()
        },
    }


def minified(source: str, rename: bool) -> str:
    """By python-minifier; annotations in classes stay, which the dataclasses need, and names outside of functions."""
    try:
        library = importlib.import_module("python_minifier")
    except ImportError:
        sys.exit(
            "error: python-minifier is not installed; `pip install --target DIR python-minifier`, then run this with PYTHONPATH=DIR"
        )
    options = library.RemoveAnnotationsOptions(remove_class_attribute_annotations=False)
    text: str = library.minify(
        source,
        remove_literal_statements=True,
        remove_annotations=options,
        rename_locals=rename,
        rename_globals=False,
    )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()
    parameters = embedded(config.load(ROOT / "params.yaml", Params, []))
    rows: list[dict[str, Any]] = []
    for text, carried in texts().items():
        plain = importer_template.plain(carried, parameters)
        for compressor, compress in COMPRESSORS.items():
            packed = compress(plain)
            sizes = {wrapper: len(wrap(packed)) for wrapper, wrap in WRAPPERS.items()}
            rows.append(
                {
                    "text": text,
                    "characters": len(plain),
                    "compressor": compressor,
                    "packed": len(packed),
                    "wrapped": sizes,
                }
            )
            print(f"{text:<40} {compressor:<8} {len(plain):>8,} {len(packed):>8,} {sizes}", flush=True)
    result: dict[str, Any] = {
        "rows": rows,
        "train_gpt.py": len(importer_template.render(importer_template.sources(ROOT), parameters, 11)),
    } | environment.facts(torch.device("cpu"))
    result["versions"]["python-minifier"] = importlib.metadata.version("python-minifier")
    arguments.results.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
