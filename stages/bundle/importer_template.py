"""Render `train_gpt.py`: a compressed payload of stripped modules and parameters, and an importer for it.

The file is a function of the sources and the parameters alone. People read, hash and count it, so
everything but the payload is readable: what the file is, the importer, and the call. The payload is
binary in a Latin-1 source: a program that reads the file as text must honour the encoding in its
first line, as Python does.

`get_source` in the importer is needed: Triton compiles from `inspect.getsource`, and tracebacks and
torch.compile read lines through linecache, which calls it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import brotli

from stages.bundle import closure, latin1_literal
from stages.bundle.shorten_locals import shorten_locals
from stages.bundle.strip import strip

ENTRY = "stages.bundle.program.entry"  # the module whose main(parameters) the bundle calls
LARGEST_WINDOW = 24  # log2 of bytes: brotli's largest window without the large-window extension
ENCODING = "latin-1"
SEPARATOR = "\0"  # between the parts of the payload; no Python source may contain it

TEMPLATE = '''\
# coding: latin-1
"""Trains a language model under a byte budget, and scores it; this file is the code that is counted.

    python train_gpt.py        trains, calibrates and packs: data/train/*.bin to model.bin
    python train_gpt.py eval   scores data/val/*.bin with model.bin and data/tokenizer.model

Both accept --help and run under torchrun; the environment variable SEED is the seed. The modules of
Caddie's `stages` package are in the payload, without comments, docstrings and annotations, and with
short names of local variables. To print one:
`import train_gpt; print(train_gpt.SOURCES["stages/bundle/program/entry.py"])`.
"""

import importlib.abc
import importlib.util
import json
import sys

import brotli

PAYLOAD = {payload}
PARAMETERS, *MODULES = brotli.decompress(PAYLOAD.encode("latin-1")).decode().split("\\0")
SOURCES = dict(zip(MODULES[::2], MODULES[1::2]))


class SourceImporter(importlib.abc.MetaPathFinder, importlib.abc.ExecutionLoader):
    """Finds and loads the modules in SOURCES; inspect, linecache and Triton get their source from it."""

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


sys.meta_path.insert(0, SourceImporter())

if __name__ == "__main__":
    importlib.import_module("{entry}").main(json.loads(PARAMETERS))
'''


def collect_sources(root: Path) -> dict[str, str]:
    """Return the stripped text of every file that ENTRY needs, by its path relative to `root`."""
    sources = {}
    for path in sorted(closure.import_closure(root, ENTRY)):
        # An empty module becomes an empty line: inspect takes an empty text for a missing one.
        sources[path.as_posix()] = shorten_locals(strip(closure.read_source(root / path))) or "\n"
    return sources


def render_bundle(sources: Mapping[str, str], parameters: Mapping[str, Any], quality: int) -> bytes:
    """Return the bundle of these modules and parameters; equal arguments give equal bytes."""
    payload = brotli.compress(
        serialise(sources, parameters), mode=brotli.MODE_TEXT, quality=quality, lgwin=LARGEST_WINDOW
    )
    return wrap_payload(payload)


def wrap_payload(payload: bytes) -> bytes:
    """Return the whole file with this compressed payload."""
    return TEMPLATE.format(payload=latin1_literal.quote(payload), entry=ENTRY).encode(ENCODING)


def serialise(sources: Mapping[str, str], parameters: Mapping[str, Any]) -> bytes:
    """Return the payload before compression: the parameters as JSON, then path and text of each module.

    The texts are not JSON, since their escapes would make the compressed payload 0.8 % larger.
    """
    parts = [json.dumps(parameters, sort_keys=True, ensure_ascii=False, separators=(",", ":"))]
    for path in sorted(sources):
        parts += [path, sources[path]]
    assert not any(SEPARATOR in part for part in parts)
    return SEPARATOR.join(parts).encode("utf-8")
