"""The bytes of `train_gpt.py`: a payload of stripped modules and parameters, and the importer that gives each its own name.

The file is a function of the sources and the parameters alone. People read, hash and count it, so all but the payload is readable: what it
is, the importer, and the call. `get_source` is not decoration: Triton compiles from `inspect.getsource`, and tracebacks and torch.compile
read lines through linecache, which asks the loader. The payload is binary in a Latin-1 source; who reads the file as text must read it as
Python does, by its first line.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import brotli

from stages.bundle import closure, latin1_literal
from stages.bundle.strip import strip

ENTRY = "stages.bundle.program.entry"  # its main(parameters) is what the bundle does
LARGEST_WINDOW = 24  # log2 of bytes: brotli's largest without the large-window extension
ENCODING = "latin-1"
SEPARATOR = "\0"  # which no Python source may hold

TEMPLATE = '''\
# coding: latin-1
"""Trains a language model under a byte budget, and scores it; the code that is counted is this file.

    python train_gpt.py        trains, calibrates and packs: data/train/*.bin to model.bin
    python train_gpt.py eval   scores data/val/*.bin with model.bin and data/tokenizer.model

Both take --help and run under torchrun; the seed is the environment variable SEED. The modules of Caddie's `stages` package are
carried without comments, docstrings and annotations: `import train_gpt; print(train_gpt.SOURCES["stages/bundle/program/entry.py"])`
shows one.
"""

import importlib.abc
import importlib.util
import json
import sys

import brotli

PAYLOAD = {payload}
PARAMETERS, *CARRIED = brotli.decompress(PAYLOAD.encode("latin-1")).decode().split("\\0")
SOURCES = dict(zip(CARRIED[::2], CARRIED[1::2]))


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
    importlib.import_module("{entry}").main(json.loads(PARAMETERS))
'''


def sources(root: Path) -> dict[str, str]:
    """The stripped text of every file that ENTRY needs, by its path relative to `root`.

    An empty one becomes an empty line: inspect takes an empty text for a missing one.
    """
    return {
        path.as_posix(): strip(closure.read(root / path)) or "\n"
        for path in sorted(closure.closure(root, ENTRY))
    }


def render(carried: Mapping[str, str], parameters: Mapping[str, Any], quality: int) -> bytes:
    """The bundle of these modules and parameters; the same arguments give the same bytes."""
    packed = brotli.compress(
        plain(carried, parameters), mode=brotli.MODE_TEXT, quality=quality, lgwin=LARGEST_WINDOW
    )
    return wrap(packed)


def wrap(packed: bytes) -> bytes:
    """The file around a payload."""
    return TEMPLATE.format(payload=latin1_literal.quote(packed), entry=ENTRY).encode(ENCODING)


def plain(carried: Mapping[str, str], parameters: Mapping[str, Any]) -> bytes:
    """What is compressed: the parameters as JSON, then the path and the text of each module; JSON around the texts would cost 0.8 %."""
    written = json.dumps(parameters, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    parts = [written, *(part for path in sorted(carried) for part in (path, carried[path]))]
    assert not any(SEPARATOR in part for part in parts)
    return SEPARATOR.join(parts).encode("utf-8")
