"""Bytes of the counted code by other strippers, compressors and wrappers, from the same modules.

    pip install --target DIR python-minifier
    PYTHONPATH=DIR python -m benchmarks.bundle --results FILE

All files carry the same modules and parameters. Three things vary:

- the text: sources as they are, stripped as stages/bundle does it, or minified by python-minifier, with
  local names kept or shortened (names that another module imports are always kept);
- the compressor: brotli, which has a dictionary, or LZMA in its best setting for this text (lc=3, pb=0);
- the wrapper: raw bytes in a Latin-1 literal, as in train_gpt.py, or base85, which the records use.
"""

import base64
import functools
import importlib
import importlib.metadata
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brotli
import torch

from benchmarks._command import command_line, write_results
from stages.bundle import closure, importer_template
from stages.bundle.params import Params
from stages.bundle.stage import embedded_parameters
from stages.common import config, environment

ROOT = Path(__file__).resolve().parent.parent
LZMA_SETTINGS = {"lc": 3, "lp": 0, "pb": 0, "nice_len": 273, "depth": 1000}
LZMA_FILTERS = [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME} | LZMA_SETTINGS]
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "brotli": functools.partial(
        brotli.compress, mode=brotli.MODE_TEXT, quality=11, lgwin=importer_template.LARGEST_WINDOW
    ),
    "lzma": functools.partial(lzma.compress, format=lzma.FORMAT_RAW, filters=LZMA_FILTERS),
}
WRAPPERS: dict[str, Callable[[bytes], bytes]] = {
    "latin-1 literal": importer_template.wrap_payload,
    "base85": lambda packed: importer_template.wrap_payload(base64.b85encode(packed)),
}


def texts() -> dict[str, dict[str, str]]:
    """The modules' texts by path, for each way to make them small."""
    paths = sorted(closure.import_closure(ROOT, importer_template.ENTRY))
    plain = {path.as_posix(): closure.read_source(ROOT / path) for path in paths}
    kept = {path: minified(text, rename=False) for path, text in plain.items()}
    shortened = {path: minified(text, rename=True) for path, text in plain.items()}
    return {
        "as it is": plain,
        "stripped": importer_template.collect_sources(ROOT),
        "python-minifier, names kept": kept,
        "python-minifier, local names shortened": shortened,
    }


def minified(source: str, rename: bool) -> str:
    """A module by python-minifier, without the annotations that no dataclass needs."""
    try:
        library = importlib.import_module("python_minifier")
    except ImportError:
        install = "`pip install --target DIR python-minifier`, then run this with PYTHONPATH=DIR"
        sys.exit(f"error: python-minifier is not installed; {install}")
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
    """Print one line for each text and compressor, and write the JSON file."""
    parser = command_line(__doc__)
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()

    parameters = embedded_parameters(config.load(ROOT / "params.yaml", Params, []))
    rows: list[dict[str, Any]] = []
    for text, carried in texts().items():
        plain = importer_template.serialise(carried, parameters)
        for compressor, compress in COMPRESSORS.items():
            packed = compress(plain)
            sizes = {wrapper: len(wrap(packed)) for wrapper, wrap in WRAPPERS.items()}
            row = {"text": text, "characters": len(plain), "compressor": compressor}
            rows.append(row | {"packed": len(packed), "wrapped": sizes})
            print(f"{text:<40} {compressor:<8} {len(plain):>8,} {len(packed):>8,} {sizes}", flush=True)

    # The size of the file that is shipped, for comparison.
    shipped = importer_template.render_bundle(importer_template.collect_sources(ROOT), parameters, 11)
    result: dict[str, Any] = {"rows": rows, "train_gpt.py": len(shipped)}
    result |= environment.run_environment(torch.device("cpu"))
    result["versions"]["python-minifier"] = importlib.metadata.version("python-minifier")
    write_results(arguments.results, result)


if __name__ == "__main__":
    main()
