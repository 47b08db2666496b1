"""The text of `train_gpt.py`: a payload of stripped modules and parameters, and the importer that gives each its own name.

The file is a function of the sources and the parameters alone. People read, hash and count it, so it has a readable shape: what it is, the
payload in lines, the importer, and the call. `get_source` is not decoration: Triton compiles from `inspect.getsource`, and tracebacks
and torch.compile read lines through linecache, which asks the loader.
"""

import base64
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import brotli

from stages.bundle import closure
from stages.bundle.strip import strip

ENTRY = "stages.bundle.entry"  # its main(parameters) is what the bundle does
LARGEST_WINDOW = 24  # log2 of bytes: brotli's largest without the large-window extension
LINE = 120  # characters of payload in a line

TEMPLATE = '''\
"""Trains a language model under a byte budget, and scores it; the code that is counted is this file.

    python train_gpt.py        trains, calibrates and packs: data/train/*.bin to model.bin
    python train_gpt.py eval   scores data/val/*.bin with model.bin and data/tokenizer.model

Both take --help and run under torchrun; the seed is the environment variable SEED. The modules of Caddie's `stages` package are
carried without comments and docstrings: `import train_gpt; print(train_gpt.SOURCES["stages/bundle/entry.py"])` shows one.
"""

import base64
import importlib.abc
import importlib.util
import json
import sys

import brotli

PAYLOAD = """
{payload}
"""
SOURCES, PARAMETERS = json.loads(brotli.decompress(base64.b85decode("".join(PAYLOAD.split()))))


class Carried(importlib.abc.MetaPathFinder, importlib.abc.ExecutionLoader):
    """Finds and loads the carried modules; inspect, linecache and Triton ask it for their source."""

    def path(self, name):
        stem = name.replace(".", "/")
        return next((path for path in (stem + "/__init__.py", stem + ".py") if path in SOURCES), None)

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if self.path(name) else None

    def is_package(self, name):
        return self.path(name).endswith("/__init__.py")

    def get_filename(self, name):
        return __file__ + "/" + self.path(name)

    def get_source(self, name):
        return SOURCES[self.path(name)]


sys.meta_path.insert(0, Carried())

if __name__ == "__main__":
    importlib.import_module("{entry}").main(PARAMETERS)
'''


def sources(root: Path) -> dict[str, str]:
    """The stripped text of every file that ENTRY needs, by its path relative to `root`.

    An empty one becomes an empty line: inspect takes an empty text for a missing one.
    """
    return {path.as_posix(): strip(closure.read(root / path)) or "\n" for path in sorted(closure.closure(root, ENTRY))}


def render(carried: Mapping[str, str], parameters: Mapping[str, Any], quality: int) -> str:
    """The bundle of these modules and parameters; the same arguments give the same text."""
    plain = json.dumps([carried, parameters], sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    packed = brotli.compress(plain, mode=brotli.MODE_TEXT, quality=quality, lgwin=LARGEST_WINDOW)
    payload = base64.b85encode(packed).decode("ascii")
    return TEMPLATE.format(payload="\n".join(textwrap.wrap(payload, LINE, break_on_hyphens=False)), entry=ENTRY)
